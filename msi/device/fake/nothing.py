"""A driver that does nothing, at once: what a device with streams costs the host."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

from msi.device.fake.streams import APART, FakeEvent, FakeGraph, FakeStream, FakeStreams


class NothingDriver(FakeStreams):
    """Implements `msi.device.cuda_driver.Driver`: no gate is waited for, a flag is there as soon as it is launched.

    Attributes:
        calls: counted, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = {"wait": 0, "write": 0, "record": 0, "launch": 0, "replay": 0}

    def enter(self) -> None: ...

    def launch(self, stream: FakeStream, work: Callable[[], object], reads: bool = False) -> None:
        self.calls["launch"] += 1
        work()

    def capture(self, memory: object, work: Callable[[], object]) -> FakeGraph:
        work()
        return []

    def replay(self, graph: FakeGraph) -> None:
        self.calls["replay"] += 1

    def wait(self, stream: FakeStream, address: int, at_least: int) -> None:
        self.calls["wait"] += 1

    def write(self, stream: FakeStream, address: int, value: int) -> None:
        self.calls["write"] += 1
        _at(address).value = value

    def record(self, stream: FakeStream, event: FakeEvent) -> None:
        self.calls["record"] += 1

    def elapsed_s(self, start: FakeEvent, end: FakeEvent) -> float:
        return 0.0


@lru_cache(maxsize=1024)
def _at(address: int) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_address(address - APART)
