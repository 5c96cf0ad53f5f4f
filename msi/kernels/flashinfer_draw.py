"""Tokens that are drawn from lists which flashinfer makes: of each row its best tokens, in order.

Only the list is the library's. Cuts and the draw are those of `msi.kernels.sampling.drawn`, by the number that follows
from a request's seed and its position, so a token does not depend on what else runs beside it. The library's own draws
do: their random numbers follow from a row's place in the batch. Its filters (top_k_mask_logits, top_k_renorm_probs,
top_p_renorm_probs) are not used either: they keep every token that is as likely as the last one, where ours keep those
of lower ids, and share memory between streams, so lanes could not draw at the same time.

A list is asked for with ties to the lower id, in an order that is always the same; it is right for rows that have a
top_k, and passes with others are drawn by Triton's kernels, as all are on GPUs that have too little shared memory for
such lists.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from msi.kernels.choosing import choose
from msi.kernels.sampling import drawn

MOST_LISTED = 256  # tokens of a row; rows that want more are rare, and lists cost what is listed
SIZES = (1, 4, 16, 64, 128)  # rows that both ways are compared on
TO_THE_LOWER_ID = 1  # TopKTieBreak.SMALL

Draw = Callable[[Tensor, Tensor], Tensor]


class ListedDraw:
    """Implements `msi.kernels.sampling.draw`.

    Args:
        library: the module.
        own: draws where it does not.
        is_measured: it draws where it gives the same tokens as `own` and is faster, which is found out where a
            vocabulary is met first; else wherever it can.
        seconds: that something takes on the device.
    """

    def __init__(
        self, library: Any, own: Draw, is_measured: bool, seconds: Callable[[Callable[[], object]], float]
    ) -> None:
        self._library, self._own, self._seconds = library, own, seconds
        self._is_measured = is_measured
        self._is_able: bool | None = None
        self._is_taken: dict[int, list[bool]] = {}  # by vocabulary: of each of SIZES

    def __call__(self, logits: Tensor, numbers: Tensor) -> Tensor:
        num_rows, vocab_size = logits.shape
        is_known = numbers.device.type == "cpu"  # else asking would wait for the device
        if not num_rows or not is_known or vocab_size <= MOST_LISTED or numbers[1].max() > MOST_LISTED:
            return self._own(logits, numbers)
        return (self._listed if self._takes(num_rows, vocab_size, logits.device) else self._own)(logits, numbers)

    def _listed(self, logits: Tensor, numbers: Tensor) -> Tensor:
        # a -0.0 becomes 0.0: they are equal, and the library tells them apart
        values, order = self._library.top_k(
            logits + 0.0, int(numbers[1].max()), sorted=True, deterministic=True, tie_break=TO_THE_LOWER_ID
        )
        return drawn(values, order, numbers)

    def _takes(self, num_rows: int, vocab_size: int, device: torch.device) -> bool:
        if self._is_able is None:
            self._is_able = bool(self._library.topk.can_implement_filtered_topk())
        if not self._is_able or not self._is_measured:
            return self._is_able
        found = self._is_taken.get(vocab_size)
        if found is None:
            found = self._is_taken[vocab_size] = [self._is_better(size, vocab_size, device) for size in SIZES]
        return found[next((at for at, size in enumerate(SIZES) if size >= num_rows), -1)]

    def _is_better(self, num_rows: int, vocab_size: int, device: torch.device) -> bool:
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.randn(num_rows, vocab_size, generator=generator, device=device) * 4
        each = torch.tensor([[0.8], [MOST_LISTED], [0.95], [0.0], [0.0]], dtype=torch.float64)
        numbers = each.repeat(1, num_rows)
        numbers[4] = torch.rand(num_rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ways = {
            "Triton": partial(self._own, logits, numbers),
            "flashinfer": partial(self._listed, logits, numbers),
        }
        what = f"drawing of {num_rows} tokens among {vocab_size}"
        return choose(what, ways, self._seconds, most_apart=0.0) == "flashinfer"
