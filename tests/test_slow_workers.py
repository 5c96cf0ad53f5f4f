"""Workers that are slow beside their peers: who is, who leaves after how long, and who stays."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from dataclasses import replace

import pytest

from msi.control.counters import AttentionCounters, ExpertCounters
from msi.control.membership import Cluster
from msi.control.messages import Goodbye, Linked, WorkerReady
from msi.control.replacements import FIRST_PAUSE_S, Replacements
from msi.control.slow_workers import SlowWorkerPolicy
from msi.control.slowness import LEAST_BATCHES, LEAST_LOOKS, Done, Slowness, ratio_to
from msi.errors import ConfigError
from msi.placement import place_evenly, place_with_replicas
from msi.planner.stage_costs import ConstantCosts
from msi.settings import SlowWorkers
from msi.simulator.deployment import Deployment, Fault
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival
from tests.comings_and_goings import Act, lived_through
from tests.everyday import mostly_slow
from tests.test_faults import until
from tests.test_live_workers import COMES_WITHIN_S, ctl
from tests.test_lost_experts import GREEDY, Streams, checkpoint
from tests.test_membership import PLAN, hello
from tests.test_membership import beat as cluster_beat

__all__ = ["checkpoint"]  # a fixture

SETTINGS = SlowWorkers(drain_slow_after_s=30, drain_slow_factor=4.0)
SLOW = ("expert-1", 0)


# -- who is slow -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("done", "ratio"), [
    (Done(8.0, (10, 100, 0)), 8.0),
    (Done(8.0, (10, 800, 0)), 1.0),  # it has more rows
    (Done(1.0, (10, 5, 0)), 1.0),  # it has fewer: each takes longer, batches do not
    (Done(8.0, (10, 100, 5000)), 8.0),  # what the others have none of says nothing
    (Done(8.0, (0, 0, 0)), 0.0),
], ids=["slow", "more rows", "fewer rows", "an amount of its own", "idle"])  # fmt: skip
def test_whoever_has_more_to_do_is_not_slow_for_it(done, ratio):
    others = [Done(0.5, (10, 100, 0)), Done(1.0, (10, 100, 0)), Done(20.0, (10, 100, 0))]
    assert ratio_to(done, others) == ratio
    assert ratio_to(done, []) == 0.0


def test_long_contexts_and_many_weights_are_reasons_to_take_long():
    short = Done.by(AttentionCounters(passes=10, batch_tokens=80, batch_contexts=1000, attention_s=1.0))
    long = Done.by(AttentionCounters(passes=10, batch_tokens=80, batch_contexts=9000, attention_s=9.0))
    assert ratio_to(long, [short]) == 1.0
    few = Done.by(ExpertCounters(batches=10, rows_landed=80, weight_bytes_read=1000, expert_batches_s=1.0))
    many = Done.by(ExpertCounters(batches=10, rows_landed=80, weight_bytes_read=9000, expert_batches_s=9.0))
    assert ratio_to(many, [few]) == 1.0


class Workers:
    """Three experts that compute a batch every tenth of a second."""

    def __init__(self, settings=SETTINGS):
        self.slowness = Slowness(settings)
        self.now = 0.0
        self.done = {(f"expert-{index}", 0): Done(0.0, (0, 0)) for index in range(3)}

    def run(self, seconds, batch_s=0.01, num_batches=10):
        """`batch_s`, `num_batches` a second: of the one that may be slow."""
        for _ in range(seconds):
            for life, done in self.done.items():
                count, each_s = (num_batches, batch_s) if life == SLOW else (10, 0.01)
                amounts = (done.amounts[0] + count, done.amounts[1] + 8 * count)
                self.done[life] = Done(done.seconds + count * each_s, amounts)
            self.now += 1.0
            self.slowness.look(self.done, self.now)
        return self.slowness


def test_who_is_slow_for_long_leaves_and_who_recovers_or_is_slow_for_a_moment_does_not():
    workers = Workers()
    assert workers.run(3).slow == []
    assert workers.run(29, 0.05).slow == [SLOW]
    assert workers.slowness.ratio(SLOW) == pytest.approx(5.0)
    assert workers.slowness.slow_for_long == []
    assert workers.run(1, 0.035).slow == [SLOW], "nearly as slow as before is no recovery"
    assert workers.slowness.slow_for_long == [], "nor does it count as slow"
    assert workers.run(1, 0.05).slow_for_long == [SLOW]
    assert workers.run(1, 0.01).slow == [], "as fast as the others: it begins anew"
    assert workers.run(29, 0.05).slow_for_long == []
    workers.done[SLOW] = Done(0.0, (0, 0))
    workers.done[("expert-1", 1)] = workers.done.pop(SLOW)
    workers.slowness.look(workers.done, workers.now)
    assert workers.slowness.ratio(SLOW) == 0.0, "between two looks, too"
    assert workers.run(3).slow == [], "of its former life nothing is held against it"


def test_what_was_not_measured_counts_for_little():
    workers = Workers()
    workers.run(2)
    for number in range(1, LEAST_LOOKS + 1):
        workers.run(600, 0.05, num_batches=0)  # as one that is set aside
        assert workers.slowness.slow_for_long == []
        assert workers.run(1, 0.05, num_batches=LEAST_BATCHES).slow == [SLOW]
        assert workers.slowness.slow_for_long == ([SLOW] if number == LEAST_LOOKS else [])


def test_where_it_is_off_nobody_leaves():
    workers = Workers(replace(SETTINGS, drain_slow_after_s=0))
    workers.run(2)
    assert workers.run(1000, 0.5).slow_for_long == []
    with pytest.raises(ConfigError, match="drain_slow_factor"):
        SlowWorkers(drain_slow_factor=1.0)


# -- who may leave -----------------------------------------------------------------------------------------------------


def cluster_of(num_attention=1, num_expert=3, redundancy=1, copies=None):
    placement = copies or place_with_replicas(8, num_expert, redundancy)
    plan = replace(PLAN, num_attention=num_attention, num_expert=num_expert, placement=placement, slow=SETTINGS)
    cluster = Cluster(plan, 0.0)
    for role, count in (("expert", num_expert), ("attention", num_attention)):
        for index in range(count):
            route = f"{role[0]}{index}".encode()
            given = hello(cluster, route, role=role, pid=100 + index if role == "expert" else 200 + index)
            cluster.ready(route, WorkerReady(given.worker_id, 0, f"shm://{given.worker_id}", 100))
            if role == "attention":
                cluster.linked(route, Linked(given.worker_id, 0, True))
    cluster.use_lanes(3)
    return cluster


def policy_of(cluster, name, refuses="", can_start=False):
    """One in which a worker has been slow for long, and whom it let go."""
    let_go = []

    def leave(member, why):
        if refuses:
            raise ConfigError(refuses)
        let_go.append((member.worker_id, why))

    policy = SlowWorkerPolicy(SETTINGS, cluster, leave, lambda: can_start)
    for second in range(1, 40):
        for role in ("expert", "attention"):
            for member in cluster.live(role):
                cluster_beat(cluster, member.route, member.worker_id, float(second))
                count, seconds = 100 * second, second * (0.5 if member.worker_id == name else 0.1)
                counted = (
                    {"experts": ExpertCounters(batches=count, rows_landed=count, expert_batches_s=seconds)}
                    if role == "expert"
                    else {"attention": AttentionCounters(passes=count, batch_tokens=count, attention_s=seconds)}
                )
                member.status = replace(member.status, **counted)
        policy.look(float(second))
    return policy, let_go


def test_an_expert_worker_whose_experts_others_can_take_leaves_once():
    policy, let_go = policy_of(cluster := cluster_of(), "expert-1")
    assert let_go == [("expert-1", "it took 5.0 times as long as the others")]
    assert policy.counters() == {"slow_workers": 1.0, "slow_workers_drained": 1.0}
    assert policy.ratio("expert-1", 0) == pytest.approx(5.0)
    assert policy.ratio("expert-9", 0) == 0.0
    cluster.goodbye(b"e1", Goodbye("expert-1", 0))
    assert policy.replacements_due(1e6) == [], "nobody starts workers here"


def test_an_attention_worker_leaves_where_another_takes_requests():
    assert policy_of(cluster_of(num_attention=2), "attention-0")[1] == [
        ("attention-0", "it took 5.0 times as long as the others")
    ]


@pytest.mark.parametrize(("cluster", "why"), [
    (lambda: cluster_of(num_expert=2), "each expert is on 2 workers, and without it no more than 1 are there"),
    (lambda: cluster_of(copies=place_evenly(8, 3)), "no other worker holds expert 3"),
], ids=["too few left", "no replicas"])  # fmt: skip
def test_whose_experts_would_be_less_safe_stays_and_that_is_said_once(cluster, why, caplog):
    policy, let_go = policy_of(cluster(), "expert-1")
    assert (let_go, policy.num_let_go) == ([], 0)
    assert [record.message for record in caplog.records if "it stays" in record.message] == [
        f"expert-1 takes 5.0 times as long as the others; it stays: {why}"
    ]


def test_nobody_leaves_while_another_does_or_loads():
    cluster = cluster_of(num_expert=4)
    member = cluster._members["expert-1"]
    policy = SlowWorkerPolicy(SETTINGS, cluster, lambda member, why: None)
    assert policy.why_stays(member) == ""
    cluster.ask_to_leave("expert-3", math.inf, lambda instructions: None)
    assert policy.why_stays(member) == "expert-3 leaves already"
    cluster = cluster_of(num_expert=4)
    cluster._members["expert-3"].state = "loading"
    policy = SlowWorkerPolicy(SETTINGS, cluster, lambda member, why: None)
    assert policy.why_stays(cluster._members["expert-1"]) == "workers are still loading"


def test_who_cannot_leave_is_asked_once(caplog):
    policy, _ = policy_of(cluster_of(), "expert-1", refuses="there is no way")
    assert policy.num_let_go == 0
    assert sum("there is no way" in record.message for record in caplog.records) == 1


def test_the_reason_is_told_when_it_has_gone():
    cluster = cluster_of()
    member = cluster.ask_to_leave(
        "expert-1", 60.0, lambda instructions: None, "it took 5.0 times as long as the others"
    )
    cluster.goodbye(b"e1", Goodbye("expert-1", 0))
    assert member.reason == "it was drained: it took 5.0 times as long as the others"
    cluster.worker_exited("expert-1", member.pid, "it ended", 1.0)
    assert member.reason == "it ended: it took 5.0 times as long as the others"


# -- who comes in its place --------------------------------------------------------------------------------------------


def leaver(name="expert-1"):
    member = cluster_of(num_expert=4)._members[name]
    member.state, member.is_leaving = "draining", True
    return member


def gone(member):
    member.state, member.is_leaving = "lost", False


def test_another_comes_once_the_slow_one_has_gone_and_once_alone():
    replacements, member = Replacements(), leaver()
    assert replacements.begin(member, 4, 10.0) == 0.0
    assert replacements.due({"expert": 4}, 11.0) == []
    gone(member)
    assert replacements.due({"expert": 3}, 12.0) == ["expert"]
    assert replacements.due({"expert": 3}, 13.0) == []


def test_nobody_comes_for_one_that_stays_or_whose_place_has_been_taken():
    replacements, stays, taken = Replacements(), leaver(), leaver()
    replacements.begin(stays, 4, 0.0)
    replacements.begin(taken, 4, 0.0)
    stays.state, stays.is_leaving = "ready", False
    gone(taken)
    assert replacements.due({"expert": 4}, 1.0) == []
    gone(stays)
    assert replacements.due({"expert": 2}, 2.0) == []


def test_where_those_that_come_are_slow_too_the_next_waits_twice_as_long_each_time_until_all_was_well():
    replacements, now, pauses = Replacements(), 0.0, []
    for _ in range(4):
        member = leaver()
        pauses.append(replacements.begin(member, 4, now))
        gone(member)
        if pauses[-1]:
            assert replacements.due({"expert": 3}, now + pauses[-1] - 0.1) == []
        now += pauses[-1]
        assert replacements.due({"expert": 3}, now) == ["expert"]
    assert pauses == [0.0, FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert replacements.begin(leaver("attention-0"), 1, now) == 0.0, "the other role has a pause of its own"
    now += 16 * FIRST_PAUSE_S
    gone(member := leaver())
    assert replacements.begin(member, 4, now) == 0.0
    assert replacements.due({"expert": 3}, now) == ["expert"]
    assert replacements.begin(leaver(), 4, now) == FIRST_PAUSE_S


def test_that_another_comes_is_said_with_when(caplog):
    policy_of(cluster_of(), "expert-1", can_start=True)
    assert [record.message for record in caplog.records] == [
        "expert-1 takes 5.0 times as long as the others, and leaves: its experts go to others; "
        "once it has gone, another one is started in its place"
    ]


# -- in an instance ----------------------------------------------------------------------------------------------------

COSTS = ConstantCosts(3e-3, 3e-3, 0.2e-3, 0.3e-3)
SIMULATED = Deployment(
    num_layers=2, num_experts=6, top_k=2, num_attention=2, num_expert=3, num_micro_batches=2, expert_redundancy=1,
    slow=SlowWorkers(drain_slow_after_s=5),
)  # fmt: skip


@pytest.mark.parametrize("worker", mostly_slow(["expert-1", "attention-1"]))
def test_a_slow_worker_is_drained_and_requests_notice_nothing_but_that_they_are_fast_again(worker):
    arrivals = [Arrival(0.8 * number, 4, 100) for number in range(30)]
    fault = Fault(2.0, worker, "slow", 10.0)
    drained = simulate(SIMULATED, COSTS, arrivals, faults=[fault])
    assert (drained.num_failed, drained.num_tokens) == (0, 30 * 100)
    took_s, usual_s = (
        [one.end_s - one.arrival_s for one in report.requests[22:]]
        for report in (drained, simulate(SIMULATED, COSTS, arrivals))
    )
    assert max(took_s) < 2 * max(usual_s), "those that came after it had left"


@pytest.mark.parametrize("worker", mostly_slow(["expert-1", "attention-1"]))
def test_where_somebody_starts_workers_another_one_has_its_place_and_serves(worker):
    arrivals = [Arrival(0.8 * number, 4, 100) for number in range(16)]
    faults = [Fault(2.0, worker, "slow", 10.0)]
    report, world = lived_through(SIMULATED, COSTS, arrivals, [Act(16.0, "rebalance")], 0, faults=faults)
    assert not report.failed, report.failed
    role = worker.partition("-")[0]
    coordinator = world.coordinator
    assert coordinator.operator.slow.num_let_go == 1
    assert len(coordinator._cluster.live(role)) == coordinator._cluster.plan.wanted[role] == {"expert": 3}.get(role, 2)
    assert worker not in world.pids or world.pids[worker] > 5, "the slow one is not there any more"


async def slowed(pid):
    """A process runs for a twentieth of the time, in pulses."""
    try:
        while True:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.095)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.005)
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_slow_expert_worker_leaves_a_running_instance_and_another_one_comes_in_its_place(checkpoint):
    from msi import Engine  # real processes

    async with Engine.local(
        model=checkpoint, attention_workers=1, expert_workers=3, expert_redundancy=1, micro_batches=2,
        threads_per_worker=1, transport="shm", drain_slow_after_s=2, drain_slow_factor=3.0,
    ) as engine:  # fmt: skip
        expected = await asyncio.wait_for(Streams(engine).ended, COMES_WITHIN_S)
        slow_pid = engine.pids["expert-1"]
        slow = asyncio.create_task(slowed(slow_pid))

        async def run():
            while True:
                assert await Streams(engine).ended == expected

        running = asyncio.create_task(run())

        async def has_been_replaced():
            assert not running.done(), running.result()
            told = await ctl(engine, "status")
            live = [one for one in told["workers"] if one["role"] == "expert" and one["state"] == "ready"]
            return (
                len(live) == told["wanted"]["expert"] == 3
                and slow_pid not in [one["pid"] for one in live]
                and told["placement"]["stage"] == "settled"
                and sum(len(held) > 0 for held in told["placement"]["experts"].values()) == 3
            )

        try:
            async with asyncio.timeout(2 * COMES_WITHIN_S):
                while not await leaves(engine, slow):
                    assert not running.done(), running.result()
                    await asyncio.sleep(0.2)
            await until(has_been_replaced, 2 * COMES_WITHIN_S)
            assert (await engine.stats()).counters["slow_workers_drained"] == 1
        finally:
            running.cancel()
            slow.cancel()
        async for output in engine.generate([5] * 4, GREEDY):
            assert output.token_ids


async def leaves(engine, slow):
    """Whether it does; then it is as fast as the others, so that it ends soon."""
    if not (await engine.stats()).counters["slow_workers_drained"]:
        return False
    slow.cancel()
    return True
