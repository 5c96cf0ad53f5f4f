"""The scheduler of one attention worker: who runs, on which lane, with which KV blocks.

Decides; does not act: takes requests and sampled tokens, returns micro-batches and progress. Knows no clock, tensors
or sockets.

Admission is in order of arrival, as soon as there are blocks for a request's tokens and one more for every sequence
that runs, onto the lane with the least predicted time; a sequence keeps its lane to its end or preemption. Blocks
whose contents are known already (a common prefix) are shared and need not be computed. Each micro-batch takes a token
from every sequence that decodes and fills the token budget with prompt chunks. When blocks run out, the sequence that
arrived last gives its own up and waits, in front of all others, to be computed again: whoever came first always gets
on, so nobody starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from msi.block_pool import BlockPool, hash_block
from msi.errors import InvalidRequest, Unavailable, context_exceeded
from msi.sampling import has_extras, is_stop_token, sampling_extras
from msi.types import MicroBatch, SamplingParams, TokenLogprobs, TokenSampling

# The predicted time of a lane, in units of one decoded token: attention over this much context costs as much again,
# and of a prompt that is still to be computed a token costs this share.
CONTEXT_UNIT = 1024
PROMPT_SHARE = 1 / 16
NO_LOGPROBS: Mapping[int, TokenLogprobs] = {}


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for. `params.seed` is set: whoever accepted the request has drawn one."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Progress:
    """What is new of a request after a pass.

    Attributes:
        finish_reason: "stop", "length" or None while it goes on.
        logprobs: one for each token if they were asked for, else ().
        num_cached_tokens: with the first token, how many of the prompt were known when it was admitted; else 0.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0


@dataclass(slots=True)
class SchedulerCounters:
    """Counts since start. `prompt_tokens` counts the tokens of admitted sequences, again after a preemption."""

    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0


@dataclass(slots=True, eq=False)
class _Sequence:
    request: Request
    arrival: int
    max_len: int  # tokens, prompt included, at which it ends
    tokens: list[int]
    num_computed: int = 0  # tokens whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were needed
    num_kept: int = 0  # full blocks that can be found by their hashes
    num_cached: int | None = None  # tokens of the prompt that were known at its first admission
    is_cancelled: bool = False
    has_failed: bool = False  # what it computed is not to be found by others
    was_left_out: bool = False  # of the last micro-batch, for want of room
    has_extras: bool = field(init=False)

    def __post_init__(self) -> None:
        self.has_extras = has_extras(self.request.params)

    @property
    def num_left(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    def take_cached(self) -> int:
        """`num_cached`, the first time it is asked for; 0 afterwards."""
        count, self.num_cached = self.num_cached or 0, 0
        return count

    @property
    def predicted(self) -> float:
        return 1 + len(self.tokens) / CONTEXT_UNIT + (self.num_left - 1) * PROMPT_SHARE


@dataclass(slots=True, eq=False)
class _Lane:
    sequences: list[_Sequence] = field(default_factory=list)
    in_flight: list[tuple[_Sequence, int]] = field(default_factory=list)  # with the tokens it computes


class Scheduler:
    """Requests in, micro-batches out.

    Args:
        num_blocks: KV blocks, block 0 (padding) included.
        block_tokens: tokens per block.
        max_num_seqs: the most sequences that run at a time.
        max_num_batched_tokens: the most tokens in one micro-batch; at most the rows of a slot.
        max_model_len: the most tokens of a sequence, prompt included.
        max_num_waiting: the most requests that wait for admission.
        has_prefix_cache: whether blocks are found again by their contents.
    """

    def __init__(
        self,
        *,
        num_lanes: int,
        num_blocks: int,
        block_tokens: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...] = (),
        max_num_waiting: int = 1024,
        has_prefix_cache: bool = True,
    ) -> None:
        self.counters = SchedulerCounters()
        self._has_prefix_cache = has_prefix_cache
        self._num_arrived = 0
        self._pool = BlockPool(num_blocks)
        self._block_tokens = block_tokens
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._max_num_waiting = max_num_waiting
        self._eos_token_ids = frozenset(eos_token_ids)
        self._waiting: deque[_Sequence] = deque()
        self._lanes = [_Lane() for _ in range(num_lanes)]
        self._sequences: dict[str, tuple[_Sequence, _Lane | None]] = {}

    # -- counts ------------------------------------------------------------------------------------------------------

    @property
    def num_lanes(self) -> int:
        return len(self._lanes)

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def num_blocks(self) -> int:
        """Blocks that sequences can have, all together."""
        return self._pool.capacity

    @property
    def num_evicted(self) -> int:
        """Blocks whose contents were given up for others since the start."""
        return self._pool.num_evicted

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(len(lane.sequences) for lane in self._lanes)

    @property
    def is_idle(self) -> bool:
        return not self._sequences

    def check_integrity(self) -> None:
        """Re-adds free, kept and used blocks. Raises AssertionError with the numbers."""
        in_use = [block for lane in self._lanes for sequence in lane.sequences for block in sequence.blocks]
        self._pool.check_integrity(in_use)

    # -- requests ----------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Takes a request.

        Raises:
            InvalidRequest: it can never run here; says why.
            Unavailable: too many wait already.
        """
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            raise InvalidRequest("the prompt is empty; give at least one token")
        if num_prompt >= self._max_model_len:
            raise context_exceeded(self._max_model_len, num_prompt, request.params.max_tokens)
        cache_len = self._pool.capacity * self._block_tokens
        if num_prompt >= cache_len:
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens; the whole KV cache holds {cache_len}. Shorten it, or give the "
                f"attention workers more memory"
            )
        if len(self._waiting) >= self._max_num_waiting:
            raise Unavailable(f"{len(self._waiting)} requests wait here already; try again later")
        assert request.request_id not in self._sequences, request.request_id
        max_len = min(num_prompt + request.params.max_tokens, self._max_model_len, cache_len)
        sequence = _Sequence(request, self._num_arrived, max_len, list(request.prompt_token_ids))
        self._num_arrived += 1
        self._waiting.append(sequence)
        self._sequences[request.request_id] = (sequence, None)
        self._admit()

    def cancel(self, request_id: str) -> bool:
        """Forgets a request, at once or when its pass is through; False when it is not here."""
        if request_id not in self._sequences:
            return False
        self._forget(request_id)
        self._admit()
        return True

    def fail_running(self) -> list[str]:
        """Forgets every request that was admitted and returns their ids; what waits stays."""
        failed = [request_id for request_id, (_, lane) in self._sequences.items() if lane is not None]
        for request_id in failed:
            self._forget(request_id)
        return failed

    # -- passes ------------------------------------------------------------------------------------------------------

    def has_work(self, lane_index: int) -> bool:
        lane = self._lanes[lane_index]
        return bool(lane.sequences) and not lane.in_flight

    def plan(self, lane_index: int) -> MicroBatch | None:
        """The next micro-batch of a lane that has none in flight; None when it has nothing to do."""
        lane = self._lanes[lane_index]
        assert not lane.in_flight, f"lane {lane_index} is in flight"
        self._admit()
        budget = self._max_num_batched_tokens
        # whoever had no room last time, then those that decode, then prompts; each in order of arrival
        turns = sorted(lane.sequences, key=lambda one: (not one.was_left_out, one.num_left > 1, one.arrival))
        chosen: list[tuple[_Sequence, int]] = []
        for sequence in turns:
            if not sequence.blocks:
                continue  # preempted meanwhile
            room = max(1, budget // 2) if sequence.was_left_out else budget
            count = min(sequence.num_left, room, budget)
            if count and not self._make_room(sequence, count, chosen):
                count = 0
                if not sequence.blocks:
                    continue
            sequence.was_left_out = count == 0
            if count:
                chosen.append((sequence, count))
                budget -= count
        if not chosen:
            return None
        lane.in_flight = chosen
        return _micro_batch(chosen, self._eos_token_ids)

    def may_continue(self, lane_index: int) -> bool:
        """Whether the lane may have a micro-batch right after the one in flight."""
        lane = self._lanes[lane_index]
        if len(lane.sequences) > len(lane.in_flight):
            return True
        return any(
            not sequence.is_cancelled and (sequence.num_left > count or len(sequence.tokens) + 1 < sequence.max_len)
            for sequence, count in lane.in_flight
        )

    def update(
        self, lane_index: int, token_ids: list[int], logprobs: Mapping[int, TokenLogprobs] = NO_LOGPROBS
    ) -> list[Progress]:
        """The pass of a lane is through: one sampled token for each of its micro-batch's logit rows.

        Args:
            logprobs: by index into `token_ids`.
        """
        lane = self._lanes[lane_index]
        in_flight, lane.in_flight = lane.in_flight, []
        sampled = iter(enumerate(token_ids))
        progress = []
        for sequence, count in in_flight:
            sequence.num_computed += count
            if not sequence.has_failed:
                self._keep_full_blocks(sequence)
            row, token = next(sampled) if sequence.num_computed == len(sequence.tokens) else (-1, None)
            if sequence.is_cancelled:
                self._release(lane, sequence)
            elif token is not None:
                sequence.tokens.append(token)
                reason = self._finish_reason(sequence, token)
                chosen = (logprobs[row],) if row in logprobs else ()
                progress.append(Progress(sequence.request.request_id, (token,), reason, chosen, sequence.take_cached()))
                if reason is not None:
                    del self._sequences[sequence.request.request_id]
                    self._release(lane, sequence)
        assert next(sampled, None) is None, f"more tokens than logit rows: {token_ids}"
        self._admit()
        return progress

    def fail(self, lane_index: int, indices: Iterable[int]) -> list[str]:
        """Sequences of the pass in flight, by index in its micro-batch, end without a token; before its `update`.

        Returns their ids; those that were cancelled before are not among them. No block of theirs is found by its
        contents from now on, not even those that others found sound.
        """
        failed = []
        for index in indices:
            sequence, _ = self._lanes[lane_index].in_flight[index]
            sequence.has_failed = True
            self._pool.forget(sequence.blocks)
            if not sequence.is_cancelled:
                self._forget(sequence.request.request_id)
                failed.append(sequence.request.request_id)
        return failed

    def give_up(self, lane_index: int) -> None:
        """The pass of a lane was lost: what it computed counts as not computed."""
        lane = self._lanes[lane_index]
        in_flight, lane.in_flight = lane.in_flight, []
        for sequence, _ in in_flight:
            if sequence.is_cancelled:
                self._release(lane, sequence)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _forget(self, request_id: str) -> None:
        sequence, lane = self._sequences.pop(request_id)
        sequence.is_cancelled = True
        if lane is None:
            self._waiting.remove(sequence)
        elif all(flying is not sequence for flying, _ in lane.in_flight):
            self._release(lane, sequence)

    def _finish_reason(self, sequence: _Sequence, token: int) -> str | None:
        if is_stop_token(sequence.request.params, token, self._eos_token_ids):
            return "stop"
        return "length" if len(sequence.tokens) >= sequence.max_len else None

    def _admit(self) -> None:
        while self._waiting and (num_running := self.num_running) < self._max_num_seqs:
            sequence = self._waiting[0]
            known = self._known_blocks(sequence)
            num_new = self._blocks_for(len(sequence.tokens)) - len(known)
            # one for each that runs, so that the next token of an older one does not throw this one out again
            if num_new + self._pool.num_unused(known) + num_running > self._pool.num_free:
                return
            self._waiting.popleft()
            self._pool.share(known)
            sequence.blocks = known + self._pool.allocate(num_new)
            sequence.num_kept = len(known)
            sequence.num_computed = len(known) * self._block_tokens
            if sequence.num_cached is None:
                sequence.num_cached = sequence.num_computed
            self.counters.prompt_tokens += len(sequence.tokens)
            self.counters.prefix_hit_tokens += sequence.num_computed
            lane = min(self._lanes, key=lambda lane: sum(other.predicted for other in lane.sequences))
            lane.sequences.append(sequence)
            self._sequences[sequence.request.request_id] = (sequence, lane)

    def _release(self, lane: _Lane, sequence: _Sequence) -> None:
        lane.sequences.remove(sequence)
        self._pool.free(sequence.blocks)
        sequence.blocks = []

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def _hash(self, sequence: _Sequence, index: int) -> bytes:
        """Of the sequence's block at `index`, which is full."""
        hashes, size = sequence.hashes, self._block_tokens
        while len(hashes) <= index:
            start = len(hashes) * size
            hashes.append(hash_block(hashes[-1] if hashes else b"", sequence.tokens[start : start + size]))
        return hashes[index]

    def _known_blocks(self, sequence: _Sequence) -> list[int]:
        """Blocks that hold the beginning of the sequence; at least its last token is left to compute."""
        if not self._has_prefix_cache:
            return []
        num_full = (len(sequence.tokens) - 1) // self._block_tokens
        return self._pool.find(self._hash(sequence, index) for index in range(num_full))

    def _keep_full_blocks(self, sequence: _Sequence) -> None:
        if self._has_prefix_cache:
            for index in range(sequence.num_kept, sequence.num_computed // self._block_tokens):
                self._pool.keep(sequence.blocks[index], self._hash(sequence, index))
                sequence.num_kept = index + 1

    def _make_room(self, sequence: _Sequence, count: int, chosen: list[tuple[_Sequence, int]]) -> bool:
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

    def _victim(self, sequence: _Sequence, chosen: list[tuple[_Sequence, int]]) -> _Sequence | None:
        """Whoever arrived last of those that nothing is being computed for, `sequence` included if none came later."""
        busy = {id(one) for lane in self._lanes for one, _ in lane.in_flight} | {id(one) for one, _ in chosen}
        later = [
            one
            for lane in self._lanes
            for one in lane.sequences
            if one.arrival > sequence.arrival and id(one) not in busy
        ]
        if later:
            return max(later, key=lambda one: one.arrival)
        is_last = all(one.arrival <= sequence.arrival for lane in self._lanes for one in lane.sequences)
        return sequence if is_last else None

    def _preempt(self, sequence: _Sequence) -> None:
        """Takes a sequence's blocks; it waits to be computed again, before all that came later."""
        lane = next(lane for lane in self._lanes if sequence in lane.sequences)
        self._release(lane, sequence)
        sequence.num_computed = sequence.num_kept = 0
        sequence.was_left_out = False
        self._sequences[sequence.request.request_id] = (sequence, None)
        self._waiting.appendleft(sequence)
        self.counters.preemptions += 1


def _micro_batch(chosen: list[tuple[_Sequence, int]], eos_token_ids: Collection[int]) -> MicroBatch:
    token_ids: list[int] = []
    positions: list[int] = []
    logit_rows = []
    sampling = []
    for sequence, count in chosen:
        start = sequence.num_computed
        token_ids += sequence.tokens[start : start + count]
        positions += range(start, start + count)
        if start + count == len(sequence.tokens):
            params = sequence.request.params
            assert params.seed is not None, sequence.request.request_id
            logit_rows.append(len(token_ids) - 1)
            extras = None
            if sequence.has_extras:
                num_prompt = len(sequence.request.prompt_token_ids)
                extras = sampling_extras(params, sequence.tokens, num_prompt, eos_token_ids)
            sampling.append(
                TokenSampling(params.temperature, params.top_p, params.top_k, params.seed, len(sequence.tokens), extras)
            )
    return MicroBatch(
        token_ids=tuple(token_ids),
        positions=tuple(positions),
        query_lens=tuple(count for _, count in chosen),
        context_lens=tuple(sequence.num_computed + count for sequence, count in chosen),
        block_tables=tuple(tuple(sequence.blocks) for sequence, _ in chosen),
        logit_rows=tuple(logit_rows),
        sampling=tuple(sampling),
    )
