"""How far each assumption moves each claim: one at a time, over a range that is plausible for it.

The ranges were chosen for what is known of kernels, networks and traces, not for where the paper's numbers lie. A claim
that differs by more than 15 % gets a sentence from this computation: what could close the gap alone, or, where nothing
could, what moves it most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tools.paper.claims import Claim, Measured, Topic
from tools.paper.systems import Setting, Systems

Change = Callable[[Setting], Setting]
HOMOGENEOUS_TOPICS: tuple[Topic, ...] = ("a800", "end to end", "ablation", "micro-batches", "data parallelism")
HETEROGENEOUS_TOPICS: tuple[Topic, ...] = ("h20+l40s", "end to end")
ALL: tuple[Topic, ...] = ("h20+l40s", *HOMOGENEOUS_TOPICS)
WITH_BASELINES: tuple[Topic, ...] = ("a800", "h20+l40s", "end to end", "ablation")
WITH_NETWORK: tuple[Topic, ...] = ("a800", "h20+l40s", "ablation", "micro-batches", "data parallelism")


@dataclass(frozen=True, slots=True)
class Knob:
    """One assumption, the ends of its range, and the topics that it can move."""

    name: str
    low: str
    high: str
    changes: tuple[Change, ...]  # to the low end, to the high end; the first alone where the default is the high end
    topics: tuple[Topic, ...] = ALL


@dataclass(frozen=True, slots=True)
class Swing:
    """A claim at the ends of a knob's range."""

    knob: Knob
    at: tuple[float, ...]
    default: float

    @property
    def ends(self) -> tuple[float, float]:
        low, high = (*self.at, self.default)[:2]
        return low, high

    @property
    def lowest(self) -> float:
        return min(*self.at, self.default)

    @property
    def highest(self) -> float:
        return max(*self.at, self.default)

    @property
    def width(self) -> float:
        return self.highest - self.lowest

    def reaches(self, value: float) -> bool:
        """Within 2 %."""
        return self.lowest * 0.98 <= value <= self.highest * 1.02

    def distance(self, value: float) -> float:
        return 0.0 if self.reaches(value) else min(abs(self.lowest - value), abs(self.highest - value))

    def to_json(self) -> dict[str, Any]:
        knob = self.knob
        return {"assumption": knob.name, "from": knob.low, "to": knob.high, "ours": list(self.ends)}

    def __str__(self) -> str:
        low, high = self.ends
        return f"{self.knob.name} ({self.knob.low} to {self.knob.high}: {low:.2f} to {high:.2f})"


def given(**values: Any) -> Change:
    return lambda setting: replace(setting, given=replace(setting.given, **values))


def compute(fraction: float) -> Change:
    return given(compute=((1.0, fraction),))


def launches(scale: float) -> Change:
    return lambda setting: given(
        attention_launch_s=setting.given.attention_launch_s * scale,
        expert_launch_s=setting.given.expert_launch_s * scale,
    )(setting)


def lengths(**values: float) -> Change:
    return lambda setting: replace(setting, workload=replace(setting.workload, **values))


def most_seqs(baseline: str, count: int) -> Change:
    return lambda setting: replace(
        setting,
        baselines={**setting.baselines, baseline: replace(setting.baselines[baseline], max_num_seqs=count)},
    )


def scaled(gpu: str, name: str, scale: float) -> Change:
    """One nominal figure of one GPU, times `scale`."""

    def change(setting: Setting) -> Setting:
        old = setting.gpus[gpu]
        return replace(setting, gpus={**setting.gpus, gpu: replace(old, **{name: getattr(old, name) * scale})})

    return change


def no_kv_copies(setting: Setting) -> Setting:
    """As if each KV head could be halved: all sizes kept, twice as many heads of half the width."""
    models = {
        name: model
        if model.latent is not None
        else replace(
            model, num_heads=model.num_heads * 2, num_kv_heads=model.num_kv_heads * 2, head_dim=model.head_dim // 2
        )
        for name, model in setting.models.items()
    }
    return replace(setting, models=models)


KNOBS: tuple[Knob, ...] = (
    Knob("GEMM efficiency", "0.55", "0.90", (compute(0.55), compute(0.90))),
    Knob("memory bandwidth reached", "0.75", "0.95", (given(memory=0.75), given(memory=0.95))),
    Knob("network bandwidth reached", "0.6", "0.95", (given(network=0.6), given(network=0.95)), WITH_NETWORK),
    Knob(
        "message at half rate", "8 KB", "128 KB",
        (given(network_half_bytes=8e3), given(network_half_bytes=128e3)), WITH_NETWORK,
    ),
    Knob(
        "M2N latency", "5 us", "40 us", (given(network_latency_s=5e-6), given(network_latency_s=40e-6)), WITH_NETWORK
    ),
    Knob("tail of T_c over its mean", "1.0", "1.5", (given(tail=1.0), given(tail=1.5)), WITH_NETWORK),
    Knob("NVLink and PCIe efficiency", "0.5", "0.9", (given(intra_node=0.5), given(intra_node=0.9)), WITH_BASELINES),
    Knob(
        "collective latency in a node", "8 us", "40 us",
        (given(collective_latency_s=8e-6), given(collective_latency_s=40e-6)), WITH_BASELINES,
    ),
    Knob(
        "collective latency across nodes", "20 us", "200 us",
        (given(cross_node_latency_s=20e-6), given(cross_node_latency_s=200e-6)), WITH_BASELINES,
    ),
    Knob("gaps between kernels", "half", "three times", (launches(0.5), launches(3.0))),
    Knob(
        "memory that may be planned", "0.85", "0.95",
        (given(memory_utilization=0.85), given(memory_utilization=0.95)),
    ),
    Knob("time by NCCL over M2N", "2.0", "5.2", (given(nccl_over_m2n=2.0), given(nccl_over_m2n=5.2)), ("ablation",)),
    Knob(
        "baselines' kernels over ours", "0.6", "1.0",
        (lambda setting: replace(setting, baseline_kernels=0.6),), WITH_BASELINES,
    ),
    Knob(
        "vLLM's max_num_seqs", "128", "1024", (most_seqs("vllm", 128), most_seqs("vllm", 1024)), WITH_BASELINES,
    ),
    Knob(
        "TensorRT-LLM's max batch", "256", "4096",
        (most_seqs("tensorrt-llm", 256), most_seqs("tensorrt-llm", 4096)), WITH_BASELINES,
    ),
    Knob("KV copies in groups above 8 GPUs", "none", "as assumed", (no_kv_copies,), ("a800", "end to end", "ablation")),
    Knob("mean input length", "400", "1700", (lengths(input_len=400), lengths(input_len=1700))),
    Knob("mean output length", "80", "480", (lengths(output_len=80), lengths(output_len=480))),
    Knob(
        "FLOPS that an L40S sustains", "half", "as assumed", (scaled("l40s", "flops_per_s", 0.5),),
        HETEROGENEOUS_TOPICS,
    ),
    Knob(
        "network of an L40S", "50 Gbit/s", "200 Gbit/s",
        (scaled("l40s", "network_bytes_per_s", 0.5), scaled("l40s", "network_bytes_per_s", 2.0)), HETEROGENEOUS_TOPICS,
    ),
    Knob(
        "price of an L40S", "0.8 x", "1.5 x", (scaled("l40s", "price", 0.8), scaled("l40s", "price", 1.5)),
        HETEROGENEOUS_TOPICS,
    ),
    Knob(
        "price of an H20", "0.7 x", "1.3 x", (scaled("h20", "price", 0.7), scaled("h20", "price", 1.3)),
        HETEROGENEOUS_TOPICS,
    ),
    Knob(
        "power that an H20 draws", "0.6 x", "as its limit", (scaled("h20", "power_w", 0.6),), HETEROGENEOUS_TOPICS
    ),
    Knob(
        "power that an L40S draws", "0.7 x", "as its limit", (scaled("l40s", "power_w", 0.7),), HETEROGENEOUS_TOPICS
    ),
    Knob(
        "GPU of our prefill in the mixed cluster", "its cheapest FLOPS", "H20",
        (lambda setting: replace(setting, prefill_gpu=""),), ("end to end",),
    ),
    Knob(
        "plan that lends its micro-batches", "the best with m = 3", "the best with m = 4",
        (lambda setting: replace(setting, pipeline_m=3),), ("micro-batches",),
    ),
)  # fmt: skip


def swings(
    measured: Sequence[Measured], setting: Setting, knobs: Iterable[Knob] = KNOBS
) -> Iterator[tuple[Claim, Swing]]:
    """Every claim of the paper at the ends of every assumption that can move it."""
    for knob in knobs:
        ends = [Systems(change(setting)) for change in knob.changes]
        for one in measured:
            if one.claim.paper is not None and one.claim.topic in knob.topics:
                at = tuple(one.claim.measure(systems).ours for systems in ends)
                yield one.claim, Swing(knob, at, one.ours)


def by_claim(measured: Sequence[Measured], setting: Setting, knobs: Iterable[Knob] = KNOBS) -> dict[str, list[Swing]]:
    """Of each claim the swings, widest first; those that do not move it are left out."""
    found: dict[str, list[Swing]] = {one.claim.key: [] for one in measured}
    for claim, swing in swings(measured, setting, knobs):
        if swing.width > 1e-3 * abs(swing.default):
            found[claim.key].append(swing)
    for of_claim in found.values():
        of_claim.sort(key=lambda swing: -swing.width)
    return found


def reason(one: Measured, found: Sequence[Swing]) -> str:
    """Why a claim differs by more than 15 %, as far as this computation can tell; "" where it does not."""
    if one.is_close:
        return ""
    means = f"{one.claim.means}. " if one.claim.means else ""
    return means + _what_decides(one, found)


def _what_decides(one: Measured, found: Sequence[Swing]) -> str:
    paper = one.claim.paper
    assert paper is not None
    if not found:
        return "No assumption moves ours within its range."
    if reaching := [swing for swing in found if swing.reaches(paper)]:
        return f"Within reach of one assumption alone: {'; '.join(str(swing) for swing in reaching[:3])}."
    nearest = sorted(found, key=lambda swing: swing.distance(paper))[:2]
    if nearest[0].distance(paper) >= abs(one.ours - paper):
        return f"No assumption moves ours towards it; the widest is {found[0]}."
    return f"Out of reach of any one assumption; those that come nearest: {'; '.join(str(swing) for swing in nearest)}."
