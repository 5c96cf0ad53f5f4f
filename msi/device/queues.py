"""The seam to work on a device: ordered queues, words that both sides see, gates.

    gate, done = words.take(), words.take()
    queue = device.queue("lane 0")
    queue.wait(gate, 1)          # what follows starts once the word is there
    queue.run(program)           # a closure on a CPU, a captured graph on a GPU
    queue.signal(done, 1)        # visible once all before it is, with all that it wrote to host memory
    words.open(gate, 1)          # from the host: a gate

Work is launched ahead and never waited for by the host; no value crosses but through words and host memory. Whoever
launched behind a gate opens it in the end, on failure too: a queue whose gate stays closed is stuck, and all that is
launched on it later. Knows no torch, layers or rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

P = TypeVar("P", contravariant=True)
Changed = Callable[[int], None]  # called with the value that a word has been given


class Words(Protocol):
    """32-bit counters in host memory, 64 bytes apart, that host and device both see. Each starts at 0 and only rises;
    past 2**32 it goes on at 0, so that of two values the one less than 2**31 ahead counts as the later.
    """

    def take(self) -> int:
        """A word of one's own."""

    def give_back(self, word: int) -> None:
        """Nobody is told of it any more, and whatever waits for it is forgotten."""

    def is_there(self, word: int, at_least: int) -> bool:
        """Whether the word has come to a value, or past it."""

    def open(self, word: int, value: int) -> None:
        """The host's own write: what waits for the word goes on. Does nothing to a word that is there. Any thread."""


class Queue(Protocol[P]):
    """Ordered work of one lane, or of the experts. Calls return at once, on whatever device, from any thread; nobody is
    told of anything within them.
    """

    def wait(self, word: int, at_least: int) -> None:
        """What follows starts once the word is there."""

    def run(self, program: P) -> None:
        """Runs it. Should that raise, the program is told and the queue goes on."""

    def signal(self, word: int, value: int) -> None:
        """Gives the word its value once all before it is through."""


class QueueDevice(Protocol[P]):
    """A device, as far as work goes. Queues that share what computes take turns in the order in which their heads
    opened.
    """

    @property
    def busy_s(self) -> float:
        """Time spent computing since the start."""

    @property
    def words(self) -> Words: ...

    def queue(self, name: str) -> Queue[P]: ...

    def follow(self, word: int, changed: Changed) -> None:
        """Calls `changed` as soon as a signal is seen, on whatever thread sees it: before what comes behind it starts,
        where the device computes on a thread of this process.
        """

    def watch(self, word: int, changed: Changed) -> None:
        """Calls `changed` on the event loop after a signal; of signals that follow fast it may see the last alone."""
