"""The text of one answer as it comes: detokenised, ended by stop strings, and shared out to its tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from msi.errors import InvalidRequest, RequestFailed
from msi.text.detokenizer import Detokenizer, end_of_prompt
from msi.text.stop_strings import StopSearch, Thinking, ThinkingGate
from msi.text.tokenizer import is_library_error
from msi.text.vocabulary import Vocabulary
from msi.types import SamplingParams, TokenLogprobs, TokenText


class NewText(NamedTuple):  # one for every token: a tuple is made in half the time of a frozen dataclass
    """What has become certain.

    Attributes:
        logprobs: of the tokens whose text is all told.
        token_texts: what each of them adds to the text.
    """

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    token_texts: tuple[TokenText, ...] = ()


def text_streams(
    vocabulary: Vocabulary | None,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    thinking: Thinking | None = None,
) -> list[TextStream]:
    """One for each choice of a request. Raises InvalidRequest: the tokenizer cannot decode the prompt.

    Args:
        thinking: where stop strings do not count.
    """
    try:
        if vocabulary is not None and not params.skip_special_tokens:
            vocabulary = vocabulary.showing_special
        end = () if vocabulary is None else end_of_prompt(vocabulary, prompt_token_ids)
        return [
            TextStream(
                vocabulary,
                end,
                params.stop,
                params.min_tokens,
                includes_stop=params.include_stop_str_in_output,
                thinking=thinking,
            )
            for _ in range(params.n)
        ]
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise InvalidRequest(f"the tokenizer cannot decode the prompt: {error}", param="prompt") from error


class TextStream:
    """One answer's text, as soon as it is certain; `is_stopped` once a stop string has ended it, which `stopped_by` is.

    Held back are bytes of an unfinished character, and the end of a text that may turn out to begin a stop string.
    The texts of all tokens together are the text that was given out: a token that ends the answer adds nothing, of
    those that a stop string reaches into only what lies before it counts.

    Args:
        vocabulary: None for a model without tokenizer, whose answers have no text.
        prompt_end: see `msi.text.detokenizer.end_of_prompt`.
        min_tokens: before so many tokens no stop string counts.
        includes_stop: the stop string or token that ends the text is part of it.
        thinking: where no stop string counts.
    """

    def __init__(
        self, vocabulary: Vocabulary | None, prompt_end: Sequence[int], stop: tuple[str, ...], min_tokens: int = 0,
        *, includes_stop: bool = False, thinking: Thinking | None = None,
    ) -> None:  # fmt: skip
        self.is_stopped = False
        self.stopped_by = ""
        self._detokenizer = None if vocabulary is None else Detokenizer(vocabulary, prompt_end)
        self._search = StopSearch(stop) if stop else None
        self._gate = ThinkingGate(thinking) if stop and thinking is not None else None
        self._min_tokens = min_tokens
        self._includes_stop = includes_stop
        self._num_settled = 0  # tokens whose text is known
        self._held = ""  # text that is not given out
        self._untold = _Untold(vocabulary)

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = (),
        *,
        is_last: bool = False,
        is_ended_by_token: bool = False,
    ) -> NewText:
        """More tokens; once it `is_stopped`, nothing may follow.

        Args:
            logprobs: theirs, if they are wanted.
            is_last: no more tokens follow.
            is_ended_by_token: the last one is a stop token, no part of the text unless that includes it.

        Raises:
            RequestFailed: the tokenizer cannot decode them.
        """
        is_ended_by_token = is_ended_by_token and not self._includes_stop
        try:
            texts = self._texts_of(token_ids, is_last, is_ended_by_token)
        except BaseException as error:
            if not is_library_error(error):
                raise
            raise RequestFailed(f"the tokenizer cannot decode the answer: {error}") from error
        text = self._certain(texts, is_last)
        if not logprobs and not self._untold.has_any:
            return NewText(text)
        self._untold.add(logprobs, texts)
        return self._untold.tell(text, is_all=is_last or self.is_stopped, is_ended_by_token=is_ended_by_token)

    def _texts_of(self, token_ids: Sequence[int], is_last: bool, is_ended_by_token: bool) -> list[str]:
        """What was settled, token by token."""
        if self._detokenizer is None:
            return [""] * len(token_ids)
        if len(token_ids) == 1 and not is_last:
            return self._detokenizer.step(token_ids[0])
        texts: list[str] = []
        for token_id in token_ids[:-1] if is_ended_by_token else token_ids:
            texts += self._detokenizer.step(token_id)
        if is_last:
            held, rest = self._detokenizer.finish()
            texts += [*held, ""] if is_ended_by_token else held
            if rest:
                texts = [*texts[:-1], "".join(texts[-1:]) + rest]
        return texts

    def _certain(self, texts: list[str], is_last: bool) -> str:
        """The text that can be given out now."""
        if self._search is None:
            return texts[0] if len(texts) == 1 else "".join(texts)
        early, keep = "", len(self._held)  # early: what comes before a stop string counts
        for text in texts:
            self._num_settled += 1
            if self._gate is not None:
                thought, text = self._gate.push(text)
                early += thought
                if self._gate.is_passed:
                    self._gate = None
            if self._num_settled <= self._min_tokens:
                early += text
            elif text:
                self._held += text
                start, keep, end = self._search.push(text)
                if start:
                    self.is_stopped = True
                    self.stopped_by = self._held[len(self._held) - start : len(self._held) - end]
                    return early + self._held[: len(self._held) - (end if self._includes_stop else start)]
        if is_last and self._gate is not None:
            early += self._gate.close()
        if is_last or self._includes_stop:
            keep = 0
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return early + certain


class _Untold:
    """Tokens whose text was not given out, or not all of it."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._vocabulary = vocabulary
        self._logprobs: deque[TokenLogprobs] = deque()
        self._texts: deque[str] = deque()  # of the first of them, those that are settled
        self._num_told = 0  # characters of the first text that were given out

    @property
    def has_any(self) -> bool:
        return bool(self._logprobs)

    def add(self, logprobs: Sequence[TokenLogprobs], texts: Sequence[str]) -> None:
        self._logprobs += logprobs
        self._texts += texts

    def tell(self, text: str, *, is_all: bool, is_ended_by_token: bool) -> NewText:
        """Those whose text this completes, or all that are left."""
        num_left = self._num_told + len(text)
        logprobs, token_texts = [], []
        while self._logprobs and (is_all or (self._texts and len(self._texts[0]) <= num_left)):
            one = self._logprobs.popleft()
            whole = self._texts.popleft() if self._texts else ""
            part = whole[:num_left]
            num_left -= len(part)
            is_stop_token = is_ended_by_token and not self._logprobs
            logprobs.append(one)
            token_texts.append(TokenText(part, b"" if is_stop_token else self._bytes_of(one.token_id, part, whole)))
        self._num_told = num_left
        return NewText(text, tuple(logprobs), tuple(token_texts))

    def _bytes_of(self, token_id: int, part: str, whole: str) -> bytes:
        known = self._vocabulary.bytes_of(token_id) if self._vocabulary is not None and part == whole else None
        return part.encode() if known is None else known
