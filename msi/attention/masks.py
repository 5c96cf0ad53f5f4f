"""Which tokens may follow, for rows that are held to a grammar: found beside the pass that computes their logits.

A pass without such rows has no masks, and pays nothing. Knows grammars by `msi.types.GrammarState` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from msi.errors import InvalidRequest, one_line
from msi.kernels.kernels import TokenKernels
from msi.types import Cause, Constrained, Sampled

WITHIN_S = 30.0  # what a pass waits for its masks; each has bounds of its own, far below


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """Of one pass.

    Attributes:
        rows: of the logits that are held to a grammar.
        bits: int32 [len(rows), vocab_size / 32, rounded up], of tokens that may follow, as `penalties.allow` takes
            them; in host memory.
        failures: why a row has no mask, by row; it is none of `rows`.
    """

    rows: list[int]
    bits: Tensor
    failures: dict[int, Cause]

    def apply(self, logits: Tensor, kernels: TokenKernels) -> None:
        """What is not allowed becomes -inf, unless it is broken."""
        if self.rows:
            rows = torch.tensor(self.rows, device=logits.device)
            kernels.allow(logits, rows, self.bits.to(logits.device))

    def of_row(self, row: int) -> Masks:
        """The same for a row alone."""
        at = [index for index, one in enumerate(self.rows) if one == row]
        failures = {0: self.failures[row]} if row in self.failures else {}
        return Masks([0] * len(at), self.bits[at], failures)


class MaskMaker:
    """Makes masks, on a thread that is started when it is first needed. `close` at the end."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._pool: ThreadPoolExecutor | None = None

    def begin(self, constrained: Sequence[Constrained]) -> Future[Masks]:
        """The masks of a pass, as soon as they are there."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "msi-masks")
        return self._pool.submit(make_masks, constrained, self._vocab_size)

    def close(self) -> None:
        """What is still to be made is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def make_masks(constrained: Sequence[Constrained], vocab_size: int) -> Masks:
    rows: list[int] = []
    failures: dict[int, Cause] = {}
    words = np.zeros((len(constrained), -(-vocab_size // 32)), np.int32)
    for one in constrained:
        try:
            allowed = np.frombuffer(one.state.allowed(one.output_token_ids), np.uint8)
        except InvalidRequest as error:
            failures[one.row] = error
            continue
        except Exception as error:
            failures[one.row] = f"it cannot go on in its grammar: {one_line(error)}"
            continue
        of_row = words[len(rows)].view(np.uint8)
        num_bytes = min(len(of_row), len(allowed))  # a grammar knows no tokens that a model only has room for
        of_row[:num_bytes] = allowed[:num_bytes]
        rows.append(one.row)
    return Masks(rows, torch.from_numpy(words[: len(rows)]), failures)


def followed(constrained: Sequence[Constrained], sampled: Sampled) -> Sampled:
    """With what the tokens that were chosen mean to their grammars: some end with them."""
    ended: list[int] = []
    failures = dict(sampled.failures)
    for one in constrained:
        if one.row in failures:
            continue
        try:
            if one.state.ends_with(sampled.token_ids[one.row]):
                ended.append(one.row)
        except InvalidRequest as error:
            failures[one.row] = error
        except Exception as error:
            failures[one.row] = f"its token does not fit its grammar: {one_line(error)}"
    return replace(sampled, ended=tuple(ended), failures=failures)
