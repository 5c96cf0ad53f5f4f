"""The paper's claims (arXiv 2504.02263), each with our value of it.

"Up to" is the best over the models named; each model's own value stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tools.paper.systems import HETEROGENEOUS, HOMOGENEOUS, MODELS, SCALED, SMALL, TITLES, Systems, best_degree

CLOSE = 0.15  # a claim further off carries a reason
Topic = Literal["a800", "h20+l40s", "end to end", "ablation", "micro-batches", "data parallelism"]


@dataclass(frozen=True, slots=True)
class Claim:
    """One number of the paper, or None for a row of ours that it does not have.

    Attributes:
        topic: what it rests on: which assumptions can move it.
        of_model: our value of one model.
        ours: of all models' values, the one to compare.
        means: what the paper's number says about its system, where arithmetic tells.
    """

    key: str
    figure: str
    text: str
    paper: float | None
    topic: Topic
    models: tuple[str, ...]
    of_model: Callable[[Systems, str], float]
    ours: Callable[[Sequence[float]], float] = max
    means: str = ""

    def measure(self, systems: Systems) -> Measured:
        each = {model: self.of_model(systems, model) for model in self.models}
        return Measured(self, self.ours(list(each.values())), each)


@dataclass(frozen=True, slots=True)
class Measured:
    claim: Claim
    ours: float
    each: Mapping[str, float]

    @property
    def difference(self) -> float | None:
        """Ours over the paper's, less one."""
        return None if self.claim.paper is None else self.ours / self.claim.paper - 1

    @property
    def is_close(self) -> bool:
        return self.difference is None or abs(self.difference) <= CLOSE


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _decode(baseline: str, *, is_tuned: bool = False) -> Callable[[Systems, str], float]:
    return lambda systems, model: systems.decode_ratio(model, HOMOGENEOUS, baseline, is_tuned=is_tuned)


def _per_cost(baseline: str, *, is_tuned: bool = False) -> Callable[[Systems, str], float]:
    return lambda systems, model: systems.decode_ratio(model, HETEROGENEOUS, baseline, per="cost", is_tuned=is_tuned)


def _disaggregated(systems: Systems, model: str) -> float:
    """With T_c by NCCL, the plan searched anew, over the colocated baseline that the paper's total of 7.11 is over."""
    theirs = systems.baseline("vllm", model, HOMOGENEOUS)
    return systems.ours(model, HOMOGENEOUS, is_nccl=True).tokens_per_s_per_gpu / theirs.tokens_per_s_per_gpu


def _m2n(systems: Systems, model: str) -> float:
    slow = systems.ours(model, HOMOGENEOUS, is_nccl=True)
    return systems.ours(model, HOMOGENEOUS).tokens_per_s_per_gpu / slow.tokens_per_s_per_gpu


def _four_over_one(systems: Systems, model: str) -> float:
    sweep = systems.sweep(model)
    return sweep[4].tokens_per_s / sweep[1].tokens_per_s


CLAIMS: tuple[Claim, ...] = (
    Claim("8a-vllm", "8a", "decode per GPU over vLLM, up to", 2.56, "a800", SMALL, _decode("vllm")),
    Claim("8a-trt", "8a", "decode per GPU over TensorRT-LLM, up to", 1.28, "a800", SMALL, _decode("tensorrt-llm")),
    Claim("8a-vllm-scaled", "8a", "decode per GPU over vLLM, Scaled-MoE", 7.11, "a800", (SCALED,), _decode("vllm")),
    Claim(
        "8a-trt-scaled", "8a", "decode per GPU over TensorRT-LLM, Scaled-MoE", 1.90, "a800", (SCALED,),
        _decode("tensorrt-llm"),
    ),
    Claim(
        "8a-vllm-tuned", "8a", "decode per GPU over vLLM without its limit of sequences", None, "a800", MODELS,
        _decode("vllm", is_tuned=True),
    ),
    Claim(
        "8a-trt-tuned", "8a", "decode per GPU over TensorRT-LLM without its limit", None, "a800", MODELS,
        _decode("tensorrt-llm", is_tuned=True),
    ),
    Claim(
        "8c", "8c", "end to end per GPU over TensorRT-LLM, up to", 1.18, "end to end", MODELS,
        lambda systems, model: systems.end_to_end_ratio(model, HOMOGENEOUS, "tensorrt-llm"),
    ),
    Claim("9-vllm", "9", "decode per price over vLLM on H20, up to", 3.24, "h20+l40s", MODELS, _per_cost("vllm")),
    Claim(
        "9-trt", "9", "decode per price over TensorRT-LLM on H20, up to", 1.86, "h20+l40s", MODELS,
        _per_cost("tensorrt-llm"),
    ),
    Claim(
        "9-tuned", "9", "decode per price over either without its limit", None, "h20+l40s", MODELS,
        lambda systems, model: min(
            _per_cost(name, is_tuned=True)(systems, model) for name in ("vllm", "tensorrt-llm")
        ),
    ),
    Claim(
        "9-end-to-end", "9", "end to end per price over TensorRT-LLM on H20, up to", 1.66, "end to end", MODELS,
        lambda systems, model: systems.end_to_end_ratio(model, HETEROGENEOUS, "tensorrt-llm", per="cost"),
    ),
    Claim(
        "10-decode", "10", "decode per watt over TensorRT-LLM on H20, up to", 1.80, "h20+l40s", MODELS,
        lambda systems, model: systems.decode_ratio(model, HETEROGENEOUS, "tensorrt-llm", per="watt"),
    ),
    Claim(
        "10-end-to-end", "10", "end to end per watt over TensorRT-LLM on H20, up to", 1.72, "end to end", MODELS,
        lambda systems, model: systems.end_to_end_ratio(model, HETEROGENEOUS, "tensorrt-llm", per="watt"),
    ),
    Claim(
        "13-disaggregation", "13", "disaggregation, T_c by NCCL, over vLLM, up to", 4.66, "ablation", MODELS,
        _disaggregated,
    ),
    Claim("13-m2n", "13", "M2N on top of it, up to another", 1.53, "ablation", MODELS, _m2n),
    Claim(
        "14-two", "14", "micro-batches 1 to 2, mean", 1.9, "micro-batches", MODELS,
        lambda systems, model: systems.speedup(model, 2), mean,
    ),
    *(
        Claim(
            f"14-three-{model}", "14", f"micro-batches 2 to 3, {TITLES[model]}", paper, "micro-batches", (model,),
            lambda systems, model: systems.speedup(model, 3),
            means=f"At T_a = T_e it is 1 + T_c / T_f, up to 1.5: the paper's means T_c = {paper - 1:.2f} T_f",
        )
        for model, paper in zip(MODELS, (1.10, 1.28, 1.38), strict=True)
    ),
    Claim(
        "14-four", "14", "micro-batches 3 to 4, mean (about flat)", 1.0, "micro-batches", MODELS,
        lambda systems, model: systems.speedup(model, 4), mean,
    ),
    Claim(
        "15-linear", "15", "throughput of 4 attention nodes over 1 (linear)", 4.0, "data parallelism", ("dbrx",),
        _four_over_one,
    ),
    Claim(
        "15-latency", "15", "latency of 4 attention nodes over 1 (flat)", 1.0, "data parallelism", ("dbrx",),
        lambda systems, model: systems.sweep(model)[4].tpot_s / systems.sweep(model)[1].tpot_s,
    ),
    Claim(
        "15-peak", "15", "attention nodes with the most tokens/s per GPU, of 1, 2, 4, 8, 16", 8.0, "data parallelism",
        ("dbrx",),
        lambda systems, model: float(best_degree(systems.sweep(model))),
    ),
)  # fmt: skip


def measure_all(systems: Systems) -> list[Measured]:
    return [claim.measure(systems) for claim in CLAIMS]
