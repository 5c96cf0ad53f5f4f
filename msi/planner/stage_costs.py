"""What stages take, as the simulator asks for it: one layer of one micro-batch, one batch of experts, one message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class StageCosts(Protocol):
    """Durations in seconds on one deployment; pure functions of sizes."""

    def attention_s(self, num_tokens: int, num_context_tokens: int) -> float:
        """T_a: one layer's turn of the attention node's device.

        Args:
            num_tokens: rows of the micro-batch: one per decoding sequence, more for chunks of prompts.
            num_context_tokens: the context lengths of its sequences, summed.
        """
        ...

    def pass_s(self, num_logit_rows: int) -> float:
        """Once per pass on the attention node: embedding, LM head and sampling of so many sequences."""
        ...

    def expert_s(self, num_expert_rows: float, num_active_experts: int) -> float:
        """T_e: one layer's batch on an expert node.

        Args:
            num_expert_rows: (token, expert) pairs, summed over the node's experts.
            num_active_experts: experts with at least one; the weights of the others are not read.
        """
        ...

    def comm_s(self, num_bytes: int) -> float:
        """T_c: one message to one peer, one way, as the pipeline sees it: all messages of the same stage included."""
        ...


@dataclass(frozen=True, slots=True)
class ConstantCosts:
    """Stage times that do not depend on sizes: what the pipeline's formulas are checked with."""

    attention: float
    expert: float
    comm: float
    once_per_pass: float = 0.0

    def attention_s(self, num_tokens: int, num_context_tokens: int) -> float:
        return self.attention

    def pass_s(self, num_logit_rows: int) -> float:
        return self.once_per_pass

    def expert_s(self, num_expert_rows: float, num_active_experts: int) -> float:
        return self.expert

    def comm_s(self, num_bytes: int) -> float:
        return self.comm


@dataclass(frozen=True, slots=True)
class BatchMean:
    """What was measured: the mean of an expert node's batches of about the same size.

    Attributes:
        rows: (token, expert) pairs of a batch.
        experts: that had at least one.
        seconds: that it took.
        num_batches: how many there were.
    """

    rows: float
    experts: float
    seconds: float
    num_batches: float
