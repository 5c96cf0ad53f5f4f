"""The paper's claims beside ours: every figure has rows, its page shows the current ones, and shapes are theirs."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from msi.planner.assumptions import DEFAULTS
from msi.planner.pipeline import Stages, steady_pass_s
from tools import reproduce_paper
from tools.paper.claims import CLAIMS, Claim, Measured, measure_all
from tools.paper.sensitivity import KNOBS, Knob, Swing, by_claim, no_kv_copies, reason
from tools.paper.simulated import simulated_pass_s
from tools.paper.systems import HETEROGENEOUS, HOMOGENEOUS, MODELS, Setting, Systems, best_degree

PAGE = reproduce_paper.PAGE.read_text()
T_F = 1e-3
FEW = [knob for knob in KNOBS if knob.name in ("FLOPS that an L40S sustains", "vLLM's max_num_seqs")]


@pytest.fixture(scope="module")
def systems():
    return Systems(Setting())


@pytest.fixture(scope="module")
def measured(systems):
    return measure_all(systems)


@pytest.fixture(scope="module")
def found(measured):
    """Sensitivities to two of the assumptions; all of them take a minute."""
    return by_claim(measured, Setting(), FEW)


def throughput(stages: Stages, m: int) -> float:
    """Micro-batches per second, each of the same size."""
    return m / steady_pass_s(stages, m, num_layers=16)


def balanced(comm_share: float) -> Stages:
    return Stages(T_F, T_F, comm_share * T_F)


def test_the_assumptions_are_the_planners_own():
    assert Setting().given == DEFAULTS


def test_every_figure_of_a_model_has_rows(measured):
    assert {one.claim.figure for one in measured} == {"8a", "8c", "9", "10", "13", "14", "15"}
    assert len({claim.key for claim in CLAIMS}) == len(CLAIMS)
    assert all(one.ours > 0 and set(one.each) == set(one.claim.models) for one in measured)


def test_headline_ratios_are_within_15_percent_or_the_page_gives_a_reason(measured):
    of = {one.claim.key: one for one in measured}
    paper = {"8a-trt": 1.28, "8a-trt-scaled": 1.90, "9-trt": 1.86}
    for key, value in paper.items():
        assert of[key].claim.paper == value
        assert of[key].is_close or f"- Figure {of[key].claim.figure}, {of[key].claim.text}: " in PAGE


def test_the_page_shows_todays_numbers_and_a_reason_for_each_that_differs(measured):
    block = PAGE.split(reproduce_paper.BEGIN)[1].split(reproduce_paper.END)[0]
    for one in measured:
        assert reproduce_paper.markdown_row(one) in block, "run tools/reproduce_paper.py --write-page"
        is_explained = f"- Figure {one.claim.figure}, {one.claim.text}: " in block
        assert is_explained == (not one.is_close)


def test_no_plan_asks_more_of_a_nic_than_it_carries(systems):
    """The steady pass does not bound m messages by the NIC; here they fit, so it need not."""
    for model in MODELS:
        by_m2n = systems.ours(model, HOMOGENEOUS), systems.ours(model, HETEROGENEOUS), systems.pipelined(model)
        slower = DEFAULTS.nccl_over_m2n
        for plan, times in (
            *((plan, 1.0) for plan in by_m2n),
            (systems.ours(model, HOMOGENEOUS, is_nccl=True), slower),
        ):
            occupied_s = plan.t_comm_s / DEFAULTS.tail - times * DEFAULTS.network_latency_s
            assert plan.num_layers * plan.num_micro_batches * occupied_s <= plan.tpot_s


def test_tuned_baselines_are_never_slower_than_shipped_ones(systems):
    for model in MODELS:
        for cluster in (HOMOGENEOUS, HETEROGENEOUS):
            for name in ("vllm", "tensorrt-llm"):
                shipped = systems.decode_ratio(model, cluster, name)
                assert systems.decode_ratio(model, cluster, name, is_tuned=True) <= shipped * (1 + 1e-9)


def test_prefill_that_is_equal_in_both_dilutes_the_decode_gain(systems):
    for model in MODELS:
        for cluster in (HOMOGENEOUS, HETEROGENEOUS):
            decode = systems.decode_ratio(model, cluster, "tensorrt-llm", per="cost")
            assert 1 < systems.end_to_end_ratio(model, cluster, "tensorrt-llm", per="cost") < decode


def test_a_prompts_flops_are_two_per_active_parameter_and_token_and_causal_attention(systems):
    setting = systems.setting
    model, gpu = setting.models["mixtral-8x22b"], setting.gpus["a800"]
    active = 56 * (6144 * 128 * (2 * 48 + 2 * 8) + 6144 * 8 + 2 * 3 * 6144 * 16384)
    attention = 56 * 4 * 48 * 128 * 571**2 / 2
    flops = 2 * 571 * active + attention + 2 * 6144 * 32768
    assert systems.prefill_s(model, gpu) == pytest.approx(flops / (312e12 * 0.79))


def test_a_second_micro_batch_nearly_doubles_throughput_and_a_fourth_adds_nothing_on_a_fast_network():
    for comm_share in (0.05, 0.1, 0.28, 0.38, 0.5):
        stages = balanced(comm_share)
        assert 1.8 <= throughput(stages, 2) / throughput(stages, 1) <= 2.0
        assert throughput(stages, 3) / throughput(stages, 2) == pytest.approx(1 + comm_share)
        assert throughput(stages, 4) / throughput(stages, 3) == pytest.approx(1.0)


def test_a_third_micro_batch_adds_nothing_where_messages_take_no_time():
    assert throughput(balanced(0.0), 3) == pytest.approx(throughput(balanced(0.0), 2))


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_the_simulator_agrees_with_the_closed_form(m):
    for stages in (balanced(0.1), Stages(0.8 * T_F, T_F, 0.3 * T_F)):
        assert simulated_pass_s(stages, m, num_layers=16) == pytest.approx(steady_pass_s(stages, m, 16), rel=1e-6)


def test_more_micro_batches_never_cost_throughput(systems):
    for model in MODELS:
        assert 1.8 <= systems.speedup(model, 2) <= 2.0 + 1e-9
        assert all(systems.speedup(model, m) >= 1 - 1e-9 for m in (3, 4))


def test_attention_nodes_of_dbrx_are_linear_up_to_the_balance_and_latency_rises_beyond(systems):
    sweep = systems.sweep("dbrx")
    balance = max(degree for degree, one in sweep.items() if one.stages.expert_s <= one.stages.attention_s)
    best = best_degree(sweep, tuple(sweep))
    assert 4 <= balance <= best <= 8
    for degree in range(1, balance + 1):
        assert sweep[degree].tokens_per_s == pytest.approx(degree * sweep[1].tokens_per_s, rel=0.05)
        assert sweep[degree].tpot_s == pytest.approx(sweep[1].tpot_s, rel=0.05)
    for degree in range(best, 16):
        assert sweep[degree + 1].tokens_per_s_per_gpu < sweep[degree].tokens_per_s_per_gpu
        assert sweep[degree + 1].tpot_s > sweep[degree].tpot_s
    assert sweep[16].tpot_s > 1.9 * sweep[8].tpot_s
    assert sweep[systems.ours("dbrx", HOMOGENEOUS).num_attention_nodes].tpot_s == pytest.approx(
        systems.ours("dbrx", HOMOGENEOUS).tpot_s
    )


def test_a_sensitivity_moves_the_claims_that_rest_on_it_and_no_others(found):
    def moved_by(name: str) -> set[str]:
        return {key for key, swings in found.items() if any(swing.knob.name == name for swing in swings)}

    assert moved_by("vLLM's max_num_seqs") == {"8a-vllm", "8a-vllm-scaled", "9-vllm", "13-disaggregation"}
    assert moved_by("FLOPS that an L40S sustains") == {
        "9-vllm", "9-trt", "9-end-to-end", "10-decode", "10-end-to-end",
    }  # fmt: skip


def test_without_kv_copies_a_model_keeps_all_its_sizes():
    for name, before in Setting().models.items():
        after = no_kv_copies(Setting()).models[name]
        for size in ("projection_values", "kv_values", "attention_flops", "total_values"):
            assert getattr(after, size) == getattr(before, size)


def swing(low: float, high: float, name: str = "price") -> Swing:
    return Swing(Knob(name, "1", "2", ()), (low, high), 2.0)


def off(paper: float, means: str = "") -> Measured:
    return Measured(
        Claim("k", "9", "a claim", paper, "a800", ("dbrx",), lambda *_: 2.0, means=means), 2.0, {"dbrx": 2.0}
    )


@pytest.mark.parametrize(
    ("one", "swings", "sentence"),
    [
        (off(2.1), [swing(1.0, 4.0)], ""),
        (off(3.0), [], "No assumption moves ours within its range."),
        (off(3.0), [swing(1.0, 3.5)], "Within reach of one assumption alone: price (1 to 2: 1.00 to 3.50)."),
        (off(3.0, "So"), [swing(1.0, 2.0)],
         "So. No assumption moves ours towards it; the widest is price (1 to 2: 1.00 to 2.00)."),
        (off(3.0), [swing(1.0, 2.4), swing(1.5, 2.6, "power")],
         "Out of reach of any one assumption; those that come nearest: power (1 to 2: 1.50 to 2.60); "
         "price (1 to 2: 1.00 to 2.40)."),
    ],
)  # fmt: skip
def test_a_reason_says_what_could_close_the_gap(one, swings, sentence):
    assert reason(one, swings) == sentence


def test_only_what_stands_between_the_markers_is_rewritten():
    text = f"before\n{reproduce_paper.BEGIN}\nold\n{reproduce_paper.END}\nafter"
    assert reproduce_paper.with_block(text, "new") == text.replace("old", "new")


def test_without_matplotlib_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tools.paper.figures", None)
    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", "--figures", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"--figures needs matplotlib .*pip install -e '\.\[plot\]'"):
        reproduce_paper.main()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")
def test_every_figure_is_drawn(tmp_path, systems, measured, found):
    from tools.paper.figures import draw

    draw(tmp_path / "figures", systems, measured, found)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "figures").iterdir()}
    figures = ("figure_8", "figure_9", "figure_10", "figure_13", "figure_14", "figure_15", "sensitivity")
    assert set(sizes) == {f"{name}.png" for name in figures}
    assert max(sizes.values()) < 60_000
