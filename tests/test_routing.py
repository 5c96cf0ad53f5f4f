"""Where requests go, and what becomes of them."""

from __future__ import annotations

from msi.messages import RequestUpdate
from msi.routing import WAIT_FOR_WORKERS_S, Router
from msi.scheduler import Progress, Request
from msi.types import SamplingParams


def request(name, num_prompt=10, max_tokens=10):
    return Request(name, (1,) * num_prompt, SamplingParams(max_tokens=max_tokens, seed=1))


def error(name, kind, reason):
    return RequestUpdate(name, (), "", kind, reason)


def test_requests_go_to_the_worker_with_the_most_free_cache():
    router = Router()
    for index, size in enumerate((90, 10, 10, 10)):
        router.add(request(f"r{index}", size), b"c", 0.0)
    given = router.route({"a": 200, "b": 150})
    assert [(worker, one.request_id) for worker, one in given] == [("a", "r0"), ("b", "r1"), ("b", "r2"), ("b", "r3")]
    assert router.route({"a": 200, "b": 150}) == []


def test_without_workers_requests_wait_and_then_end_with_what_is_waited_for():
    router = Router()
    router.add(request("r"), b"c", 0.0)
    assert router.route({}) == []
    assert router.expire(WAIT_FOR_WORKERS_S - 1, "waiting for expert worker 1 of 2") == {}
    updates = router.expire(WAIT_FOR_WORKERS_S + 1, "waiting for expert worker 1 of 2")
    reason = "no worker could take it for 30 s: waiting for expert worker 1 of 2"
    assert updates == {b"c": [error("r", "Unavailable", reason)]}
    assert len(router) == 0


def test_progress_reaches_the_client_that_asked_and_nobody_else():
    router = Router()
    router.add(request("r"), b"c1", 0.0)
    router.add(request("s"), b"c2", 0.0)
    router.route({"a": 100})
    updates = router.progress("a", [Progress("r", (5,)), Progress("s", (6,), "stop"), Progress("gone", (7,))])
    assert updates == {
        b"c1": [RequestUpdate("r", (5,), "", "", "")],
        b"c2": [RequestUpdate("s", (6,), "stop", "", "")],
    }
    assert router.progress("b", [Progress("r", (5,))]) == {}, "from a worker that does not have it"
    assert len(router) == 1


def test_a_lost_worker_fails_its_requests_by_name():
    router = Router()
    router.add(request("r"), b"c", 0.0)
    router.route({"a": 100})
    router.add(request("waits"), b"c", 0.0)
    assert router.worker_lost("a", "it died") == {
        b"c": [error("r", "RequestFailed", "attention worker a was lost: it died")]
    }
    assert len(router) == 1


def test_cancelling_names_the_worker_that_has_it():
    router = Router()
    router.add(request("r"), b"c", 0.0)
    assert router.cancel(b"other", "r") == ""
    router.route({"a": 100})
    assert router.cancel(b"c", "r") == "a"
    assert router.cancel(b"c", "r") == ""


def test_a_lost_client_takes_its_requests_along():
    router = Router()
    for name, client in (("r", b"c"), ("s", b"d")):
        router.add(request(name), client, 0.0)
    router.route({"a": 100})
    router.add(request("t"), b"c", 0.0)
    assert router.client_lost(b"c") == [("a", "r")]
    assert len(router) == 1


def test_an_id_in_use_is_refused():
    router = Router()
    assert router.add(request("r"), b"c", 0.0) is None
    assert router.add(request("r"), b"d", 0.0) == error("r", "InvalidRequest", "request id r is in use")


def test_what_ends_frees_its_share():
    router = Router()
    router.add(request("large", 90), b"c", 0.0)
    router.route({"a": 100, "b": 90})
    router.fail(["large"], "RequestFailed", "x")
    router.add(request("next"), b"c", 0.0)
    assert router.route({"a": 100, "b": 90})[0][0] == "a"
