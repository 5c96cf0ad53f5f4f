"""Which KV blocks are free, shared or kept for their contents. Pure bookkeeping.

A full block is known by the hash of its tokens and of all tokens before it, so sequences with a common prefix share
its blocks. A block that nobody uses any more keeps its contents until it is needed: least recently used first, the
end of a prefix before its beginning. Block 0 is never given out (it pads block tables).
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable, Sequence

HASH_BYTES = 16


def hash_salt(salt: str) -> bytes:
    """What the first block of a prefix comes after; b"" without a salt."""
    return hashlib.blake2b(salt.encode(), digest_size=HASH_BYTES, person=b"salt").digest() if salt else b""


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a block's contents: its tokens after everything that `parent` names (at the start, `hash_salt`)."""
    tokens = struct.pack(f"<{len(token_ids)}q", *token_ids)
    return hashlib.blake2b(parent + tokens, digest_size=HASH_BYTES).digest()


class BlockPool:
    """Blocks 1 .. num_blocks - 1."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, num_blocks
        self.num_blocks = num_blocks
        self.num_evicted = 0  # kept blocks that were needed for other contents
        self._free = list(range(num_blocks - 1, 0, -1))  # without contents; the last is taken first
        self._kept: dict[int, None] = {}  # unused but with contents, least recently used first
        self._users = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def capacity(self) -> int:
        """Blocks that sequences can have, all together."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Blocks that nobody uses and that keep their contents."""
        return len(self._kept)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks without contents; the caller checked `num_free`."""
        assert count <= self.num_free, (count, self.num_free)
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block = next(iter(self._kept))
                del self._kept[block]
                del self._block_of[self._hash_of.pop(block)]
                self.num_evicted += 1
            self._users[block] = 1
            taken.append(block)
        return taken

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks with the contents of the longest known prefix of `hashes`; to be taken with `share`."""
        found = []
        for name in hashes:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def num_unused(self, blocks: Iterable[int]) -> int:
        """How many of these blocks count as free now and will not once they are shared."""
        return sum(1 for block in blocks if not self._users[block])

    def released_by(self, blocks: Iterable[int]) -> set[int]:
        """Those that would be used by nobody if each of these, once for each of its appearances, was freed."""
        return {block for block, count in Counter(blocks).items() if self._users[block] == count}

    def share(self, blocks: Iterable[int]) -> None:
        """One more sequence uses these blocks, which `find` has just found."""
        for block in blocks:
            if not self._users[block]:
                del self._kept[block]
            self._users[block] += 1

    def keep(self, block: int, name: bytes) -> None:
        """A block in use has become full: its contents can be found by this hash from now on."""
        if name not in self._block_of and block not in self._hash_of:
            self._block_of[name] = block
            self._hash_of[block] = name

    def free(self, blocks: Sequence[int]) -> None:
        """A sequence does not use its blocks any more."""
        for block in reversed(blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0, block
            if self._users[block]:
                continue
            if block in self._hash_of:
                self._kept[block] = None
            else:
                self._free.append(block)

    def forget(self, blocks: Iterable[int]) -> None:
        """The contents of these blocks, which are in use, are found by nobody any more."""
        for block in blocks:
            assert self._users[block], block
            if (name := self._hash_of.pop(block, None)) is not None:
                del self._block_of[name]

    def check_integrity(self, in_use: Iterable[int]) -> None:
        """Re-adds free, kept and used blocks.

        Args:
            in_use: the blocks of every sequence; a shared one appears once for each.

        Raises:
            AssertionError: a block is lost, given out twice, or shared by a wrong number of sequences.
        """
        users = Counter(in_use)
        unused = [*self._free, *self._kept]
        assert sorted([*unused, *users]) == list(range(1, self.num_blocks)), (
            f"{len(self._free)} free, {len(self._kept)} kept and {len(users)} used blocks are not the "
            f"{self.capacity} that exist"
        )
        wrong = {block: count for block, count in users.items() if self._users[block] != count}
        assert not wrong, f"blocks used by other numbers of sequences than counted: {wrong}"
        assert self._kept.keys() <= self._hash_of.keys(), "a kept block has no contents"
        assert {name: block for block, name in self._hash_of.items()} == self._block_of, "hashes and blocks disagree"
