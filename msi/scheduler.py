"""The scheduler of one attention worker: who runs, on which lane, with which KV blocks.

Decides; does not act: takes requests and sampled tokens, returns micro-batches and progress. Knows no clock, tensors
or sockets.

Admission is in order of arrival, as soon as a request's blocks are free (all that it can ever need, so nothing has to
be preempted), onto the lane with the least predicted time; a sequence keeps its lane to its end. Each micro-batch
takes a token from every sequence that decodes and fills the token budget with prompt chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from msi.block_pool import BlockPool
from msi.errors import InvalidRequest, Unavailable
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
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(slots=True, eq=False)
class _Sequence:
    request: Request
    max_len: int  # tokens, prompt included, at which it ends
    tokens: list[int]
    num_computed: int = 0  # tokens whose keys and values are in the cache
    blocks: tuple[int, ...] = ()
    is_cancelled: bool = False
    was_left_out: bool = False  # of the last micro-batch, for want of room
    has_extras: bool = field(init=False)

    def __post_init__(self) -> None:
        self.has_extras = has_extras(self.request.params)

    @property
    def num_prompt_left(self) -> int:
        return max(0, len(self.request.prompt_token_ids) - self.num_computed)

    @property
    def predicted(self) -> float:
        return 1 + len(self.tokens) / CONTEXT_UNIT + self.num_prompt_left * PROMPT_SHARE


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
        max_num_waiting: int = 100_000,
    ) -> None:
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
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(len(lane.sequences) for lane in self._lanes)

    @property
    def is_idle(self) -> bool:
        return not self._sequences

    def check_integrity(self) -> None:
        """Re-adds free and used blocks. Raises AssertionError with the numbers."""
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
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens; with a context of {self._max_model_len} at most "
                f"{self._max_model_len - 1} are allowed, so that one can follow"
            )
        cache_len = self._pool.capacity * self._block_tokens
        if num_prompt >= cache_len:
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens; the whole KV cache holds {cache_len}. Shorten it, or give the "
                f"attention workers more memory"
            )
        if len(self._waiting) >= self._max_num_waiting:
            raise Unavailable(f"{len(self._waiting)} requests wait already; try again later")
        assert request.request_id not in self._sequences, request.request_id
        max_len = min(num_prompt + request.params.max_tokens, self._max_model_len, cache_len)
        sequence = _Sequence(request, max_len, list(request.prompt_token_ids))
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
        # whoever had no room last time, then those that decode, then prompts
        turns = sorted(lane.sequences, key=lambda sequence: (not sequence.was_left_out, sequence.num_prompt_left > 0))
        chosen: list[tuple[_Sequence, int]] = []
        for sequence in turns:
            room = max(1, budget // 2) if sequence.was_left_out else budget
            count = min(sequence.num_prompt_left or 1, room, budget)
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
            not sequence.is_cancelled
            and (sequence.num_prompt_left > count or len(sequence.tokens) + 1 < sequence.max_len)
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
            row, token = next(sampled) if sequence.num_computed == len(sequence.tokens) else (-1, None)
            if sequence.is_cancelled:
                self._release(lane, sequence)
            elif token is not None:
                sequence.tokens.append(token)
                reason = self._finish_reason(sequence, token)
                chosen = (logprobs[row],) if row in logprobs else ()
                progress.append(Progress(sequence.request.request_id, (token,), reason, chosen))
                if reason is not None:
                    del self._sequences[sequence.request.request_id]
                    self._release(lane, sequence)
        assert next(sampled, None) is None, f"more tokens than logit rows: {token_ids}"
        self._admit()
        return progress

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
        while self._waiting and self.num_running < self._max_num_seqs:
            sequence = self._waiting[0]
            # the last token is never written to the cache
            num_blocks = -(-(sequence.max_len - 1) // self._block_tokens)
            if num_blocks > self._pool.num_free:
                return
            self._waiting.popleft()
            sequence.blocks = self._pool.allocate(num_blocks)
            lane = min(self._lanes, key=lambda lane: sum(other.predicted for other in lane.sequences))
            lane.sequences.append(sequence)
            self._sequences[sequence.request.request_id] = (sequence, lane)

    def _release(self, lane: _Lane, sequence: _Sequence) -> None:
        lane.sequences.remove(sequence)
        self._pool.free(sequence.blocks)
        sequence.blocks = ()


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
        block_tables=tuple(sequence.blocks for sequence, _ in chosen),
        logit_rows=tuple(logit_rows),
        sampling=tuple(sampling),
    )
