"""Log-probabilities of prompts as answers show them: OpenAI's echo, and vLLM's `prompt_logprobs`.

A prompt may have a million of them: they are made into JSON once, a few tokens at a time, between which others have
their turn; what answers hold from then on is that JSON.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from msi.prompt_logprobs import PromptLogprobs, ScoredToken
from msi.server.token_ids import id_name, named_by_id
from msi.types import Output, TokenText

TOKENS_AT_A_TIME = 64
ECHOED = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """A prompt whose log-probabilities are wanted.

    Attributes:
        echo: its text.
        ends: the place in it where each token ends; () where it is not echoed with log-probabilities.
    """

    token_ids: tuple[int, ...]
    echo: str = ""
    ends: Sequence[int] = ()


class PromptAnswers:
    """Those of one request.

    Args:
        num_echoed: most probable tokens that an echo shows of each position; None for no echo.
        num_listed: the same for `prompt_logprobs`.
        names_by_id: an echo names tokens by their ids.
    """

    def __init__(
        self, prompts: Sequence[ScoredPrompt], num_choices: int, token_text: Callable[[int], TokenText],
        *, num_echoed: int | None = None, num_listed: int | None = None,
        names_by_id: bool = False,
    ) -> None:  # fmt: skip
        self._prompts = prompts
        self._num_choices = num_choices
        self._token_text = token_text
        self._named = named_by_id(token_text) if names_by_id else token_text
        self._names_by_id = names_by_id
        self._num_echoed = num_echoed
        self._num_listed = num_listed
        self._echoed: dict[int, dict[str, bytes]] = {}  # by prompt: items as JSON, by name
        self._listed: dict[int, list[bytes]] = {}  # by prompt: the same of some tokens each

    async def take(self, output: Output) -> None:
        """The one with a prompt's log-probabilities, before anything else is asked about that prompt."""
        assert output.prompt_logprobs is not None, output.request_id
        number = output.index // self._num_choices
        prompt, logprobs = self._prompts[number], output.prompt_logprobs
        echoed: dict[str, list[bytes]] = {name: [] for name in ECHOED}
        listed: list[bytes] = []
        for start in range(0, len(prompt.token_ids), TOKENS_AT_A_TIME):
            stop = min(start + TOKENS_AT_A_TIME, len(prompt.token_ids))
            scored = _scored(logprobs, start, stop)
            if self._num_echoed is not None:
                items = self._echo(prompt, start, scored, self._num_echoed)
                for name, one in zip(ECHOED, zip(*items, strict=True), strict=True):
                    echoed[name].append(_items(one))
            if self._num_listed is not None:
                listed.append(_items(self._list(prompt, start, scored, self._num_listed)))
            await asyncio.sleep(0)
        self._echoed[number] = {name: b",".join(items) for name, items in echoed.items()}
        self._listed[number] = listed

    def echoed(self, index: int) -> dict[str, bytes]:
        """What comes before a choice's own log-probabilities: items as JSON, by name; {} where nothing does."""
        return {} if self._num_echoed is None else self._echoed[index // self._num_choices]

    def echoed_whole(self, index: int) -> dict[str, orjson.Fragment]:
        """The same, as arrays."""
        return {name: orjson.Fragment(b"[" + items + b"]") for name, items in self.echoed(index).items()}

    def listed(self, index: int) -> dict[str, orjson.Fragment]:
        """The field of an answer or a choice; {} where it is not asked for."""
        if self._num_listed is None:
            return {}
        items = b",".join(self._listed[index // self._num_choices])
        return {"prompt_logprobs": orjson.Fragment(b"[" + items + b"]")}

    def listed_in_parts(self, index: int) -> list[dict[str, orjson.Fragment]]:
        """The field of messages that are small; joined they are the whole."""
        if self._num_listed is None:
            return []
        parts = self._listed[index // self._num_choices]
        return [{"prompt_logprobs": orjson.Fragment(b"[" + items + b"]")} for items in parts]

    def _echo(
        self, prompt: ScoredPrompt, start: int, scored: Sequence[ScoredToken | None], num_top: int
    ) -> Iterable[tuple[str, float | None, dict[str, float] | None, int]]:
        offset = prompt.ends[start - 1] if start else 0
        for at, one in enumerate(scored, start):
            token_id, end = prompt.token_ids[at], prompt.ends[at]
            text = id_name(token_id) if self._names_by_id else prompt.echo[offset:end]
            if one is None:
                yield text, None, None, offset
            else:
                best = zip(one.top_token_ids[:num_top], one.top_logprobs[:num_top], strict=True)
                yield text, one.logprob, named_top(token_id, text, one.logprob, best, self._named), offset
            offset = end

    def _list(
        self, prompt: ScoredPrompt, start: int, scored: Sequence[ScoredToken | None], num_top: int
    ) -> Iterable[dict[str, Any] | None]:
        for token_id, one in zip(prompt.token_ids[start:], scored, strict=False):
            if one is None:
                yield None
                continue
            entries = {str(token_id): self._entry(token_id, one.logprob, one.rank)}
            best = zip(one.top_token_ids[:num_top], one.top_logprobs, strict=False)
            for rank, (other, logprob) in enumerate(best, 1):
                if other != token_id:
                    entries[str(other)] = self._entry(other, logprob, rank)
            yield entries

    def _entry(self, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": logprob, "rank": rank, "decoded_token": self._token_text(token_id).text}


def named_top(
    chosen: int, text: str, value: float, best: Iterable[tuple[int, float]], token_text: Callable[[int], TokenText]
) -> dict[str, float]:
    """OpenAI's `top_logprobs` of one token: by text. The token is always there, and nothing is lost where texts are
    the same."""
    named = {text: value}
    for token_id, logprob in best:
        if token_id != chosen:
            name = token_text(token_id).text
            named[f"token_id:{token_id}" if name in named else name] = logprob
    return named


def _scored(logprobs: PromptLogprobs, start: int, stop: int) -> list[ScoredToken | None]:
    """Of the positions from `start` to `stop`; None for the first of the prompt."""
    first = logprobs.first
    unscored = max(0, first - start)
    return [None] * unscored + list(logprobs.tokens(start + unscored - first, stop - first))


def _items(values: Iterable[Any]) -> bytes:
    return orjson.dumps(list(values))[1:-1]


def ends_of(packed: bytes) -> array[int]:
    """Of one of `msi.server.prepare.Prepared.echo_ends`."""
    ends = array("i")
    ends.frombytes(packed)
    return ends
