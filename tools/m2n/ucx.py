"""UCX by its Python binding: tagged messages, whose worker is driven by the rank itself, yielding between its looks."""

from __future__ import annotations

import os
import time
from typing import Any

from ucxx._lib import libucxx as ucx_api
from ucxx._lib.arr import Array
from ucxx.types import Tag

from tools.m2n.fabric import Place, Task, check, stamp


class UcxFabric:
    def __init__(self, place: Place) -> None:
        self._place = place
        context = ucx_api.UCXContext(feature_flags=(ucx_api.Feature.TAG,))
        self._worker = ucx_api.UCXWorker(context)
        place.publish(bytes(ucx_api.UCXAddress.create_from_worker(self._worker)))
        self._endpoints = []
        for peer in place.peers:
            address = ucx_api.UCXAddress.create_from_buffer(place.published(peer))
            self._endpoints.append(ucx_api.UCXEndpoint.create_from_worker_address(self._worker, address, False))
        self._out = bytearray(place.max_bytes)
        self._in = [bytearray(place.max_bytes) for _ in place.peers]
        self._ack = bytearray(1)
        self._acks = [bytearray(1) for _ in place.peers]
        for index in range(len(place.peers)):  # wired up before the first round
            self._wait([self._send(index, self._ack), self._receive(index, self._acks[index])])

    def run(self, task: Task) -> list[float]:
        size, indices = task.size, range(len(self._endpoints))
        out, landed = memoryview(self._out)[:size], [memoryview(one)[:size] for one in self._in]
        answers: Any = landed if task.is_exchange else self._acks
        times: list[float] = []
        for round_number in range(task.rounds):
            if self._place.is_sender:
                started = time.monotonic()
                stamp(out, size, started, round_number, self._place.rank)
                requests = [self._send(index, out) for index in indices]
                requests += [self._receive(index, answers[index]) for index in indices]
                self._wait(requests)
                if task.is_exchange:
                    times.append(time.monotonic() - started)
                    for one in landed:
                        check(one, size, round_number)
                continue
            waiting = {index: self._receive(index, landed[index]) for index in indices}
            sends = []
            while waiting:
                self._look()
                for index in [index for index, request in waiting.items() if request.completed]:
                    del waiting[index]
                    now = time.monotonic()
                    started, _ = check(landed[index], size, round_number)
                    if not task.is_exchange:
                        times.append(now - started)
                        sends.append(self._send(index, self._ack))
            if task.is_exchange:
                stamp(out, size, 0.0, round_number, self._place.rank)
                sends = [self._send(index, out) for index in indices]
            self._wait(sends)
        return times

    def close(self) -> None:
        self._endpoints.clear()

    def _send(self, index: int, buffer: Any) -> Any:
        return self._endpoints[index].tag_send(Array(buffer), tag=Tag(self._place.rank))

    def _receive(self, index: int, buffer: Any) -> Any:
        return self._endpoints[index].tag_recv(Array(buffer), tag=Tag(self._place.peers[index]))

    def _wait(self, requests: list[Any]) -> None:
        while not all(request.completed for request in requests):
            self._look()
        for request in requests:
            request.check_error()

    def _look(self) -> None:
        if not self._worker.progress():
            os.sched_yield()
