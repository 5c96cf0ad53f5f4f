"""Completions as numbers, from a queue of libibverbs that somebody else has made; here its functions are Python's."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from msi.net.rdma import abi
from msi.net.rdma.completion_queue import BindingQueue, CompletionQueue, Events
from msi.net.rdma.verbs import COMPLETIONS_PER_POLL, EVENTS_PER_ACKNOWLEDGEMENT

POLL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
ARM = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


class Queue:
    """An ibv_cq: the address of its context comes first, and in that, behind another, those of functions."""

    def __init__(self):
        self.completions = []
        self.failure = 0
        self.armed = []
        self.poll, self.arm = POLL(self._poll), ARM(self._arm)
        self.context = (ctypes.c_void_p * 40)()
        self.context[1 + abi.POLL] = ctypes.cast(self.poll, ctypes.c_void_p).value
        self.context[1 + abi.ARM] = ctypes.cast(self.arm, ctypes.c_void_p).value
        self.memory = ctypes.c_void_p(ctypes.addressof(self.context))
        self.address = ctypes.addressof(self.memory)

    def _poll(self, address, most, into):
        assert address == self.address
        if self.failure:
            return self.failure
        found, self.completions = self.completions[:most], self.completions[most:]
        words = (ctypes.c_uint32 * (len(found) * abi.COMPLETION_BYTES // 4)).from_address(into)
        for number, (status, opcode, immediate, queue_pair) in enumerate(found):
            at = number * abi.COMPLETION_BYTES // 4
            words[at + 2], words[at + 3], words[at + 6], words[at + 7] = status, opcode, immediate, queue_pair
        return len(found)

    def _arm(self, address, is_solicited):
        self.armed.append((address, is_solicited))
        return -self.failure


@pytest.mark.parametrize("way", ["poll", "look"])
def test_what_came_is_read_in_order_and_no_more_than_fits_at_a_time(way):
    queue = Queue()
    came = [(number % 3, 129, number << 20, number) for number in range(COMPLETIONS_PER_POLL + 5)]
    queue.completions = list(came)
    take = getattr(CompletionQueue(queue.address), way)
    assert [*take()] == came[:COMPLETIONS_PER_POLL]
    assert [*take()] == came[COMPLETIONS_PER_POLL:]
    assert [*take()] == []


@pytest.mark.parametrize("way", ["poll", "look", "arm"])
def test_a_queue_that_fails_says_so(way):
    queue = Queue()
    queue.failure = -errno.EIO
    with pytest.raises(OSError, match=rf"\[Errno {errno.EIO}\]"):
        getattr(CompletionQueue(queue.address), way)()


def test_it_is_armed_for_every_completion():
    queue = Queue()
    CompletionQueue(queue.address).arm()
    assert queue.armed == [(queue.address, 0)]


class Library:
    """Whose channel has so many events of a queue."""

    def __init__(self, num_events, queue):
        self.num_events, self.queue = num_events, queue
        self.acknowledged = []
        self.fds = set()
        self.failure = errno.EAGAIN

    def get_cq_event(self, channel, queue, context):
        self.fds.add(channel._obj.fd)
        if not self.num_events:
            ctypes.set_errno(self.failure)
            return -1
        self.num_events -= 1
        queue._obj.value = self.queue
        return 0

    def ack_cq_events(self, queue, count):
        self.acknowledged.append((queue, count))


def test_an_event_tells_of_which_queue_it_is_and_all_that_were_taken_are_acknowledged():
    library = Library(EVENTS_PER_ACKNOWLEDGEMENT + 2, queue=7 << 40)
    events = Events(library, fd=5)
    assert events.queue == 0
    events.acknowledge()
    assert library.acknowledged == []
    while events.take():
        assert events.queue == 7 << 40
    assert library.acknowledged == [(7 << 40, EVENTS_PER_ACKNOWLEDGEMENT)]
    events.acknowledge()
    events.acknowledge()
    assert library.acknowledged == [(7 << 40, EVENTS_PER_ACKNOWLEDGEMENT), (7 << 40, 2)]
    assert library.fds == {5}
    library.failure = errno.EIO
    with pytest.raises(OSError, match=rf"\[Errno {errno.EIO}\]"):
        events.take()


def test_a_binding_polls_until_an_event_says_where_its_queue_is(monkeypatch):
    queue = Queue()
    queue.completions = [(0, 129, 1, 2)]
    library = Library(1, queue.address)
    monkeypatch.setattr(abi, "Library", lambda: library)
    channel, writer = os.pipe()
    card = BindingQueue(poll=lambda: "the binding's", arm=lambda: None)
    card.follow(channel)
    assert card.fd == channel
    assert not os.get_blocking(channel)
    assert card.poll() == card.look() == "the binding's"
    assert card.take_event()
    assert [*card.poll()] == [(0, 129, 1, 2)]
    card.arm()
    assert queue.armed
    assert [*card.look()] == []
    assert not card.take_event()
    card.unfollow()
    assert library.acknowledged == [(queue.address, 1)]
    assert card.fd == -1
    os.close(channel)
    os.close(writer)
