"""Overload: who waits in which order, what is refused when, what has had its time; and goodput does not collapse."""

from __future__ import annotations

import math
from itertools import count

import aiohttp
import pytest

from msi.attention.scheduler import Scheduler
from msi.control.fair_queue import FairQueue
from msi.control.overload import HEADROOM, Objectives, Service, backlog_of
from msi.control.prediction import Line, Meters, Occupancy
from msi.control.request_routing import Router
from msi.control.routed import Load, Routed
from msi.errors import DeadlineExceeded, Failure, InvalidRequest, Overloaded
from msi.planner.stage_costs import ConstantCosts
from msi.server.urgency import Urgency, shortest_timeout_s, urgency
from msi.settings import SchedulerLimits, ServiceLevel
from msi.simulator.deployment import Deployment
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival
from msi.types import Progress, Request, SamplingParams
from tests.edge import gateway
from tests.test_engine import idle
from tools.bench_overload import Result, arrivals_of, parse, simulated


def request(name="r", num_prompt=10, max_tokens=10, **values):
    return Request(name, (1,) * num_prompt, SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True), **values)


def ids(given):
    return [one.request_id for _, one in given]


def failures(updates):
    return {one.request_id: one.failure for items in updates.values() for one in items if one.failure}


# -- the order in which requests get a worker --------------------------------------------------------------------------


def routed(name, flow="", priority=0):
    return Routed(request(name, priority=priority), b"c", name, 0.0, 20, flow=flow)


def order(queue):
    return [one.name for one in queue]


def test_flows_take_turns_by_tokens_and_one_alone_is_served_in_order_of_arrival():
    queue = FairQueue()
    for number in range(4):
        queue.add(routed(f"a{number}", "a"), 10.0)
    assert order(queue) == ["a0", "a1", "a2", "a3"]
    queue.add(routed("b0", "b"), 20.0)
    queue.add(routed("b1", "b"), 20.0)
    assert order(queue) == ["a0", "b0", "a1", "a2", "b1", "a3"], "b's take twice as much"


def test_a_flow_that_was_idle_has_saved_nothing_up_and_pays_for_what_it_took_more():
    queue = FairQueue()
    for number in range(3):
        queue.add(routed(f"a{number}", "a"), 10.0)
    for one in list(queue)[:2]:
        queue.hand_out(one)
    queue.add(routed("b0", "b"), 10.0)
    queue.add(routed("b1", "b"), 10.0)
    assert order(queue) == ["b0", "a2", "b1"]
    queue.took("b", 1000.0)
    queue.add(routed("b2", "b"), 10.0)
    queue.add(routed("a3", "a"), 10.0)
    assert order(queue) == ["b0", "a2", "b1", "a3", "b2"]


def test_a_lower_priority_goes_first_and_within_one_what_had_a_worker_before():
    queue = FairQueue()
    had = routed("had")
    queue.add(had, 10.0)
    queue.hand_out(had)
    for name, priority in (("late", 5), ("usual", 0), ("early", -1)):
        queue.add(routed(name, priority=priority), 10.0)
    queue.add_again(had)
    assert order(queue) == ["early", "had", "usual", "late"]
    queue.remove(had)
    queue.remove(had)
    assert order(queue) == ["early", "usual", "late"]


def test_the_router_keeps_what_workers_cannot_begin_with_and_a_light_key_waits_for_little():
    router = Router(max_num_seqs=2, backlog=lambda mean_output: 1)
    for number in range(10):
        router.add(request(f"heavy{number}", flow="heavy"), b"c", 0.0)
    assert ids(router.route({"a": 1000})) == ["heavy0", "heavy1"], "more could not begin"
    router.add(request("light", flow="light"), b"c", 1.0)
    router.progress("a", [Progress("heavy0", (7,)), Progress("heavy1", (7,))], 2.0)
    assert ids(router.route({"a": 1000}, now=2.0)) == ["light"], "one waits there, so that it need not wait for more"
    assert router.num_unrouted == 8


def test_a_full_queue_gives_a_place_to_whoever_goes_first_and_the_last_one_ends():
    router = Router(max_waiting=3)
    for number in range(3):
        assert router.add(request(f"heavy{number}", flow="heavy"), b"c", 0.0) is None
    assert router.add(request("heavy3", flow="heavy"), b"c", 0.0).failure.kind == "unavailable"
    assert router.add(request("light", flow="light"), b"d", 0.0) is None
    assert [*failures(router.take_ended())] == ["heavy2"]
    assert router.add(request("urgent", flow="heavy", priority=-1), b"c", 0.0) is None
    assert [*failures(router.take_ended())] == ["heavy1"]
    assert router.counters["requests_displaced"] == 2
    assert ids(router.route({"a": 1000})) == ["urgent", "heavy0", "light"]


# -- what is predicted -------------------------------------------------------------------------------------------------


def test_a_line_goes_through_its_points_and_through_the_origin_where_they_are_all_alike():
    line = Line()
    assert (line.at(5.0), line.most_x(1.0)) == (0.0, math.inf)
    for _ in range(3):
        line.add(10.0, 2.0)
    assert (line.at(5.0), line.most_x(1.0)) == (1.0, 5.0)
    line = Line()
    for x in (1.0, 2.0, 3.0, 4.0):
        line.add(x, 3.0 + 2.0 * x)
    assert line.at(10.0) == pytest.approx(23.0)
    assert line.most_x(23.0) == pytest.approx(10.0)
    assert line.most_x(1.0) == 0.0


def test_first_tokens_wait_for_the_prompts_before_them_and_then_for_places():
    meters = Meters()
    for num_tokens in (100, 200, 300):
        meters.prefill.add(num_tokens, 0.1 + num_tokens / 1000)
    meters.stay.add(8.0)
    assert meters.ttft_s(50, 0, []) == 0.0, "nothing is known without workers"
    free, full = Occupancy(4, 2, 150), Occupancy(4, 4, 0)
    assert meters.ttft_s(50, 0, [full, free]) == pytest.approx(0.1 + 0.2)
    assert meters.ttft_s(50, 0, [full, full]) == pytest.approx(8.0 / 8 + 0.15), "the next of eight that ends in 8 s"
    assert meters.ttft_s(50, 7, [full, full]) == pytest.approx(8.0 + 0.15)
    backlogged = Occupancy(4, 6, 0)
    assert meters.ttft_s(50, 3, [backlogged]) == pytest.approx(6 * 8.0 / 4 + 0.15)
    assert meters.ttft_s(50, 3, [backlogged], 0.75) == pytest.approx(4 * 6 * 8.0 / 4 + 0.15), "one place in four is its"
    assert meters.ttft_s(50, 0, [free], 0.75) == meters.ttft_s(50, 0, [free]), "nobody comes before it to a free place"
    assert meters.ttft_s(50, 3, [backlogged], 1.0) < 200.0


def test_those_that_go_first_are_counted_in_what_the_others_are_predicted():
    service = Service(Objectives(ttft_s=10.0), 4)
    load = Load(num_requests=4)
    service.meters.stay.add(8.0)
    for number in range(8):
        asked = request(f"r{number}", priority=-1 if number % 4 else 0)
        service.started(Routed(asked, b"c", "", 0.0, 1), load, Progress("r"), 0.0)
    full = [(1000, load)]
    assert service.refusal(1, 2, full, priority=-1) is None, "6 s for its place"
    refused = service.refusal(1, 2, full)
    assert refused is not None
    assert "in about 24 s" in str(refused), "three places of four go to those that go first"
    assert service.refusal(1, 0, full) is None, "8 s"


def test_a_worker_has_as_many_besides_those_that_run_as_may_end_before_it_hears_of_more():
    assert [backlog_of(64, mean_output) for mean_output in (0, 1, 16, 128, 1000)] == [17, 17, 9, 2, 2]


def test_no_more_sequences_run_than_keep_their_tokens_in_time_or_fit_the_cache():
    meters = Meters()
    assert meters.places(64, 1000, 0.05) == 64, "nothing is known yet"
    for num in (1, 8, 16):
        meters.tpot.add(num, 0.01 + 0.002 * num)
    assert meters.places(64, 1000, math.inf) == 64
    assert meters.places(64, 1000, 0.05) == 20
    assert meters.places(64, 1000, 0.001) == 1
    meters.num_tokens.add(100)
    assert meters.places(64, 1000, math.inf) == 10


def served(router, name, came_at, first_at, end_at, num_output=10):
    router.add(request(name), b"c", came_at)
    ((worker, _),) = router.route({"a": 1000}, now=came_at)
    router.progress(worker, [Progress(name, (7,))], first_at)
    router.progress(worker, [Progress(name, (7,) * (num_output - 1), "length")], end_at)


def test_what_would_come_too_late_is_refused_with_when_to_try_again_and_what_waited_too_long_is_not_begun():
    router = Router(max_num_seqs=1, objectives=Objectives(ttft_s=10.0), backlog=lambda mean_output: 0)
    served(router, "first", 0.0, 1.0, 4.0)
    names = (f"r{number}" for number in count())
    taken = [next(names) for _ in range(2)]
    assert router.add(request(taken[0]), b"c", 10.0) is None
    router.route({"a": 1000}, now=10.0)
    assert router.add(request(taken[1]), b"c", 10.0) is None, "it waits 4 s for its place, and 1 s for its prompt"
    refused = router.add(request(next(names)), b"c", 10.0)
    assert HEADROOM * 10.0 < 2 * 4.0 + 1.0
    assert isinstance(refused.failure.error(), Overloaded)
    assert refused.failure.retry_after_s == 1.0
    assert router.counters["requests_refused_as_too_late"] == 1
    assert router.expire(18.0, "") == {}
    assert failures(router.expire(19.5, "")) == {taken[1]: Failure.of(_late(9.5 + 1.0 / HEADROOM))}
    assert router.counters["requests_shed"] == 1


def test_where_first_tokens_come_later_than_was_predicted_others_are_refused_earlier():
    def takes_one_more(num_late):
        service = Service(Objectives(ttft_s=10.0), max_num_seqs=1)
        for number in range(40):
            one = routed(f"{number}")
            service.started(one, Load(), Progress(one.name, (7,)), 11.0 if number >= 40 - num_late else 4.0)
        return service.refusal(10, 0, [(1000, Load())]) is None

    assert takes_one_more(0)
    assert takes_one_more(2)
    assert not takes_one_more(12)


def _late(ttft_s):
    return Overloaded(
        f"the first token would come in about {ttft_s:.3g} s, and is to come within 10 s; try again in 1 s",
        code="overloaded", retry_after_s=1.0,
    )  # fmt: skip


def test_how_long_it_waited_for_a_worker_is_told_with_its_first_token():
    router = Router(max_num_seqs=1, backlog=lambda mean_output: 0)
    router.add(request("r"), b"c", 1.0)
    router.route({"a": 1000}, now=3.0)
    updates = router.progress("a", [Progress("r", (7,), queued_s=0.5)], 4.0)
    assert updates == {b"c": [Progress("r", (7,), queued_s=2.5)]}


# -- deadlines ---------------------------------------------------------------------------------------------------------


def test_what_has_had_its_time_ends_wherever_it_is():
    router = Router(max_num_seqs=1, backlog=lambda mean_output: 0)
    for name in ("runs", "waits", "stays"):
        router.add(request(name, timeout_s=0.0 if name == "stays" else 5.0), b"c", 0.0)
    ((_, told),) = router.route({"a": 1000}, now=2.0)
    assert told.timeout_s == 3.0, "what is left"
    router.progress("a", [Progress("runs", (7, 8))], 3.0)
    assert router.expire(4.9, "") == {}
    ended = failures(router.expire(5.0, ""))
    assert {name: failure.kind for name, failure in ended.items()} == dict.fromkeys(
        ("runs", "waits"), "deadline_exceeded"
    )
    assert "had 2 tokens" in ended["runs"].message
    assert router.take_to_cancel() == [("a", "runs")]
    assert router.load("a").num_requests == 0
    assert ids(router.route({"a": 1000}, now=5.0)) == ["stays"]


def test_a_workers_word_that_the_time_is_over_is_told_as_the_coordinators_own():
    router = Router()
    router.add(request("r", timeout_s=5.0), b"c", 0.0)
    router.route({"a": 1000}, now=0.0)
    (ended,) = failures(router.fail(["r"], Failure.of(DeadlineExceeded("over")), "a")).values()
    assert ended.message.startswith("the 5 s that this request gave itself were over")
    assert router.counters["requests_out_of_time"] == 1


def test_the_shortest_time_counts_and_a_header_that_is_none_says_nothing():
    read, whole = {"x-stainless-read-timeout": "3.5"}, {"x-envoy-expected-rq-timeout-ms": "1500"}
    assert shortest_timeout_s(0.0, read, is_streamed=False) == 3.5
    assert shortest_timeout_s(2.0, read, is_streamed=False) == 2.0
    assert shortest_timeout_s(0.0, read, is_streamed=True) == 0.0, "a stream's next piece, not its end"
    assert shortest_timeout_s(0.0, whole, is_streamed=True) == 1.5
    for nonsense in ("", "soon", "-1", "0", "nan", "inf", "1e300"):
        assert shortest_timeout_s(0.0, {"x-stainless-read-timeout": nonsense}, is_streamed=False) == 0.0


@pytest.mark.parametrize(
    "values",
    [{"priority": "high"}, {"priority": 1.5}, {"priority": 2**40}, {"timeout_s": 0}, {"timeout_s": -1},
     {"timeout_s": "soon"}, {"timeout_s": True}, {"timeout_s": 1e9}],
)  # fmt: skip
def test_a_body_whose_urgency_is_none_is_refused_by_name(values):
    with pytest.raises(InvalidRequest) as refused:
        urgency(values)
    assert refused.value.param == next(iter(values))


def test_what_a_body_says_of_its_urgency():
    assert urgency({}) == urgency({"priority": None, "timeout_s": None}) == Urgency()
    assert urgency({"priority": -3.0, "timeout_s": 2}) == Urgency(-3, 2.0)
    assert urgency({"priority": "-3", "timeout_s": "2"}) == Urgency(-3, 2.0)


async def test_over_http_what_has_no_time_left_is_a_408_and_what_comes_too_late_a_429(tiny_model, monkeypatch):
    body = {"prompt": [5, 6, 7], "max_tokens": 5}
    async with gateway(tiny_model) as (engine, url), aiohttp.ClientSession() as session:

        async def post(more, **headers):
            async with session.post(f"{url}/v1/completions", json=body | more, headers=headers) as response:
                return response.status, await response.json(), response.headers

        status, answer, _ = await post({"timeout_s": 1e-6})
        assert (status, answer["error"]["code"]) == (408, "timeout")
        assert (await post({}, **{"X-Stainless-Read-Timeout": "0.000001"}))[0] == 408
        assert (await post({"priority": 3, "timeout_s": 1000}))[0] == 200
        await idle(engine)

        def overloaded(*_):
            raise Overloaded("too late", code="overloaded", retry_after_s=7.2)

        monkeypatch.setattr(type(engine), "_require_client", overloaded)
        status, answer, headers = await post({})
        assert (status, headers["Retry-After"], answer["error"]["code"]) == (429, "8", "overloaded")


# -- priorities at a worker --------------------------------------------------------------------------------------------


def test_a_lower_priority_is_admitted_first_and_takes_blocks_of_a_higher_one():
    limits = SchedulerLimits(
        max_model_len=80, max_num_seqs=8, max_num_batched_tokens=64, enable_prefix_caching=False
    )  # fmt: skip
    scheduler = Scheduler(limits, num_lanes=1, num_blocks=21, block_tokens=4)  # 80 tokens
    scheduler.add(request("idle", 20, max_tokens=50, priority=9))
    scheduler.add(request("later", 20, max_tokens=50, priority=1))
    for _ in range(2):
        scheduler.update(0, [9] * len(scheduler.plan(0).logit_rows))
    scheduler.add(request("urgent", 40, max_tokens=5, priority=-1))
    scheduler.plan(0)
    running = {one.request.request_id for one in scheduler._lanes[0].sequences}
    assert running == {"urgent", "later"}
    assert scheduler.counters["preemptions"] == 1
    scheduler.check_integrity()


# -- the whole, under the virtual clock --------------------------------------------------------------------------------

SMALL = Deployment(
    num_layers=2, num_experts=4, top_k=2, num_micro_batches=1,
    limits=SchedulerLimits(
        max_model_len=4096, max_num_seqs=2, enable_prefix_caching=False, num_gpu_blocks_override=400
    ),
)  # fmt: skip
COSTS = ConstantCosts(1e-3, 1e-3, 0.1e-3)


def test_in_the_whole_product_late_ones_end_and_leave_nothing_behind_and_the_urgent_and_the_light_come_first():
    long = [Arrival(0.0, 8, 200, flow="heavy") for _ in range(6)]
    asked = [
        *long,
        Arrival(0.1, 8, 5, flow="heavy", timeout_s=0.3),
        Arrival(0.1, 8, 1000, flow="heavy", timeout_s=3.0, priority=-1),
        Arrival(0.11, 8, 5, flow="light"),
    ]
    report = simulate(SMALL, COSTS, asked)
    kinds = [one.error_kind for one in report.requests]
    assert kinds == [""] * 6 + ["DeadlineExceeded", "DeadlineExceeded", ""]
    never_ran, ran_out, light = report.requests[6:]
    assert never_ran.num_tokens == 0
    assert 0.3 <= never_ran.end_s - 0.1 < 0.7
    assert ran_out.num_tokens > 100
    assert ran_out.end_s - 0.1 == pytest.approx(3.0, abs=0.3)
    assert light.first_token_s < report.requests[5].first_token_s, "it need not wait for what came long before it"


MIX = ["--urgent", "0.2", "--hurried", "0.2"]


@pytest.mark.slow
@pytest.mark.parametrize("mix", [[], MIX], ids=["alike", "mixed"])
def test_goodput_at_three_times_the_load_is_at_least_nine_tenths_of_that_at_capacity(mix):
    promised = ServiceLevel(ttft_slo_ms=1000, tpot_slo_ms=100)
    values = parse(["--seconds", "5", *mix])
    capacity = 39.6  # as tools/bench_overload.py measures it

    def goodput(load: float, service: ServiceLevel) -> int:
        results: list[Result] = simulated(values, arrivals_of(values, load * capacity), service)
        return sum(one.is_good(promised) for one in results)

    at_capacity = goodput(1.0, promised)
    assert goodput(3.0, promised) >= 0.9 * at_capacity
    assert mix or goodput(3.0, ServiceLevel()) < 0.5 * at_capacity, "which is what the objectives are for"
