"""When a worker that ended is started again, and what becomes of requests under which workers crashed."""

from __future__ import annotations

import errno

from msi.control.request_routing import Router
from msi.control.restarts import HEALTHY_AFTER_S, TRIES, Restarts, restart_delay_s
from msi.control.suspects import SUSPECTED_FOR_S
from msi.instance import processes as process_instance
from msi.instance.children import Child
from msi.options import InstanceOptions
from msi.types import Progress, Request, SamplingParams


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


def request(name, seed, prompt=(1, 2, 3)):
    return Request(name, prompt, SamplingParams(max_tokens=5, seed=seed))


def crash(router, name, now, seed=1, has_crashed=True):
    assert router.add(request(name, seed), b"c", now) is None
    router.route({"a": 1000})
    router.worker_lost("a", "it was killed by signal 11", now, has_crashed)


def test_a_request_under_which_workers_crashed_twice_is_not_tried_a_third_time():
    router = Router()
    crash(router, "r", 0.0)
    crash(router, "s", 1.0, seed=2)
    refused = router.add(request("t", 3), b"c", 2.0)
    assert "crashed 2 times while they ran this very request" in refused.failure.message
    assert router.add(request("u", 3, prompt=(1, 2)), b"c", 2.0) is None, "others are"
    assert router.add(request("v", 3), b"c", 2.0 + SUSPECTED_FOR_S) is None, "not for ever"


def test_a_worker_that_was_killed_says_nothing_of_its_requests_nor_does_a_crash_after_which_they_were_answered():
    router = Router()
    for number in range(5):
        crash(router, f"r{number}", 0.0, has_crashed=False)
    for number in range(5):
        crash(router, f"s{number}", 0.0)
        assert router.add(request(f"t{number}", 1), b"c", 1.0) is None
        router.route({"a": 1000})
        router.progress("a", [Progress(f"t{number}", (1,), "stop")])


async def test_a_worker_for_which_the_machine_has_no_room_is_tried_again_and_ends_nobody(tiny_model, monkeypatch):
    """A fork that failed once ended the instance, healthy workers included."""
    outcomes = [OSError(errno.EAGAIN, "Resource temporarily unavailable"), OSError(errno.ENOMEM, "no memory"), "child"]

    async def start(*_):
        outcome = outcomes.pop(0)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    monkeypatch.setattr(Child, "start", start)
    monkeypatch.setattr(process_instance, "NO_ROOM_AGAIN_S", 0.01)
    failures = []
    instance = process_instance.ProcessInstance(InstanceOptions.of(model=tiny_model), failures.append)
    assert await instance._start_again("ipc://x", "expert", "expert-0")
    assert instance._children == {"expert-0": "child"}
    assert failures == []
