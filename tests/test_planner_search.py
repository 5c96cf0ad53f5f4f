"""The deployment search against plain loops, what every plan keeps to, and what is refused in which words."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from msi.errors import ConfigError
from msi.planner import equations as eq
from msi.planner.algorithm1 import FITTED_AT, Fits, algorithm1
from msi.planner.assumptions import BASELINES, DEFAULTS, Baseline
from msi.planner.choose import pareto_front
from msi.planner.colocated import Group, best_colocated
from msi.planner.hardware import read_catalogue
from msi.planner.model_shape import ModelShape
from msi.planner.node_pair import spread_up_to
from msi.planner.performance import (
    Roofline,
    active_experts,
    attention_node_bytes,
    expert_gemm_s,
    expert_layer_s,
    expert_node_bytes,
    nodes_per_token,
)
from msi.planner.pipeline import isolated_pass_s, steady_pass_s
from msi.planner.plan import Plan, Workload, plan_from_json
from msi.planner.search import node_pairs, search
from msi.planner.task import OBJECTIVES, Limits, Pool, Task, score_of

CATALOGUE = read_catalogue()
A800, H20, L40S, H200, L20 = (CATALOGUE.gpu(name) for name in ("a800", "h20", "l40s", "h200", "l20"))
MIXTRAL = CATALOGUE.model("mixtral-8x22b")
PAPERS = Workload(input_len=571, output_len=159, tpot_s=0.150)
FEW = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])

SMALL = ModelShape(
    name="small",
    num_layers=8,
    hidden_size=2048,
    intermediate_size=8192,
    num_experts=4,
    top_k=2,
    num_heads=16,
    num_kv_heads=2,
    head_dim=128,
    vocab_size=32000,
)
WITH_ALL = replace(
    SMALL,
    name="with dense layers and shared experts",
    num_dense_layers=2,
    dense_intermediate_size=8192,
    shared_intermediate_size=4096,
    num_experts=6,
    sliding_window=512,
)
FEW_BLOCKS = replace(A800, name="little memory", memory_bytes=8e9)
FULL = replace(A800, name="full", memory_bytes=(SMALL.expert_bytes + 2e9 + 2e6) / 0.9)  # 2 MB beside one expert
WEAK = replace(
    L20, name="weak", price=0.1, power_w=20.0, memory_bytes_per_s=100e9, flops_per_s=10e12
)  # many are needed


def task_of(model=MIXTRAL, attention=(A800, 64), expert=None, workload=PAPERS, objective="gpu", **limits) -> Task:
    pools = Pool(*attention), Pool(*(expert or attention))
    return Task(
        model=model,
        workload=workload,
        attention=pools[:1],
        expert=pools[1:],
        objective=objective,
        limits=Limits(**limits),
    )


# -------------------------------------------------------------------------------------------------- exhaustive search


@dataclass(frozen=True)
class Tried:
    """One deployment at one micro-batch that keeps every limit."""

    attention: str
    expert: str
    tp_a: int
    tp_e: int
    n_a: int
    experts_per_node: int
    m: int
    b_a: int
    tpot_s: float
    score: float


def try_everything(task: Task) -> Iterator[Tried]:
    """Every deployment and every micro-batch, one at a time."""
    limits = task.limits
    for attention, expert in itertools.product(task.attention, task.expert):
        is_shared = attention.gpu == expert.gpu
        for tp_a, tp_e in itertools.product(limits.tp_sizes, limits.tp_sizes):
            if tp_a > attention.gpu.gpus_per_node or tp_e > expert.gpu.gpus_per_node:
                continue
            for experts_per_node in range(1, task.model.num_experts + 1):
                if task.model.num_experts % experts_per_node:
                    continue
                n_e = task.model.num_experts // experts_per_node
                for n_a in range(1, attention.count + 1):
                    gpus_a, gpus_e = n_a * tp_a, n_e * tp_e
                    if gpus_a > attention.count or gpus_e > expert.count:
                        continue
                    if is_shared and gpus_a + gpus_e > max(attention.count, expert.count):
                        continue
                    for m, b_a in itertools.product(limits.micro_batches, range(1, limits.max_micro_batch + 1)):
                        if limits.max_batch and b_a * m * n_a > limits.max_batch:
                            continue
                        one = predict_one(task, attention, expert, tp_a, tp_e, n_a, n_e, experts_per_node, m, b_a)
                        if one is not None:
                            yield one


def predict_one(task, attention, expert, tp_a, tp_e, n_a, n_e, experts_per_node, m, b_a) -> Tried | None:
    model, given = task.model, task.given
    mean_len = task.workload.input_len + task.workload.output_len / 2
    kept_len = mean_len
    if model.sliding_window:
        mean_len = min(mean_len, model.sliding_window)
    held = attention_node_bytes(
        model, tp_a, given, micro_batch=b_a, num_micro_batches=m, mean_len=kept_len, num_expert_nodes=n_e
    )
    if held > tp_a * attention.gpu.memory_bytes * given.memory_utilization:
        return None
    held = expert_node_bytes(
        model, tp_e, given, micro_batch=b_a, num_micro_batches=m, num_attention_nodes=n_a,
        experts_per_node=experts_per_node,
    )  # fmt: skip
    if held > tp_e * expert.gpu.memory_bytes * given.memory_utilization:
        return None
    tokens, L = b_a * n_a, model.num_layers - model.num_dense_layers
    rows = tokens * model.top_k / n_e
    pair = Roofline(model, attention.gpu, tp_a, expert.gpu, tp_e, given)
    t_a = pair.attention_s(float(b_a), b_a * mean_len) + pair.pass_s(float(b_a)) / L
    t_e = expert_layer_s(model, expert.gpu, tp_e, rows, active_experts(model, experts_per_node, tokens), given)
    message = b_a * nodes_per_token(model, experts_per_node) / n_e * model.hidden_size * 2
    t_c = pair.comm_s(message, float(n_a), float(n_e))
    tpot_s = L * max(m * t_a, m * t_e, t_a + t_e + 2 * t_c)
    if tpot_s > task.workload.tpot_s:
        return None
    gpus_a, gpus_e = n_a * tp_a, n_e * tp_e
    if attention.gpu == expert.gpu:
        instances = max(attention.count, expert.count) // (gpus_a + gpus_e)
        instances = min(instances, attention.count // gpus_a, expert.count // gpus_e)
    else:
        instances = min(attention.count // gpus_a, expert.count // gpus_e)
    spent = {
        "gpu": gpus_a + gpus_e,
        "cost": gpus_a * attention.gpu.price + gpus_e * expert.gpu.price,
        "watt": gpus_a * attention.gpu.power_w + gpus_e * expert.gpu.power_w,
        "cluster": 1 / instances,
    }
    score = b_a * m * n_a / tpot_s / spent[task.objective]
    return Tried(
        attention.gpu.name, expert.gpu.name, tp_a, tp_e, n_a, experts_per_node, m, b_a, float(tpot_s), float(score)
    )


SHORT = Workload(input_len=200, output_len=100, tpot_s=0.150)
LONG = replace(SHORT, input_len=40_000)
EXHAUSTED = {
    "one stock of five": task_of(SMALL, (A800, 5), workload=SHORT, max_micro_batch=20, tp_sizes=(1, 2)),
    "one stock, slow": task_of(
        SMALL, (A800, 5), workload=replace(SHORT, tpot_s=0.0016), max_micro_batch=90, tp_sizes=(1,)
    ),
    "one stock, two counts": task_of(SMALL, (A800, 5), (A800, 3), SHORT, "cluster", max_micro_batch=12, tp_sizes=(1,)),
    "one stock, other two counts": task_of(
        SMALL, (A800, 2), (A800, 6), SHORT, "cluster", max_micro_batch=12, tp_sizes=(1,)
    ),
    "long contexts in little memory": task_of(
        SMALL, (FEW_BLOCKS, 4), workload=LONG, max_micro_batch=60, tp_sizes=(1, 2)
    ),
    "two types, by cost": task_of(SMALL, (H20, 3), (L40S, 4), SHORT, "cost", max_micro_batch=20, tp_sizes=(1, 2)),
    "two types, by watt, slow": task_of(
        SMALL, (H20, 3), (L20, 3), replace(SHORT, tpot_s=0.004), "watt", max_micro_batch=80, tp_sizes=(1,)
    ),
    "at most 40 sequences": task_of(SMALL, (A800, 5), workload=SHORT, max_batch=40, max_micro_batch=45, tp_sizes=(1,)),
    "dense layers, shared experts, a window": task_of(
        WITH_ALL, (H200, 3), (A800, 6), SHORT, "cluster", max_micro_batch=12, tp_sizes=(1, 2), micro_batches=(1, 3)
    ),
    "little room beside the expert": task_of(SMALL, (A800, 3), (FULL, 4), SHORT, max_micro_batch=60, tp_sizes=(1,)),
    "either type on either side": Task(
        model=SMALL,
        workload=SHORT,
        attention=(Pool(H20, 2), Pool(L40S, 3)),
        expert=(Pool(H20, 2), Pool(L40S, 3)),
        objective="cost",
        limits=Limits(max_micro_batch=16, tp_sizes=(1,), micro_batches=(2, 3)),
    ),
}


@pytest.mark.parametrize("name", EXHAUSTED)
def test_the_search_finds_what_trying_everything_finds(name):
    task = EXHAUSTED[name]
    tried = list(try_everything(task))
    plan = search(task)[0]
    best = max(one.score for one in tried)
    assert score_of(plan, task.objective) == pytest.approx(best, rel=1e-9)
    same = [
        one
        for one in tried
        if (one.attention, one.expert, one.tp_a, one.tp_e, one.n_a, one.experts_per_node, one.m)
        == (
            plan.attention_gpu, plan.expert_gpu, plan.tp_attention, plan.tp_expert, plan.num_attention_nodes,
            plan.experts_per_node, plan.num_micro_batches,
        )
    ]  # fmt: skip
    assert plan.micro_batch == max(one.b_a for one in same)
    assert plan.tpot_s == pytest.approx(next(one.tpot_s for one in same if one.b_a == plan.micro_batch))


def test_the_cases_above_meet_every_limit():
    limits = {search(task)[0].limited_by for task in EXHAUSTED.values()}
    assert limits == {"tpot", "attention memory", "expert memory", "batch limit"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_many_attention_nodes_are_found_between_the_steps_tried_first(objective):
    task = task_of(CATALOGUE.model("dbrx"), (WEAK, 300), (H200, 32), objective=objective, tp_sizes=(1,))
    best = max(float(one.scores(at)[0].max()) for one in node_pairs(task) if len(at := one.candidates(range(1, 301))))
    plan = search(task)[0]
    assert plan.num_attention_nodes > 16
    assert score_of(plan, objective) >= best * 0.99


def test_attention_nodes_are_tried_without_gaps_above_a_tenth():
    numbers = spread_up_to(1000)
    assert numbers[:16] == list(range(1, 17))
    assert numbers[-1] == 1000
    assert all(low < high <= max(low + 1, low * 1.1) for low, high in itertools.pairwise(numbers))
    assert [spread_up_to(most) for most in (-3, 0, 1, 2)] == [[], [], [1], [1, 2]]


# ------------------------------------------------------------------------------------------------------- what holds


@st.composite
def tasks(draw) -> Task:
    gpus = st.sampled_from([A800, H20, L40S, H200])
    counts = st.sampled_from([2, 5, 8, 13, 16])
    attention = draw(gpus), draw(counts)
    expert = attention if draw(st.booleans()) else (draw(gpus), draw(counts))
    workload = Workload(
        input_len=draw(st.sampled_from([1, 300, 4000])),
        output_len=draw(st.sampled_from([1, 200])),
        tpot_s=draw(st.sampled_from([0.003, 0.02, 0.06, 0.15, 1.0])),
    )
    model = draw(st.sampled_from([SMALL, WITH_ALL, *(CATALOGUE.model(name) for name in ("mixtral-8x7b", "dbrx"))]))
    max_batch = draw(st.sampled_from([0, 0, 7, 500]))
    objective, tp_sizes = draw(st.sampled_from(OBJECTIVES)), draw(st.sampled_from([(1,), (1, 2), (2, 8)]))
    return task_of(model, attention, expert, workload, objective, max_batch=max_batch, tp_sizes=tp_sizes)


def search_or_none(task: Task, num_plans: int = 5) -> list[Plan]:
    try:
        return search(task, num_plans=num_plans)
    except ConfigError:
        return []


def check(plan: Plan, task: Task) -> None:
    """What every disaggregated plan keeps to."""
    attention = next(pool for pool in task.attention if pool.gpu.name == plan.attention_gpu)
    expert = next(pool for pool in task.expert if pool.gpu.name == plan.expert_gpu)
    assert plan.tpot_s <= task.workload.tpot_s * (1 + 1e-9)
    assert plan.attention_memory_bytes <= plan.attention_memory_limit_bytes
    assert plan.attention_memory_limit_bytes == pytest.approx(plan.tp_attention * attention.gpu.memory_bytes * 0.9)
    assert plan.expert_memory_bytes <= plan.expert_memory_limit_bytes
    assert plan.expert_memory_limit_bytes == pytest.approx(plan.tp_expert * expert.gpu.memory_bytes * 0.9)
    assert plan.num_expert_nodes * plan.experts_per_node == task.model.num_experts
    assert plan.batch_size == plan.micro_batch * plan.num_micro_batches * plan.num_attention_nodes
    assert plan.batch_size <= (task.limits.max_batch or math.inf)
    for side, tp, gpus in (
        (attention, plan.tp_attention, plan.num_attention_gpus),
        (expert, plan.tp_expert, plan.num_expert_gpus),
    ):
        assert tp <= side.gpu.gpus_per_node
        assert plan.num_instances * gpus <= side.count
    if attention.gpu == expert.gpu:
        assert plan.num_instances * plan.num_gpus <= max(attention.count, expert.count)
    assert plan.num_instances >= 1
    L, m = plan.num_layers, plan.num_micro_batches
    assert task.model.num_layers - task.model.num_dense_layers == L
    assert plan.tpot_s == pytest.approx(steady_pass_s(plan.stages, m, L))
    assert plan.step_s == pytest.approx(isolated_pass_s(plan.stages, m, L))
    assert plan.tokens_per_s == pytest.approx(plan.batch_size / plan.tpot_s)
    gpus_a, gpus_e = plan.num_attention_gpus, plan.num_expert_gpus
    cost = gpus_a * attention.gpu.price + gpus_e * expert.gpu.price
    watts = gpus_a * attention.gpu.power_w + gpus_e * expert.gpu.power_w
    assert plan.tokens_per_s_per_gpu == pytest.approx(plan.tokens_per_s / plan.num_gpus)
    assert plan.tokens_per_s_per_cost == pytest.approx(plan.tokens_per_s / cost)
    assert plan.tokens_per_s_per_watt == pytest.approx(plan.tokens_per_s / watts)
    assert -1e-9 <= plan.attention_bubble < 1
    assert -1e-9 <= plan.expert_bubble < 1


@FEW
@given(tasks())
def test_plans_keep_to_every_limit_and_agree_with_themselves(task):
    plans = search_or_none(task)
    for plan in plans:
        check(plan, task)
        assert plan_from_json(json.loads(json.dumps(plan.to_json())), "plan.json") == plan
    scores = [score_of(plan, task.objective) for plan in plans]
    assert scores == sorted(scores, reverse=True)
    kinds = [
        (plan.attention_gpu, plan.expert_gpu, plan.tp_attention, plan.tp_expert, plan.num_micro_batches)
        for plan in plans
    ]
    assert len(set(kinds)) == len(kinds)


@FEW
@given(tasks(), st.randoms(use_true_random=False))
def test_the_largest_micro_batch_keeps_the_limits_and_one_more_does_not(task, random):
    pairs = [one for one in node_pairs(task) if len(one.candidates())]
    assume(pairs)
    pair = random.choice(pairs)
    at = pair.candidates()
    largest = pair.largest_micro_batch(at)
    is_broken = np.any(list(pair.violated(at, np.maximum(largest, 1)).values()), axis=0)
    assert not np.any(is_broken & (largest > 0))
    assert np.all(np.any(list(pair.violated(at, largest + 1).values()), axis=0))


@FEW
@given(tasks(), st.sampled_from([1.0001, 1.3, 10.0]))
def test_a_larger_tpot_limit_lowers_neither_the_batch_nor_the_best_score(task, factor):
    looser = replace(task, workload=replace(task.workload, tpot_s=task.workload.tpot_s * factor))
    for tight, loose in zip(node_pairs(task), node_pairs(looser), strict=True):
        at = tight.candidates()
        if len(at):
            assert np.all(loose.largest_micro_batch(at) >= tight.largest_micro_batch(at))
    before, after = search_or_none(task, 1), search_or_none(looser, 1)
    if before:
        assert score_of(after[0], task.objective) >= score_of(before[0], task.objective) * (1 - 1e-9)


@FEW
@given(tasks(), st.sampled_from([1.01, 2.0]))
def test_more_memory_never_lowers_the_best_score(task, factor):
    def grown(pools):
        return tuple(
            replace(pool, gpu=replace(pool.gpu, memory_bytes=pool.gpu.memory_bytes * factor)) for pool in pools
        )

    roomier = replace(task, attention=grown(task.attention), expert=grown(task.expert))
    before, after = search_or_none(task, 1), search_or_none(roomier, 1)
    if before:
        assert score_of(after[0], task.objective) >= score_of(before[0], task.objective) * (1 - 1e-9)


@FEW
@given(tasks())
def test_more_gpus_never_lower_the_best_score_per_gpu(task):
    def doubled(pools):
        return tuple(replace(pool, count=pool.count + 1) for pool in pools)

    more = replace(task, attention=doubled(task.attention), expert=doubled(task.expert))
    before, after = search_or_none(task, 1), search_or_none(more, 1)
    if before:
        assert score_of(after[0], task.objective) >= score_of(before[0], task.objective) * (1 - 1e-9)


def test_memory_that_is_full_to_the_last_byte_is_not_over_full():
    """All sizes are integers here, so the limit can be met exactly."""
    for sequences in range(1, 40):
        needed = attention_node_bytes(
            SMALL, 1, DEFAULTS, micro_batch=sequences, num_micro_batches=3, mean_len=250.0, num_expert_nodes=1
        )
        gpu = replace(A800, memory_bytes=needed / DEFAULTS.memory_utilization * (1 + 1e-15))
        task = task_of(SMALL, (gpu, 1), (H200, 1), SHORT, tp_sizes=(1,), micro_batches=(3,))
        assert search(task)[0].micro_batch == sequences


def test_the_papers_model_on_the_papers_cluster():
    plan = search(task_of(objective="cost"))[0]
    assert plan.num_micro_batches >= 3  # 25 GB/s are not fast enough for two
    assert plan.limited_by == "attention memory"
    assert min(plan.t_attention_s, plan.t_expert_s) > 0.7 * max(plan.t_attention_s, plan.t_expert_s)  # Eq 1


def test_attention_goes_to_h20_and_experts_to_l40s_when_cost_counts():
    pools = Pool(H20, 32), Pool(L40S, 32)
    plan = search(Task(model=MIXTRAL, workload=PAPERS, attention=pools, expert=pools, objective="cost"))[0]
    assert (plan.attention_gpu, plan.expert_gpu) == ("h20", "l40s")


# ---------------------------------------------------------------------------------------------------- Pareto front


@pytest.mark.parametrize("objective", ["gpu", "cluster"])
def test_no_plan_of_the_front_is_beaten_in_both(objective):
    task = task_of(CATALOGUE.model("dbrx"), (A800, 48), objective=objective, tp_sizes=(1, 4))
    front = pareto_front(task)
    points = [(plan.tpot_s, score_of(plan, objective)) for plan in front]
    assert len(front) >= 3
    assert all(slow > fast and more > less for (fast, less), (slow, more) in itertools.pairwise(points))
    assert points[-1][1] == pytest.approx(score_of(search(task)[0], objective))
    for plan in front:
        check(plan, task)


def test_a_front_of_nothing_is_refused_as_a_search_is():
    with pytest.raises(ConfigError, match="does not fit"):
        pareto_front(task_of(attention=(A800, 2)))


# ------------------------------------------------------------------------------------------------- colocated baselines


def colocated_plainly(task: Task, baseline: Baseline, gpu, size: int) -> list[tuple[int, float]]:
    """(batch, TPOT) of every batch that a group of this size may run."""
    model, given, found = task.model, task.given, []
    mean_len = task.workload.mean_len
    for batch in range(1, baseline.max_num_seqs + 1):
        held = model.num_experts * model.expert_bytes + attention_node_bytes(
            model, size, given, micro_batch=batch, num_micro_batches=1, mean_len=mean_len, num_expert_nodes=0
        )
        held += batch * model.top_k * (2 * model.hidden_size + 3 * model.intermediate_size) * 2
        pair = Roofline(model, gpu, size, gpu, size, given)
        head_s = pair.pass_s(float(batch))
        active = active_experts(model, model.num_experts, batch)
        slices = size if baseline.experts == "sharded" else max(1, size // model.num_experts)
        share = slices / size
        experts_s = expert_gemm_s(model, gpu, batch * model.top_k * share, active * share, given, slices=slices)
        bandwidth, latency = gpu.intra_node_bytes_per_s * given.intra_node, given.collective_latency_s
        if size > gpu.gpus_per_node:
            nics = gpu.gpus_per_node * gpu.network_bytes_per_s * given.network
            bandwidth, latency = min(bandwidth, nics), given.cross_node_latency_s
        all_reduce_s = 0.0
        if size > 1:
            all_reduce_s = 2 * (latency + batch * model.hidden_size * 2 * (size - 1) / size / bandwidth)
        layer_s = pair.attention_s(float(batch), batch * mean_len) + experts_s + all_reduce_s
        tpot_s = float(model.num_layers * layer_s + head_s)
        if held <= size * gpu.memory_bytes * 0.9 and tpot_s <= task.workload.tpot_s:
            found.append((batch, tpot_s))
    return found


@pytest.mark.parametrize("experts", ["sharded", "placed"])
@pytest.mark.parametrize("tpot_s", [0.15, 0.035])
@pytest.mark.parametrize("objective", ["gpu", "cluster"])
def test_the_best_colocated_group_is_the_best_of_all_groups_and_batches(experts, tpot_s, objective):
    baseline = Baseline("plain", experts, 90)
    task = task_of(attention=(A800, 20), workload=replace(PAPERS, tpot_s=tpot_s), objective=objective)
    best = 0.0
    for size in (1, 2, 4, 8, 16):
        for batch, seconds in colocated_plainly(task, baseline, A800, size):
            best = max(best, batch / seconds * (1 / size if objective == "gpu" else 20 // size))
    plan = best_colocated(task, baseline)
    assert score_of(plan, objective) == pytest.approx(best)
    assert plan.num_expert_gpus == 0
    assert plan.num_gpus == plan.tp_attention


@FEW
@given(tasks(), st.sampled_from(list(BASELINES.values())))
def test_colocated_plans_keep_to_every_limit(task, baseline):
    plan = best_colocated(task, baseline)
    assume(plan is not None)
    pool = next(one for one in (*task.attention, *task.expert) if one.gpu.name == plan.attention_gpu)
    counts = [one.count for one in (*task.attention, *task.expert) if one.gpu == pool.gpu]
    assert plan.kind == "colocated"
    assert plan.baseline == baseline.name
    assert 1 <= plan.batch_size <= baseline.max_num_seqs
    assert plan.batch_size <= (task.limits.max_batch or math.inf)
    assert plan.tpot_s <= task.workload.tpot_s
    assert plan.attention_memory_bytes <= plan.attention_memory_limit_bytes
    assert plan.expert_memory_bytes <= plan.expert_memory_limit_bytes
    both = plan.attention_memory_bytes + plan.expert_memory_bytes
    assert both <= plan.num_gpus * pool.gpu.memory_bytes * 0.9
    assert plan.num_instances == max(counts) // plan.num_gpus >= 1
    assert plan.tpot_s == pytest.approx(steady_pass_s(plan.stages, 1, plan.num_layers)) == pytest.approx(plan.step_s)
    assert plan.tokens_per_s == pytest.approx(plan.batch_size / plan.tpot_s)
    assert plan.tokens_per_s_per_watt == pytest.approx(plan.tokens_per_s / plan.num_gpus / pool.gpu.power_w)
    assert plan_from_json(json.loads(json.dumps(plan.to_json())), "plan.json") == plan
    limits = {Group(task, pool.gpu, plan.num_gpus, baseline).broken(plan.batch_size + 1), "batch limit"}
    assert plan.limited_by in limits


def test_a_model_that_no_group_holds_has_no_colocated_plan():
    assert best_colocated(task_of(attention=(A800, 2)), BASELINES["vllm"]) is None


# ------------------------------------------------------------------------------------------------- the paper's search


def algorithm_1_plainly(task: Task, equations: str, fits: Fits) -> list[tuple[float, int, int, int, int, int]]:
    """Of every (tp_a, tp_e, m): throughput per cost, tp_a, tp_e, m, n_a, b_a; every b_a is tried."""
    model, given_, (pool,), (expert_pool,) = task.model, task.given, task.attention, task.expert
    gpu, expert_gpu, E, K, found = pool.gpu, expert_pool.gpu, task.model.num_experts, task.model.top_k, []
    h, L = model.hidden_size, model.num_layers
    for tp_e, tp_a, m in itertools.product(task.limits.tp_sizes, task.limits.tp_sizes, (3, 4)):
        room = tp_a * gpu.memory_bytes * (1 if equations == "paper" else 0.9)
        expert_room = tp_e * expert_gpu.memory_bytes * (1 if equations == "paper" else 0.9)
        most = (pool.count - (E * tp_e if gpu == expert_gpu else 0)) // tp_a
        if room <= model.attention_bytes or expert_room <= model.expert_bytes or E * tp_e > expert_pool.count:
            continue
        largest: dict[int, int] = {}
        for n_a, b_a in itertools.product(range(1, most + 1), range(1, task.limits.max_micro_batch + 1)):
            b_e = b_a * n_a * K / E
            t_a, t_e = fits.k1 * b_a + fits.k2, fits.k3 * b_e + fits.k4
            sent, got, pair = b_a * h * K / tp_a, b_e * h / tp_e, b_a * K / E * h
            W_a, W_e = gpu.network_bytes_per_s, expert_gpu.network_bytes_per_s
            if equations == "paper":
                t_c = max(sent / W_a / given_.network_at(sent), got / W_e / given_.network_at(got))
                total = t_a + t_e + 2 * t_c + max(t_a, t_e) * (m * L - 1)
                g = model.num_heads / model.num_kv_heads
                held = 4 * m * b_a * task.workload.mean_len * h * L / g + model.attention_bytes
                experts_held = model.expert_bytes
            else:
                sending = 2 * sent / W_a / given_.network_at(2 * pair / tp_a)
                receiving = 2 * got / W_e / given_.network_at(2 * pair / tp_e)
                t_c = (max(sending, receiving) + given_.network_latency_s) * given_.tail
                round_trip, t_f = t_a + t_e + 2 * t_c, max(t_a, t_e)
                total = max(round_trip + t_f * (m * L - 1), L * round_trip + (m - 1) * t_f)
                held = attention_node_bytes(
                    model, tp_a, given_, micro_batch=b_a, num_micro_batches=m, mean_len=task.workload.mean_len,
                    num_expert_nodes=E,
                )  # fmt: skip
                experts_held = expert_node_bytes(
                    model, tp_e, given_, micro_batch=b_a, num_micro_batches=m, num_attention_nodes=n_a,
                    experts_per_node=1,
                )  # fmt: skip
            if total <= task.workload.tpot_s and held < room and experts_held < expert_room:
                largest[n_a] = b_a
        if equations == "paper":
            chosen = min(most, max(1, round(fits.k1 * E / (fits.k3 * K))))
        else:
            balanced = [
                n_a
                for n_a, b_a in largest.items()
                if n_a == 1 or fits.k3 * b_a * n_a * K / E + fits.k4 <= fits.k1 * b_a + fits.k2 + 1e-12
            ]
            chosen = max(balanced, default=0)
        if chosen in largest:
            b_a = largest[chosen]
            b_e = b_a * chosen * K / E
            cost = chosen * tp_a * gpu.price + E * tp_e * expert_gpu.price
            found.append((b_a * m * chosen / cost, tp_a, tp_e, m, chosen, b_a))
    return found


ALGORITHM_1 = {
    "k2 above k4": (task_of(SMALL, (A800, 10), workload=SHORT, max_micro_batch=40, tp_sizes=(1, 2)), 20e-6, 10e-6),
    "k4 above k2": (task_of(SMALL, (A800, 10), workload=SHORT, max_micro_batch=40, tp_sizes=(1, 2)), 10e-6, 30e-6),
    "a tight limit": (
        task_of(SMALL, (A800, 10), workload=replace(SHORT, tpot_s=0.0018), max_micro_batch=90, tp_sizes=(1, 2)),
        10e-6,
        30e-6,
    ),
    "little memory, two types": (
        task_of(SMALL, (FEW_BLOCKS, 7), (L40S, 8), LONG, max_micro_batch=40, tp_sizes=(1, 2)),
        15e-6,
        5e-6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("equations", ["paper", "corrected"])
@pytest.mark.parametrize("name", ALGORITHM_1)
def test_algorithm_1_finds_what_trying_every_batch_finds(name, equations):
    task, k2, k4 = ALGORITHM_1[name]
    fits = Fits(1.5e-6, k2, 0.9e-6, k4)
    expected = {one[1:] for one in algorithm_1_plainly(task, equations, fits)}
    plans = algorithm1(task, equations=equations, fits=fits, num_plans=100)
    assert {
        (plan.tp_attention, plan.tp_expert, plan.num_micro_batches, plan.num_attention_nodes, plan.micro_batch)
        for plan in plans
    } == expected
    per_cost = [plan.tokens_per_s_per_cost for plan in plans]
    assert per_cost == sorted(per_cost, reverse=True)


def test_fits_are_straight_lines_through_the_models_own_points():
    """Where every stage is bound by memory, T_a and T_e are straight lines, and n_a comes from their slopes."""
    quick = replace(A800, flops_per_s=1e18)
    plan = algorithm1(task_of(attention=(quick, 64), tp_sizes=(4,)), equations="corrected")[0]
    pair = Roofline(MIXTRAL, quick, 4, quick, 4, DEFAULTS)
    b_a = float(plan.micro_batch)
    b_e = b_a * plan.num_attention_nodes * 2 / 8
    t_a = pair.attention_s(b_a, b_a * PAPERS.mean_len) + pair.pass_s(b_a) / 56
    assert plan.t_attention_s == pytest.approx(float(t_a))
    assert plan.t_expert_s == pytest.approx(float(pair.expert_s(b_e, 1.0, 1.0)))
    assert len(FITTED_AT) > 2


def test_algorithm_1_on_the_papers_model_is_sensible_in_both_versions():
    task = task_of()
    written, corrected = (algorithm1(task, equations=version)[0] for version in ("paper", "corrected"))
    for plan in (written, corrected):
        assert (plan.num_expert_nodes, plan.experts_per_node, plan.num_layers) == (8, 1, 56)
        assert 1 <= plan.num_attention_nodes <= 24
        assert plan.num_micro_batches in (3, 4)
        assert plan.tpot_s <= 0.150
        assert plan.num_instances >= 1
        assert plan.attention_memory_bytes < plan.attention_memory_limit_bytes
        assert plan.tokens_per_s == pytest.approx(plan.batch_size / plan.tpot_s)
        assert plan_from_json(plan.to_json(), "plan.json") == plan
    assert corrected.t_expert_s <= corrected.t_attention_s
    assert corrected.step_s == pytest.approx(isolated_pass_s(corrected.stages, corrected.num_micro_batches, 56))
    assert written.step_s == pytest.approx(eq.eq5_as_written_s(written.stages, written.num_micro_batches, 56))
    # two matrices of three, half the bytes and no buffers promise more than there is
    assert written.tokens_per_s_per_cost > corrected.tokens_per_s_per_cost


def test_algorithm_1_never_beats_the_search_by_more_than_its_straight_lines():
    corrected = algorithm1(task_of(objective="cost"), equations="corrected")[0]
    assert corrected.tokens_per_s_per_cost < search(task_of(objective="cost"))[0].tokens_per_s_per_cost * 1.1


def test_algorithm_1_says_that_it_needs_a_node_per_expert():
    with pytest.raises(ConfigError, match=r"128 nodes for experts.*give more GPUs.*leave out `algorithm`"):
        algorithm1(task_of(CATALOGUE.model("qwen3-30b-a3b")))


# ------------------------------------------------------------------------------------------------------------ refusals


def refusal(call, *arguments, **named) -> str:
    with pytest.raises(ConfigError) as raised:
        call(*arguments, **named)
    return str(raised.value)


@pytest.mark.parametrize("count", [0, -3])
def test_no_gpus_are_refused(count):
    assert refusal(Pool, A800, count) == f"{count} GPUs of type a800: give at least 1"


@pytest.mark.parametrize("length", [0, -5, math.nan, math.inf])
def test_lengths_that_are_none_are_refused(length):
    said = refusal(Workload, input_len=length, output_len=10, tpot_s=0.1)
    assert said.startswith(f"`input_len` {length:g}: ")
    assert refusal(Workload, input_len=10, output_len=length, tpot_s=0.1).startswith(f"`output_len` {length:g}: ")


@pytest.mark.parametrize("tpot_s", [0, -0.1, math.nan])
def test_a_tpot_limit_that_is_none_is_refused(tpot_s):
    assert refusal(Workload, input_len=10, output_len=10, tpot_s=tpot_s).startswith(f"`tpot_s` {tpot_s:g}: ")


def test_a_model_that_fits_nowhere_is_refused_with_its_size():
    assert refusal(search, task_of(attention=(A800, 2))) == (
        "mixtral-8x22b (281 GB of weights) does not fit on 2 a800; give more GPUs or larger ones"
    )
    assert refusal(search, task_of(attention=(CATALOGUE.gpu("cpu"), 1))) == (
        "mixtral-8x22b: attention needs 10.7 GB of weights, and the largest group of cpu that may be used has 7.2 GB; "
        "give GPUs with more memory, or more of them"
    )
    small = replace(A800, name="small", memory_bytes=36e9)
    assert "one expert needs 33.8 GB of weights" in refusal(search, task_of(expert=(small, 8), tp_sizes=(1,)))


def test_contexts_that_do_not_fit_are_refused_with_their_length():
    long = replace(PAPERS, input_len=10_000_000)
    said = refusal(search, task_of(workload=long))
    assert "not one sequence of 1.00001e+07 tokens fits" in said
    assert "64 a800" in said
    assert "shorter lengths" in said


@pytest.mark.parametrize(("name", "attention"), [("mixtral-8x22b", (A800, 64)), ("dbrx", (H20, 16))])
def test_an_impossible_tpot_is_refused_with_the_fastest_possible_which_then_works(name, attention):
    task = task_of(CATALOGUE.model(name), attention, workload=replace(PAPERS, tpot_s=0.001))
    said = refusal(search, task)
    assert "no plan keeps a TPOT of 1 ms" in said
    fastest_s = float(re.search(r"fastest possible here is ([\d.]+) ms", said)[1]) / 1e3

    def within(tpot_s):
        return search(replace(task, workload=replace(task.workload, tpot_s=tpot_s)))[0]

    assert within(fastest_s).tpot_s <= fastest_s
    assert "no plan keeps" in refusal(within, fastest_s - 0.1e-3)


def test_a_batch_limit_that_leaves_nothing_is_named():
    said = refusal(search, task_of(max_batch=2, micro_batches=(3, 4)))
    assert "at most 2 sequences per instance" in said
    assert "3 or 4 micro-batches" in said
    assert "TPOT" not in said


def test_an_unknown_name_is_refused_with_the_nearest():
    assert "no GPU is called 'h2oo'; did you mean h20" in refusal(CATALOGUE.gpu, "h2oo")
    assert "no GPU is called 'tpu-v5e'; " in refusal(CATALOGUE.gpu, "tpu-v5e")
    assert "did you mean mixtral-8x22b or mixtral-8x7b?" in refusal(CATALOGUE.model, "Mixtral-8x22")
    assert "known: dbrx, deepseek-v3, " in refusal(CATALOGUE.model, "zzz")
    assert CATALOGUE.gpu("A800") is A800


ENTRY = """
price = 2.0
memory_gb = 64
memory_gb_per_s = 1600
bf16_tflops = 400
power_w = 310
network_gbit_per_s = 200
intra_node_gb_per_s = 30
gpus_per_node = 8
"""
SHAPE = """
layers = 4
hidden = 64
intermediate = 128
experts = 4
top_k = 2
heads = 4
kv_heads = 2
head_dim = 16
vocab = 1000
"""


@pytest.fixture
def own(tmp_path):
    """Reads a catalogue of these lines."""

    def read(text: str):
        path = tmp_path / "own.toml"
        path.write_text(text)
        return read_catalogue(path)

    return read


def test_an_own_file_adds_and_replaces(own):
    catalogue = own(f"[gpus.New]{ENTRY}[gpus.a800]{ENTRY}[models.Mine]{SHAPE}")
    assert catalogue.gpu("new").network_bytes_per_s == 25e9
    assert catalogue.gpu("NEW").memory_bytes == 64e9
    assert catalogue.gpu("a800").price == 2.0
    assert catalogue.model("mine").num_experts == 4
    assert catalogue.model("dbrx") == CATALOGUE.model("dbrx")


LATENT = "q_lora_rank = 0\nqk_nope_head_dim = 8\nqk_rope_head_dim = 4\nv_head_dim = 8\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[gpus.new\n", ["own.toml is not valid TOML"]),
        (f"[gpu.new]{ENTRY}", ["own.toml: unknown section [gpu]", "[gpus.NAME]"]),
        ("gpus = 3\n", ["[gpus] must hold tables"]),
        ("[gpus]\nnew = 3\n", ["[gpus] must hold tables"]),
        (f"[gpus.new]{ENTRY}colour = 1\n", ["own.toml: GPU new: unknown key 'colour'", "price, memory_gb"]),
        (f"[gpus.new]{ENTRY.replace('64', '-64')}", ["GPU new: memory_gb is -64; it must be a number above 0"]),
        (f"[gpus.new]{ENTRY.replace('64', 'nan')}", ["GPU new: memory_gb is nan"]),
        (f"[gpus.new]{ENTRY.replace('64', 'true')}", ["GPU new: memory_gb is True"]),
        (f"[gpus.new]{ENTRY.replace('node = 8', 'node = 7.5')}", ["gpus_per_node is 7.5; it must be an integer"]),
        ("[gpus.new]\nprice = 1\n", ["GPU new: memory_gb, memory_gb_per_s,", "missing"]),
        (f"[models.mine]{SHAPE}colour = 1\n", ["own.toml: model mine: unknown key 'colour'", "kv_lora_rank"]),
        (f"[models.mine]{SHAPE.replace('64', '-64')}", ["model mine: hidden is -64; it must be an integer"]),
        (f"[models.mine]{SHAPE.replace('64', '64.0')}", ["model mine: hidden is 64.0; it must be an integer"]),
        (f"[models.mine]{SHAPE}dense_layers = -1\n", ["model mine: dense_layers is -1", "at least 0"]),
        (f"[models.mine]{SHAPE}dense_layers = 1\n", ["dense_layers is 1; give dense_intermediate, too"]),
        (f"[models.mine]{SHAPE}dense_layers = 4\n", ["one layer at least must have experts"]),
        (f"[models.mine]{SHAPE.replace('top_k = 2', 'top_k = 5')}", ["top_k must not exceed experts"]),
        (f"[models.mine]{SHAPE}{LATENT}", ["model mine: latent attention needs kv_lora_rank too"]),
        (f"[models.mine]{SHAPE}{LATENT}kv_lora_rank = 0\n", ["kv_lora_rank is 0; it must be an integer of at least 1"]),
        ("[models.mine]\nlayers = 3\n", ["model mine: hidden is missing; needed: layers, hidden"]),
    ],
)
def test_a_catalogue_file_that_is_wrong_is_refused_by_file_entry_and_key(own, text, parts):
    said = refusal(own, text)
    assert "own.toml" in said
    for part in parts:
        assert part in said


def test_a_catalogue_file_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "none.toml"
    assert refusal(read_catalogue, path) == f"{path} cannot be read: No such file or directory"


PLAN = search(task_of(attention=(A800, 16)), num_plans=1)[0]


@pytest.mark.parametrize("key", [one.name for one in fields(Plan)])
def test_a_plan_without_a_key_is_refused_by_its_name(key):
    values = PLAN.to_json()
    del values[key]
    assert refusal(plan_from_json, values, "plan.json").startswith(f"plan.json: {key} is missing; ")


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("batch_size", "many", "it must be a number"),
        ("batch_size", 1.5, "it must be a number"),
        ("batch_size", True, "it must be a number"),
        ("attention_gpu", 3, "it must be text"),
        ("batch_size", -1, "it must be finite and above 0"),
        ("num_micro_batches", 0, "it must be finite and above 0"),
        ("tpot_s", 0.0, "it must be finite and above 0"),
        ("t_comm_s", -1.0, "it must be finite and not negative"),
        ("step_s", math.nan, "it must be finite and not negative"),
        ("step_s", math.inf, "it must be finite and not negative"),
        ("kind", "sideways", "it must be disaggregated or colocated"),
        ("limited_by", "weather", "it must be tpot or attention memory or"),
    ],
)
def test_a_plan_with_a_wrong_value_is_refused_by_its_name(key, value, part):
    said = refusal(plan_from_json, PLAN.to_json() | {key: value}, "plan.json")
    assert said.startswith(f"plan.json: {key} is {value!r}; ")
    assert part in said


def test_whole_numbers_are_read_back_as_times():
    assert plan_from_json(PLAN.to_json() | {"t_comm_s": 0}, "plan.json").t_comm_s == 0
