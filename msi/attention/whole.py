"""Passes whose experts compute on the same thread: a layer's halves follow one another, and nothing lies between them.

No slots, waves or messages: a lane's pass is one run of programs, and what it raises is its own. Knows no tensors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import Generic, TypeVar

from msi.device.queues import Queue, QueueDevice

P = TypeVar("P")


class _Lane(Generic[P]):
    __slots__ = ("num_launched", "queue", "through", "waiter")

    def __init__(self, device: QueueDevice[P], index: int) -> None:
        self.queue: Queue[P] = device.queue(f"lane {index}")
        self.through = device.words.take()  # passes
        self.num_launched = 0
        self.waiter: asyncio.Future[None] | None = None


class WholeQueues(Generic[P]):
    """The queues of all lanes on a device.

    Args:
        busy_s: what the device has computed so far.
    """

    def __init__(self, device: QueueDevice[P], num_lanes: int, busy_s: Callable[[], float]) -> None:
        self._words = device.words
        self._busy_s = busy_s
        self._lanes = [_Lane(device, index) for index in range(num_lanes)]
        for lane in self._lanes:
            device.watch(lane.through, partial(self._through, lane))

    async def run(self, lane_index: int, programs: Iterable[P], within_s: float) -> None:
        """A pass, to its end: all of its programs.

        Raises:
            TimeoutError: nothing was computed for so long.
        """
        lane = self._lanes[lane_index]
        for program in programs:
            lane.queue.run(program)
        number = lane.num_launched = lane.num_launched + 1
        lane.queue.signal(lane.through, number)
        seen_s, num_silent = self._busy_s(), 0
        while not self._words.is_there(lane.through, number):
            lane.waiter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(within_s / 2):
                    await lane.waiter
            except TimeoutError:
                now_s = self._busy_s()
                num_silent = num_silent + 1 if now_s == seen_s else 0
                seen_s = now_s
                if num_silent == 2:  # after one this process may have been stopped itself
                    raise TimeoutError(f"nothing was computed for {within_s:g} s") from None

    def close(self) -> None:
        """Gives the words back. No pass is in flight any more."""
        for lane in self._lanes:
            self._words.give_back(lane.through)

    @staticmethod
    def _through(lane: _Lane[P], number: int) -> None:
        if lane.waiter is not None and not lane.waiter.done():
            lane.waiter.set_result(None)
