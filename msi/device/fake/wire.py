"""What network cards do with a post: read it some time after, write it piece by piece, announce it last."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from msi.device.fake.memory import DeviceMemory
from msi.device.fake.world import FakeWorld


def _always() -> bool:
    return True


@dataclass(slots=True)
class RowsCopy:
    """Rows on their way from one device's memory to another's; written only if `is_wanted` still."""

    source: Tensor
    source_memory: DeviceMemory
    target: Tensor
    target_memory: DeviceMemory
    is_wanted: Callable[[], bool] = _always
    _read: list[Tensor] = field(default_factory=list)

    def read(self) -> None:
        with self.source_memory.opened():
            self._read.append(self.source.clone())

    def write(self) -> None:
        """Its values are seen once the target's memory is flushed."""
        if self.is_wanted():
            self.target_memory.write_unseen(self.target, self._read.pop())


@dataclass(frozen=True, slots=True)
class BytesCopy:
    """A header on its way from host memory to host memory; written only if `is_wanted` still."""

    source: memoryview
    target: memoryview
    is_wanted: Callable[[], bool] = _always

    def move(self) -> None:
        if self.is_wanted():
            self.target[:] = self.source


class Wire:
    """One direction of a pair of queues: posts move in order, and each in moments of its own between which anything
    else may happen.
    """

    def __init__(self, world: FakeWorld) -> None:
        self._world = world
        self._moments: deque[Callable[[], None]] = deque()
        world.join(self)

    def post(self, rows: RowsCopy | None, header: BytesCopy | None, announce: Callable[[], None]) -> None:
        """`announce` is called when all has been written; must not raise."""
        if rows is not None:
            self._moments += (rows.read, rows.write)
        if header is not None:
            self._moments.append(header.move)
        self._moments.append(announce)
        self._world.poke()

    def cut(self) -> None:
        """What is under way gets no further. Idempotent."""
        self._moments.clear()

    def is_ready(self) -> bool:
        return bool(self._moments)

    def step(self) -> None:
        self._moments.popleft()()
