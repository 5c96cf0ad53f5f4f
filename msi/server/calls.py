"""JSON values in, the engine's outputs out: what all ways in (HTTP, WebSocket) have in common. Knows no HTTP."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from msi.engine import Engine
from msi.errors import InvalidRequest, RequestFailed, Unavailable, shown
from msi.server.answers import Usage, error_object
from msi.server.chat import ChatAnswer, parse_chat
from msi.server.chat_template import ChatTemplates
from msi.server.completions import CompletionAnswer, parse_completion
from msi.server.fields import Streaming, Values, typed
from msi.server.merging import merged
from msi.server.metrics import Metrics
from msi.server.request_log import RequestLog
from msi.types import Output

log = logging.getLogger(__name__)

MAX_NAMES_LOGGED = 100
CLIENTS_ID = re.compile(r"[A-Za-z0-9._:/+=@~-]{1,128}")


class ModelNotFound(InvalidRequest):
    """The request names a model that is not served here (HTTP 404)."""


STATUS_OF = {ModelNotFound: 404, InvalidRequest: 400, Unavailable: 503, RequestFailed: 502}


def status_of(error: Exception) -> int:
    """Of HTTP."""
    return next((code for kind, code in STATUS_OF.items() if isinstance(error, kind)), 500)


def error_of(error: Exception) -> dict[str, Any]:
    """OpenAI's error object; its code is the HTTP status where there is no word for the error."""
    param, code = getattr(error, "param", ""), getattr(error, "code", "")
    return error_object(str(error), status_of(error), param=param, code=code)


def request_id_of(given: str | None) -> str:
    """A client's own id where it is sane, else a new one."""
    return given if given is not None and CLIENTS_ID.fullmatch(given) else uuid.uuid4().hex


class Answer(Protocol):
    """How an endpoint shapes the outputs of one request."""

    request_id: str
    usage: Usage

    def opening(self) -> list[dict[str, Any]]: ...

    def chunk(self, output: Output) -> dict[str, Any]: ...

    def usage_chunk(self) -> dict[str, Any]: ...

    def whole(self, outputs: list[Output]) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Call:
    """A request on its way. Closing `outputs` cancels it."""

    outputs: AsyncGenerator[Output, None]
    answer: Answer
    streaming: Streaming


class Calls:
    """Understands requests and starts them.

    Args:
        template: a chat template in place of the model's.
        requests: told of every request.

    Raises:
        ConfigError: the chat template is not valid.
    """

    def __init__(
        self, engine: Engine, metrics: Metrics, template: str = "", requests: RequestLog | None = None
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._requests = requests or RequestLog(is_told=False)
        sources = {"default": template} if template else engine.chat_templates
        self._templates = ChatTemplates(sources, engine.special_tokens)
        self._names_logged: set[str] = set()

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return self._engine.decode(token_ids)

    def completion(self, values: Values, request_id: str = "") -> Call:
        """Nothing runs before the first output is asked for.

        Args:
            request_id: the client's own, "" for none.

        Raises:
            InvalidRequest: it cannot be understood.
        """
        self._check_model(values)
        asked = parse_completion(values, self._engine.sampling_defaults)
        self._log_ignored(asked.ignored)
        echoes = [
            "" if not asked.echo else prompt if isinstance(prompt, str) else self._engine.decode(prompt)
            for prompt in asked.prompts
        ]
        answer = CompletionAnswer(
            f"cmpl-{request_id or uuid.uuid4().hex}", self._engine.model_name, int(time.time()), self._engine.decode,
            asked.params.n, echoes,
        )  # fmt: skip
        prompts = [self._engine.encode(prompt, add_special_tokens=asked.add_special_tokens) for prompt in asked.prompts]
        outputs = [self._metrics.observed(self._engine.generate(prompt, asked.params)) for prompt in prompts]
        followed = self._requests.followed(merged(outputs, asked.params.n), answer.request_id, asked.params.n)
        return Call(followed, answer, asked.streaming)

    def chat(self, values: Values, request_id: str = "") -> Call:
        """Nothing runs before the first output is asked for.

        Args:
            request_id: the client's own, "" for none.

        Raises:
            InvalidRequest: it cannot be understood.
        """
        self._check_model(values)
        asked = parse_chat(values, max_tokens=self._engine.max_model_len, defaults=self._engine.sampling_defaults)
        self._log_ignored(asked.ignored)
        if not self._templates:
            raise InvalidRequest("this model has no chat template; use /v1/completions, or serve with --chat-template")
        text = self._templates.choose(has_tools=asked.tools is not None).render(
            asked.messages,
            add_generation_prompt=asked.add_generation_prompt,
            values=asked.template_values,
            continue_final_message=asked.continue_final_message,
            tools=asked.tools,
            documents=asked.documents,
        )
        # the template writes special tokens itself
        prompt = self._engine.encode(text, add_special_tokens=asked.add_special_tokens)
        answer = ChatAnswer(
            f"chatcmpl-{request_id or uuid.uuid4().hex}", self._engine.model_name, int(time.time()),
            self._engine.decode, asked.params.n,
        )  # fmt: skip
        outputs = self._metrics.observed(self._engine.generate(prompt, asked.params))
        followed = self._requests.followed(outputs, answer.request_id, asked.params.n)
        return Call(followed, answer, asked.streaming)

    def _check_model(self, values: Values) -> None:
        model = typed(values, "model", str, "")
        if model and model != self._engine.model_name:
            raise ModelNotFound(
                f"model {shown(model)} is not served here; this is {self._engine.model_name!r}",
                param="model",
            )

    def _log_ignored(self, names: Sequence[str]) -> None:
        """Once per name; of a client that invents names, the first ones."""
        for name in names:
            if name not in self._names_logged and len(self._names_logged) < MAX_NAMES_LOGGED:
                self._names_logged.add(name)
                log.info("field %s of requests is not known here and is ignored", shown(name))
