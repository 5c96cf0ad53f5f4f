"""The whole product under a virtual clock: its pipeline's timing, its faults, and that it is the same every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import islice

import pytest

from msi.errors import ConfigError
from msi.planner.pipeline import Stages, isolated_pass_s, steady_pass_s
from msi.planner.stage_costs import ConstantCosts
from msi.simulator.clock import SimulationStalled
from msi.simulator.deployment import LIMITS, Deployment, Fault, parse_fault
from msi.simulator.histories import Histories, answer_to
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival, fixed_lengths, lognormal_lengths, poisson
from msi.tracing import COMPUTE_ROW
from msi.types import MicroBatch, TokenSampling
from tests.everyday import mostly_slow

T_F = 1e-3


def blocks(count):
    """So many of KV cache on each attention worker."""
    return replace(LIMITS, num_gpu_blocks_override=count)


SMALL = Deployment(
    num_layers=6,
    num_experts=8,
    top_k=2,
    num_attention=3,
    num_expert=2,
    num_micro_batches=3,
    limits=blocks(400),
)
COSTS = ConstantCosts(T_F, T_F, 0.2 * T_F, 0.3 * T_F)


def decoding(deployment: Deployment, num_tokens: int) -> list[Arrival]:
    """One sequence for every lane, all at once; prompts of one token, so that every pass is a decode step."""
    return [Arrival(0.0, 1, num_tokens)] * deployment.num_attention * deployment.num_micro_batches


def steady_tokens_per_s(deployment: Deployment, costs, num_seqs: int = 1, num_tokens: int = 12) -> float:
    """Decode throughput with `num_seqs` sequences in every micro-batch: sequences over TPOT."""
    arrivals = decoding(deployment, num_tokens) * num_seqs
    report = simulate(deployment, costs, arrivals)
    assert report.num_failed == 0
    return len(arrivals) / report.tpot_s.p50_s


# -- the pipeline ----------------------------------------------------------------------------------------------------

SHAPES = [
    (4, 2, 3, 16, Stages(T_F, T_F, 0.2 * T_F)),
    (2, 2, 2, 56, Stages(T_F, T_F, 0.2 * T_F)),
    (1, 1, 1, 8, Stages(0.5e-3, 1.2e-3, 0.9e-3)),
    (1, 1, 4, 8, Stages(0.5e-3, 1.2e-3, 0.9e-3)),
    (3, 5, 2, 8, Stages(1e-3, 0.7e-3, 0.2e-3)),
    (2, 3, 3, 8, Stages(0.9e-3, 1.1e-3, 0.1e-3)),
    (1, 4, 4, 5, Stages(2e-3, 0.3e-3, 1.5e-3)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_passes_through_the_whole_product_equal_the_formulas(shape):
    num_attention, num_expert, m, num_layers, stages = shape
    deployment = Deployment(
        num_layers=num_layers, num_experts=30, top_k=2, num_attention=num_attention, num_expert=num_expert,
        num_micro_batches=m, control_latency_s=0.0,
    )  # fmt: skip
    costs = ConstantCosts(stages.attention_s, stages.expert_s, stages.comm_s)
    isolated = simulate(deployment, costs, decoding(deployment, num_tokens=1))
    assert isolated.duration_s == pytest.approx(isolated_pass_s(stages, m, num_layers), rel=1e-3)
    running = simulate(deployment, costs, decoding(deployment, num_tokens=21))
    expected_s = steady_pass_s(stages, m, num_layers)
    assert [one.tpot_s for one in running.requests] == pytest.approx([expected_s] * len(running.requests), rel=1e-3)
    assert running.num_messages == 21 * 2 * num_attention * num_expert * m * num_layers


@pytest.mark.parametrize("comm_share", mostly_slow([0.28, 0.02, 0.1, 0.38]))
def test_more_micro_batches_of_equal_size_help_as_in_the_papers_figure_14(comm_share):
    costs = ConstantCosts(T_F, T_F, comm_share * T_F, 0.5 * T_F)
    one, two, three, four = (
        steady_tokens_per_s(replace(SMALL, num_layers=32, num_attention=2, num_micro_batches=m), costs)
        for m in (1, 2, 3, 4)
    )
    assert 1.8 <= two / one <= 2.0 + 1e-9
    assert three / two == pytest.approx(1 + comm_share, abs=0.03)
    assert four / three == pytest.approx(1, abs=0.03)


@dataclass(frozen=True)
class LinearCosts:
    """The paper's T_a = k1 b + k2 and T_e = k3 b + k4, of the (token, expert) pairs on a node."""

    k1: float
    k2: float
    k3: float
    k4: float

    def attention_s(self, num_tokens, num_context_tokens):
        return self.k1 * num_tokens + self.k2

    def pass_s(self, num_logit_rows):
        return 0.0

    def expert_s(self, num_expert_rows, num_active_experts):
        return self.k3 * num_expert_rows + self.k4

    def comm_s(self, num_bytes):
        return 0.05e-3


@pytest.mark.slow
def test_attention_data_parallelism_pays_up_to_the_balance_point_as_in_the_papers_figure_15():
    # DBRX: 16 experts, 4 per token, on 4 nodes; 16 sequences per micro-batch: T_a = T_e = 1 ms at n_a = 8
    costs = LinearCosts(k1=0.05e-3, k2=0.2e-3, k3=0.8e-3 / (8 * 16), k4=0.2e-3)
    throughput = {}
    for num_attention in (1, 2, 4, 8, 12, 16):
        deployment = Deployment(
            num_layers=8, num_experts=16, top_k=4, num_attention=num_attention, num_expert=4, num_micro_batches=3
        )
        throughput[num_attention] = steady_tokens_per_s(deployment, costs, num_seqs=16, num_tokens=8)
    for num_attention in (2, 4, 8):
        assert throughput[num_attention] / throughput[1] == pytest.approx(num_attention, rel=0.02)
    per_gpu = {n: tokens_per_s / (n + 4) for n, tokens_per_s in throughput.items()}
    assert per_gpu[1] < per_gpu[2] < per_gpu[4] < per_gpu[8]
    assert per_gpu[8] > 1.05 * per_gpu[12]
    assert per_gpu[12] > 1.05 * per_gpu[16]
    assert throughput[16] / throughput[8] < 1.12  # T_e is the bottleneck: k4 is shared, no more


def test_when_m_is_left_open_the_coordinator_measures_and_chooses_it():
    arrivals = [Arrival(0.0, 4, 3)] * 6
    half_costs_all = simulate(replace(SMALL, num_micro_batches=0), COSTS, arrivals)
    assert half_costs_all.num_micro_batches == 1  # halving a batch halves no constant time
    half_costs_half = simulate(replace(SMALL, num_micro_batches=0), LinearCosts(1e-4, 0.0, 1e-5, 0.0), arrivals)
    assert half_costs_half.num_micro_batches >= 2


def test_a_colocated_instance_pays_both_stages_one_after_the_other():
    deployment = replace(
        SMALL, num_attention=1, num_expert=1, num_micro_batches=1, is_colocated=True, control_latency_s=0.0
    )
    report = simulate(deployment, ConstantCosts(2e-3, 1e-3, 5e-3), [Arrival(0.0, 1, 5)])
    assert report.duration_s == pytest.approx(5 * 6 * 3e-3)
    (worker,) = report.workers
    assert (worker.worker_id, worker.busy) == ("attention-0", pytest.approx(1))


# -- the same every time ---------------------------------------------------------------------------------------------

STORM = (
    Fault(0.05, "attention-0", "slow", 3.0),
    Fault(0.08, "expert-1", "stalled", 0.03),
    Fault(0.11, "attention-1", "dead"),
)


def storm(seed: int = 1, **options):
    arrivals = poisson(40, 200.0, lognormal_lengths(30, 8, most=200), seed=seed)
    return simulate(SMALL, COSTS, arrivals, popularity="zipf", faults=STORM, seed=seed, **options)


def test_equal_seeds_give_equal_results_to_the_bit():
    assert storm() == storm()
    assert storm().num_failed == 0, "a lost attention worker costs no request"
    assert storm(seed=2).requests != storm().requests


def test_messages_that_land_together_as_one_event_change_nothing():
    assert storm() == storm(is_collapsing=False)
    arrivals = decoding(SMALL, 10)
    assert simulate(SMALL, COSTS, arrivals) == simulate(SMALL, COSTS, arrivals, is_collapsing=False)


@pytest.mark.slow
def test_results_do_not_depend_on_the_process():
    script = "from tests.test_simulator import storm; print(repr(storm()))"
    said = [
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True,
            text=True, timeout=60, check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]  # fmt: skip
    assert said[0] == said[1] == repr(storm()) + "\n"


# -- requests --------------------------------------------------------------------------------------------------------


def test_every_request_gets_its_tokens_and_its_times():
    arrivals = poisson(30, 100.0, fixed_lengths(40, 7), seed=3)
    report = simulate(SMALL, COSTS, arrivals)
    assert (report.num_requests, report.num_failed, report.num_tokens) == (30, 0, 210)
    for arrival, result in zip(arrivals, report.requests, strict=True):
        assert (result.arrival_s, result.num_tokens) == (arrival.arrival_s, 7)
        assert arrival.arrival_s < result.first_token_s < result.end_s
    assert report.tokens_per_s == pytest.approx(210 / report.duration_s)
    assert report.ttft_s.p50_s <= report.ttft_s.p90_s <= report.ttft_s.p99_s
    assert all(0 < worker.busy < 1 and 0 <= worker.bubble < 1 for worker in report.workers)


def test_long_prompts_are_cut_into_chunks_and_scarce_blocks_are_waited_for():
    deployment = replace(SMALL, num_attention=1, limits=replace(blocks(20), max_num_batched_tokens=32))
    report = simulate(deployment, COSTS, [Arrival(0.0, 150, 20)] * 4)
    assert (report.num_failed, report.num_tokens) == (0, 80)
    assert report.ttft_s.p99_s > 5 * 6 * 2 * T_F  # five chunks of six layers


def test_a_request_that_the_kv_cache_cannot_hold_fails_as_in_reality():
    report = simulate(replace(SMALL, limits=blocks(10)), COSTS, [Arrival(0.0, 500, 5), Arrival(0.0, 20, 5)])
    (failed,) = report.failed
    assert (failed.input_len, failed.error_kind) == (500, "InvalidRequest")
    assert "the whole KV cache holds 160" in failed.error
    assert report.num_tokens == 5


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dead_attention_worker_delays_its_own_requests_and_no_others():
    arrivals = decoding(SMALL, 400)
    undisturbed = simulate(SMALL, COSTS, arrivals)
    report = simulate(SMALL, COSTS, arrivals, faults=[Fault(0.5, "attention-1", "dead")])
    assert not report.failed
    assert [one.num_tokens for one in report.requests] == [400] * 9
    late = [one.end_s - before.end_s for one, before in zip(report.requests, undisturbed.requests, strict=True)]
    assert sum(late_s < 0.1 for late_s in late) == 6
    assert sum(1.5 < late_s < 5.5 for late_s in late) == 3, late  # until its silence was noticed


@pytest.mark.slow
def test_the_only_attention_worker_that_stays_dead_costs_its_requests_once_nobody_waits_any_longer():
    plan = replace(SMALL, num_attention=1)
    report = simulate(plan, COSTS, decoding(plan, 400), faults=[Fault(0.5, "attention-0", "dead")])
    assert len(report.failed) == report.num_requests
    for failed in report.failed:
        assert failed.error_kind == "Unavailable"
        assert "attention-0 was lost" in failed.error
        assert "no other could go on with it for 60 s" in failed.error


def test_a_dead_expert_worker_fails_those_in_flight_and_new_requests_wait_in_vain():
    arrivals = [*decoding(SMALL, 400), Arrival(2.0, 1, 5)]
    report = simulate(SMALL, COSTS, arrivals, faults=[Fault(0.5, "expert-1", "dead")])
    assert report.num_failed == len(arrivals)
    assert {failed.error_kind for failed in report.failed[:-1]} == {"RequestFailed"}
    assert "expert-1" in report.failed[0].error
    late = report.failed[-1]
    assert late.error_kind == "Unavailable"
    assert late.end_s == pytest.approx(32, abs=1)


def test_a_slow_attention_worker_slows_its_own_requests():
    arrivals = decoding(SMALL, 60)
    plain = simulate(SMALL, COSTS, arrivals)
    report = simulate(SMALL, COSTS, arrivals, faults=[Fault(0.0, "attention-1", "slow", 10.0)])
    ends = sorted(result.end_s for result in report.requests)
    assert ends[5] / plain.duration_s < 1.6  # its peers, but for waits of 5 ms
    assert ends[-1] / plain.duration_s > 5


def test_a_stalled_device_delays_by_its_stall():
    arrivals = decoding(SMALL, 60)
    plain = simulate(SMALL, COSTS, arrivals)
    report = simulate(SMALL, COSTS, arrivals, faults=[Fault(0.3, "expert-0", "stalled", 0.5)])
    assert report.num_failed == 0
    assert report.duration_s - plain.duration_s == pytest.approx(0.5, abs=0.05)


def test_a_simulation_that_would_never_end_says_so():
    with pytest.raises(SimulationStalled, match=r"0.5 s of virtual time"):
        simulate(SMALL, COSTS, [Arrival(0.0, 1, 1000)], limit_s=0.5)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            "attention-7:dead@1",
            "fault of 'attention-7', which is not there; there are expert-0, expert-1, ",
        ),
        ("attention-0:broken@1", "fault 'broken' is not one; give slow, stalled, dead"),
        ("attention-0:slow@1", r"slow by 0\.0; give the factor, above 0"),
        ("attention-0:dead@-1", r"comes at -1\.0 s; give a time of at least 0"),
        ("coordinator:slow:2@1", "the coordinator cannot be slow here; give coordinator:dead:SECONDS@AT"),
        ("coordinator:dead@1", r"coordinator is to be dead by 0\.0; give the seconds, above 0"),
        ("attention-0:dead", "cannot be read; give WORKER:KIND@SECONDS"),
        ("attention-0:slow:much@1", "cannot be read"),
    ],
)
def test_faults_that_cannot_be_are_refused_with_a_sentence(fault, sentence):
    with pytest.raises(ConfigError, match=sentence):
        simulate(SMALL, COSTS, [Arrival(0.0, 1, 1)], faults=[parse_fault(fault)])


def test_deployments_that_cannot_be_are_refused_with_a_sentence():
    for changes, sentence in [
        ({"num_attention": 0}, "num_attention is 0; give a number of at least 1"),
        ({"num_expert": 9}, "9 expert workers for 8 experts"),
        ({"top_k": 9}, "top_k is 9"),
        ({"num_micro_batches": 5}, "num_micro_batches is 5; give 1 to 4"),
        ({"limits": replace(LIMITS, max_num_batched_tokens=600)}, "a slot has 512 rows"),
        ({"is_colocated": True}, "leave the numbers of workers out"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            replace(SMALL, **changes)


# -- the trace -------------------------------------------------------------------------------------------------------


def test_the_trace_is_the_real_runs_in_virtual_time(tmp_path):
    file = tmp_path / "trace.json"
    report = simulate(SMALL, COSTS, decoding(SMALL, 4), trace=file)
    events = json.loads(file.read_text())["traceEvents"]
    tracks = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert sorted(tracks.values()) == sorted(worker.worker_id for worker in report.workers)
    spans = [event for event in events if event["ph"] == "X"]
    for name, each in (("attention", 3 * 3 * 4 * 6), ("experts", 2 * 3 * 4 * 6), ("sample", 3 * 3 * 4)):
        assert sum(span["name"] == name for span in spans) == each
    computed = [span for span in spans if span["tid"] == COMPUTE_ROW]
    assert {round(span["dur"], 3) for span in computed if span["name"] != "sample"} == {1000.0}
    exchanges = [span for span in spans if span["tid"] != COMPUTE_ROW]
    assert {span["name"] for span in exchanges} == {"expert-0", "expert-1"}
    assert {round(span["args"]["delay_ms"], 3) for span in exchanges} == {0.4}
    assert max(span["ts"] + span["dur"] for span in spans) <= (report.duration_s + 1) * 1e6


PROMPT, TABLE, SEED = tuple(range(40)), (7, 3, 9), 5
NEXT = next(answer_to(PROMPT, SEED))


def run_pass(histories, tokens, first, table=TABLE, is_given_up=False):
    """The last of these tokens, which begin at that position, is to be followed by one; which."""
    end = first + len(tokens)
    sampling = (TokenSampling(0.0, 1.0, 0, SEED, end),)
    batch = MicroBatch(
        tuple(tokens), tuple(range(first, end)), (len(tokens),), (end,), (table,), (len(tokens) - 1,), sampling
    )
    histories.begin(batch)
    if not is_given_up:
        histories.write(batch)
    return histories.said(batch)[0]


@pytest.mark.parametrize("cut", [0, 15, 16, 39])
def test_a_simulated_sequence_says_the_same_however_its_prompt_is_cut(cut):
    histories = Histories()
    if cut:
        run_pass(histories, PROMPT[:cut], 0)
    assert run_pass(histories, PROMPT[cut:], cut) == NEXT
    assert run_pass(histories, (NEXT,), 40) == list(islice(answer_to(PROMPT, SEED), 2))[1]


@pytest.mark.parametrize(
    "before",
    [PROMPT[:10] + (99,) + PROMPT[11:39], (PROMPT[1], PROMPT[0]) + PROMPT[2:39], PROMPT[1:39] + (0,)],
    ids=["changed", "swapped", "lost"],
)
def test_a_wrong_token_anywhere_shows_in_what_follows(before):
    histories = Histories()
    run_pass(histories, before, 0)
    assert run_pass(histories, PROMPT[39:], 39) != NEXT


def test_a_block_that_is_anothers_or_that_no_pass_has_filled_shows_in_what_follows():
    histories = Histories()
    run_pass(histories, PROMPT[:32], 0)
    run_pass(histories, PROMPT[::-1], 0, table=(4, 5, 6))
    assert run_pass(histories, PROMPT[32:], 32, table=(7, 5, 9)) != NEXT, "of another sequence"
    assert run_pass(histories, PROMPT[32:], 32) == NEXT
    run_pass(histories, PROMPT[16:32], 16, is_given_up=True)
    assert run_pass(histories, PROMPT[32:], 32) != NEXT, "of a pass that came to nothing"
    assert run_pass(histories, PROMPT[16:], 16) == NEXT, "computed again"
