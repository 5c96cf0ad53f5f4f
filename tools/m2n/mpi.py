"""MPI: Isend and Irecv, which poll, and yield between their looks where the launcher says so."""

from __future__ import annotations

import time

from mpi4py import MPI

from tools.m2n.fabric import Place, Task, check, stamp

DATA, ANSWER = 1, 2


class MpiFabric:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._world = MPI.COMM_WORLD
        self._out = bytearray(place.max_bytes)
        self._in = [bytearray(place.max_bytes) for _ in place.peers]
        self._world.Barrier()

    def run(self, task: Task) -> list[float]:
        world, peers, size = self._world, self._place.peers, task.size
        out, landed = memoryview(self._out)[:size], [memoryview(one)[:size] for one in self._in]
        answer = size if task.is_exchange else 0
        times: list[float] = []
        for round_number in range(task.rounds):
            if self._place.is_sender:
                started = time.monotonic()
                stamp(out, size, started, round_number, self._place.rank)
                requests = [world.Isend([out, MPI.BYTE], peer, DATA) for peer in peers]
                requests += [
                    world.Irecv([one[:answer], MPI.BYTE], peer, ANSWER) for one, peer in zip(landed, peers, strict=True)
                ]
                MPI.Request.Waitall(requests)
                if task.is_exchange:
                    times.append(time.monotonic() - started)
                    for one in landed:
                        check(one, size, round_number)
                continue
            requests = [world.Irecv([one, MPI.BYTE], peer, DATA) for one, peer in zip(landed, peers, strict=True)]
            answers = []
            for _ in peers:
                index = MPI.Request.Waitany(requests)
                now = time.monotonic()
                started, sender = check(landed[index], size, round_number)
                if not task.is_exchange:
                    times.append(now - started)
                    answers.append(world.Isend([out[:0], MPI.BYTE], sender, ANSWER))
            if task.is_exchange:
                stamp(out, size, 0.0, round_number, self._place.rank)
                answers = [world.Isend([out, MPI.BYTE], peer, ANSWER) for peer in peers]
            MPI.Request.Waitall(answers)
        return times

    def close(self) -> None:
        self._world.Barrier()
