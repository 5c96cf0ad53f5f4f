"""A queue for each lane, kept a few layers ahead of the device: how a pass is launched.

    launch            per layer: wait(gate >= turn - 1), run(its program), signal(packed, turn), run(what goes on while
                      rows are away); behind the last gate: run(head and sampling), signal(sampled, last turn)
    packed, turn      the rows lie in the outboxes, their numbers in `counts`: the link posts, a layer more is launched
    open(lane, turn)  the answers to a turn have landed, or never will
    pack_again        the rows of a turn whose gate is closed are packed anew: run(again), signal(again, n), on a queue
                      beside that of the lane, which waits
    sampled           the tokens are there
    alone             run(something else), signal(alone, n), while the lane has no pass

Knows programs by their places alone; knows no tensors, sockets or sequences.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

from msi.device.queues import Queue, QueueDevice

AHEAD = 3  # layers that are launched and not yet packed

P = TypeVar("P")


class Link(Protocol):
    """Who posts what was packed."""

    def packed(self, lane: int, turn: int) -> None:
        """The rows of a turn lie in the outboxes. From any thread; does not raise."""

    def packed_again(self, lane: int, turn: int) -> None:
        """They lie there once more, packed anew. Likewise."""


class LanePrograms(Generic[P]):
    """What one lane runs in a pass.

    Attributes:
        layers: of each layer: up to where its rows are packed, and (or None) what goes on while they are away.
        sample: head and sampling, at the end.
        again: packs the rows of the layer that is away once more.
    """

    def __init__(self, layers: Sequence[tuple[P, P | None]], sample: P, again: P) -> None:
        self.layers = layers
        self.sample = sample
        self.again = again


class _Lane(Generic[P]):
    __slots__ = (
        "again", "alone", "first", "gate", "last", "link", "next", "num_again", "num_alone", "packed", "programs",
        "queue", "sampled", "turn_again", "waiter",
    )  # fmt: skip

    def __init__(self, device: QueueDevice[P], index: int, programs: LanePrograms[P]) -> None:
        self.programs = programs
        self.queue: Queue[P] = device.queue(f"lane {index}")
        self.gate, self.packed, self.sampled, self.again, self.alone = (device.words.take() for _ in range(5))
        self.num_again = self.turn_again = self.num_alone = 0
        self.link: Link | None = None
        self.first = self.next = 1  # turns of the pass, and the one to be launched next
        self.last = 0
        self.waiter: asyncio.Future[None] | None = None


class LaneQueues(Generic[P]):
    """The queues of all lanes on a device; `turn`s of a lane count up from 1 and are never used twice.

    Implements `msi.net.passes.Gates`.

    Args:
        counts: memory for them that the device sees; by default any.

    Attributes:
        counts: int32 [num_lanes, num_nodes], in host memory: rows packed for each node, for programs to write.
    """

    def __init__(
        self,
        device: QueueDevice[P],
        num_nodes: int,
        programs: Sequence[LanePrograms[P]],
        counts: memoryview | None = None,
    ) -> None:
        self.num_layers = len(programs[0].layers)
        num_bytes = 4 * len(programs) * num_nodes
        counts = memoryview(bytearray(num_bytes)) if counts is None else counts[:num_bytes]
        self.counts = counts.cast("i", (len(programs), num_nodes))
        self._words = device.words
        self._lock = threading.Lock()  # over launching, which goes on where a signal is seen
        self._lanes = [_Lane(device, index, programs[index]) for index in range(len(programs))]
        self._beside = device.queue("again")
        for index, lane in enumerate(self._lanes):
            device.follow(lane.packed, partial(self._packed, index))
            device.follow(lane.again, partial(self._packed_again, index))
            device.watch(lane.sampled, partial(self._woken, index))
            device.watch(lane.alone, partial(self._woken, index))

    def launch(self, lane_index: int, first: int, link: Link) -> None:
        """Begins a pass whose first turn is `first`. All gates of the pass before have been opened."""
        lane = self._lanes[lane_index]
        with self._lock:
            lane.link = link
            lane.first = lane.next = first
            lane.last = first + self.num_layers - 1
            for _ in range(AHEAD):
                self._launch_next(lane)

    def open(self, lane_index: int, turn: int) -> None:
        """What waits for the answers to a turn may go on. From any thread."""
        self._words.open(self._lanes[lane_index].gate, turn)

    def pack_again(self, lane_index: int, turn: int) -> None:
        """Runs the lane's program for that, of a turn whose gate is closed; one at a time."""
        lane = self._lanes[lane_index]
        lane.num_again += 1
        lane.turn_again = turn
        self._beside.run(lane.programs.again)
        self._beside.signal(lane.again, lane.num_again)

    def turn_again(self, lane_index: int) -> int:
        """The turn that is packed again."""
        return self._lanes[lane_index].turn_again

    def is_given_up(self, lane_index: int, turn: int) -> bool:
        """Whether the gate behind a turn that was not yet packed is open: nobody wants its rows any more."""
        return self._words.is_there(self._lanes[lane_index].gate, turn)

    async def sampled(self, lane_index: int) -> None:
        """Until the pass's tokens are there, or what was raised in their place. Cancelling leaves nothing behind."""
        lane = self._lanes[lane_index]
        await self._signalled(lane, lane.sampled, lane.last)

    async def alone(self, lane_index: int, program: P) -> None:
        """Runs it on the lane's queue, which has no pass; until it is through, or has failed."""
        lane = self._lanes[lane_index]
        lane.num_alone += 1
        lane.queue.run(program)
        lane.queue.signal(lane.alone, lane.num_alone)
        await self._signalled(lane, lane.alone, lane.num_alone)

    async def _signalled(self, lane: _Lane[P], word: int, value: int) -> None:
        while not self._words.is_there(word, value):
            lane.waiter = asyncio.get_running_loop().create_future()
            await lane.waiter

    def close(self) -> None:
        """Gives the words back, so that the device holds nothing of ours. No pass is in flight any more."""
        for lane in self._lanes:
            for word in (lane.gate, lane.packed, lane.sampled, lane.again, lane.alone):
                self._words.give_back(word)

    def _launch_next(self, lane: _Lane[P]) -> None:
        """One layer more, or the end of the pass. Needs the lock."""
        turn, queue = lane.next, lane.queue
        if turn > lane.last + 1:
            return
        lane.next = turn + 1
        queue.wait(lane.gate, turn - 1)
        if turn > lane.last:
            queue.run(lane.programs.sample)
            queue.signal(lane.sampled, lane.last)
            return
        program, meanwhile = lane.programs.layers[turn - lane.first]
        queue.run(program)
        queue.signal(lane.packed, turn)
        if meanwhile is not None:
            queue.run(meanwhile)

    def _packed(self, lane_index: int, turn: int) -> None:
        lane = self._lanes[lane_index]
        assert lane.link is not None
        lane.link.packed(lane_index, turn)
        with self._lock:
            if lane.first <= turn <= lane.last:  # else of a pass that was given up, and its successor is launched
                self._launch_next(lane)

    def _packed_again(self, lane_index: int, number: int) -> None:
        lane = self._lanes[lane_index]
        assert lane.link is not None
        if number == lane.num_again:
            lane.link.packed_again(lane_index, lane.turn_again)

    def _woken(self, lane_index: int, value: int) -> None:
        waiter = self._lanes[lane_index].waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
