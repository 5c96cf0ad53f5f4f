"""The operations of both halves as plain torch functions on tensors; they know nothing of msi.

These run on the CPU and are the truth that faster kernels for other devices are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_TOKENS = 16  # of a block of the KV cache; here, without torch, for those who only count blocks
MXFP4_GROUP = 32  # values of a row of an MXFP4 matrix that share a scale
NONE = "none"  # of matrices that are not quantised
SCALE_BLOCK = 128  # rows and columns of a matrix in float8 that share a scale


@dataclass(frozen=True, slots=True)
class SigmoidRouting:
    """Experts are chosen by the sigmoids of their logits and a learned bias, which does not count in their weights.

    Attributes:
        num_groups, num_chosen_groups: experts lie in groups, of which a token chooses those whose two best are best.
        scale: of the weights.
    """

    num_groups: int = 1
    num_chosen_groups: int = 1
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Activation:
    """What an expert computes between its products: gate * sigmoid(alpha * gate) * (up + up_offset).

    Attributes:
        limit: gate is at most that, and up within both signs of it; 0 for none.
    """

    alpha: float = 1.0
    limit: float = 0.0
    up_offset: float = 0.0


SWIGLU = Activation()
