"""Prompts as they come before the text of an answer, cut into their tokens where those have log-probabilities.

Pure, and grows with the prompt: it runs where nobody waits for it. Also says how much of that is too much.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from msi.errors import InvalidRequest
from msi.sampling_params import SamplingParams
from msi.server.completions import CompletionRequest
from msi.text.detokenizer import Detokenizer
from msi.text.prompts import Prompts
from msi.text.tokenizer import around, is_library_error
from msi.text.vocabulary import Vocabulary

MAX_PROMPT_LOGPROBS = 1 << 20  # in one answer: some tens of megabytes of JSON


def check_size(num_tokens: int, params: SamplingParams) -> None:
    """Raises InvalidRequest: the log-probabilities of prompts of so many tokens are too many for an answer."""
    if params.prompt_logprobs is None:
        return
    num_each = 1 + params.prompt_logprobs
    if (num := num_tokens * num_each * params.n) > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            f"log-probabilities of {num_tokens} tokens of prompts, {num_each} for each, in {params.n} choices are "
            f"{num}; at most {MAX_PROMPT_LOGPROBS} are allowed in one answer: send fewer prompts, or ask for fewer",
            param="prompt",
        )


class Echoes:
    """Of one model.

    Args:
        prompts: where there is no tokenizer, they have no text.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._vocabulary: Vocabulary | None = None
        self._around: tuple[list[int], list[int]] = ([], [])

    def of(
        self, asked: CompletionRequest, prompts: Sequence[Sequence[int]]
    ) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """The echoes of a request's prompts, and where tokens end in them, as in `msi.server.prepare.Prepared`.

        Of token ids that are truncated, those that are taken; a text comes back as it was given.

        Where they are cut, an echo is what the tokens say: the text as it was given, but for what the tokenizer leaves
        out or changes.

        Args:
            prompts: the tokens of each.

        Raises:
            InvalidRequest: the tokenizer cannot decode one.
        """
        if asked.params.logprobs is None:
            pairs = zip(asked.prompts, prompts, strict=True)
            texts = [one if isinstance(one, str) else self._prompts.decode(taken) for one, taken in pairs]
            return tuple(text.encode() for text in texts), ()
        cut = [
            self.cut(prompt, is_text=isinstance(one, str) and asked.add_special_tokens)
            for one, prompt in zip(asked.prompts, prompts, strict=True)
        ]
        return tuple(text.encode() for text, _ in cut), tuple(ends.tobytes() for _, ends in cut)

    def cut(self, token_ids: Sequence[int], *, is_text: bool) -> tuple[str, array[int]]:
        """A prompt's text, and the place in it where each token ends.

        Args:
            is_text: it was given as one: special tokens that the tokenizer has put around it are no part of it.

        Raises:
            InvalidRequest: the tokenizer cannot decode it.
        """
        if self._vocabulary is None and (tokenizer := self._prompts.tokenizer) is not None:
            self._vocabulary, self._around = Vocabulary(tokenizer, skips_special=False), around(tokenizer)
        before, after = self._own(token_ids) if is_text else (0, 0)
        inner = token_ids[before : len(token_ids) - after]
        texts = [""] * before + self._texts_of(inner) + [""] * after
        ends, end = array("i"), 0
        for text in texts:
            end += len(text)
            ends.append(end)
        return "".join(texts), ends

    def _own(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """How many tokens at the beginning and at the end are the tokenizer's own."""
        before, after = self._around
        num_before = len(before) if list(token_ids[: len(before)]) == before else 0
        rest = token_ids[num_before:]
        return num_before, len(after) if after and list(rest[-len(after) :]) == after else 0

    def _texts_of(self, token_ids: Sequence[int]) -> list[str]:
        if self._vocabulary is None:
            return [""] * len(token_ids)
        try:
            detokenizer = Detokenizer(self._vocabulary)
            texts: list[str] = []
            for token_id in token_ids:
                texts += detokenizer.step(token_id)
            held, rest = detokenizer.finish()
        except BaseException as error:
            if not is_library_error(error):
                raise
            raise InvalidRequest(f"the tokenizer cannot decode the prompt: {error}", param="prompt") from error
        texts += held
        return [*texts[:-1], "".join(texts[-1:]) + rest] if rest else texts
