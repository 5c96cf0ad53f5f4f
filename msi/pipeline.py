"""The pipeline's arithmetic: how long a pass takes, and how many micro-batches fill it. Pure; times in seconds.

Equation numbers are those of the MegaScale-Infer paper (arXiv 2504.02263).
"""

from __future__ import annotations

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
