"""A request while it is at an attention worker, and what a lane's next micro-batch takes of each.

Decides by values; knows no blocks of others, lanes or clock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from msi.sampling import SeenTokens, has_extras, is_penalised, sampling_extras
from msi.types import Constrained, GrammarState, MicroBatch, PromptRows, Request, TokenSampling

# The predicted time of a lane, in units of one decoded token: attention over this much context costs as much again,
# and of a prompt that is still to be computed a token costs this share.
CONTEXT_UNIT = 1024
PROMPT_SHARE = 1 / 16


@dataclass(slots=True, eq=False)
class Lane:
    """What one lane has: its sequences, and those of the pass in flight with the tokens that it computes for each."""

    sequences: list[Sequence] = field(default_factory=list)
    in_flight: list[tuple[Sequence, int]] = field(default_factory=list)
    num_passes: int = 0
    prompt_tokens: int = 0
    prompt_room: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """One request, its tokens so far, and the KV blocks it has.

    Attributes:
        arrival: its number in the order of arrival, within its priority.
        max_len: tokens, prompt included, at which it ends.
        num_computed: tokens whose keys and values are in the cache.
        hashes: of its full blocks, as far as they were needed.
        num_kept: full blocks that can be found by their hashes.
        num_admitted: how often it was, elsewhere included; more than once after preemptions.
        num_cached: tokens of the prompt that were known at its first admission.
        served_at: the pass of its lane that last computed something for it.
        is_cancelled: nobody waits for it any more; it goes when its pass is through.
        has_failed: its values are not to be trusted; what it computed is not to be found by others.
        is_suspect: an exception came out of a pass that it was in; until it comes through one it is alone in its own.
        lane: where it runs; None while it waits.
        grammar: that its answer is held to.
        num_scored: tokens of the prompt of which it was told how probable the next one is.
        num_to_score: how many there are in all; 0 where nobody asked.
        seen: its tokens as penalties see them.
    """

    request: Request
    arrival: int
    max_len: int
    tokens: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_kept: int = 0
    num_admitted: int = 0
    num_cached: int = 0
    served_at: int = 0
    is_cancelled: bool = False
    has_failed: bool = False
    is_suspect: bool = False
    lane: Lane | None = None
    grammar: GrammarState | None = None
    num_scored: int = 0
    num_to_score: int = field(init=False)
    has_extras: bool = field(init=False)
    seen: SeenTokens | None = field(init=False)

    def __post_init__(self) -> None:
        self.has_extras = has_extras(self.request.params)
        self.seen = SeenTokens() if is_penalised(self.request.params) else None
        is_scored = self.request.params.prompt_logprobs is not None
        self.num_to_score = len(self.request.prompt_token_ids) - 1 if is_scored else 0
        self.num_scored = min(self.request.num_scored, self.num_to_score)
        self.num_admitted = int(bool(self.request.output_token_ids))  # its client has been told what was cached

    @property
    def num_left(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    def is_followed_by_token(self, count: int = 0) -> bool:
        """Whether its next token is chosen once so many more have been computed; False where it may have none."""
        return self.num_computed + count == len(self.tokens) < self.max_len

    def take_cached(self) -> int:
        """`num_cached`, the first time it is asked for; 0 afterwards."""
        count, self.num_cached = self.num_cached, 0
        return count

    @property
    def predicted(self) -> float:
        """Its part of its lane's time."""
        return 1 + len(self.tokens) / CONTEXT_UNIT + (self.num_left - 1) * PROMPT_SHARE


def share_budget(
    sequences: Iterable[Sequence], budget: int, prompt_room: Callable[[bool], int] | None = None
) -> list[tuple[Sequence, int]]:
    """How many tokens of which sequences go into a micro-batch of at most `budget`.

    Those that decode have a token each; more than half of the budget only where no prompt waits, and in turns where
    they are too many: none waits longer than all of them take. Of what is left, half goes to prompts that it finishes,
    the shortest first, and the rest in order of arrival: so a short prompt does not wait for long ones, and the first
    of the long ones gets on all the time.

    Args:
        prompt_room: how many of the tokens may be of prompts, given whether others of these decode; None for all.
    """
    decoding: list[Sequence] = []
    prompts: list[Sequence] = []
    for sequence in sequences:
        (prompts if sequence.num_left > 1 else decoding).append(sequence)
    decoding.sort(key=lambda one: one.arrival)
    prompts.sort(key=lambda one: one.arrival)
    room = budget - budget // 2 if prompts else budget
    if len(decoding) > room:
        decoding = sorted(sorted(decoding, key=lambda one: one.served_at)[:room], key=lambda one: one.arrival)
    left = budget - len(decoding)
    if prompts and prompt_room is not None:
        left = min(left, prompt_room(bool(decoding)))
    finished: dict[int, int] = {}  # by arrival
    if len(prompts) > 1:
        for_short = left // 2
        for sequence in sorted(prompts, key=lambda one: one.num_left):
            if sequence.num_left > for_short:
                break
            for_short -= sequence.num_left
            left -= sequence.num_left
            finished[sequence.arrival] = sequence.num_left
    chosen = [(sequence, 1) for sequence in decoding]
    for sequence in prompts:
        count = finished.get(sequence.arrival, 0)
        if not count:
            count = min(sequence.num_left, left)
            left -= count
        if count:
            chosen.append((sequence, count))
    return chosen


def micro_batch(chosen: Iterable[tuple[Sequence, int]], eos_token_ids: Collection[int]) -> MicroBatch:
    """The next so many tokens of each sequence, which has the blocks for them."""
    token_ids: list[int] = []
    positions: list[int] = []
    query_lens: list[int] = []
    context_lens, block_tables = [], []
    logit_rows = []
    sampling = []
    constrained = []
    prompt_rows: list[PromptRows] = []
    for sequence, count in chosen:
        start = sequence.num_computed
        if sequence.num_scored < sequence.num_to_score:
            prompt_rows += _prompt_rows(sequence, count, index=len(query_lens), row=len(token_ids))
        token_ids += sequence.tokens[start : start + count]
        positions += range(start, start + count)
        query_lens.append(count)
        context_lens.append(start + count)
        block_tables.append(tuple(sequence.blocks))
        if sequence.is_followed_by_token(count):
            logit_rows.append(len(token_ids) - 1)
            sampling.append(_next_sampling(sequence, eos_token_ids))
            if sequence.grammar is not None:
                answer = tuple(sequence.tokens[len(sequence.request.prompt_token_ids) :])
                constrained.append(Constrained(len(logit_rows) - 1, sequence.grammar, answer))
    return MicroBatch(
        token_ids=tuple(token_ids),
        positions=tuple(positions),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        block_tables=tuple(block_tables),
        logit_rows=tuple(logit_rows),
        sampling=tuple(sampling),
        constrained=tuple(constrained),
        prompt_rows=tuple(prompt_rows),
    )


def _prompt_rows(sequence: Sequence, count: int, *, index: int, row: int) -> list[PromptRows]:
    """Of the next `count` tokens of a sequence, those that are still to be scored; none or one run.

    Args:
        index: of the sequence in the micro-batch.
        row: of the first of these tokens.
    """
    start = sequence.num_computed
    begin, end = max(start, sequence.num_scored), min(start + count, sequence.num_to_score)
    if begin >= end:
        return []
    num_top = sequence.request.params.prompt_logprobs
    assert num_top is not None, sequence.request.request_id
    following = tuple(sequence.tokens[begin + 1 : end + 1])
    return [PromptRows(index, row + begin - start, begin, following, num_top)]


def _next_sampling(sequence: Sequence, eos_token_ids: Collection[int]) -> TokenSampling:
    params = sequence.request.params
    assert params.seed is not None, sequence.request.request_id
    extras = None
    if sequence.has_extras:
        num_prompt = len(sequence.request.prompt_token_ids)
        extras = sampling_extras(params, sequence.tokens, num_prompt, eos_token_ids, sequence.seen)
    return TokenSampling(params.temperature, params.top_p, params.top_k, params.seed, len(sequence.tokens), extras)
