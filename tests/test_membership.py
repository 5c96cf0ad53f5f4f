"""Who belongs to an instance: events in, instructions out."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.control.members import NO_STATUS, InstancePlan, Lost, Send
from msi.control.membership import STUCK_AFTER_S, Cluster
from msi.control.messages import (
    PROTOCOL_VERSION,
    Assignment,
    Drain,
    Fence,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    HelloAgain,
    Linked,
    PassDone,
    PeerLost,
    Placed,
    Pulse,
    Refused,
    Topology,
    Undecided,
    UseLanes,
    WorkerBelief,
    WorkerFailed,
    WorkerHello,
    WorkerReady,
)
from msi.errors import ConfigError
from msi.placement import Placement, place_evenly
from msi.precision import Precision
from msi.settings import SchedulerLimits, Timeouts
from msi.types import Place

PLAN = InstancePlan("token", 1, 2, False, place_evenly(8, 2), SchedulerLimits(1024, 64, 512))
CHOICE = "waiting for other workers: the role that they leave is this one's"
HELLO = WorkerHello(PROTOCOL_VERSION, "", "expert", 100, "here", "print", Precision.of("float32"))


def hello(cluster, route, now=0.0, **changes):
    """The answer to it."""
    (instruction,) = cluster.hello(route, replace(HELLO, **changes), now)
    assert isinstance(instruction, Send)
    assert instruction.route == route
    return instruction.message


def formed(plan=PLAN):
    """A cluster of attention-0, expert-0 and expert-1, all ready and linked, on 3 lanes."""
    cluster = Cluster(plan, 0.0)
    for route, role in ((b"e0", "expert"), (b"e1", "expert"), (b"a0", "attention")):
        given = hello(cluster, route, role=role)
        cluster.ready(route, WorkerReady(given.worker_id, 0, f"shm://{given.worker_id}", 100))
    cluster.linked(b"a0", Linked("attention-0", 0, True))
    cluster.use_lanes(3)
    return cluster


def beat(cluster, route, worker_id, now, incarnation=0):
    member = cluster._members[worker_id]
    ready = None if member.state == "loading" else WorkerReady(worker_id, incarnation, member.address, 100)
    belief = WorkerBelief(0, ready, member.is_linked, cluster.num_lanes)
    return cluster.heartbeat(route, Heartbeat(worker_id, incarnation, NO_STATUS, belief), now)


def test_places_are_given_in_order_and_then_refused():
    cluster = Cluster(PLAN, 0.0)
    first, second = hello(cluster, b"1"), hello(cluster, b"2")
    assert [(one.worker_id, one.role, one.place.node, one.incarnation) for one in (first, second)] == [
        ("expert-0", "expert", 0, 0),
        ("expert-1", "expert", 1, 0),
    ]
    chosen = hello(cluster, b"4", role="worker")
    assert (chosen.worker_id, chosen.role) == ("attention-0", "attention")
    for route, role in ((b"3", "expert"), (b"5", "worker")):
        assert isinstance(hello(cluster, route, 0.1, role=role), Undecided), "one of them may be dead"
    for route, worker_id in ((b"1", "expert-0"), (b"2", "expert-1")):
        beat(cluster, route, worker_id, 1.0)
    assert cluster.tick(1.0) == [Send(b"3", Refused("all 2 expert workers of this instance are there already"))]
    beat(cluster, b"4", "attention-0", 1.1)
    assert cluster.tick(1.2) == [Send(b"5", Refused("all 3 workers of this instance are there already"))]


def test_who_asks_again_before_the_answer_came_gets_the_same_answer():
    cluster = Cluster(PLAN, 0.0)
    for role in ("worker", "expert"):
        assert hello(cluster, role.encode(), role=role) == hello(cluster, role.encode(), role=role)


def roles_given(instructions):
    return {one.route: one.message.role for one in instructions if isinstance(one.message, Assignment)}


def say(cluster, route, role, now=0.0, **changes):
    return cluster.hello(route, replace(HELLO, role=role, **changes), now)


def test_a_worker_for_any_role_takes_none_from_those_who_want_a_certain_one():
    cluster = Cluster(replace(PLAN, num_expert=1, placement=place_evenly(8, 1)), 0.0)
    assert say(cluster, b"any", "worker") == [Send(b"any", Undecided(CHOICE))]
    assert cluster.sentence(3.0) == "waiting for attention worker 1 of 1 (2 missing, 1 for any role here), 3 s"
    assert roles_given(say(cluster, b"e0", "expert", worker_id="expert-0")) == {b"e0": "expert", b"any": "attention"}
    assert cluster.routes == [b"any", b"e0"]


def test_who_wants_a_certain_role_and_comes_first_leaves_the_others():
    cluster = Cluster(PLAN, 0.0)
    assert roles_given(say(cluster, b"a0", "attention")) == {b"a0": "attention"}
    for route in (b"1", b"2"):
        assert roles_given(say(cluster, route, "worker")) == {route: "expert"}, "only one role is left: no waiting"


def test_workers_for_any_role_are_shared_out_when_the_last_one_is_there():
    cluster = Cluster(PLAN, 0.0)
    for route in (b"1", b"2", b"1"):
        assert say(cluster, route, "worker") == [Send(route, Undecided(CHOICE))]
    assert cluster.routes == [b"1", b"2"]
    assert roles_given(say(cluster, b"3", "worker")) == {b"1": "expert", b"2": "expert", b"3": "attention"}


def test_an_undecided_worker_counts_once_and_only_while_it_is_heard_of():
    cluster = Cluster(PLAN, 0.0)
    say(cluster, b"1", "worker", process="p")
    say(cluster, b"2", "worker", process="p")  # its connection broke
    assert cluster.routes == [b"2"]
    say(cluster, b"3", "worker", 10.0)
    cluster.tick(16.0)
    assert cluster.routes == [b"3"]


def test_an_undecided_worker_whose_model_differs_is_refused_in_the_end():
    cluster = Cluster(PLAN, 0.0)
    say(cluster, b"1", "worker", fingerprint="other")
    assert roles_given(say(cluster, b"e0", "expert")) == {b"e0": "expert"}
    _, refused = say(cluster, b"a0", "attention")
    assert refused.route == b"1"
    assert "model differs" in refused.message.reason


def test_a_worker_for_any_role_that_had_one_gets_it_at_once():
    cluster = Cluster(PLAN, 0.0)
    assert roles_given(say(cluster, b"1", "worker", worker_id="attention-0")) == {b"1": "attention"}
    cluster.worker_failed(b"1", WorkerFailed("attention-0", 0, "gone"))
    assert roles_given(say(cluster, b"2", "worker", worker_id="attention-0")) == {b"2": "attention"}


def test_once_the_instance_has_served_whoever_comes_fills_a_place_at_once():
    cluster = formed()
    cluster.tick(0.0)
    for route, worker_id in ((b"e1", "expert-1"), (b"a0", "attention-0")):
        cluster.worker_failed(route, WorkerFailed(worker_id, 0, "gone"))
    assert roles_given(say(cluster, b"any", "worker")) == {b"any": "expert"}


def test_a_default_id_says_its_place():
    cluster = Cluster(PLAN, 0.0)
    assert hello(cluster, b"1", worker_id="expert-1").place == Place(1)
    assert hello(cluster, b"2", worker_id="mine").place == Place(0)


def test_a_live_id_refuses_a_second():
    cluster = formed()
    before = cluster.stats()
    assert hello(cluster, b"x", worker_id="expert-1", pid=7) == Undecided("waiting for a sign of life of expert-1")
    beat(cluster, b"e1", "expert-1", 0.1)
    assert cluster.tick(0.2) == [], "that may have lain here since before the second asked"
    beat(cluster, b"e1", "expert-1", 1.0)
    (refused,) = cluster.tick(1.0)
    assert refused.route == b"x"
    assert "expert-1 is live already (pid 100 on here)" in refused.message.reason
    assert cluster.worker_failed(b"x", WorkerFailed("expert-1", 0, "refused")) == [], "its farewell is its own"
    assert cluster.stats() == before


def test_a_second_of_an_id_takes_the_place_of_a_first_that_nobody_knew_to_be_dead():
    """It was refused for a process that was gone, and so ended the instance."""
    cluster = Cluster(PLAN, 0.0)
    hello(cluster, b"e0", worker_id="expert-0")
    assert isinstance(hello(cluster, b"x", 1.0, worker_id="expert-0", pid=7), Undecided)
    assert isinstance(hello(cluster, b"x", 6.0, worker_id="expert-0", pid=7), Undecided), "it asks again"
    out, given = cluster.tick(15.5)
    assert isinstance(out.message, HelloAgain)
    assert (given.route, given.message.worker_id, given.message.incarnation) == (b"x", "expert-0", 1)


def test_what_the_launcher_saw_end_is_lost_at_once_and_its_place_is_free():
    for state in ("loading", "ready"):
        cluster = formed() if state == "ready" else Cluster(PLAN, 0.0)
        if state == "loading":
            hello(cluster, b"e1", worker_id="expert-1")
        assert isinstance(hello(cluster, b"x", worker_id="expert-1", pid=7), Undecided)
        instructions = cluster.worker_exited("expert-1", 100, "it was killed by signal 9", 0.5)
        assert roles_given(instructions) == {b"x": "expert"}
        assert "killed by signal 9" in cluster._members["expert-1"].reason or instructions[-1].message.incarnation == 1
        assert cluster.worker_exited("expert-1", 100, "it was killed by signal 9", 0.6) == [], "that one is not the new"


def test_what_a_dead_process_said_before_is_not_heard_any_more():
    cluster = Cluster(PLAN, 0.0)
    assert cluster.worker_exited("expert-0", 100, "it ended with status 1", 0.0) == []
    assert say(cluster, b"e0", "expert", 0.1, worker_id="expert-0") == []
    cluster.tick(60.0)
    assert roles_given(say(cluster, b"e0", "expert", 60.1)) == {b"e0": "expert"}, "numbers of processes come again"


def test_a_worker_whose_connection_broke_begins_a_new_life_under_its_own_id():
    cluster = Cluster(PLAN, 0.0)
    first = hello(cluster, b"1", worker_id="expert-0", process="p")
    instructions = cluster.hello(b"2", replace(HELLO, worker_id="expert-0", process="p"), 1.0)
    again = instructions[-1]
    assert (again.route, again.message.worker_id, again.message.incarnation) == (b"2", "expert-0", 1)
    assert first.incarnation == 0
    assert "began a new life" in instructions[0].message.reason
    assert isinstance(hello(cluster, b"3", 2.0, worker_id="expert-0", process="q"), Undecided)


def test_a_hello_asked_twice_before_the_answer_came_is_one_life():
    cluster = Cluster(PLAN, 0.0)
    assert hello(cluster, b"1") == hello(cluster, b"1", worker_id="expert-0")


def test_other_versions_models_and_roles_are_refused_with_a_sentence():
    cluster = formed(replace(PLAN, num_expert=3, placement=place_evenly(8, 3)))
    other = PROTOCOL_VERSION + 1
    said = hello(cluster, b"x", protocol_version=other).reason
    assert f"protocol version {other}, the coordinator {PROTOCOL_VERSION}" in said
    assert "model differs" in hello(cluster, b"x", fingerprint="other").reason
    assert "role 'cook'" in hello(cluster, b"x", role="cook").reason


def test_attention_workers_learn_of_expert_workers_as_they_become_ready():
    cluster = Cluster(PLAN, 0.0)
    hello(cluster, b"a0", role="attention")
    (send,) = cluster.ready(b"a0", WorkerReady("attention-0", 0, "", 100))
    assert send == Send(b"a0", Topology((), {}))
    hello(cluster, b"e0")
    (send,) = cluster.ready(b"e0", WorkerReady("expert-0", 0, "shm://e0", 0))
    assert [(expert.place.node, expert.address) for expert in send.message.experts] == [(0, "shm://e0")]
    assert not cluster.serving


def test_it_serves_once_linked_and_told_its_lanes_and_is_told_once():
    cluster = formed()
    assert list(cluster.serving) == ["attention-0"]
    assert cluster.linked(b"a0", Linked("attention-0", 0, True)) == []
    cluster.linked(b"a0", Linked("attention-0", 0, False))
    assert not cluster.serving


def test_a_silent_expert_worker_is_lost_fenced_and_comes_back_as_its_next_incarnation():
    cluster = formed()
    for route, name in ((b"a0", "attention-0"), (b"e0", "expert-0")):
        assert beat(cluster, route, name, 3.0)[-1] == Send(route, HeartbeatAck(1))
    out, topology = cluster.tick(3.5)
    assert isinstance(out.message, HelloAgain)
    assert [expert.worker_id for expert in topology.message.experts] == ["expert-0"]
    assert "no sign of life" in topology.message.lost["expert-1"]
    (again,) = beat(cluster, b"e1", "expert-1", 3.6)
    assert isinstance(again.message, HelloAgain)
    back = hello(cluster, b"e1", worker_id="expert-1")
    assert (back.place, back.incarnation) == (Place(1), 1)
    (again,) = beat(cluster, b"e1", "expert-1", 3.7)
    assert isinstance(again.message, HelloAgain), "the old life's heartbeats count no more"
    assert beat(cluster, b"e1", "expert-1", 3.7, incarnation=1) == [Send(b"e1", HeartbeatAck(1))]


def test_a_lost_attention_worker_loses_its_requests_and_frees_its_seats():
    cluster = formed()
    for route, name in ((b"e0", "expert-0"), (b"e1", "expert-1")):
        beat(cluster, route, name, 3.0)
    out, lost, *fences = cluster.tick(3.5)
    assert isinstance(out.message, HelloAgain)
    assert isinstance(lost, Lost)
    assert lost.worker_id == "attention-0"
    assert fences == [Send(b"e0", Fence("attention-0")), Send(b"e1", Fence("attention-0"))]
    again = hello(cluster, b"new", role="attention", worker_id="attention-0")
    cluster.ready(b"new", WorkerReady("attention-0", again.incarnation, "", 100))
    assert cluster.linked(b"new", Linked("attention-0", 1, True)) == [Send(b"new", UseLanes(3))]


def test_a_link_that_breaks_puts_the_expert_worker_out_at_once():
    cluster = formed()
    out, topology = cluster.peer_lost(b"a0", PeerLost("attention-0", 0, "expert-1", 0, "connection lost"))
    assert out.route == b"e1"
    assert [expert.worker_id for expert in topology.message.experts] == ["expert-0"]
    assert cluster.peer_lost(b"a0", PeerLost("attention-0", 0, "expert-1", 0, "again")) == []
    assert cluster.peer_lost(b"a0", PeerLost("attention-0", 0, "expert-0", 4, "another life")) == []


def test_draining_an_attention_worker_stops_requests_to_it():
    cluster = formed()
    assert cluster.draining(b"a0", "attention-0", 0) == [Send(b"a0", Drain())]
    assert not cluster.serving
    _, lost, *_ = cluster.goodbye(b"a0", Goodbye("attention-0", 0))
    assert lost == Lost("attention-0", "it was drained")


PIDS = {"attention-0": 100, "attention-1": 101, "expert-0": 110, "expert-1": 111}
SIGNS_OF_AN_END = {
    "a peer's word": lambda cluster, route, name: cluster.peer_lost(
        b"a1", PeerLost("attention-1", 0, name, 0, "closed")
    ),
    "its goodbye": lambda cluster, route, name: cluster.goodbye(route, Goodbye(name, 0)),
    "its exit": lambda cluster, route, name: cluster.worker_exited(name, PIDS[name], "it ended with status 0", 0.5),
    "its crash": lambda cluster, route, name: cluster.worker_exited(
        name, PIDS[name], "it was killed by signal 11", 0.5, has_crashed=True
    ),
    "its failure": lambda cluster, route, name: cluster.worker_failed(route, WorkerFailed(name, 0, "no memory")),
}


@pytest.mark.parametrize("is_late", [False, True], ids=["", "before its experts are elsewhere"])
@pytest.mark.parametrize("signs", list(permutations(SIGNS_OF_AN_END, 2)), ids=" then ".join)
@pytest.mark.parametrize(("name", "route"), [("expert-0", b"e0"), ("attention-0", b"a0")])
def test_a_worker_that_was_told_to_leave_is_not_waited_for_however_its_end_is_noticed(name, route, signs, is_late):
    """Where the wrong one of its goodbye, its exit and a peer's word came first, it was waited for for ever."""
    cluster = Cluster(replace(PLAN, num_attention=2, max_expert=3), 0.0)
    for one, pid in PIDS.items():
        role, number = one.split("-")
        hello(cluster, f"{role[0]}{number}".encode(), role=role, worker_id=one, pid=pid)
    cluster.draining(route, name, 0)

    def notice():
        for sign in signs:
            SIGNS_OF_AN_END[sign](cluster, route, name)

    if is_late:
        notice()
    cluster.placing.placement = Placement(((), tuple(range(8))), 8, version=1)
    if not is_late:
        notice()
    cluster.tick(0.6)
    wanted = {"attention": 2, "expert": 2, name.split("-")[0]: 1}
    assert cluster.plan.wanted == wanted
    cluster.worker_exited("attention-1", PIDS["attention-1"], "it was killed by signal 9", 0.7)
    cluster.worker_exited("expert-1", PIDS["expert-1"], "it was killed by signal 9", 0.7)
    assert cluster.plan.wanted == wanted, "nobody asked these to end"


def test_who_has_the_place_of_one_that_left_stays_wanted():
    cluster = formed(replace(PLAN, num_attention=2, max_attention=3))
    hello(cluster, b"a1", role="attention", worker_id="attention-1", pid=101)
    cluster.ready(b"a1", WorkerReady("attention-1", 0, "", 100))
    cluster._formation.has_served = True
    cluster.draining(b"a0", "attention-0", 0)
    cluster.goodbye(b"a0", Goodbye("attention-0", 0))
    assert cluster.plan.wanted_places["attention"] == (1,)
    assert isinstance(hello(cluster, b"a5", role="attention", worker_id="attention-5", pid=105), Undecided)
    beat(cluster, b"a1", "attention-1", 1.0)
    for at in (1.1, 1.2):
        cluster.tick(at)
    assert cluster._members["attention-5"].place.index == 0
    assert cluster.plan.wanted_places["attention"] == (0, 1)


def test_an_expert_worker_that_an_operator_asked_to_leave_and_that_cannot_serves_on():
    """Its place was given up when it crashed later on."""
    cluster = formed()
    for route, name in ((b"e0", "expert-0"), (b"e1", "expert-1"), (b"a0", "attention-0")):
        beat(cluster, route, name, 1.0)
    cluster.tick(1.0)
    member = cluster.ask_to_leave("expert-1", 9.0, lambda instructions: None)
    cluster.tick(1.1)
    cluster.placed(b"e0", Placed("expert-0", 0, 1, False, "the memory that is free is too little"))
    for version, has_former in ((2, True), (2, False)):
        for one in cluster._members.values():
            one.placement_version, one.has_former = version, has_former and one.role == "expert"
        cluster.tick(1.2)
    assert (member.state, member.is_leaving, cluster.take_staying()) == ("ready", False, ["expert-1"])
    assert list(cluster.serving) == ["attention-0"]


def test_expert_workers_that_all_want_to_end_wait_for_all_requests():
    cluster = formed()
    assert cluster.draining(b"e0", "expert-0", 0) == []
    assert cluster.serving, "the other one may take its experts"
    assert cluster.draining(b"e1", "expert-1", 0) == []
    assert not cluster.serving
    assert cluster.no_requests_left() == [Send(b"e0", Drain()), Send(b"e1", Drain())]


def test_what_is_waited_for_is_said_by_name():
    cluster = Cluster(PLAN, 0.0)
    assert cluster.sentence(2.0) == "waiting for attention worker 1 of 1, 2 s"
    hello(cluster, b"a0", role="attention")
    hello(cluster, b"e0")
    assert cluster.sentence(12.0) == "waiting for expert worker 2 of 2, 12 s"
    hello(cluster, b"e1")
    assert cluster.sentence(12.0) == "loading weights: attention-0 0 %, expert-0 0 %, expert-1 0 %, 12 s"
    assert formed().sentence(1.0) == "ready"


def test_all_workers_hold_and_compute_in_what_the_instance_was_told_or_the_first_of_them_does():
    """Whoever comes first decides where nobody said it; each is told, whatever it would have done by itself."""
    first, other = Precision.of("float32"), Precision.of("bfloat16")
    cluster = Cluster(PLAN, 0.0)
    assert hello(cluster, b"e0", precision=first).precision == first
    assert hello(cluster, b"e1", precision=other).precision == first
    told = Cluster(replace(PLAN, precision=Precision(compute="float32")), 0.0)
    assert hello(told, b"e0", precision=first).precision == first
    assert hello(told, b"e1", precision=other).reason == (
        "it computes in bfloat16, the instance in float32; give all workers the same `dtype`"
    )
    for unsaid in (Precision(), replace(first, rows="auto")):
        assert "it leaves open what it computes in" in hello(told, b"e1", precision=unsaid).reason


def test_cpus_that_round_differently_are_not_in_one_instance():
    cluster, compiled = Cluster(PLAN, 0.0), "compiled products"
    assert not hasattr(hello(cluster, b"e0", products=compiled), "reason")
    assert "install g++ on all of these hosts, or on none" in hello(cluster, b"e1", products="torch's products").reason
    assert not hasattr(hello(cluster, b"e1"), "reason"), "a GPU, or what computes in float32"


def test_cpus_of_one_instance_hold_their_matrices_alike():
    cluster = Cluster(replace(PLAN, precision=Precision(quantization="none")), 0.0)
    quantised = replace(Precision.of("float32"), quantization="int8")
    assert "it holds weights with `quantization` int8, the instance with none" in (
        hello(cluster, b"e0", precision=quantised).reason
    )
    cluster = Cluster(replace(PLAN, precision=Precision()), 0.0)
    stored = replace(Precision.of("float32"), quantization="fp8")
    assert hello(cluster, b"e0", precision=stored).precision == stored, "as the checkpoint is"
    assert "it holds weights with `quantization` none, the instance with fp8" in (
        hello(cluster, b"e1", precision=Precision.of("float32")).reason
    )


def test_caches_and_rows_of_one_instance_are_alike():
    hello_of = replace(Precision.of("float32"), kv_cache="fp8")
    assert "it has `kv_cache_dtype` fp8, the instance another; give all workers the same" in (
        hello(Cluster(PLAN, 0.0), b"a0", precision=hello_of).reason
    )
    cluster = Cluster(replace(PLAN, precision=Precision(kv_cache="fp8")), 0.0)
    assert "it has `kv_cache_dtype` another, the instance fp8" in hello(cluster, b"e0").reason
    assert "it has `rows_dtype` fp8, the instance another" in (
        hello(cluster, b"e0", precision=replace(hello_of, rows="fp8")).reason
    )
    assert not hasattr(hello(cluster, b"e0", precision=hello_of), "reason")


def test_it_gives_up_with_the_same_sentence():
    cluster = Cluster(replace(PLAN, timeouts=Timeouts(5.0)), 0.0)
    cluster.tick(4.0)
    assert cluster.failure == ""
    cluster.tick(6.0)
    assert cluster.failure == "gave up after 5 s: waiting for attention worker 1 of 1, 6 s"


def test_a_worker_that_cannot_load_ends_the_start():
    cluster = Cluster(PLAN, 0.0)
    hello(cluster, b"e0")
    cluster.worker_failed(b"e0", WorkerFailed("expert-0", 0, "model.norm.weight is missing"))
    assert cluster.failure == "model.norm.weight is missing"


def test_messages_of_strangers_change_nothing():
    cluster = formed()
    before = cluster.stats()
    assert isinstance(cluster.ready(b"x", WorkerReady("expert-0", 0, "shm://evil", 1))[0].message, HelloAgain)
    assert cluster.linked(b"x", Linked("attention-0", 0, False)) == []
    assert cluster.goodbye(b"x", Goodbye("expert-0", 0)) == []
    assert cluster.peer_lost(b"x", PeerLost("attention-0", 0, "expert-0", 0, "lie")) == []
    assert cluster.stats() == before


def test_colocated_has_one_worker_and_no_expert_workers():
    cluster = Cluster(replace(PLAN, is_colocated=True, num_expert=1), 0.0)
    assert "runs colocated" in hello(cluster, b"e0").reason
    given = hello(cluster, b"a0", role="attention")
    assert isinstance(given, Assignment)
    (send,) = cluster.ready(b"a0", WorkerReady("attention-0", 0, "inproc://0", 100))
    assert [expert.address for expert in send.message.experts] == ["inproc://0"]


# -- whose lateness it is --------------------------------------------------------------------------------------------


def live(cluster):
    return {worker.worker_id for worker in cluster.stats() if worker.state != "lost"}


@pytest.mark.parametrize("stopped_s", [2.5, 4.5, 6.0, 600.0])
def test_a_coordinator_that_stood_still_takes_its_own_absence_for_nobodys(stopped_s):
    cluster = formed()
    for now in (0.25, 0.5):
        cluster.tick(now)
    woken_at = 0.75 + stopped_s
    assert cluster.tick(woken_at, late_s=stopped_s) == []
    assert live(cluster) == {"attention-0", "expert-0", "expert-1"}
    beat(cluster, b"a0", "attention-0", woken_at + 1)
    out = [one for step in range(1, 14) for one in cluster.tick(woken_at + step * 0.25)]
    assert live(cluster) == {"attention-0"}, "who is silent from then on is lost as ever"
    assert {one.message.reason for one in out if isinstance(one.message, HelloAgain)} == {
        "the coordinator gave it up: no sign of life for 3.2 s"
    }


def test_workers_that_are_awaited_get_the_lateness_too():
    cluster = Cluster(replace(PLAN, timeouts=Timeouts(5.0)), 0.0)
    say(cluster, b"any", "worker")
    cluster.tick(304.0, late_s=300.0)
    assert cluster.failure == ""
    assert cluster.routes == [b"any"]
    cluster.tick(306.0)
    assert "gave up after 5 s" in cluster.failure


@given(st.lists(st.tuples(st.floats(0.0, 20.0), st.booleans()), max_size=60), st.integers(0, 2))
def test_nobody_who_speaks_every_second_of_our_own_time_is_ever_lost(ticks, silent):
    """Whatever the delays: they pass for the coordinator, not for the others, and who is silent is lost in the end."""
    cluster, now = formed(), 0.0
    members = [(b"a0", "attention-0"), (b"e0", "expert-0"), (b"e1", "expert-1")]
    for index, (late_s, _) in enumerate([*ticks, *[(0.0, True)] * 20]):
        now += 0.25 + late_s
        cluster.tick(now, late_s)
        if index % 4 == 3:
            for at, (route, worker_id) in enumerate(members):
                if at != silent:
                    beat(cluster, route, worker_id, now)
    assert live(cluster) == {worker_id for at, (_, worker_id) in enumerate(members) if at != silent}


# -- signs of life from a busy process -------------------------------------------------------------------------------


def with_process():
    cluster = Cluster(PLAN, 0.0)
    hello(cluster, b"e0", worker_id="expert-0", process="secret")
    return cluster


def test_a_pulse_keeps_a_worker_whose_loop_is_busy():
    cluster = with_process()
    for second in range(1, 60):
        cluster.pulse(Pulse("expert-0", 0, "secret", min(29.0, second)), second)
        cluster.tick(second)
    assert live(cluster) == {"expert-0"}


@pytest.mark.parametrize(
    "pulse",
    [
        Pulse("expert-0", 0, "guess", 0.0),
        Pulse("expert-0", 0, "", 0.0),
        Pulse("expert-0", 1, "secret", 0.0),
        Pulse("expert-1", 0, "secret", 0.0),
        Pulse("expert-0", 0, "guess", 1e9),
    ],
    ids=repr,
)
def test_a_pulse_that_does_not_prove_whose_it_is_counts_for_nobody(pulse):
    cluster = with_process()
    for second in range(1, 16):
        assert cluster.pulse(pulse, second) == []
    cluster.tick(15.5)
    assert live(cluster) == set()


def test_without_a_secret_no_pulse_counts():
    cluster = Cluster(PLAN, 0.0)
    hello(cluster, b"e0", worker_id="expert-0")
    cluster.pulse(Pulse("expert-0", 0, "", 0.0), 15.0)
    cluster.tick(15.5)
    assert live(cluster) == set()


def test_a_loop_that_stands_for_long_is_given_up_though_its_process_lives():
    cluster = with_process()
    (out, *_) = cluster.pulse(Pulse("expert-0", 0, "secret", STUCK_AFTER_S + 1), 31.0)
    assert "its loop has been standing still for 31 s" in out.message.reason
    assert live(cluster) == set()


# -- what was lost on its way ----------------------------------------------------------------------------------------


def test_what_a_worker_turns_out_not_to_know_is_said_again():
    cluster = formed()

    def answers(**belief):
        ready = WorkerReady("attention-0", 0, "", 100)
        heartbeat = Heartbeat("attention-0", 0, NO_STATUS, WorkerBelief(0, ready, **belief))
        return [one.message for one in cluster.heartbeat(b"a0", heartbeat, 1.0)][:-1]

    assert answers(is_linked=True, num_lanes=3) == []
    assert answers(is_linked=True, num_lanes=0) == [UseLanes(3)]
    (topology,) = answers(is_linked=False, num_lanes=3)
    assert [expert.worker_id for expert in topology.experts] == ["expert-0", "expert-1"]
    assert not cluster.serving, "it is not connected, whatever became of the message that said so"
    assert answers(is_linked=True, num_lanes=3) == []
    assert list(cluster.serving) == ["attention-0"]


def test_a_ready_worker_whose_word_was_lost_is_ready_by_its_heartbeat():
    cluster = Cluster(PLAN, 0.0)
    hello(cluster, b"e0", worker_id="expert-0")
    ready = WorkerReady("expert-0", 0, "shm://e0", 0)
    cluster.heartbeat(b"e0", Heartbeat("expert-0", 0, NO_STATUS, WorkerBelief(ready=ready)), 1.0)
    assert [worker.state for worker in cluster.stats()] == ["ready"]


def test_tokens_that_miss_others_before_them_end_the_life_that_lost_them():
    cluster = formed()
    assert cluster.passed(b"a0", PassDone("attention-0", 0, 0, ())) == []
    (again,) = cluster.passed(b"x", PassDone("attention-0", 0, 1, ()))
    assert isinstance(again.message, HelloAgain), "its connection was another: it begins a new life at once"
    assert again.route == b"x"
    assert cluster.passed(b"a0", PassDone("attention-0", 1, 1, ())) is None
    assert cluster.passed(b"a0", PassDone("attention-0", 0, 1, ())) == []
    _, lost, *_ = cluster.passed(b"a0", PassDone("attention-0", 0, 3, ()))
    assert lost == Lost("attention-0", "tokens of its were lost on the way")


# -- nodes of several ranks --------------------------------------------------------------------------------------------


def test_a_node_is_ready_when_all_its_ranks_are():
    plan = replace(PLAN, num_expert=2, expert_ranks=2, attention_ranks=2)
    cluster = Cluster(plan, 0.0)
    routes = (b"e0", b"e1", b"e2", b"e3")
    given = [hello(cluster, route, role="expert") for route in routes]
    assert [(one.worker_id, one.place) for one in given] == [
        ("expert-0", Place(0, 0, 2)), ("expert-1", Place(0, 1, 2)), ("expert-2", Place(1, 0, 2)),
        ("expert-3", Place(1, 1, 2)),
    ]  # fmt: skip
    for route in (b"a0", b"a1"):
        name = hello(cluster, route, role="attention").worker_id
        cluster.ready(route, WorkerReady(name, 0, "", 100))
    assert cluster.ready(b"e2", WorkerReady("expert-2", 0, "shm://2", 0)) == [
        Send(route, Topology((), {})) for route in (b"a0", b"a1")
    ]
    cluster.ready(b"e0", WorkerReady("expert-0", 0, "shm://0", 0))
    (told, _) = cluster.ready(b"e1", WorkerReady("expert-1", 0, "shm://1", 0))
    assert [(one.place, one.address) for one in told.message.experts] == [
        (Place(0, 0, 2), "shm://0"), (Place(0, 1, 2), "shm://1"),
    ]  # fmt: skip
    cluster.ready(b"e3", WorkerReady("expert-3", 0, "shm://3", 0))
    cluster.use_lanes(1)
    cluster.linked(b"a0", Linked("attention-0", 0, True))
    assert cluster.serving == {}
    cluster.linked(b"a1", Linked("attention-1", 0, True))
    assert list(cluster.serving) == ["attention-0"], "requests go to the first rank of a node"
    lost = [one for one in cluster.tick(100.0) if isinstance(one, Lost)]
    assert [one.worker_id for one in lost] == ["attention-0", "attention-1"]


def test_nodes_of_more_than_one_rank_are_refused_by_name_where_work_would_begin():
    Place(3).check_is_built()
    with pytest.raises(ConfigError, match=r"rank 1 of 2 of node 0; nodes of more than one rank \(tensor parallelism\)"):
        Place(0, 1, 2).check_is_built()
