"""The figures as PNG files: ours as bars and lines, the paper's published numbers as dashed lines."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from msi.planner.task import Objective, score_of
from tools.paper.claims import CLAIMS, Measured
from tools.paper.sensitivity import Swing
from tools.paper.simulated import simulated_pass_s
from tools.paper.systems import HETEROGENEOUS, HOMOGENEOUS, MODELS, SCALED, SMALL, TITLES, Cluster, Systems

COLOURS = ("#9aa5b1", "#4c78a8", "#e4572e")  # vLLM, TensorRT-LLM, ours
BASELINES = {"vllm": "vLLM", "tensorrt-llm": "TensorRT-LLM"}
PAPER = {claim.key: claim.paper for claim in CLAIMS if claim.paper is not None}
TORNADOS = ("8a-vllm-scaled", "8a-trt-scaled", "8c", "9-trt", "9-end-to-end", "13-disaggregation")
MOST_BARS = 8
DPI = 85
HEADROOM = 1.25  # for the legend


def draw(folder: Path, systems: Systems, measured: Sequence[Measured], found: Mapping[str, Sequence[Swing]]) -> None:
    """Writes every figure into `folder`, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {
        "figure_8": figure_8(systems),
        "figure_9": clusters_two(systems, "cost", "price", ("9-vllm", "9-end-to-end")),
        "figure_10": clusters_two(systems, "watt", "watt", ("10-decode", "10-end-to-end")),
        "figure_13": figure_13(systems),
        "figure_14": figure_14(systems),
        "figure_15": figure_15(systems),
        "sensitivity": tornados(measured, found),
    }
    for name, page in pages.items():
        _save(page, folder / f"{name}.png")


def figure_8(systems: Systems) -> Figure:
    page, (decode, end_to_end) = _page(2)
    _decode(decode, systems, HOMOGENEOUS, "gpu", "vllm")
    decode.set_title("8a: decode per GPU, 8 x 8 A800 (vLLM = 1)")
    for models, key in ((SMALL, "8a-vllm"), ((SCALED,), "8a-vllm-scaled")):
        _claimed(decode, PAPER[key], models)
    _end_to_end(end_to_end, systems, HOMOGENEOUS, "gpu")
    end_to_end.set_title("8c: end to end per GPU (TensorRT-LLM = 1)")
    _claimed(end_to_end, PAPER["8c"], MODELS)
    return page


def clusters_two(systems: Systems, per: Objective, unit: str, keys: tuple[str, str]) -> Figure:
    """Figures 9 and 10: H20 + L40S against H20 alone, decode and end to end."""
    page, (decode, end_to_end) = _page(2)
    over = "vllm" if keys[0].endswith("vllm") else "tensorrt-llm"
    _decode(decode, systems, HETEROGENEOUS, per, over)
    decode.set_title(f"{keys[0].split('-')[0]}: decode per {unit}, H20 + L40S ({BASELINES[over]} on H20 = 1)")
    _claimed(decode, PAPER[keys[0]], MODELS)
    _end_to_end(end_to_end, systems, HETEROGENEOUS, per)
    end_to_end.set_title(f"end to end per {unit} (TensorRT-LLM on H20 = 1)")
    _claimed(end_to_end, PAPER[keys[1]], MODELS)
    return page


def figure_13(systems: Systems) -> Figure:
    page, (axis,) = _page(1)
    base = {model: systems.baseline("vllm", model, HOMOGENEOUS).tokens_per_s_per_gpu for model in MODELS}
    slow = [systems.ours(model, HOMOGENEOUS, is_nccl=True).tokens_per_s_per_gpu / base[model] for model in MODELS]
    fast = [systems.ours(model, HOMOGENEOUS).tokens_per_s_per_gpu / base[model] for model in MODELS]
    series = {"colocated (vLLM)": [1.0] * len(MODELS), "disaggregated, NCCL": slow, "with M2N": fast}
    _bars(axis, series, MODELS)
    axis.set_title("13: what disaggregation and M2N bring (vLLM = 1)")
    _claimed(axis, PAPER["13-disaggregation"], MODELS)
    return page


def figure_14(systems: Systems) -> Figure:
    page, (axis,) = _page(1)
    counts = (1, 2, 3, 4)
    for model, colour in zip(MODELS, COLOURS, strict=True):
        plan = systems.pipelined(model)
        alone_s = systems.pass_s(model, 1)
        axis.plot(counts, [m * alone_s / systems.pass_s(model, m) for m in counts], color=colour, label=TITLES[model])
        simulated = [m * alone_s / simulated_pass_s(plan.stages, m, plan.num_layers) for m in counts]
        axis.plot(counts, simulated, "o", color=colour)
        steps = (PAPER["14-two"], PAPER[f"14-three-{model}"], PAPER["14-four"])
        claimed = [1.0, steps[0], steps[0] * steps[1], steps[0] * steps[1] * steps[2]]
        axis.plot(counts, claimed, "--", color=colour, alpha=0.6)
    axis.set_title("14: throughput by micro-batches of equal size")
    axis.set_xlabel("m   (line: closed form, dots: simulator, dashed: the paper)")
    axis.set_xticks(counts)
    axis.set_ylabel("over m = 1")
    axis.legend(fontsize=8)
    return page


def figure_15(systems: Systems) -> Figure:
    page, (rate, latency) = _page(2)
    sweep = systems.sweep()
    degrees = list(sweep)
    rate.plot(degrees, [one.tokens_per_s / sweep[1].tokens_per_s for one in sweep.values()], label="tokens/s")
    per_gpu = [one.tokens_per_s_per_gpu / sweep[1].tokens_per_s_per_gpu for one in sweep.values()]
    rate.plot(degrees, per_gpu, color=COLOURS[2], label="tokens/s per GPU")
    rate.set_title("15: DBRX, throughput over 1 attention node")
    rate.legend(fontsize=8)
    latency.plot(degrees, [one.tpot_s * 1e3 for one in sweep.values()], color="black", label="TPOT, ms")
    for label, colour, times in (
        ("T_a", COLOURS[1], [one.stages.attention_s for one in sweep.values()]),
        ("T_e", COLOURS[2], [one.stages.expert_s for one in sweep.values()]),
    ):
        latency.plot(degrees, [one * 1e5 for one in times], "--", color=colour, label=f"{label}, 10 us")
    latency.set_title("15: DBRX, latency")
    latency.legend(fontsize=8)
    for axis in (rate, latency):
        axis.set_xlabel("attention nodes (dotted: the paper's peak)")
        axis.axvline(PAPER["15-peak"], color="black", linestyle=":", linewidth=1)
        axis.set_ylim(bottom=0)
    return page


def tornados(measured: Sequence[Measured], found: Mapping[str, Sequence[Swing]]) -> Figure:
    page = Figure(figsize=(13, 8.5), layout="constrained")
    of = {one.claim.key: one for one in measured}
    for place, key in enumerate(TORNADOS, 1):
        one, axis = of[key], page.add_subplot(2, 3, place)
        widest = list(reversed(found[key][:MOST_BARS]))
        names = [f"{swing.knob.name}\n{swing.knob.low} to {swing.knob.high}" for swing in widest]
        axis.barh(names, [swing.width for swing in widest], left=[swing.lowest for swing in widest], color=COLOURS[1])
        axis.axvline(one.ours, color="black", linewidth=1)
        axis.axvline(PAPER[key], color=COLOURS[2], linestyle="--", linewidth=1.5)
        axis.tick_params(labelsize=7)
        axis.set_title(textwrap.fill(f"{one.claim.figure}: {one.claim.text}", 36), fontsize=8)
    page.suptitle("One assumption at a time over its range (black: ours, dashed: the paper)", fontsize=10)
    return page


def _save(page: Figure, path: Path) -> None:
    """With a palette of 64 colours: a third of the bytes."""
    drawn = io.BytesIO()
    page.savefig(drawn, dpi=DPI, format="png")
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


def _page(columns: int) -> tuple[Figure, list[Axes]]:
    page = Figure(figsize=(5.2 * columns, 3.6), layout="constrained")
    return page, [page.add_subplot(1, columns, place) for place in range(1, columns + 1)]


def _decode(axis: Axes, systems: Systems, cluster: Cluster, per: Objective, over: str) -> None:
    base = {model: score_of(systems.baseline(over, model, cluster), per) for model in MODELS}
    series = {
        title: [score_of(systems.baseline(name, model, cluster), per) / base[model] for model in MODELS]
        for name, title in BASELINES.items()
    }
    series["ours"] = [score_of(systems.ours(model, cluster), per) / base[model] for model in MODELS]
    _bars(axis, series, MODELS)


def _end_to_end(axis: Axes, systems: Systems, cluster: Cluster, per: Objective) -> None:
    ours = [systems.end_to_end_ratio(model, cluster, "tensorrt-llm", per=per) for model in MODELS]
    vllm = [
        one / systems.end_to_end_ratio(model, cluster, "vllm", per=per) for one, model in zip(ours, MODELS, strict=True)
    ]
    _bars(axis, {"vLLM": vllm, "TensorRT-LLM": [1.0] * len(MODELS), "ours": ours}, MODELS)


def _bars(axis: Axes, series: Mapping[str, Sequence[float]], models: Sequence[str]) -> None:
    width = 0.8 / len(series)
    for index, (label, values) in enumerate(series.items()):
        places = [place - 0.4 + width * (index + 0.5) for place in range(len(models))]
        drawn = axis.bar(places, values, width, label=label, color=COLOURS[index])
        axis.bar_label(drawn, fmt="%.2f", fontsize=7)
    axis.set_xticks(range(len(models)), [TITLES[model] for model in models])
    axis.set_ylim(top=axis.get_ylim()[1] * HEADROOM)
    axis.legend(fontsize=8, loc="upper center", ncols=len(series))


def _claimed(axis: Axes, value: float, models: Sequence[str]) -> None:
    """The paper's number, over the models that its "up to" speaks of."""
    places = [MODELS.index(model) for model in models]
    axis.hlines(value, min(places) - 0.45, max(places) + 0.45, colors="black", linestyles="dashed", linewidth=1)
    axis.text(min(places) - 0.45, value, f"paper: up to {value:g}", fontsize=7, verticalalignment="bottom")
    axis.set_ylim(top=max(axis.get_ylim()[1], value * HEADROOM))
