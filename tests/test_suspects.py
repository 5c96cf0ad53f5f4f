"""What becomes of requests under which workers crashed: which of them is why, and that no other pays for it."""

from __future__ import annotations

import pytest

from msi.control.request_routing import Router
from msi.control.suspects import ACQUITTED_AFTER, SUSPECTED_FOR_S
from msi.types import Progress, Request, SamplingParams

CAPACITIES = {"a": 1000, "b": 1000, "c": 1000}


def request(name, seed=1, prompt=(1, 2, 3)):
    return Request(name, prompt, SamplingParams(max_tokens=20, seed=seed))


def ids(given):
    return [one.request_id for _, one in given]


def ends(updates):
    return {one.request_id: one.failure.message for items in updates.values() for one in items}


def crash(router, worker, now=0.0):
    return router.worker_lost(worker, "it was killed by signal 11", now, has_crashed=True)


def tokens(router, worker, name, count=ACQUITTED_AFTER):
    router.progress(worker, [Progress(name, (7,)) for _ in range(count)])


def test_a_request_under_which_workers_crashed_twice_is_not_tried_a_third_time():
    router = Router()
    assert router.add(request("r"), b"c", 0.0) is None
    router.route(CAPACITIES)
    assert crash(router, "a") == {}
    ((worker, _),) = router.route({"b": 1000, "c": 1000})
    (why,) = ends(crash(router, worker, 1.0)).values()
    assert (
        f"{worker} was lost: it was killed by signal 11; attention workers crashed 2 times while they ran this" in why
    )
    refused = router.add(request("t", 3), b"c", 2.0)
    assert "crashed 2 times while they ran this very request" in refused.failure.message
    assert router.add(request("u", 3, prompt=(1, 2)), b"c", 2.0) is None, "others are"
    assert router.add(request("v", 3), b"c", 1.0 + SUSPECTED_FOR_S) is None, "not for ever"


@pytest.mark.parametrize("guilty", range(4))
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_of_those_that_a_crash_has_met_the_guilty_one_ends_alone_and_takes_no_third_worker(guilty, num_workers):
    """Whichever it is: each goes on alone, and the others get on."""
    router = Router()
    for number in range(4):
        router.add(request(f"r{number}", prompt=(number,)), b"c", 0.0)
    assert ids(router.route({"a": 1000})) == ["r0", "r1", "r2", "r3"]
    tokens(router, "a", "r1")
    num_crashes = 1
    ended = ends(crash(router, "a"))
    others = {f"w{number}": 1000 for number in range(num_workers)}
    running: list[tuple[str, str]] = []
    for _ in range(20):
        running += [(worker, one.request_id) for worker, one in router.route(others)]
        on_trial = [worker for worker, name in running if router._requests[name].is_suspect]
        assert len(set(on_trial)) == len(on_trial), "two suspects at one worker"
        for worker, name in running:
            if name == f"r{guilty}":
                ended |= ends(crash(router, worker))
                num_crashes += 1
                running = [one for one in running if one[0] != worker]
                break
            tokens(router, worker, name, 1)
        else:
            if not router._waiting:
                break
    assert num_crashes == 2
    assert list(ended) == [f"r{guilty}"]
    assert len(router) == 3


def test_nothing_new_goes_to_a_worker_where_a_suspect_runs_until_it_gets_on_or_ends():
    router = Router()
    for name in ("r", "s"):
        router.add(request(name, prompt=(ord(name),)), b"c", 0.0)
    router.route({"a": 1000})
    crash(router, "a")
    assert ids(router.route({"b": 1000})) == ["r"]
    router.add(request("new", prompt=(9,)), b"c", 0.0)
    assert router.route({"b": 1000}) == []
    tokens(router, "b", "r", ACQUITTED_AFTER - 1)
    assert router.route({"b": 1000}) == []
    tokens(router, "b", "r", 1)
    assert ids(router.route({"b": 1000})) == ["s"]
    assert router.cancel(b"c", "s") == ("b", "s")
    assert ids(router.route({"b": 1000})) == ["new"]


def test_those_that_ask_for_the_same_are_not_tried_at_two_workers_at_a_time_and_end_together():
    router = Router()
    for number in range(3):
        router.add(request(f"r{number}", seed=number), b"c", 0.0)
    router.route({"a": 1000})
    crash(router, "a")
    ((worker, first),) = router.route({"b": 1000, "c": 1000})
    ended = ends(crash(router, worker))
    assert set(ended) == {"r0", "r1", "r2"}
    assert first.request_id == "r0"
    assert len(router) == 0


def test_a_request_that_asks_for_the_same_as_a_suspect_is_one_and_an_answer_to_its_end_clears_both():
    router = Router()
    router.add(request("r"), b"c", 0.0)
    router.route({"a": 1000})
    crash(router, "a")
    router.cancel(b"c", "r")
    router.add(request("s", seed=5), b"c", 1.0)
    router.add(request("t", prompt=(8,)), b"c", 1.0)
    assert ids(router.route({"b": 1000})) == ["s"]
    router.progress("b", [Progress("s", (7,), "stop")])
    router.add(request("u"), b"c", 2.0)
    router.add(request("v"), b"c", 2.0)
    assert ids(router.route({"b": 1000})) == ["t", "u", "v"]


def test_a_worker_that_was_killed_says_nothing_of_its_requests():
    router = Router(max_resumptions=9)
    for number in range(4):
        router.add(request(f"r{number}", prompt=(number,)), b"c", 0.0)
    for _ in range(5):
        assert len(router.route({"a": 1000})) == 4
        assert router.worker_lost("a", "it was killed by signal 9", 0.0) == {}


def test_those_that_waited_at_a_worker_that_crashed_are_not_suspected():
    router = Router(max_num_seqs=2)
    for number in range(5):
        router.add(request(f"r{number}", prompt=(number,)), b"c", 0.0)
    router.route({"a": 1000})
    crash(router, "a")
    given = router.route({"b": 1000, "c": 1000, "d": 1000})
    assert ids(given) == ["r0", "r1", "r2", "r3", "r4"]
    assert [worker for worker, _ in given[2:]] == ["d"] * 3, "where no suspect runs"
