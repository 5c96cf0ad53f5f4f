"""The scheduler of one attention worker: who runs, on which lane, with which KV blocks.

Decides; does not act: takes requests and sampled tokens, returns micro-batches and progress. Knows no clock, tensors
or sockets.

A request waits until `admission` lets it onto a lane, which it keeps to its end or preemption. Each micro-batch takes
from the lane's sequences what `share_budget` says. Sequences fail alone: those whose values went wrong by what the
sampler says, and where an exception came out of a pass each is tried again by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import chain

from msi.attention.admission import Admission
from msi.attention.block_pool import BlockPool
from msi.attention.exchanged_blocks import ExchangedBlocks
from msi.attention.prompt_share import PromptShare
from msi.attention.sequence import Lane, Sequence, micro_batch, share_budget
from msi.errors import InvalidRequest, RequestFailed, Unavailable, context_exceeded, shown
from msi.prompt_logprobs import PromptLogprobs
from msi.sampling import is_stop_token
from msi.settings import SchedulerLimits
from msi.types import GrammarState, MicroBatch, Progress, Request, TokenLogprobs

RESUMED_FIRST = 2**62  # requests that were running elsewhere are taken to have arrived so many before the others
PRIORITY_STEP = 2**64  # and those of a lower priority by so many times as much
NO_LOGPROBS: Mapping[int, TokenLogprobs] = {}
NOT_SCORED: Mapping[int, PromptLogprobs] = {}


class Scheduler:
    """Requests in, micro-batches out.

    Args:
        num_blocks: KV blocks, block 0 (padding) included.
        block_tokens: tokens per block.
        limits: without zeros; a micro-batch's tokens are at most the rows of a slot.
        prompt_share: what prompts may have beside those that decode; None for whatever there is room for.
        vocab_size: no token outside it gets in; None for any.

    Attributes:
        exchanged: KV blocks that go to other attention workers, or come from them.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        num_lanes: int,
        num_blocks: int,
        block_tokens: int,
        vocab_size: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        prompt_share: PromptShare | None = None,
    ) -> None:
        self._num_arrived = 0
        self._pool = BlockPool(num_blocks)
        self._lanes = [Lane() for _ in range(num_lanes)]
        self._admission = Admission(
            self._lanes, self._pool, block_tokens, max_num_seqs=limits.max_num_seqs,
            has_prefix_cache=limits.enable_prefix_caching,
        )  # fmt: skip
        self._cache_len = self._pool.capacity * block_tokens
        self._limits = limits
        self._prompt_share = prompt_share
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(token for token in eos_token_ids if self._is_token(token))
        self._sequences: dict[str, Sequence] = {}
        self.exchanged = ExchangedBlocks(
            self._pool, self._sequences, lambda: self.num_running, takes_any=limits.enable_prefix_caching
        )
        self._ended: list[Sequence] = []
        self._num_failed = 0

    # -- counts ------------------------------------------------------------------------------------------------------

    @property
    def num_lanes(self) -> int:
        return len(self._lanes)

    def use_lanes(self, num_lanes: int) -> None:
        """Sequences come onto so many from now on; those on others stay there to their end, or preemption."""
        self._lanes += [Lane() for _ in range(num_lanes - len(self._lanes))]
        self._admission.num_lanes = num_lanes

    @property
    def counters(self) -> dict[str, int]:
        """Counts since start, by name."""
        return {
            **asdict(self._admission.counters),
            "kv_blocks_evicted": self._pool.num_evicted,
            "sequences_failed": self._num_failed,
        }

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def num_blocks(self) -> int:
        """Blocks that sequences can have, all together."""
        return self._pool.capacity

    @property
    def num_waiting(self) -> int:
        return len(self._admission.waiting)

    @property
    def num_running(self) -> int:
        return self._admission.num_running

    @property
    def requests(self) -> list[Request]:
        """All that are here, in the order in which they came."""
        return [sequence.request for sequence in self._sequences.values()]

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of all requests that are here, whether they run or wait."""
        return tuple(self._sequences)

    @property
    def num_admissions(self) -> int:
        """Since the start: where it rose, lanes that had no work may have some."""
        return self._admission.num_admissions

    def take_admitted(self) -> list[str]:
        """Ids of the requests that were admitted for the first time since this was last asked."""
        admitted, self._admission.admitted = self._admission.admitted, []
        return [sequence.request.request_id for sequence in admitted]

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All that are here; to be read."""
        return tuple(self._sequences.values())

    def find(self, request_id: str) -> Sequence | None:
        """One that is here; to be read."""
        return self._sequences.get(request_id)

    def take_ended(self) -> list[Sequence]:
        """Those whose last token came since this was last asked."""
        ended, self._ended = self._ended, []
        return ended

    @property
    def is_idle(self) -> bool:
        return not self._sequences

    def check_integrity(self) -> None:
        """Re-adds free, kept and used blocks. Raises AssertionError with the numbers."""
        in_use = [block for lane in self._lanes for sequence in lane.sequences for block in sequence.blocks]
        self._pool.check_integrity(in_use)

    # -- requests ----------------------------------------------------------------------------------------------------

    def add(self, request: Request, grammar: GrammarState | None = None) -> None:
        """Takes a request.

        Args:
            grammar: that its answer is held to, from its beginning.

        Raises:
            InvalidRequest: it can never run here; says why.
            RequestFailed: it ran elsewhere, and cannot go on here.
            Unavailable: too many wait already.
        """
        num_prompt = len(request.prompt_token_ids)
        least = num_prompt + min(1, request.params.max_tokens)
        if num_prompt == 0:
            raise InvalidRequest("the prompt is empty; give at least one token")
        if least > self._limits.max_model_len:
            raise context_exceeded(self._limits.max_model_len, num_prompt, request.params.max_tokens)
        if least > self._cache_len:
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens; the whole KV cache holds {self._cache_len}. Shorten it, or give "
                f"the attention workers more memory"
            )
        if not request.num_resumptions and self.num_waiting >= self._limits.max_num_waiting:
            raise Unavailable(f"{self.num_waiting} requests wait here already; try again later")
        if request.request_id in self._sequences:
            raise InvalidRequest(f"request id {shown(request.request_id)} is in use")
        self._check_tokens(request)
        max_len = min(num_prompt + request.params.max_tokens, self._limits.max_model_len, self._cache_len)
        tokens = [*request.prompt_token_ids, *request.output_token_ids]
        if len(tokens) >= max_len and request.output_token_ids:
            raise RequestFailed(f"it has {len(tokens)} tokens, and the KV cache here holds {self._cache_len}")
        arrival = self._num_arrived - (RESUMED_FIRST if request.num_resumptions else 0)
        arrival += request.priority * PRIORITY_STEP
        sequence = Sequence(request, arrival, max_len, tokens, grammar=grammar)
        self._num_arrived += 1
        self._sequences[request.request_id] = sequence
        self._admission.wait(sequence)

    def cancel(self, request_id: str) -> bool:
        """Forgets a request, at once or when its pass is through; False when it is not here."""
        if request_id not in self._sequences:
            return False
        self._forget(request_id)
        self._admission.admit()
        return True

    def fail_running(self) -> list[str]:
        """Forgets every request that was admitted and returns their ids; what waits stays."""
        failed = [request_id for request_id, sequence in self._sequences.items() if sequence.lane is not None]
        for request_id in failed:
            self._forget(request_id)
        self._admission.admit()
        return failed

    # -- passes ------------------------------------------------------------------------------------------------------

    def has_work(self, lane_index: int) -> bool:
        lane = self._lanes[lane_index]
        return bool(lane.sequences) and not lane.in_flight

    def plan(self, lane_index: int) -> MicroBatch | None:
        """The next micro-batch of a lane that has none in flight; None when it has nothing to do."""
        lane = self._lanes[lane_index]
        assert not lane.in_flight, f"lane {lane_index} is in flight"
        while not (chosen := self._choose(lane)):
            # what was preempted for nothing may have left room for others
            if not self._admission.admit():
                return None
        lane.num_passes += 1
        lane.prompt_tokens = sum(count for _, count in chosen if count > 1)
        for sequence, _ in chosen:
            sequence.served_at = lane.num_passes
        lane.in_flight = chosen
        return micro_batch(chosen, self._eos_token_ids)

    def _choose(self, lane: Lane) -> list[tuple[Sequence, int]]:
        """Who is in the lane's next micro-batch, with how many tokens; all have the blocks for them."""
        suspect = next((one for one in lane.sequences if one.is_suspect), None)
        candidates = lane.sequences if suspect is None else [suspect]
        chosen: list[tuple[Sequence, int]] = []
        lane.prompt_room = 0
        room = None if self._prompt_share is None else partial(self._prompt_room, lane, self._prompt_share)
        for sequence, count in share_budget(candidates, self._limits.max_num_batched_tokens, room):
            # one without blocks was preempted for another of them
            if sequence.blocks and self._admission.make_room(sequence, count, chosen):
                chosen.append((sequence, count))
        return chosen

    def _prompt_room(self, lane: Lane, share: PromptShare, is_decoding: bool) -> int:
        others = [one for one in self._lanes if one is not lane]
        if not is_decoding and not any(one.num_left == 1 for other in others for one in other.sequences):
            return self._limits.max_num_batched_tokens
        lane.prompt_room = share.room(sum(one.prompt_tokens for one in others if one.in_flight))
        return lane.prompt_room

    def took(self, lane_index: int, seconds: float) -> None:
        """The pass of a lane is through, and took so long; before its `update`."""
        lane, share = self._lanes[lane_index], self._prompt_share
        if share is None:
            return
        if lane.prompt_room:
            share.passed(seconds, is_full=lane.prompt_tokens >= lane.prompt_room)
        elif not any(one.prompt_tokens for one in self._lanes if one.in_flight):
            share.decoded(seconds)

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
        self,
        lane_index: int,
        token_ids: list[int],
        logprobs: Mapping[int, TokenLogprobs] = NO_LOGPROBS,
        ended: Collection[int] = (),
        prompt_logprobs: Mapping[int, PromptLogprobs] = NOT_SCORED,
    ) -> list[Progress]:
        """The pass of a lane is through: one sampled token for each of its micro-batch's logit rows.

        Args:
            logprobs: by index into `token_ids`.
            ended: indices of the tokens behind which nothing may follow.
            prompt_logprobs: by index of the sequence in the micro-batch.
        """
        lane = self._lanes[lane_index]
        sampled = iter(enumerate(token_ids))
        progress = []
        for index, (sequence, count) in enumerate(lane.in_flight):
            sequence.num_computed += count
            sequence.is_suspect = False
            if not sequence.has_failed:
                self._admission.keep_full_blocks(sequence)
            row, token = next(sampled) if sequence.is_followed_by_token() else (-1, None)
            if sequence.is_cancelled:
                self._admission.release(sequence)
                continue
            scored = prompt_logprobs.get(index) if prompt_logprobs else None
            if scored is not None:
                sequence.num_scored += len(scored)
            is_all = sequence.num_computed == sequence.max_len  # where the prompt alone is wanted
            if token is None and scored is None and not is_all:
                continue
            new_tokens: tuple[int, ...] = ()
            reason, num_cached, keeps_last = "length" if is_all else None, 0, False
            if token is not None:
                sequence.tokens.append(token)
                reason = self._finish_reason(sequence, token)
                keeps_last = row in ended and reason != "stop"
                new_tokens, reason = (token,), "stop" if row in ended else reason
            if token is not None or is_all:
                num_cached = sequence.take_cached()
            chosen = (logprobs[row],) if row in logprobs else ()
            request_id = sequence.request.request_id
            progress.append(
                Progress(
                    request_id, new_tokens, reason, chosen, num_cached, keeps_last=keeps_last, prompt_logprobs=scored
                )
            )
            if reason is not None:
                del self._sequences[request_id]
                self._admission.release(sequence)
                self._ended.append(sequence)
        assert next(sampled, None) is None, f"more tokens than logit rows: {token_ids}"
        lane.in_flight = []
        self._admission.admit()
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
        self._num_failed += len(failed)
        return failed

    def give_up(self, lane_index: int) -> None:
        """The pass of a lane was lost: what it computed counts as not computed."""
        lane = self._lanes[lane_index]
        in_flight, lane.in_flight = lane.in_flight, []
        for sequence, _ in in_flight:
            if sequence.is_cancelled:
                self._admission.release(sequence)
        self._admission.admit()

    def suspect(self, lane_index: int) -> list[str]:
        """An exception came out of the pass of a lane: its sequences are tried again, each in a pass of its own.

        Returns the ids of those that end with it: the one that was alone already.
        """
        in_flight = self._lanes[lane_index].in_flight
        failed = self.fail(lane_index, [0]) if len(in_flight) == 1 else []
        for sequence, _ in in_flight:
            sequence.is_suspect = True
        self.give_up(lane_index)
        return failed

    def fail_lane(self, lane_index: int) -> list[str]:
        """Forgets every request of a lane, whatever state it is in, and returns their ids."""
        lane = self._lanes[lane_index]
        ended = {one.arrival: one for one in (*lane.sequences, *(one for one, _ in lane.in_flight))}
        lane.in_flight = []
        for sequence in list(lane.sequences):
            self._admission.release(sequence)
        failed = [one.request.request_id for one in ended.values() if not one.is_cancelled]
        for request_id in failed:
            self._sequences.pop(request_id, None)
        self._num_failed += len(failed)
        self._admission.admit()
        return failed

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _forget(self, request_id: str) -> None:
        sequence = self._sequences.pop(request_id)
        sequence.is_cancelled = True
        if sequence.lane is None:
            self._admission.waiting.remove(sequence)
        elif all(flying is not sequence for flying, _ in sequence.lane.in_flight):
            self._admission.release(sequence)

    def _finish_reason(self, sequence: Sequence, token: int) -> str | None:
        if is_stop_token(sequence.request.params, token, self._eos_token_ids):
            return "stop"
        return "length" if len(sequence.tokens) >= sequence.max_len else None

    def _is_token(self, token_id: int) -> bool:
        return self._vocab_size is None or 0 <= token_id < self._vocab_size

    def _check_tokens(self, request: Request) -> None:
        """The last line of defence: whoever asked has been told before, or goes round those who tell."""
        if self._vocab_size is None:
            return
        listed = {
            "prompt": request.prompt_token_ids,
            "output": request.output_token_ids,
            "logit_bias": request.params.logit_bias,
            "stop_token_ids": request.params.stop_token_ids,
            "allowed_token_ids": request.params.allowed_token_ids,
            "bad_words": list(chain.from_iterable(request.params.bad_words_token_ids)),
        }
        for name, token_ids in listed.items():
            if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self._vocab_size):
                wrong = next(token for token in token_ids if not self._is_token(token))
                raise InvalidRequest(
                    f"token id {shown(wrong)} in {name}; ids are integers from 0 to {self._vocab_size - 1}", param=name
                )
        params = request.params
        if not params.min_tokens:
            return
        ending = self._eos_token_ids.union(params.stop_token_ids)
        if params.allowed_token_ids and ending.issuperset(params.allowed_token_ids):
            raise InvalidRequest(
                f"min_tokens is {params.min_tokens}, and allowed_token_ids has no token that may come before",
                param="allowed_token_ids",
            )
        if len(ending) >= self._vocab_size:
            raise InvalidRequest(
                f"min_tokens is {params.min_tokens}, and stop_token_ids leave no token that may come before",
                param="stop_token_ids",
            )
