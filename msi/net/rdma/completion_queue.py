"""A completion queue of libibverbs read as numbers, wherever it was made, and the events of its channel.

Polling and arming are inline functions of the library's header: they call what the card's provider has put into a table
of the queue's context. All that came is written into one array by one call, and read out of it; nothing is made of it.

That takes the queue's address, which bindings keep for themselves. But each event says of which queue it is. So a
binding polls until the first event, which comes with the first completion, and from then on its queue is read here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Sequence
from ctypes import addressof, byref, c_char, c_int, c_uint64, c_void_p
from typing import Any

from msi.net.rdma import abi
from msi.net.rdma.verbs import COMPLETIONS_PER_POLL, EVENTS_PER_ACKNOWLEDGEMENT, Completion

HOLDING = ctypes.PYFUNCTYPE(c_int)  # the interpreter's lock
LETTING_GO = ctypes.CFUNCTYPE(c_int)


class CompletionQueue:
    """Whoever made it keeps it for as long. Its methods are those of `msi.net.rdma.verbs.Card`.

    Args:
        address: of the library's ibv_cq.
    """

    __slots__ = ("_arm", "_founds", "_from", "_into", "_look", "_poll", "_unpack")

    def __init__(self, address: int) -> None:
        context = c_uint64.from_address(address + abi.QUEUE_CONTEXT).value
        poll = abi.table_function(context, abi.POLL)
        self._poll, self._look = HOLDING(poll), LETTING_GO(poll)
        self._arm = HOLDING(abi.table_function(context, abi.ARM))
        self._from = at(address)
        found = memoryview(bytearray(COMPLETIONS_PER_POLL * abi.COMPLETION_BYTES))
        self._founds = [found[: n * abi.COMPLETION_BYTES] for n in range(COMPLETIONS_PER_POLL + 1)]
        self._into = at(addressof(c_char.from_buffer(found)))
        self._unpack = struct.Struct(abi.COMPLETION).iter_unpack

    def poll(self) -> Sequence[Completion]:
        count = self._poll(self._from, COMPLETIONS_PER_POLL, self._into)
        if count > 0:
            return list(self._unpack(self._founds[count]))
        return self._read(count) if count else ()

    def look(self) -> Sequence[Completion]:
        return self._read(self._look(self._from, COMPLETIONS_PER_POLL, self._into))

    def _read(self, count: int) -> Sequence[Completion]:
        if count > 0:
            return list(self._unpack(self._founds[count]))
        if count < 0:
            raise OSError(errno.EIO, "the completion queue cannot be polled")
        return ()

    def arm(self) -> None:
        if code := self._arm(self._from, 0):
            raise OSError(code, os.strerror(code))


class Events:
    """Of a channel that wakes for one queue.

    Args:
        fd: of the channel, which does not block.
    """

    def __init__(self, library: abi.Library, fd: int) -> None:
        self._library = library
        self._channel = abi.Channel(fd=fd)  # all that the library reads of one
        self._queue = c_void_p()
        self._take = library.get_cq_event
        self._taken = byref(self._channel), byref(self._queue), byref(c_void_p())
        self._num_events = 0  # taken and not acknowledged, which takes a lock

    @property
    def queue(self) -> int:
        """The address of the one whose event was taken; 0 before."""
        return self._queue.value or 0

    def take(self) -> bool:
        """Whether there was one."""
        if self._take(*self._taken):
            code = ctypes.get_errno()
            if code == errno.EAGAIN:
                return False
            raise OSError(code, os.strerror(code))
        self._num_events += 1
        if self._num_events == EVENTS_PER_ACKNOWLEDGEMENT:
            self.acknowledge()
        return True

    def acknowledge(self) -> None:
        """All that were taken, or the queue waits for it for ever when it is destroyed."""
        if self._num_events:
            self._library.ack_cq_events(self.queue, self._num_events)
            self._num_events = 0


class BindingQueue:
    """What a binding's card has of its queue: by the binding's own calls, and from the first event on read here.

    Args:
        poll, arm: the binding's.
    """

    def __init__(self, poll: Callable[[], Sequence[Completion]], arm: Callable[[], None]) -> None:
        self.fd = -1
        self.poll = self.look = poll
        self.arm = arm
        self._events: Events | None = None
        self._is_read_here = False

    def follow(self, fd: int) -> None:
        """The channel's, once it is there."""
        os.set_blocking(fd, False)  # else a thread that takes an event stops all others
        self.fd = fd
        self._events = Events(abi.Library(), fd)

    def take_event(self) -> bool:
        events = self._events
        assert events is not None
        if not events.take():
            return False
        if not self._is_read_here:
            self._is_read_here = True
            queue = CompletionQueue(events.queue)
            self.poll, self.look, self.arm = queue.poll, queue.look, queue.arm
        return True

    def unfollow(self) -> None:
        """Before the queue is destroyed."""
        if self._events is not None:
            self._events.acknowledge()
        self.fd = -1


def at(address: int) -> Any:
    """An argument for a function that takes the address: nothing is made of it when it is called."""
    return byref(c_char.from_address(address))
