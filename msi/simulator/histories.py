"""What simulated sequences say: each token hangs on all before it, by way of the KV blocks that hold them.

Where a real KV cache holds keys and values, this one holds a number for each token: what its sequence was up to there.
So a token that was lost, said twice or changed, a block that is another's, and one that no pass has filled to its last
layer show in whatever is said from then on.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate

from msi.kernels import BLOCK_TOKENS
from msi.types import MicroBatch

NUM_TOKEN_IDS = 1009  # that are said


def answer_to(prompt: Sequence[int], seed: int) -> Iterator[int]:
    """What a sequence says, without end."""
    history, position = 0, len(prompt)
    for token in prompt:
        history = _longer(history, token)
    while True:
        token = _said(history, seed, position)
        yield token
        history, position = _longer(history, token), position + 1


class Histories:
    """In the KV blocks of one attention worker."""

    def __init__(self) -> None:
        self._blocks: dict[int, array[int]] = defaultdict(lambda: array("Q", bytes(8 * BLOCK_TOKENS)))

    def begin(self, batch: MicroBatch) -> None:
        """A pass runs: until it is through the places of its tokens hold nothing, and for good if it is given up."""
        for table, first, context in _spans(batch):
            for position in range(first, context):
                self._put(table, position, 0)

    def write(self, batch: MicroBatch) -> None:
        """It is at its last layer."""
        tokens = iter(batch.token_ids)
        for table, first, context in _spans(batch):
            history = self._at(table, first - 1) if first else 0
            for position in range(first, context):
                history = _longer(history, next(tokens))
                self._put(table, position, history)

    def said(self, batch: MicroBatch) -> list[int]:
        """The next token of each of the pass's `logit_rows`, by what its blocks hold now."""
        ends = list(accumulate(batch.query_lens))
        tables = (batch.block_tables[bisect_right(ends, row)] for row in batch.logit_rows)
        return [
            _said(self._at(table, batch.positions[row]), one.seed, one.position)
            for row, table, one in zip(batch.logit_rows, tables, batch.sampling, strict=True)
        ]

    def _at(self, table: Sequence[int], position: int) -> int:
        return self._blocks[table[position // BLOCK_TOKENS]][position % BLOCK_TOKENS]

    def _put(self, table: Sequence[int], position: int, history: int) -> None:
        self._blocks[table[position // BLOCK_TOKENS]][position % BLOCK_TOKENS] = history


def _spans(batch: MicroBatch) -> Iterator[tuple[Sequence[int], int, int]]:
    """Each sequence's blocks, its first position in this pass, and the one behind its last."""
    for table, num_tokens, context in zip(batch.block_tables, batch.query_lens, batch.context_lens, strict=True):
        yield table, context - num_tokens, context


def _longer(history: int, token: int) -> int:
    """Other for any other token, and for the same ones in another order."""
    return (history * 6364136223846793005 + token + 1) % 2**64


def _said(history: int, seed: int, position: int) -> int:
    return ((history >> 40) + seed * 31 + position) % NUM_TOKEN_IDS
