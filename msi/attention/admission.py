"""Who is in, with which KV blocks, and who waits.

Admission is in order of arrival, as soon as there are blocks for a request's tokens and one more for every sequence
that runs, onto the lane with the least predicted time. Blocks whose contents are known already (a common prefix) are
shared and need not be computed.

Whoever comes first is never later for those who come after. When blocks run out, the sequence that arrived last gives
its own up and waits to be computed again. While a request has to wait for blocks that earlier ones hold, later ones
that fit overtake it. As soon as the earlier ones leave it enough, nobody else overtakes, and those that did give their
blocks up to it at the end of the passes they are in; but those that need no more than `PATIENCE` tokens end first. So a
large request does not keep small ones waiting, and nobody starves: a request is admitted no later than if nobody had
overtaken it, but for the passes that take so many tokens.

Decides; knows no requests' ids, clock or tensors.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from msi.attention.block_pool import BlockPool, hash_block, hash_salt
from msi.attention.sequence import Lane, Sequence

OVERTAKING = 32  # waiting requests that are looked at for one that fits
PATIENCE = 32  # tokens still to be computed, at which it costs less to wait for a sequence than to compute it again


@dataclass(slots=True)
class AdmissionCounters:
    """Counts since start.

    Attributes:
        prompt_tokens: of the sequences that were admitted.
        prefix_hit_tokens: those of them that were known already.
        readmitted_tokens, readmission_hit_tokens: the same for sequences that were admitted again after a preemption.
        overtakings: admissions while an earlier request waited.
    """

    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    readmitted_tokens: int = 0
    readmission_hit_tokens: int = 0
    preemptions: int = 0
    overtakings: int = 0


class Admission:
    """The waiting room, and the KV blocks of those who are through it.

    Attributes:
        waiting: in order of `Sequence.arrival`.
        num_admissions: since the start.
        admitted: for the first time, and not yet taken by whoever wants to know.

    Args:
        lanes: where sequences run; those in flight keep their blocks.
        max_num_seqs: the most sequences that run at a time.
        has_prefix_cache: whether blocks are found again by their contents.

    Attributes:
        num_lanes: that sequences come onto; those on others stay there to their end.
    """

    def __init__(
        self, lanes: list[Lane], pool: BlockPool, block_tokens: int, *, max_num_seqs: int, has_prefix_cache: bool
    ) -> None:
        self.waiting: list[Sequence] = []
        self.counters = AdmissionCounters()
        self.num_admissions = 0
        self.admitted: list[Sequence] = []
        self.num_lanes = len(lanes)
        self._lanes = lanes
        self._pool = pool
        self._block_tokens = block_tokens
        self._max_num_seqs = max_num_seqs
        self._has_prefix_cache = has_prefix_cache

    @property
    def num_running(self) -> int:
        return sum(len(lane.sequences) for lane in self._lanes)

    def wait(self, sequence: Sequence) -> None:
        """One has arrived."""
        insort(self.waiting, sequence, key=lambda one: one.arrival)
        self.admit()

    def release(self, sequence: Sequence) -> None:
        """A sequence leaves its lane and gives its blocks up."""
        assert sequence.lane is not None, sequence.request.request_id
        sequence.lane.sequences.remove(sequence)
        sequence.lane = None
        self._pool.free(sequence.blocks)
        sequence.blocks = []

    def admit(self) -> bool:
        """Lets in whoever may now; whether that was anybody."""
        before = self.num_admissions
        self._admit()
        return self.num_admissions > before

    def _admit(self) -> None:
        while self.waiting:
            first = self.waiting[0]
            if not self._fits(first):
                later = [one for one in self._running() if one.arrival > first.arrival]
                if not later or not self._fits(first, without=later):
                    break  # it has to wait for earlier ones
                self._preempt_until_fits(first, later)
                if not self._fits(first):
                    return  # those in flight, or about to end, give way soon; nobody takes what is free now
            self._start(first)
        for sequence in self.waiting[1:OVERTAKING]:
            if self._fits(sequence):
                self._start(sequence)
                self.counters.overtakings += 1

    def _running(self) -> Iterator[Sequence]:
        return (sequence for lane in self._lanes for sequence in lane.sequences)

    def _fits(self, sequence: Sequence, without: Iterable[Sequence] = ()) -> bool:
        """Whether it can be admitted, once sequences `without` have given up what they have."""
        gone = list(without)
        num_running = self.num_running - len(gone)
        if num_running >= self._max_num_seqs:
            return False
        released = self._pool.released_by(block for one in gone for block in one.blocks) if gone else set()
        # one for each that runs, so that the next token of an older one does not throw this one out again
        num_free = self._pool.num_free + len(released) - num_running
        num_blocks = self._blocks_for(len(sequence.tokens))
        if num_blocks > num_free and not self._may_know(sequence, num_blocks - num_free):
            return False
        known = self._known_blocks(sequence)
        num_revived = self._pool.num_unused(known) + sum(1 for block in known if block in released)
        return num_blocks - len(known) + num_revived <= num_free

    def _preempt_until_fits(self, sequence: Sequence, later: Iterable[Sequence]) -> None:
        """Takes the blocks of those that overtook it, are not in flight and not about to end, the last first."""
        busy = self._busy()
        for victim in sorted(later, key=lambda one: one.arrival, reverse=True):
            if id(victim) not in busy and victim.max_len - victim.num_computed > PATIENCE:
                self._preempt(victim)
                if self._fits(sequence):
                    return

    def _start(self, sequence: Sequence) -> None:
        """Admits a waiting sequence, which fits."""
        self.waiting.remove(sequence)
        known = self._known_blocks(sequence)
        self._pool.share(known)
        sequence.blocks = known + self._pool.allocate(self._blocks_for(len(sequence.tokens)) - len(known))
        sequence.num_kept = len(known)
        sequence.num_computed = len(known) * self._block_tokens
        counters = self.counters
        if sequence.num_admitted:
            counters.readmitted_tokens += len(sequence.tokens)
            counters.readmission_hit_tokens += sequence.num_computed
        else:
            counters.prompt_tokens += len(sequence.tokens)
            counters.prefix_hit_tokens += sequence.num_computed
            sequence.num_cached = sequence.num_computed
            self.admitted.append(sequence)
        sequence.num_admitted += 1
        self.num_admissions += 1
        sequence.lane = min(
            self._lanes[: self.num_lanes], key=lambda lane: sum(other.predicted for other in lane.sequences)
        )
        sequence.lane.sequences.append(sequence)

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """Of the sequence's block at `index`, which is full."""
        hashes, size = sequence.hashes, self._block_tokens
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else hash_salt(sequence.request.cache_salt)
            hashes.append(hash_block(parent, sequence.tokens[start : start + size]))
        return hashes[index]

    def _known_blocks(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the beginning of the sequence."""
        if not self._has_prefix_cache:
            return []
        return self._pool.find(self._hash(sequence, index) for index in range(self._num_shareable(sequence)))

    def _may_know(self, sequence: Sequence, count: int) -> bool:
        """False where it is certain, at little cost, that fewer than `count` of its first blocks are known."""
        if not self._has_prefix_cache or count > self._num_shareable(sequence):
            return False
        return bool(self._pool.find((self._hash(sequence, count - 1),)))

    def _num_shareable(self, sequence: Sequence) -> int:
        """Blocks that others may have computed; its last token is left to compute, and what is still to be scored."""
        num_tokens = len(sequence.tokens) - 1
        if sequence.num_scored < sequence.num_to_score:
            num_tokens = min(num_tokens, sequence.num_scored)
        return num_tokens // self._block_tokens

    def keep_full_blocks(self, sequence: Sequence) -> None:
        """What was computed is found by its contents from now on, block by block."""
        if self._has_prefix_cache:
            for index in range(sequence.num_kept, sequence.num_computed // self._block_tokens):
                self._pool.keep(sequence.blocks[index], self._hash(sequence, index))
                sequence.num_kept = index + 1

    def make_room(self, sequence: Sequence, count: int, chosen: list[tuple[Sequence, int]]) -> bool:
        """Sees to it that the sequence has blocks for `count` more tokens; False where it must wait for them."""
        num_new = self._blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        while num_new > self._pool.num_free:
            victim = self._victim(sequence, chosen)
            if victim is None:
                return False  # what came later is in flight, and gives its blocks up when it has landed
            self._preempt(victim)
            if victim is sequence:
                return False
        if num_new > 0:
            sequence.blocks += self._pool.allocate(num_new)
        return True

    def _busy(self) -> set[int]:
        """Identities of the sequences that something is being computed for."""
        return {id(one) for lane in self._lanes for one, _ in lane.in_flight}

    def _victim(self, sequence: Sequence, chosen: list[tuple[Sequence, int]]) -> Sequence | None:
        """Whoever arrived last of those that nothing is being computed for, `sequence` included if none came later."""
        busy = self._busy() | {id(one) for one, _ in chosen}
        later = [one for one in self._running() if one.arrival > sequence.arrival and id(one) not in busy]
        if later:
            return max(later, key=lambda one: one.arrival)
        is_last = all(one.arrival <= sequence.arrival for one in self._running())
        return sequence if is_last else None

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks; it waits to be computed again, before all that came later."""
        self.release(sequence)
        sequence.num_computed = sequence.num_kept = 0
        insort(self.waiting, sequence, key=lambda one: one.arrival)
        self.counters.preemptions += 1
