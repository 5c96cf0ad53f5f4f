"""What a compute thread goes through: open queues in their order, and what transports bring between programs."""

from __future__ import annotations

import os
import threading

import pytest

from msi.device.polling import Bell
from msi.device.ready import Ready
from msi.errors import TransportError
from msi.net.inproc import InprocTransport
from msi.net.looking import Cores
from msi.net.rdma.transport import RdmaTransport
from msi.net.regions import HOST_MEMORY
from msi.net.shm import ShmTransport
from msi.net.slots import SlotLayout
from msi.net.transport import Admission, CompletionKind
from tests.loopback_verbs import LoopbackDriver
from tests.waiting import until

LAYOUT = SlotLayout(2, 4, 128)


class Serving:
    """A thread that serves `ready` and notes what it gets, until None."""

    def __init__(self, poll_s=0.0):
        self.ready = Ready(poll_s)
        self.got = []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self):
        while (queue := self.ready.get()) is not None:
            self.got.append(queue)
            if callable(queue):
                queue()

    def end(self):
        self.ready.put(None)
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.ready.close()


@pytest.fixture
def serving():
    serving = Serving()
    yield serving
    serving.end()


def test_queues_come_in_the_order_in_which_they_opened(serving):
    for index in range(1000):
        serving.ready.put(index)
    serving.end()
    assert serving.got == list(range(1000))


def test_a_ring_from_anywhere_brings_a_look_at_every_source(serving):
    looked = [threading.Event(), threading.Event()]
    for event in looked:
        serving.ready.add(event.set)
    for event in looked:
        assert event.wait(10)
        event.clear()
    os.eventfd_write(serving.ready.bell, 1)  # as another process does
    assert all(event.wait(10) for event in looked)


def test_what_a_source_brings_is_run_by_the_thread_that_looked(serving):
    brought, ran = [7], threading.Event()

    def take():
        if brought:
            brought.pop()
            serving.ready.put(lambda: ran.set() if threading.current_thread() is serving.thread else None)

    serving.ready.add(take)
    assert ran.wait(10)


def test_a_source_that_fails_takes_nothing_from_the_others(serving, caplog):
    looked = threading.Event()

    def broken():
        raise ValueError("it is broken")

    serving.ready.add(broken)
    serving.ready.add(looked.set)
    assert looked.wait(10)
    serving.ready.remove(broken)
    serving.ready.put("goes on")
    serving.end()
    assert serving.got == ["goes on"]
    assert "it is broken" in caplog.text


def test_a_source_is_asked_once_more_before_the_thread_sleeps_if_it_wants_to_be(serving):
    answers, all_asked = [True, True, False], threading.Event()

    def take():
        if not answers:
            return False
        answer = answers.pop(0)
        if not answers:
            all_asked.set()
        return answer

    serving.ready.add(take)
    assert all_asked.wait(10), "it slept, though it was to ask again"


@pytest.mark.parametrize("poll_s", [0.0, 0.02])
def test_a_descriptor_that_is_followed_wakes_the_thread_and_one_that_was_left_does_not(poll_s):
    serving, rings = Serving(poll_s), threading.Semaphore(0)
    ours = os.eventfd(0, os.EFD_NONBLOCK)
    serving.ready.add(rings.release, ours)
    for _ in range(5):  # nobody reads it: each time that it is written counts
        assert rings.acquire(timeout=10)
        while rings.acquire(timeout=0.05):
            pass
        os.eventfd_write(ours, 1)
    serving.ready.put("its bell still wakes it")
    serving.ready.remove(rings.release, ours)
    os.close(ours)
    serving.end()
    serving.ready.remove(rings.release, ours)  # what is late does nothing


def test_a_source_that_was_removed_is_not_looked_at(serving):
    calls, looked = [], threading.Event()

    def take():
        calls.append(1)
        looked.set()

    serving.ready.add(take)
    assert looked.wait(10)
    serving.ready.remove(take)
    serving.ready.put("after it")
    serving.end()
    num_calls = len(calls)
    serving.ready.ring()
    assert len(calls) == num_calls


def test_after_its_end_a_ring_does_nothing(serving):
    serving.end()
    serving.ready.close()
    serving.ready.ring()
    serving.ready.put("nobody's")


CARDS = LoopbackDriver()


def rdma_transport(poller=None):
    return RdmaTransport(CARDS, poller=poller)


@pytest.mark.parametrize("kind", [ShmTransport, InprocTransport, rdma_transport])
async def test_immediates_come_on_the_pollers_thread_and_everything_else_on_the_loop(kind, serving):
    loop_thread = threading.current_thread()
    seen, all_seen = [], threading.Event()

    def note(endpoint, kind, immediate, reason):
        seen.append((kind, immediate, threading.current_thread()))
        if kind is CompletionKind.IMMEDIATE and immediate == 99:
            all_seen.set()

    ours, theirs = kind(poller=serving.ready), kind()
    landing = ours.register(1, LAYOUT, HOST_MEMORY)
    ours.deliver(note)
    address = await ours.listen(lambda hello: Admission(landing, 0, b"welcome"))
    endpoint = await theirs.connect(address, b"hello", theirs.register(1, LAYOUT, HOST_MEMORY), 0)
    await until(lambda: seen)
    for immediate in range(100):
        endpoint.post(0, immediate)
    assert all_seen.wait(10), "the loop stood still, and the poller took them all the same"
    endpoint.close()
    await until(lambda: len(seen) == 102)
    assert seen[0] == (CompletionKind.CONNECTED, 0, loop_thread)
    assert seen[1:101] == [(CompletionKind.IMMEDIATE, index, serving.thread) for index in range(100)]
    assert seen[101] == (CompletionKind.CLOSED, 0, loop_thread)
    with pytest.raises(TransportError):
        endpoint.post(0, 1)
    await theirs.close()
    await ours.close()


# -- looking at the bell before sleeping at it -------------------------------------------------------------------------


def ring_late(bell, after_s):
    thread = threading.Timer(after_s, lambda: os.eventfd_write(bell.fd, 3))
    thread.start()
    return thread


@pytest.mark.parametrize("poll_s", [0.0, 200e-6])
def test_a_bell_is_heard_whether_it_rings_before_while_or_after_it_is_looked_at(poll_s):
    bell = Bell(poll_s)
    for after_s in (None, 0.0, 50e-6, 0.02):
        for _ in range(20 if after_s != 0.02 else 3):
            thread = ring_late(bell, after_s) if after_s is not None else os.eventfd_write(bell.fd, 3)
            bell.wait()
            if thread is not None:
                thread.join()
            was_blocking = os.get_blocking(bell.fd)
            os.set_blocking(bell.fd, False)
            with pytest.raises(BlockingIOError):  # heard, and once
                os.eventfd_read(bell.fd)
            os.set_blocking(bell.fd, was_blocking)
    os.close(bell.fd)


def test_who_looks_in_vain_looks_less_and_less_and_who_is_rewarded_looks_again():
    looks, waits, rewarded = [], [], False

    class Look:
        def __call__(self):
            looks.append(len(waits))
            return rewarded

        def sleep(self):
            pass

        def rest(self):
            return False

    bell = Bell(look=Look())
    while len(waits) < 12:
        bell.wait()
        waits.append(None)
    assert looks == [0, 2, 6]
    rewarded = True
    while len(waits) < 20:
        bell.wait()
        waits.append(None)
    assert looks == [0, 2, 6, 14, 15, 16, 17, 18, 19]
    os.close(bell.fd)


def test_who_rests_hears_every_ring_and_looks_again_afterwards():
    looks, heard, slept = [], [], []

    class Look:
        """Who never sees what has rung, and so sleeps."""

        def __call__(self):
            looks.append(len(heard))
            return False

        def sleep(self):
            slept.append(os.eventfd_read(bell.fd))

        def rest(self):
            return True

    bell = Bell(look=Look())
    while len(heard) < 200:
        os.eventfd_write(bell.fd, 1)
        bell.wait()
        heard.append(None)
    assert looks == [0, 2, 6, 14, 30, 62, 126]
    assert len(slept) == 31 + 2, "from the fifth look on, the bell itself is read between looks"
    os.set_blocking(bell.fd, False)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(bell.fd)
    bell.close()


def test_who_rests_hears_late_rings_and_what_the_bell_follows_from_then_on(monkeypatch):
    monkeypatch.setattr(Cores, "one_is_free", lambda cores: False)
    bell = Bell(1000.0)
    for _ in range(40):
        thread = ring_late(bell, 0.002)
        bell.wait()
        thread.join()
    other = os.eventfd(1, os.EFD_NONBLOCK)
    bell.follow(other)
    bell.wait()
    os.eventfd_read(other)
    os.eventfd_write(bell.fd, 1)
    bell.wait()
    bell.close()
    os.close(other)


def test_nobody_looks_while_no_core_is_free(monkeypatch):
    monkeypatch.setattr(Cores, "one_is_free", lambda cores: False)
    bell = Bell(1000.0)  # it would look for a quarter of an hour
    thread = ring_late(bell, 0.05)
    bell.wait()
    thread.join()
    bell.close()
