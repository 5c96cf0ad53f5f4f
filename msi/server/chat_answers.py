"""How answers of OpenAI's /v1/chat/completions look. Pure; knows no HTTP, and of a request only what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msi.server.answers import Usage, logprob_values
from msi.server.parsed_choice import ParsedChoice
from msi.server.parsing.parser import Parsing
from msi.server.prompt_answers import PromptAnswers
from msi.server.token_ids import TokenIds, id_name, named_by_id
from msi.types import Output, TokenLogprobs, TokenText


class ChatAnswer:
    """Shapes the outputs of one request.

    Args:
        token_text: what a token would add to a text.
        has_logprobs: whether log-probabilities are wanted.
        parsing: what is looked for in the text; None to tell it as it is.
        is_streamed: nobody will ask for a whole `choice`.
        prompts: log-probabilities of the prompt, where those are wanted.
        token_ids: where those are wanted.
        names_by_id: log-probabilities name tokens by their ids.

    Attributes:
        is_plain: the chunks of a choice differ in nothing but their text, up to the one that ends it.
    """

    def __init__(
        self, request_id: str, model: str, created: int, token_text: Callable[[int], TokenText], num_choices: int,
        has_logprobs: bool = False, parsing: Parsing | None = None, is_streamed: bool = False,
        prompts: PromptAnswers | None = None, token_ids: TokenIds | None = None, names_by_id: bool = False,
    ) -> None:  # fmt: skip
        self.request_id = request_id
        self.usage = Usage(num_choices)
        self.is_plain = not has_logprobs and parsing is None and prompts is None and token_ids is None
        self._token_text = named_by_id(token_text) if names_by_id else token_text
        self.token_ids = token_ids
        self._names_by_id = names_by_id
        self._has_logprobs = has_logprobs
        self._prompts = prompts
        self._is_open = False
        self.num_choices = num_choices
        self._has_reasoning = parsing is not None and bool(parsing.reasoning_parser)
        self._parsed = (
            [] if parsing is None else [ParsedChoice(parsing, keeps=not is_streamed) for _ in range(num_choices)]
        )
        self._common = {"id": request_id, "created": created, "model": model}
        self._head = self._common | {"object": "chat.completion.chunk"}

    def opening(self, output: Output) -> list[dict[str, Any]]:
        """Chunks that come before an output's: before the first one, who speaks, and the prompt's log-probabilities."""
        if self._is_open:
            return []
        self._is_open = True
        delta = {"role": "assistant", "content": ""}
        chunks = [self._head | {"choices": [_choice(index, "delta", delta)]} for index in range(self.num_choices)]
        if self._prompts is not None:
            chunks[0] |= self._prompts.listed(0)
        if self.token_ids is not None:
            chunks[0] |= self.token_ids.of_prompt(0)
        return chunks

    def chunk(self, output: Output) -> dict[str, Any]:
        """One server-sent event."""
        delta, reason = self.delta(output)
        logprobs = None
        if self._has_logprobs:
            logprobs = logprobs_content(output, self._token_text, names_by_id=self._names_by_id)
        choice = _choice(output.index, "delta", delta, logprobs, reason)
        if self.token_ids is not None:
            choice |= self.token_ids.take(output)
        return self._head | {"choices": [choice]}

    def delta(self, output: Output) -> tuple[dict[str, Any], str | None]:
        """What is new of a choice's message, and the reason with which it ends, if it does."""
        self.usage.add(output)
        if not self._parsed:
            return {"content": output.text} if output.text or output.finish_reason is None else {}, output.finish_reason
        delta, reason = self._parsed[output.index].delta(output)
        if self._has_reasoning:
            self.usage.num_reasoning = sum(one.num_reasoning for one in self._parsed)
        return delta, reason

    def usage_chunk(self) -> dict[str, Any]:
        """The event that tells usage, after all others."""
        return self._head | {"choices": [], "usage": self.usage.values()}

    def frame(self) -> dict[str, Any]:
        """The answer to a request that does not stream, less the choices."""
        values = self._common | {"object": "chat.completion", "usage": self.usage.values()}
        if self.token_ids is not None:
            values |= self.token_ids.of_prompt(0)
        return values if self._prompts is None else values | self._prompts.listed(0)

    def echoed(self, index: int) -> Mapping[str, bytes]:
        """Nothing comes before a choice's own log-probabilities."""
        return {}

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """One choice of that answer, less log-probabilities."""
        message = self._parsed[index].message() if self._parsed else {"role": "assistant", "content": text}
        values = {"index": index, "message": message, "finish_reason": finish_reason}
        return values if self.token_ids is None else values | self.token_ids.whole(index)


def logprobs_content(
    output: Output, token_text: Callable[[int], TokenText], *, names_by_id: bool = False
) -> dict[str, Any]:
    """The chat endpoint's form of log-probabilities: `token` and `bytes` are what a token adds to the text.

    So joined they are the text, and its UTF-8; "" is a token inside a character, or one that ended the answer.
    """
    texts = output.token_texts
    if names_by_id:
        texts = tuple(
            TokenText(id_name(new.token_id), one.data) for new, one in zip(output.logprobs, texts, strict=True)
        )
    pairs = zip(output.logprobs, texts, strict=True)
    return {"content": [_token(one, added, token_text) for one, added in pairs]}


def _token(one: TokenLogprobs, added: TokenText, token_text: Callable[[int], TokenText]) -> dict[str, Any]:
    value, best = logprob_values(one)
    tops = [_entry(added if token == one.token_id else token_text(token), logprob) for token, logprob in best]
    return _entry(added, value) | {"top_logprobs": tops}


def _entry(token: TokenText, logprob: float) -> dict[str, Any]:
    return {"token": token.text, "logprob": logprob, "bytes": list(token.data)}


def _choice(
    index: int,
    name: str,
    content: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, name: content, "logprobs": logprobs, "finish_reason": finish_reason}
