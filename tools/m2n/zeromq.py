"""ZeroMQ: PUSH and PULL, blocking, over loopback or Unix sockets; large payloads are sent without a copy."""

from __future__ import annotations

import time

import zmq

from tools.m2n.fabric import STAMP, Place, Task, check, stamp

ZERO_COPY_BYTES = 65536  # pyzmq's own threshold: below, a copy is cheaper than telling when it may be reused


class ZeromqFabric:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._context = zmq.Context()
        self._here = self._context.socket(zmq.PULL)
        if place.system == "zmq":
            port = self._here.bind_to_random_port("tcp://127.0.0.1")
            place.publish(f"tcp://127.0.0.1:{port}".encode())
        else:
            address = f"ipc://{place.folder}/zmq-{place.rank}"
            self._here.bind(address)
            place.publish(address.encode())
        self._there = {}
        for peer in place.peers:
            self._there[peer] = self._context.socket(zmq.PUSH)
            self._there[peer].connect(place.published(peer).decode())
        for socket in self._there.values():  # connections are made before the first round
            socket.send(b"hello")
        for _ in place.peers:
            self._here.recv()
        self._rounds: list[int] = []  # that each sender is at: one may be a round ahead of another
        self._payload = bytearray(place.max_bytes)

    def run(self, task: Task) -> list[float]:
        times: list[float] = []
        self._rounds = [0] * self._place.num_senders
        for round_number in range(task.rounds):
            if self._place.is_sender:
                self._dispatch(task, round_number, times)
            else:
                self._serve(task, round_number, times)
        return times

    def _dispatch(self, task: Task, round_number: int, times: list[float]) -> None:
        started = time.monotonic()
        self._send(task, started, round_number)
        for _ in self._place.peers:
            frame = self._here.recv(copy=False)
            if task.is_exchange:
                check(frame.buffer, task.size, round_number)
        if task.is_exchange:
            times.append(time.monotonic() - started)

    def _serve(self, task: Task, round_number: int, times: list[float]) -> None:
        for _ in self._place.peers:
            frame = self._here.recv(copy=False)
            now = time.monotonic()
            sender = STAMP.unpack_from(frame.buffer)[2]
            started, _ = check(frame.buffer, task.size, self._rounds[sender])
            self._rounds[sender] += 1
            if not task.is_exchange:
                times.append(now - started)
                self._there[sender].send(b"")
        if task.is_exchange:
            self._send(task, 0.0, round_number)

    def _send(self, task: Task, started: float, round_number: int) -> None:
        payload = memoryview(self._payload)[: task.size]
        stamp(payload, task.size, started, round_number, self._place.rank)
        for socket in self._there.values():
            socket.send(payload, 0, task.size < ZERO_COPY_BYTES)

    def close(self) -> None:
        for socket in (self._here, *self._there.values()):
            socket.close()
        self._context.term()
