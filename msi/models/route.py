"""The router of one layer, as an object that is built when the layer is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from msi.kernels import SigmoidRouting
from msi.kernels.kernels import Kernels, Linear


class Route(Protocol):
    """Which experts each token goes to."""

    def __call__(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """topk_weights float32 and topk_ids int64, both [n, k], of normed rows [n, h]."""


@dataclass(frozen=True, slots=True)
class SoftmaxRoute:
    """The largest of the router's softmax; `renormalise` scales the weights of the chosen to sum to 1."""

    kernels: Kernels
    router: Linear  # [n, h] -> [n, num_experts]
    top_k: int
    renormalise: bool

    def __call__(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.topk_softmax(self.router(normed), self.top_k, self.renormalise)


@dataclass(frozen=True, slots=True)
class SigmoidRoute:
    """As `SigmoidRouting` says, in float32 whatever the rows are: rounded, the bias would turn near ties around."""

    kernels: Kernels
    router: Linear  # float32 [n, h] -> [n, num_experts]
    bias: Tensor  # float32 [num_experts]
    top_k: int
    renormalise: bool
    routing: SigmoidRouting

    def __call__(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(normed.to(torch.float32))
        return self.kernels.topk_sigmoid(logits, self.bias, self.top_k, self.renormalise, self.routing)
