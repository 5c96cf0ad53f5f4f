"""KV blocks that a scheduler has to give to other attention workers, and room for those that come from them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msi.attention.block_pool import BlockPool
from msi.attention.sequence import Sequence


class ExchangedBlocks:
    """Of one scheduler.

    Args:
        sequences: all that are here, by their requests' ids.
        num_running: sequences that may need a block at once.
        takes_any: whether blocks are found by their contents here; else nobody would find those that come.
    """

    def __init__(
        self,
        pool: BlockPool,
        sequences: Mapping[str, Sequence],
        num_running: Callable[[], int],
        *,
        takes_any: bool,
    ) -> None:
        self._pool = pool
        self._sequences = sequences
        self._num_running = num_running
        self._takes_any = takes_any

    def full(self, request_id: str, start: int, count: int) -> list[tuple[int, bytes]]:
        """Of the full blocks that a request has, so many from `start` on, each with the name of its contents; none are
        written to any more, as long as it has them.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return []
        stop = min(start + count, sequence.num_kept)
        return [(sequence.blocks[index], sequence.hashes[index]) for index in range(start, stop)]

    def adopt(self, name: bytes, write: Callable[[int], None]) -> bool:
        """The contents of a block come from elsewhere, as if a sequence that is gone had computed them.

        Args:
            write: into this block.

        Returns:
            Whether there was room; blocks that sequences may need at once are left alone.
        """
        pool = self._pool
        if not self._takes_any or pool.find((name,)) or pool.num_free <= self._num_running():
            return False
        blocks = pool.allocate(1)
        try:
            write(blocks[0])
            pool.keep(blocks[0], name)
        finally:
            pool.free(blocks)
        return True
