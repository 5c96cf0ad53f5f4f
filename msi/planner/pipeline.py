"""The pipeline's arithmetic: how long a pass takes, and how many micro-batches fill it. Pure; times in seconds.

Equation numbers are those of the MegaScale-Infer paper (arXiv 2504.02263).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MAX_MICRO_BATCHES = 4  # N_m


@dataclass(frozen=True, slots=True)
class Stages:
    """T_a, T_e: compute time of one micro-batch for one layer; T_c: one-way communication time."""

    attention_s: float
    expert_s: float
    comm_s: float

    @property
    def forward_s(self) -> float:
        """T_f = max(T_a, T_e)."""
        return max(self.attention_s, self.expert_s)

    @property
    def round_trip_s(self) -> float:
        """One layer of one micro-batch, alone: T_a + T_e + 2 T_c."""
        return self.attention_s + self.expert_s + 2 * self.comm_s


def is_full(stages: Stages, num_micro_batches: int) -> bool:
    """Whether m micro-batches hide the round trip: m T_f >= T_a + T_e + 2 T_c (Eq 3 without its simplification)."""
    return num_micro_batches * stages.forward_s >= stages.round_trip_s


def eq5_s(stages: Stages, num_micro_batches: int, num_layers: int) -> float:
    """Eq 5, T_total of one decode iteration when the pipeline is full."""
    return stages.round_trip_s + stages.forward_s * (num_micro_batches * num_layers - 1)


def isolated_pass_s(stages: Stages, num_micro_batches: int, num_layers: int) -> float:
    """One pass of m micro-batches from an empty pipeline to an empty one (the max form of Eq 5)."""
    unhidden_s = num_layers * stages.round_trip_s + (num_micro_batches - 1) * stages.forward_s
    return max(eq5_s(stages, num_micro_batches, num_layers), unhidden_s)


def steady_pass_s(stages: Stages, num_micro_batches: int, num_layers: int) -> float:
    """One pass of each of m lanes that run on without a barrier: L max(m T_f, T_a + T_e + 2 T_c)."""
    return num_layers * max(num_micro_batches * stages.forward_s, stages.round_trip_s)


def choose_micro_batches(measured: Mapping[int, Stages], batch_size: int, num_layers: int) -> tuple[int, str]:
    """The number of micro-batches with the best throughput for a batch of `batch_size` sequences, and why.

    Throughput of m micro-batches of batch_size / m sequences is batch_size over the steady pass, of stages measured
    at that size while m of them overlap. Within 3 % the fewer win: they need fewer slots.

    Args:
        measured: stages by m, each at batch_size / m sequences per micro-batch.
    """
    passes = {m: steady_pass_s(stages, m, num_layers) for m, stages in measured.items()}
    best_s = min(passes.values())
    chosen = min(m for m, pass_s in passes.items() if pass_s <= best_s * 1.03)
    lines = []
    for m, stages in sorted(measured.items()):
        condition = "full" if is_full(stages, m) else "not full"
        lines.append(
            f"m={m}: T_a {stages.attention_s * 1e3:.2f} ms, T_e {stages.expert_s * 1e3:.2f} ms, "
            f"T_c {stages.comm_s * 1e3:.2f} ms, pipeline {condition}, "
            f"{_rate(batch_size, passes[m]):.0f} tokens/s"
        )
    one, more = measured.get(1), measured.get(2)
    why = "the most tokens per second"
    if chosen == 1 and one is not None and more is not None:
        shrunk = _rate(more.attention_s + more.expert_s, one.attention_s + one.expert_s)
        why = f"half a batch costs {shrunk:.2f} of a whole one, so overlapping halves does not pay"
    return chosen, f"{chosen} micro-batches for {batch_size} sequences: {why} ({'; '.join(lines)})"


def together_or_apart(measured: Mapping[int, Stages], chosen: int, batch_size: int, num_layers: int) -> str:
    """Whether one attention and one expert worker that share the cores of a host should be one process, and why.

    Its halves take turns, L (T_a + T_e), and send nothing.

    Args:
        measured, chosen: as `choose_micro_batches` has them, with stages of one micro-batch among them.
    """
    one = measured[1]
    together = _rate(batch_size, num_layers * (one.attention_s + one.expert_s))
    apart = _rate(batch_size, steady_pass_s(measured[chosen], chosen, num_layers))
    begins = "both workers are on one host"
    if together >= apart:
        why = "where they share its cores, one process (`colocated`) is faster, as no rows travel"
    else:
        why = "they are faster than one process (`colocated`), as their halves overlap"
    return f"{begins}: {why} (together {together:.0f} tokens/s, apart {apart:.0f})"


def _rate(amount: float, time_s: float) -> float:
    """Infinite where a clock was too coarse to see any time pass."""
    return amount / time_s if time_s else math.inf


@dataclass(frozen=True, slots=True)
class CalibrationStep:
    """Measure stages with this many lanes of this many sequences."""

    num_lanes: int
    num_seqs: int


def calibration_steps(batch_size: int) -> list[CalibrationStep]:
    """What `choose_micro_batches` needs to know; only batches that divide into at least one sequence per lane."""
    most = min(MAX_MICRO_BATCHES, batch_size)
    return [CalibrationStep(m, -(-batch_size // m)) for m in range(1, most + 1)]
