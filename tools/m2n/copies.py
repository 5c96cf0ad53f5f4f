"""No system at all: what a sender's copies into its receivers' memory take, with nobody told. A bound for others."""

from __future__ import annotations

import mmap
import time

from tools.m2n.fabric import Place, Task


class CopiesFabric:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._payload = memoryview(bytearray(place.max_bytes))
        self._there = [memoryview(mmap.mmap(-1, place.max_bytes)) for _ in place.peers if place.is_sender]

    def run(self, task: Task) -> list[float]:
        """A sender's, of each copy from when it began the round; of an exchange, all copies there and as many back."""
        times: list[float] = []
        payload = self._payload[: task.size]
        for _ in range(task.rounds if self._place.is_sender else 0):
            started = time.monotonic()
            for there in self._there:
                there[: task.size] = payload
                if not task.is_exchange:
                    times.append(time.monotonic() - started)
            if task.is_exchange:
                for there in self._there:
                    payload[:] = there[: task.size]
                times.append(time.monotonic() - started)
        return times

    def close(self) -> None:
        pass
