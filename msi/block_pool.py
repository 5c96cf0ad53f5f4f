"""Which KV blocks are free. Pure bookkeeping; block 0 is never given out (it pads block tables)."""

from __future__ import annotations


class BlockPool:
    """Blocks 1 .. num_blocks - 1."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, num_blocks
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))

    @property
    def capacity(self) -> int:
        """Blocks that sequences can have, all together."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...]:
        """`count` blocks; the caller checked `num_free`."""
        assert count <= len(self._free), (count, len(self._free))
        taken = tuple(self._free[len(self._free) - count :][::-1])
        del self._free[len(self._free) - count :]
        return taken

    def free(self, blocks: tuple[int, ...]) -> None:
        self._free.extend(reversed(blocks))

    def check_integrity(self, in_use: list[int]) -> None:
        """Raises AssertionError unless free and used blocks together are every block exactly once."""
        everything = sorted([*self._free, *in_use])
        assert everything == list(range(1, self.num_blocks)), (
            f"{len(self._free)} free and {len(in_use)} used blocks are not the {self.capacity} that exist"
        )
