"""A coordinator that takes another's place: what workers kept for it, and that no token is lost or doubled."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from msi.attention.journal import KEPT_S, Journal, RequestAccount, digest_of
from msi.attention.sequence import Sequence
from msi.control.adoption import standing_of
from msi.control.arrivals import LULL_S, TAKEOVER_S
from msi.control.inheritance import ASKED_AGAIN_S, LEAVES_WITHIN_S, LIVES_PER_TERM
from msi.control.members import Lost, Send
from msi.control.membership import Cluster
from msi.control.messages import (
    Account,
    AccountWanted,
    Adopted,
    Assignment,
    Drain,
    Goodbye,
    HelloAgain,
    PassDone,
    Topology,
    UsePlacement,
    WorkerReady,
)
from msi.control.request_routing import Router
from msi.control.takeover import ACCOUNTED_WITHIN_S, CLAIMED_WITHIN_S, Taken, Takeover
from msi.placement import Placement
from msi.planner.stage_costs import ConstantCosts
from msi.prompt_logprobs import PromptLogprobs
from msi.simulator.deployment import LIMITS, Deployment, Fault
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival
from msi.types import Place, Progress, Request, SamplingParams
from tests.everyday import NUM_SEEDS, mostly_slow
from tests.test_membership import HELLO, PLAN, beat, formed, hello


def request(name="r", output=(), scored=0, **params):
    params = SamplingParams(**{"max_tokens": 10, "seed": 1, **params})
    return Request(name, (1, 2, 3), params, output_token_ids=tuple(output), num_scored=scored)


def scores(first, count):
    return PromptLogprobs(first, 0, *(bytes(4 * count) for _ in range(2)), b"", b"")


def told(*tokens, name="r"):
    return tuple(Progress(name, (token,)) for token in tokens)


# -- what a worker keeps ---------------------------------------------------------------------------------------------


def sequence(name="r", output=(), scored=0):
    asked = request(name)
    one = Sequence(asked, 0, 13, [*asked.prompt_token_ids, *output])
    one.num_scored = scored
    return one


def test_a_worker_tells_of_each_request_what_it_told_last_and_how_much_before():
    journal = Journal()
    for name in ("r", "s"):
        journal.begins(name)
    for at, token in enumerate((7, 8, 9)):
        journal.told((*told(token), *told(token + 10, name="s")), (), float(at))
    journal.heard(1.0 + KEPT_S)
    assert journal.accounts([sequence("r", (7, 8, 9)), sequence("s", (17, 18, 19))]) == [
        RequestAccount("r", digest_of(request()), 1, 0, told(8, 9)),
        RequestAccount("s", digest_of(request("s")), 1, 0, told(18, 19, name="s")),
    ]
    assert digest_of(request("r")) == digest_of(request("s")), "what it is called does not matter"
    assert digest_of(request(seed=2)) != digest_of(request())


def test_what_ended_is_told_as_long_as_its_end_is_kept():
    journal = Journal()
    journal.begins("r")
    end = (Progress("r", (8,), "stop"),)
    journal.told(told(7), (), 0.0)
    journal.told(end, [sequence("r", (7, 8))], 3.0)
    journal.heard(2.0 + KEPT_S)
    assert journal.accounts([]) == [RequestAccount("r", digest_of(request()), 1, 0, end)]
    journal.heard(3.5 + KEPT_S)
    assert journal.accounts([]) == []


def test_another_request_of_the_same_name_is_not_taken_for_the_first():
    journal = Journal()
    journal.begins("r")
    journal.told((Progress("r", (7,), "stop"),), [sequence("r", (7,))], 0.0)
    journal.begins("r")
    journal.told(told(9), (), 1.0)
    assert journal.accounts([sequence("r", (9,))]) == [RequestAccount("r", digest_of(request()), 0, 0, told(9))]
    journal.forget("r")
    assert journal.accounts([]) == []


# -- whose it is -----------------------------------------------------------------------------------------------------


def held(takeover, *, worker="a", name="r", before=0, scored=0, progress=(), digest=None, now=0.0):
    takeover.account(worker, RequestAccount(name, digest or digest_of(request()), before, scored, progress), now)


def settle(takeover, now=0.0, is_complete=True):
    settled = takeover.settle(now, is_complete=is_complete)
    return settled.taken, settled.resumed, settled.cancelled


def test_a_client_gets_what_it_lacks_and_the_rest_from_the_worker_that_has_it():
    takeover = Takeover()
    held(takeover, before=1, progress=told(8, 9))
    takeover.progress("a", told(10))
    takeover.progress("b", told(99))
    asked = request(output=(7, 8))
    takeover.claim(b"c", asked)
    assert settle(takeover) == ([Taken(b"c", asked, "a", "r", told(9, 10))], [], [])
    assert not takeover


@pytest.mark.parametrize("has", [(7,), (7, 8, 9, 10)])
def test_what_no_worker_remembers_is_computed_again_from_what_the_client_has(has):
    """The first token that is lacking is not known any more; or the worker, in another life, is behind its client."""
    takeover = Takeover()
    held(takeover, before=2, progress=told(9))
    takeover.claim(b"c", request(output=has))
    assert settle(takeover) == ([], [(b"c", request(output=has))], [("a", "r")])


def test_scores_of_the_prompt_are_counted_too():
    takeover = Takeover()
    progress = (Progress("r", prompt_logprobs=scores(1, 1)), Progress("r", (7,), prompt_logprobs=scores(2, 1)))
    held(takeover, progress=progress)
    asked = request(scored=1)
    takeover.claim(b"c", asked)
    assert settle(takeover) == ([Taken(b"c", asked, "a", "r", progress[1:])], [], [])


def test_who_has_all_and_only_lacks_the_end_gets_that():
    takeover = Takeover()
    end = (Progress("r", (8,), "stop"),)
    held(takeover, before=1, progress=end)
    takeover.claim(b"c", request(output=(7,)))
    assert [one.behind for one in settle(takeover)[0]] == [end]


def test_a_client_waits_for_workers_that_may_come_and_for_all_that_they_say():
    takeover = Takeover()
    takeover.claim(b"c", request())
    assert settle(takeover, is_complete=False) == ([], [], [])
    takeover.begins("a", 1, 0.0)
    assert settle(takeover) == ([], [], [])
    held(takeover)
    assert settle(takeover)[0] == [Taken(b"c", request(), "a", "r", ())]
    takeover.claim(b"c", request("s"))
    takeover.begins("b", 1, 0.0)
    assert settle(takeover, ACCOUNTED_WITHIN_S + 0.1)[1] == [(b"c", request("s"))], "it was lost on its way"


def test_two_clients_with_one_name_get_each_their_own():
    takeover = Takeover()
    held(takeover, name="r", digest=digest_of(request(seed=1)))
    held(takeover, name="r~2", digest=digest_of(request(seed=2)))
    takeover.claim(b"d", request(seed=2))
    takeover.claim(b"c", request(seed=1))
    assert [(one.client, one.request_id) for one in settle(takeover)[0]] == [(b"d", "r~2"), (b"c", "r")]


def test_what_nobody_asks_for_is_cancelled_after_a_while_and_at_once_where_its_name_is_wanted():
    takeover = Takeover()
    for name in ("r", "s", "t"):
        held(takeover, name=name)
    held(takeover, name="over", progress=(Progress("over", (1,), "stop"),))
    assert takeover.displaced("s") == ("a", "s")
    takeover.claim(b"c", request("t", seed=5))
    assert settle(takeover) == ([], [(b"c", request("t", seed=5))], [("a", "t")]), "it is another's"
    assert takeover.holds("a", "r")
    assert settle(takeover, CLAIMED_WITHIN_S + 0.1) == ([], [], [("a", "r")])
    assert not takeover


def test_a_worker_or_a_client_that_is_lost_takes_what_it_said_along():
    takeover = Takeover()
    held(takeover)
    takeover.claim(b"c", request())
    takeover.worker_lost("a")
    takeover.client_lost(b"c")
    assert not takeover


def test_requests_that_are_taken_over_count_for_their_worker_and_end_as_others_do():
    router = Router()
    router.adopt(request("n", output=(7,)), "n~2", "a", b"c", 0.0)
    assert (len(router), router.load("a").num_requests) == (1, 1)
    end = Progress("n~2", (8,), "stop")
    assert router.progress("a", [end]) == {b"c": [end._replace(request_id="n")]}
    assert (len(router), router.load("a").num_requests) == (0, 0)


def test_requests_that_are_computed_again_come_before_new_ones_and_begin_where_their_client_is():
    router = Router()
    router.add(request("new"), b"c", 0.0)
    router.resume(request("old", output=(7, 8)), b"c", 0.0)
    (_, first), (_, second) = router.route({"a": 100})
    assert (first.request_id, first.output_token_ids, first.num_resumptions) == ("old", (7, 8), 1)
    assert second.request_id == "new"


# -- who goes on -----------------------------------------------------------------------------------------------------


TWO = replace(PLAN, num_attention=2)


def formed_of_two():
    cluster = formed(TWO)
    hello(cluster, b"a1", role="attention", worker_id="attention-1", pid=101)
    cluster.ready(b"a1", WorkerReady("attention-1", 0, "", 100))
    return cluster


def account(cluster, worker_id, **changes):
    """What a worker of a cluster would tell another coordinator."""
    member = cluster._members[worker_id]
    introduced = replace(HELLO, worker_id=worker_id, role=member.role, pid=member.pid)
    ready = WorkerReady(worker_id, member.incarnation, member.address, member.num_blocks)
    is_attention = member.role == "attention"
    one = Account(
        introduced, cluster._assignment(member), cluster.term, ready, cluster.plan.placement, is_linked=is_attention,
        is_draining=False, num_lanes=3 * is_attention, num_passes=17 * is_attention, num_requests=0, acked=41,
    )  # fmt: skip
    return replace(one, **changes)


def taken_over(before, now=0.0):
    """A cluster that knows all workers of another."""
    cluster = Cluster(replace(PLAN, instance="another token"), now)
    for worker_id in before._members:
        assert cluster.adopt(worker_id.encode(), account(before, worker_id), now) == [
            Send(worker_id.encode(), Adopted(2))
        ]
    return cluster


def test_workers_go_on_as_they_are_under_the_token_of_the_instance():
    cluster = taken_over(formed())
    assert cluster.plan == replace(PLAN, term=2)
    assert list(cluster.serving) == ["attention-0"]
    assert (cluster.num_lanes, cluster.term) == (3, 2)
    done = PassDone("attention-0", 0, 17, ())
    assert cluster.passed(b"attention-0", done) == []
    (ack,) = beat(cluster, b"attention-0", "attention-0", 1.0)
    assert ack.message.number == 42, "numbers go on, too"
    (topology,) = cluster.tick(1.0)
    assert isinstance(topology.message, Topology), "and no word of lanes"


def test_a_worker_that_serves_is_asked_and_one_that_was_given_up_is_not():
    cluster = Cluster(PLAN, 0.0)
    cluster._members["expert-0"] = formed()._members["expert-0"]
    former = formed()._members["attention-0"]
    cluster._members["expert-0"].state = "lost"
    (answer,) = cluster._inheritance.who_are_you(b"x", "expert-0", 0.0)
    assert isinstance(answer.message, HelloAgain)
    assert cluster._inheritance.who_are_you(b"a", former.worker_id, 0.0) == [Send(b"a", AccountWanted())]
    assert cluster._inheritance.who_are_you(b"a", former.worker_id, ASKED_AGAIN_S / 2) == [], (
        "what it said before comes at once"
    )
    assert cluster.passed(b"a", PassDone(former.worker_id, 0, 5, ())) is None


def test_nobody_hears_who_is_there_before_all_are_or_are_late():
    """An attention worker would drop the link to an expert worker that only comes a moment later."""
    before = formed()
    cluster = Cluster(PLAN, 0.0)
    cluster.adopt(b"a", account(before, "attention-0"), 0.0)
    cluster.adopt(b"e0", account(before, "expert-0"), 0.0)
    assert cluster.tick(1.0) == []
    cluster.adopt(b"e1", account(before, "expert-1"), 1.0)
    (topology,) = cluster.tick(1.1)
    assert [one.worker_id for one in topology.message.experts] == ["expert-0", "expert-1"]
    cluster = Cluster(replace(PLAN, timeouts=replace(PLAN.timeouts, lost_after_s=100.0)), 0.0)
    before = formed(cluster.plan)
    cluster.adopt(b"a", account(before, "attention-0"), 0.0)
    cluster.adopt(b"e0", account(before, "expert-0"), 0.0)
    (topology,) = cluster.tick(TAKEOVER_S + 0.1)
    assert [one.worker_id for one in topology.message.experts] == ["expert-0"]
    late = hello(cluster, b"e1", worker_id="expert-1", now=TAKEOVER_S)
    assert isinstance(late, Assignment)
    assert late.incarnation == 2 * LIVES_PER_TERM, (
        "later than any life of its that the coordinator before may have known"
    )


def test_workers_that_a_launcher_saw_end_are_not_waited_for_and_others_not_after_a_lull():
    """Streams of a worker that died with its coordinator stood still for eight seconds."""
    before = formed(TWO)
    for served, is_awaited in ((["attention-0", "attention-1"], True), (["attention-0"], False)):
        cluster = Cluster(TWO, 0.0)
        cluster.launched(served, {})
        cluster.adopt(b"a", account(before, "attention-0"), 0.0)
        assert cluster.awaits_accounts(1.0) == is_awaited
        assert bool(cluster.tick(1.0)) != is_awaited, "who is there"
        cluster.worker_exited("attention-1", 4711, "it was killed by signal 9", 1.5)
        assert not cluster.awaits_accounts(1.6)
    cluster = Cluster(TWO, 0.0)
    cluster.adopt(b"a", account(before, "attention-0"), 1.0)
    assert cluster.awaits_accounts(1.0 + LULL_S - 0.1)
    assert not cluster.awaits_accounts(1.0 + LULL_S + 0.1)


def test_what_a_worker_said_before_its_launcher_saw_it_end_does_not_count():
    before = formed()
    cluster = Cluster(PLAN, 0.0)
    one = account(before, "attention-0")
    cluster.worker_exited("attention-0", one.hello.pid, "it was killed by signal 9", 0.0)
    assert cluster.adopt(b"a", one, 0.1) == []
    assert not cluster.live("attention")


def test_a_worker_that_comes_before_those_who_serve_makes_nobody_begin_anew():
    """All others were taken for those of another instance; alone it got a life that expert workers knew a later one of,
    and never was connected.
    """
    before = formed_of_two()
    cluster = Cluster(replace(TWO, instance="another token"), 0.0)
    early = hello(cluster, b"new", role="attention", worker_id="attention-1", pid=4711)
    assert early.incarnation == 0
    again, adopted = cluster.adopt(b"e0", account(before, "expert-0"), 0.1)
    assert (again.route, type(again.message), adopted) == (b"new", HelloAgain, Send(b"e0", Adopted(2)))
    assert cluster.adopt(b"a0", account(before, "attention-0"), 0.2) == [Send(b"a0", Adopted(2))]
    late = hello(cluster, b"new", role="attention", worker_id="attention-1", pid=4711)
    assert (late.instance, late.place.index, late.incarnation) == ("token", 1, 2 * LIVES_PER_TERM)


def test_a_coordinator_wants_no_more_workers_than_its_launcher_runs():
    """The one before died right after a removal, before anybody heard of that."""
    cluster = Cluster(TWO, 0.0)
    cluster.launched([], {"attention": 1, "expert": 1})
    assert cluster.plan.wanted_places == {"attention": (0,), "expert": (0, 1)}, "both have experts"
    before = formed_of_two()
    moved = Placement(((), tuple(range(8))), 8, version=1)
    cluster.adopt(b"attention-1", account(before, "attention-1", placement=moved), 0.1)
    cluster.tick(0.2)
    assert cluster.plan.wanted_places == {"attention": (1,), "expert": (1,)}
    assert hello(cluster, b"e1", worker_id="expert-1").place.index == 1, "it died with the coordinator"
    assert Cluster(TWO, 0.0).plan.at_most({"expert": 0}, {"expert": [0]}).wanted["expert"] == 1


@pytest.mark.parametrize("worker_id", ["attention-1", "expert-1"])
def test_a_worker_that_its_launcher_does_not_start_again_leaves_though_nobody_else_heard_of_it(worker_id):
    """It would have been waited for for ever once it died."""
    before = formed_of_two()
    cluster = Cluster(TWO, 0.0)
    cluster.launched([], {"attention": 2, "expert": 2}, [worker_id])
    sent = [cluster.adopt(one.encode(), account(before, one), 1.0) for one in before._members]
    member = cluster._members[worker_id]
    assert (member.state, member.is_leaving, member.leaves_by) == ("draining", True, 1.0 + LEAVES_WITHIN_S)
    assert (Send(b"attention-1", Drain()) in [one for some in sent for one in some]) == (worker_id == "attention-1")


def standing(cluster, worker_id, now=0.0):
    return standing_of(cluster._members[worker_id], cluster.plan, now)


def test_a_coordinator_after_a_removal_waits_for_as_many_workers_as_the_one_before():
    before = formed_of_two()
    assert standing(before, "attention-0") is None
    early = account(before, "expert-0")
    before.ask_to_leave("attention-1", 9.0, lambda instructions: None)
    early = replace(early, standing=standing(before, "expert-0"))
    before.goodbye(b"a1", Goodbye("attention-1", 0))
    assert standing(before, "attention-0").attention == (0,)
    for accounts in ([early, "attention-0", "expert-1"], ["attention-0", early, "expert-1"]):
        cluster = Cluster(replace(TWO, instance="another token"), 0.0)
        for one in accounts:
            told = one if isinstance(one, Account) else account(before, one, standing=standing(before, one))
            cluster.adopt(told.hello.worker_id.encode(), told, 0.0)
        assert cluster.plan.wanted == {"attention": 1, "expert": 2}
        assert not cluster.awaits_accounts(0.1)
        assert cluster.plan.num_changes >= before.plan.num_changes


@pytest.mark.parametrize("worker_id", ["attention-1", "expert-1"])
def test_a_worker_that_was_told_to_leave_leaves_the_next_coordinator_too(worker_id):
    """It was waited for for ever."""
    before = formed_of_two()
    before.ask_to_leave(worker_id, 9.0, lambda instructions: None)
    cluster = Cluster(replace(TWO, instance="another token"), 0.0)
    for one in before._members:
        cluster.adopt(one.encode(), account(before, one, standing=standing(before, one, 2.0)), 100.0)
    member = cluster._members[worker_id]
    assert (member.state, member.is_leaving, member.leaves_by) == ("draining", True, 107.0)
    if worker_id == "expert-1":
        sent = cluster.tick(100.1)
        assert {one.message.placement.experts[1] for one in sent if isinstance(one.message, UsePlacement)} == {()}
    else:
        cluster.goodbye(b"attention-1", Goodbye("attention-1", 0))
        assert cluster.plan.wanted["attention"] == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hello": replace(HELLO, fingerprint="other", role="attention")}, "its model differs"),
        ({"instance": "of others"}, "it served another instance"),
        ({"limits": replace(PLAN.limits, max_num_seqs=7)}, "was started with other options"),
        ({"place": Place(1)}, "there is room for 1 attention workers in the instance as it is now"),
        ({"worker_id": "expert-0", "role": "expert"}, "the coordinator knew it already"),
    ],
)
def test_whoever_does_not_fit_begins_anew(changes, why):
    before = formed()
    cluster = Cluster(PLAN, 0.0)
    cluster.adopt(b"e0", account(before, "expert-0"), 0.0)
    one = account(before, "attention-0")
    of_account = {name: changes.pop(name) for name in ("hello",) if name in changes}
    one = replace(one, assignment=replace(one.assignment, **changes), **of_account)
    (answer,) = cluster.adopt(b"a", one, 0.0)
    assert isinstance(answer.message, HelloAgain)
    assert why in answer.message.reason


def test_a_worker_that_is_lost_after_it_was_taken_over_is_lost_as_any():
    cluster = taken_over(formed())
    lost = [one for one in cluster.tick(100.0) if isinstance(one, Lost)]
    assert [one.worker_id for one in lost] == ["attention-0"]


# -- storms ----------------------------------------------------------------------------------------------------------

STORMY = Deployment(
    num_layers=2, num_experts=4, top_k=2, num_attention=2, num_expert=2, num_micro_batches=2,
    limits=replace(LIMITS, num_gpu_blocks_override=200),
)  # fmt: skip
COSTS = ConstantCosts(3e-3, 3e-3, 0.2e-3, 0.3e-3)


@pytest.mark.parametrize("seed", mostly_slow(range(NUM_SEEDS // 2)))
def test_coordinators_die_again_and_again_and_every_request_gets_all_its_tokens(seed):
    """That each is the right one, the simulation itself asserts."""
    chance = random.Random(seed)
    arrivals = [Arrival(chance.uniform(0, 8), chance.randrange(1, 40), chance.randrange(1, 200)) for _ in range(16)]
    faults, at_s = [], 0.0
    for _ in range(4):
        at_s += chance.uniform(0.2, 3)
        faults.append(Fault(at_s, "coordinator", "dead", chance.uniform(0.05, 4)))
        at_s += faults[-1].amount
    if seed % 3 == 2:  # and with one of them an attention worker
        faults.append(Fault(faults[1].at_s + chance.uniform(-0.5, 0.5), "attention-1", "dead"))
    report = simulate(STORMY, COSTS, arrivals, faults=faults, seed=seed, limit_s=300)
    assert not report.failed, report.failed
    assert report.num_tokens == sum(one.output_len for one in arrivals)
