"""JSON values in, the engine's outputs out: what all ways in (HTTP, WebSocket) have in common. Knows no HTTP."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

from msi.engine import Engine
from msi.errors import InvalidRequest, RequestFailed, Unavailable
from msi.server.chat import ChatAnswer, parse_chat
from msi.server.chat_template import ChatTemplate
from msi.server.completions import CompletionAnswer, parse_completion
from msi.server.fields import Values, error_object, typed
from msi.server.metrics import Metrics
from msi.types import Output, TokenText


class ModelNotFound(InvalidRequest):
    """The request names a model that is not served here (HTTP 404)."""


STATUS_OF = {ModelNotFound: 404, InvalidRequest: 400, Unavailable: 503, RequestFailed: 502}


def error_of(error: Exception) -> dict[str, Any]:
    """OpenAI's error object; its code is the HTTP status."""
    return error_object(str(error), next((code for kind, code in STATUS_OF.items() if isinstance(error, kind)), 500))


class Answer(Protocol):
    """How an endpoint shapes the outputs of one request."""

    request_id: str

    def opening(self) -> list[dict[str, Any]]: ...

    def chunk(self, output: Output) -> dict[str, Any]: ...

    def usage_chunk(self) -> dict[str, Any]: ...

    def whole(self, outputs: list[Output]) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Call:
    """A request on its way. Closing `outputs` cancels it."""

    outputs: AsyncGenerator[Output, None]
    answer: Answer
    stream: bool
    include_usage: bool
    has_logprobs: bool


class Calls:
    """Understands requests and starts them.

    Args:
        template: a chat template in place of the model's.

    Raises:
        ConfigError: the chat template is not valid.
    """

    def __init__(self, engine: Engine, metrics: Metrics, template: str = "") -> None:
        self._engine = engine
        self._metrics = metrics
        source = template or engine.chat_template
        self._template = ChatTemplate(source, engine.special_tokens) if source else None

    def token_text(self, token_id: int) -> TokenText:
        """What a token would add to a text."""
        return self._engine.token_text(token_id)

    def completion(self, values: Values) -> Call:
        """Raises InvalidRequest. Nothing runs before the first output is asked for."""
        self._check_model(values)
        asked = parse_completion(values)
        echo = ""
        if asked.echo:
            echo = asked.prompt if isinstance(asked.prompt, str) else self._engine.decode(asked.prompt)
        has_logprobs = asked.params.logprobs is not None
        answer = CompletionAnswer(
            f"cmpl-{uuid.uuid4().hex}", self._engine.model_name, int(time.time()), self._engine.token_text,
            asked.params.n, echo, has_logprobs,
        )  # fmt: skip
        outputs = self._engine.generate(asked.prompt, asked.params, request_id=answer.request_id)
        return Call(
            self._metrics.observed(outputs, asked.params.n), answer, asked.stream, asked.include_usage, has_logprobs
        )

    def chat(self, values: Values) -> Call:
        """Raises InvalidRequest. Nothing runs before the first output is asked for."""
        self._check_model(values)
        asked = parse_chat(values, max_tokens=self._engine.max_model_len)
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions, or serve with --chat-template")
        text = self._template.render(
            asked.messages, add_generation_prompt=asked.add_generation_prompt, values=asked.template_values
        )
        prompt = self._engine.encode(text, add_special_tokens=False)  # the template writes them
        has_logprobs = asked.params.logprobs is not None
        answer = ChatAnswer(
            f"chatcmpl-{uuid.uuid4().hex}", self._engine.model_name, int(time.time()), self._engine.token_text,
            asked.params.n, has_logprobs,
        )  # fmt: skip
        outputs = self._engine.generate(prompt, asked.params, request_id=answer.request_id)
        return Call(
            self._metrics.observed(outputs, asked.params.n), answer, asked.stream, asked.include_usage, has_logprobs
        )

    def _check_model(self, values: Values) -> None:
        model = typed(values, "model", str, "")
        if model and model != self._engine.model_name:
            raise ModelNotFound(f"model {model!r} is not served here; this is {self._engine.model_name!r}")
