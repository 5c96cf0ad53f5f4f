"""When a worker that ended is started again."""

from __future__ import annotations

import asyncio
import contextlib
import errno

import pytest

from msi.control import restarts as restarts_module
from msi.control.restarts import HEALTHY_AFTER_S, TRIES, Restarts, restart_delay_s
from msi.errors import ConfigError
from msi.instance import processes as process_instance
from msi.instance.children import Child
from msi.options import InstanceOptions
from tests.waiting import until


def test_delays_grow_to_half_a_minute():
    assert [restart_delay_s(number) for number in range(1, 10)] == [0, 1, 2, 4, 8, 16, 30, 30, 30]
    assert restart_delay_s(10**6) == 30


def test_a_worker_that_served_once_is_started_again_without_end():
    """The fourth death of one worker ended the whole instance."""
    restarts = Restarts()
    restarts.ready(0.0)
    delays = [restarts.ended(number, has_said_why=number % 2 == 0) for number in range(100)]
    assert None not in delays
    assert delays[:8] == [0, 1, 2, 4, 8, 16, 30, 30]


def test_a_life_that_was_healthy_ends_the_row():
    restarts = Restarts()
    now = 0.0
    for _ in range(10):
        restarts.ready(now)
        now += HEALTHY_AFTER_S
        assert restarts.ended(now, has_said_why=False) == 0


def test_one_that_never_was_ready_is_given_up_when_it_says_why_or_after_some_tries():
    assert Restarts().ended(0.0, has_said_why=True) is None
    restarts = Restarts()
    delays = [restarts.ended(0.0, has_said_why=False) for _ in range(TRIES)]
    assert delays == [0, 1, 2, None]


async def test_a_worker_for_which_the_machine_has_no_room_is_tried_again_and_ends_nobody(tiny_model, monkeypatch):
    """A fork that failed once ended the instance, healthy workers included."""
    outcomes = [OSError(errno.EAGAIN, "Resource temporarily unavailable"), OSError(errno.ENOMEM, "no memory"), "child"]

    async def start(*_):
        outcome = outcomes.pop(0)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    monkeypatch.setattr(Child, "fork", start)
    monkeypatch.setattr(process_instance, "NO_ROOM_AGAIN_S", 0.01)
    failures = []
    instance = process_instance.ProcessInstance(InstanceOptions.of(model=tiny_model), failures.append)
    assert await instance._start_again("ipc://x", "expert", "expert-0")
    assert instance._children == {"expert-0": "child"}
    assert failures == []


class Ended:
    """A child that has."""

    has_ended, pid, failure, end = True, 7, "", "it was killed by signal 9"

    def __init__(self, failure=""):
        self.failure, self.process, self.told = failure, self, []
        self.end = failure or self.end

    async def hear(self):
        return None

    async def wait(self):
        return -9

    def tell(self, **message):
        self.told.append(message)

    def close(self):
        pass


class Living(Ended):
    has_ended = False

    async def hear(self):
        await asyncio.Event().wait()


@pytest.mark.parametrize("last", [Living(), Ended("another port, please")], ids=["one lives", "one says why not"])
async def test_a_coordinator_is_started_until_one_lives_or_says_that_it_cannot(tiny_model, monkeypatch, last):
    """One that was killed before it served again ended the instance."""
    outcomes = [OSError(errno.EAGAIN, "Resource temporarily unavailable"), Ended(), last]

    async def start(*_):
        outcome = outcomes.pop(0)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    async def address_of(child):
        if child.has_ended:
            raise ConfigError("it ended while it started")
        return "ipc://x"

    monkeypatch.setattr(process_instance.ProcessInstance, "_start_coordinator", start)
    monkeypatch.setattr(process_instance, "_address_of", address_of)
    monkeypatch.setattr(restarts_module, "FIRST_DELAY_S", 0.001)
    failures = []
    instance = process_instance.ProcessInstance(InstanceOptions.of(model=tiny_model), failures.append)
    instance._watch(instance._watch_coordinator(Ended(), "ipc://x"))
    await until(lambda: last.told or failures)
    assert [str(one) for one in failures] == [f"the coordinator (pid 7) is gone: {last.end}"] * bool(last.failure)
    instance._tasks[0].cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await instance._tasks[0]
