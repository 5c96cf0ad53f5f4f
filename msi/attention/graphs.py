"""Decode passes of one lane as captured graphs: which passes are alike, and memory that stays where graphs know it.

A pass in which every sequence has one token is filled up to the next of a few sizes (`Bucket`), with rows that are
nobody's: they go to no expert, and their keys to the block that pads block tables. What the pass is made from is copied
to where the first such pass had it, and each part of a layer runs piece by piece once, which loads what it needs, is
captured the next time, and replayed from then on; `capturing.py` has both done before the first pass that was asked
for. Knows no queues, slots or arithmetic.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from msi.attention.forward import PassState
from msi.device.device import Graphs
from msi.kernels import BLOCK_TOKENS
from msi.types import MicroBatch

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # sequences of a pass
LEAST_BLOCKS = 16  # of a block table; more by powers of two


class Bucket(NamedTuple):
    """Passes that are alike: sequences, and the width of block tables."""

    num_seqs: int
    num_blocks: int


def buckets_of(max_seqs: int, max_rows: int, max_len: int) -> list[Bucket]:
    """All that passes can be in, those of short contexts first.

    Args:
        max_seqs: that decode at a time.
        max_rows: of a slot.
        max_len: of a sequence.
    """
    most = min(max_seqs, max_rows, SIZES[-1])
    sizes = [size for size in SIZES if size < most] + [min(next(size for size in SIZES if size >= most), max_rows)]
    widths = [LEAST_BLOCKS]
    while widths[-1] * BLOCK_TOKENS < max_len:
        widths.append(2 * widths[-1])
    return [Bucket(size, width) for width in widths for size in sizes]


def bucket_of(batch: MicroBatch, max_seqs: int) -> Bucket | None:
    """The least that holds it; None for a pass that is not of single tokens, or larger than all.

    Args:
        max_seqs: rows of a slot.
    """
    num_seqs = len(batch.query_lens)
    if num_seqs != batch.num_tokens or batch.prompt_rows or num_seqs > min(max_seqs, SIZES[-1]):
        return None
    size = min(next(size for size in SIZES if size >= num_seqs), max_seqs)
    num_blocks = -(-max(batch.context_lens) // BLOCK_TOKENS)
    return Bucket(size, max(LEAST_BLOCKS, 1 << (num_blocks - 1).bit_length()))


def filled_up(batch: MicroBatch, bucket: Bucket) -> MicroBatch:
    """With sequences of one token, in block 0, as many as are missing."""
    missing = bucket.num_seqs - batch.num_tokens
    return replace(
        batch,
        token_ids=batch.token_ids + (0,) * missing,
        positions=batch.positions + (0,) * missing,
        query_lens=batch.query_lens + (1,) * missing,
        context_lens=batch.context_lens + (1,) * missing,
        block_tables=batch.block_tables + ((0,),) * missing,
    )


class _Captured(NamedTuple):
    """A graph, the memory outside that it was captured with, and what a pass refers to behind it."""

    graph: Any
    outside: tuple[object, ...]
    behind: dict[str, Any]


@dataclass(slots=True)
class AlikePasses:
    """Those of one bucket: their state is one object, for ever.

    Attributes:
        met: parts of a pass that have run.
    """

    state: PassState
    met: set[object]
    captured: dict[object, _Captured]


class LaneGraphs:
    """One lane's; to be used from programs of its queue.

    Args:
        max_seqs: rows of a slot.
        buckets: of which graphs are made; None for any.

    Attributes:
        is_eager: nothing is captured any more, as something could not be.
    """

    def __init__(self, graphs: Graphs, max_seqs: int, buckets: Collection[Bucket] | None = None) -> None:
        self.num_captured = 0
        self.is_eager = False
        self._graphs = graphs
        self._max_seqs = max_seqs
        self._buckets = None if buckets is None else frozenset(buckets)
        self._memory = graphs.graph_memory()
        self._alike: dict[Bucket, AlikePasses] = {}

    def bucket_of(self, batch: MicroBatch) -> Bucket | None:
        """None where the pass is to be launched piece by piece."""
        bucket = None if self.is_eager else bucket_of(batch, self._max_seqs)
        return bucket if self._buckets is None or bucket in self._buckets else None

    def give_up(self, error: Exception) -> None:
        """Passes that begin from now on are launched piece by piece."""
        if not self.is_eager:
            self.is_eager = True
            log.warning("decoding is launched piece by piece: no graph of it could be captured: %s", error)

    def begin(self, bucket: Bucket, state: PassState) -> AlikePasses:
        """The pass that was begun as `state`, in the memory of its bucket."""
        alike = self._alike.get(bucket)
        if alike is not None:
            try:
                refill(alike.state, state)
                return alike
            except ValueError as error:
                log.info("graphs of passes of %d sequences are made anew: %s", bucket.num_seqs, error)
        alike = self._alike[bucket] = AlikePasses(state, set(), {})
        return alike

    def run(self, alike: AlikePasses, part: object, outside: tuple[object, ...], work: Callable[[], None]) -> None:
        """Part of a pass, by its graph once there is one.

        Args:
            outside: memory that `work` reads or writes beside the state's; where it is another, the graph is no more.
        """
        state = alike.state
        outside = (*outside, state.sent, state.normed)  # of another part's graph, which may have been captured anew
        captured = alike.captured.get(part)
        if captured is not None and all(map(_is_same, captured.outside, outside)):
            self._graphs.replay(captured.graph)
            _refer(state, captured.behind)
        elif part not in alike.met or self.is_eager:
            work()
            alike.met.add(part)
        else:
            before = _references(state)
            try:
                graph = self._graphs.capture(self._memory, work)
            except RuntimeError as error:
                self.give_up(error)
                _refer(state, before)
                work()
                return
            alike.captured[part] = _Captured(graph, outside, _references(state))
            self.num_captured += 1
            self._graphs.replay(graph)


def refill(kept: PassState, new: PassState) -> None:
    """What the graphs read of a new pass goes to where they read it; the rest is taken over.

    Raises:
        ValueError: something differs that graphs do not read from memory; nothing was changed.
    """
    read = ("hidden", "plans", "tables", "is_filler")
    for one, other in [pair for name in read for pair in _pairs(getattr(kept, name), getattr(new, name), name)]:
        one.copy_(other)
    for name in ("micro_batch", "inputs", "host_inputs", "masks"):
        setattr(kept, name, getattr(new, name))
    _refer(kept, _references(new))


def _pairs(kept: Any, new: Any, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of one, and of the other."""
    if type(kept) is not type(new):
        raise ValueError(f"a pass's {name} is a {type(new).__name__}, and its graphs know a {type(kept).__name__}")
    if isinstance(kept, Tensor):
        if kept.shape != new.shape:
            raise ValueError(f"a pass's {name} is {tuple(new.shape)}, and its graphs know {tuple(kept.shape)}")
        yield kept, new
    elif isinstance(kept, tuple | list):
        for index, (one, other) in enumerate(zip(kept, new, strict=True)):
            yield from _pairs(one, other, f"{name}[{index}]")
    elif is_dataclass(kept):
        for field in fields(kept):
            yield from _pairs(getattr(kept, field.name), getattr(new, field.name), f"{name}.{field.name}")
    elif kept != new:
        raise ValueError(f"a pass's {name} is {new}, and its graphs know {kept}")


def _references(state: PassState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("sent", "normed", "turn", "routed")}


def _refer(state: PassState, references: dict[str, Any]) -> None:
    for name, value in references.items():
        setattr(state, name, value)


def _is_same(one: object, other: object) -> bool:
    return one is other
