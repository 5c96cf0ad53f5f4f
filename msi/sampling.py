"""What a request's parameters mean for its next token: how it is chosen, and whether it is the last.

Decides; knows no logits. The sampler does what `sampling_extras` says.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from msi.types import LogitChanges, SamplingExtras, SamplingParams

MASK = (1 << 64) - 1


def has_extras(params: SamplingParams) -> bool:
    """Whether the parameters ask for more than temperature, top_p and top_k; if not, skip `sampling_extras`."""
    return (
        params.logprobs is not None
        or params.min_p > 0
        or params.min_tokens > 0
        or params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or bool(params.logit_bias)
        or bool(params.allowed_token_ids)
        or bool(params.bad_words_token_ids)
    )


class SeenTokens:
    """The tokens of one text as penalties see them: each once. No token is looked at twice, however often they `read`.

    Attributes:
        prompt: those of the prompt.
        output: those of the output.
        counts: how often the output has each of them.
    """

    def __init__(self) -> None:
        self.prompt, self.output, self.counts = array("q"), array("q"), array("q")
        self._places: dict[int, int] = {}  # in `output`
        self._num_read = 0

    def read(self, tokens: Sequence[int], num_prompt: int) -> None:
        """The text has grown to `tokens`."""
        if not self._num_read:
            self.prompt.extend(dict.fromkeys(tokens[:num_prompt]))
            self._num_read = num_prompt
        for token in tokens[self._num_read :]:
            place = self._places.setdefault(token, len(self.output))
            if place == len(self.output):
                self.output.append(token)
                self.counts.append(0)
            self.counts[place] += 1
        self._num_read = len(tokens)


def is_penalised(params: SamplingParams) -> bool:
    """Whether tokens are chosen by those that the text has."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def sampling_extras(
    params: SamplingParams,
    tokens: Sequence[int],
    num_prompt: int,
    eos_token_ids: Collection[int],
    seen: SeenTokens | None = None,
) -> SamplingExtras:
    """What else is done to choose the token that follows `tokens`, of which the first `num_prompt` are the prompt.

    Args:
        seen: what it has read of this text before; it reads on.
    """
    has_penalty = is_penalised(params)
    banned: tuple[int, ...] = ()
    if len(tokens) - num_prompt < params.min_tokens:
        banned = (*eos_token_ids, *params.stop_token_ids)
    if params.bad_words_token_ids:
        banned += completing(params.bad_words_token_ids, tokens, num_prompt)
    changes = None
    if has_penalty or params.logit_bias or banned or params.allowed_token_ids:
        if seen is None:
            seen = SeenTokens()
        if has_penalty:
            seen.read(tokens, num_prompt)
        changes = LogitChanges(
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            # copies of what grows on: a pass may outlast its sequence
            prompt_token_ids=seen.prompt if params.repetition_penalty != 1 else (),
            output_token_ids=seen.output[:] if has_penalty else (),
            output_counts=seen.counts[:] if params.frequency_penalty != 0 else (),
            logit_bias=params.logit_bias,
            banned_token_ids=banned,
            allowed_token_ids=params.allowed_token_ids,
        )
    return SamplingExtras(params.min_p, changes, params.logprobs)


def completing(sequences: Iterable[tuple[int, ...]], tokens: Sequence[int], num_prompt: int) -> tuple[int, ...]:
    """Tokens that would complete one of these sequences, of which the prompt counts for nothing."""
    found = []
    for sequence in sequences:
        begin = len(tokens) - len(sequence) + 1
        if begin >= num_prompt and tuple(tokens[begin:]) == sequence[:-1]:
            found.append(sequence[-1])
    return tuple(found)


def is_stop_token(params: SamplingParams, token: int, eos_token_ids: Collection[int]) -> bool:
    """Whether this new token ends the text."""
    if token in params.stop_token_ids:
        return True
    # a grammar lets an end of sequence come where the answer is whole, and nothing that follows would fit it
    return token in eos_token_ids and (not params.ignore_eos or params.structured_outputs is not None)


def choices_of(params: SamplingParams, seed: int, room: int) -> list[SamplingParams]:
    """A request's `n` choices: each with a seed of its own, and with no more tokens than there is room for.

    They have one prompt, so it is scored with the first.
    """
    max_tokens = min(params.max_tokens, room)
    min_tokens = min(params.min_tokens, max_tokens)
    return [
        replace(
            params,
            seed=seed_of_choice(seed, index),
            n=1,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            prompt_logprobs=None if index else params.prompt_logprobs,
        )
        for index in range(params.n)
    ]


def seed_of_choice(seed: int, index: int) -> int:
    """The seed of one of a request's choices; the first has the request's own."""
    return seed if index == 0 else mix(mix(seed & MASK) + index & MASK)


def uniform_of(seed: int, position: int) -> float:
    """A number in [0, 1) from 64 bits of seed and the position: splitmix64's output function, twice."""
    return (mix(mix(seed & MASK) + position & MASK) >> 11) * 2.0**-53


def mix(state: int) -> int:
    """splitmix64's output function of 64 bits."""
    state = state + 0x9E3779B97F4A7C15 & MASK
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
    return state ^ state >> 31
