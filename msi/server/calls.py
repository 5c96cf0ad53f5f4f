"""Bodies in, the engine's outputs out: what all ways in (HTTP, WebSocket) have in common. Knows no HTTP."""

from __future__ import annotations

import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from msi.engine import Engine
from msi.errors import (
    DeadlineExceeded,
    EngineError,
    Failure,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestFailed,
    Unavailable,
    shown,
)
from msi.request_spans import OpenSpans
from msi.server.answers import error_object
from msi.server.anthropic.answer import MessageAnswer
from msi.server.chat_answers import ChatAnswer
from msi.server.completions import CompletionAnswer
from msi.server.fields import Streaming
from msi.server.merging import merged
from msi.server.metrics import Metrics
from msi.server.moment import Interrupted, for_a_moment
from msi.server.parsing.parser import thinking_of
from msi.server.prepare import (
    ANSWERS,
    ANTHROPIC,
    CHAT,
    ENDPOINTS,
    RESPONSE,
    SETUP,
    Answered,
    Elsewhere,
    NotUnderstood,
    Preparation,
    Prepared,
    Setup,
    Understood,
    tokens_of,
)
from msi.server.preparers import Preparers
from msi.server.prompt_answers import PromptAnswers, ScoredPrompt, ends_of
from msi.server.request_log import RequestLog
from msi.server.responses.answer import ResponseAnswer
from msi.server.token_ids import TokenIds
from msi.server.traced import traced
from msi.server.urgency import shortest_timeout_s
from msi.types import Output, TokenText

log = logging.getLogger(__name__)

MAX_NAMES_LOGGED = 100
SMALL_BYTES = 4096  # of a body: a millisecond or two
MOMENT_S = 0.03  # for small ones; a template may make much of little
CLIENTS_ID = re.compile(r"[A-Za-z0-9._:/+=@~-]{1,128}")


STATUS_OF = {
    ModelNotFound: 404, InvalidRequest: 400, Overloaded: 429, Unavailable: 503, RequestFailed: 502,
    DeadlineExceeded: 408,
}  # fmt: skip


def status_of(error: Exception) -> int:
    """Of HTTP."""
    return next((code for kind, code in STATUS_OF.items() if isinstance(error, kind)), 500)


def error_of(error: Exception) -> dict[str, Any]:
    """OpenAI's error object; its code is the HTTP status where there is no word for the error.

    What is no error of the engine's is a bug of ours: the log has it, and the client a sentence.
    """
    if not isinstance(error, EngineError):
        log.error("a request failed", exc_info=error)
        error = EngineError("the server failed at this request; its log says why")
    param, code = getattr(error, "param", ""), getattr(error, "code", "")
    return error_object(str(error), status_of(error), param=param, code=code)


def request_id_of(given: str | None) -> str:
    """A client's own id where it is sane, else a new one."""
    return given if given is not None and CLIENTS_ID.fullmatch(given) else uuid.uuid4().hex


ChunkAnswer = CompletionAnswer | ChatAnswer
TypedAnswer = ResponseAnswer | MessageAnswer


@dataclass(frozen=True, slots=True)
class Call:
    """A request on its way. Closing `outputs` cancels it.

    Attributes:
        prompts: log-probabilities of the prompts, where those are wanted.
    """

    outputs: AsyncGenerator[Output, None]
    answer: ChunkAnswer | TypedAnswer
    streaming: Streaming
    has_logprobs: bool
    prompts: PromptAnswers | None = None


class Observer(Protocol):
    """Of one request: counts, times or logs it."""

    def saw(self, output: Output) -> None: ...

    def ended(self, error: BaseException | None) -> None:
        """Why there are no more: None where that was the last, no Exception where nobody wanted the rest."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        flow: see `msi.types.Request`.
        headers: of the request, or of the connection's beginning.
        came_at: when, by the monotonic clock.
    """

    flow: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    came_at: float | None = None

    def context(self, asked: Prepared) -> dict[str, Any]:
        """What `Engine.generate` is told of it; only what is not as it always is."""
        urgency = asked.urgency
        timeout_s = shortest_timeout_s(urgency.timeout_s, self.headers, is_streamed=asked.streaming.stream)
        if timeout_s and self.came_at is not None:  # understanding it took time
            timeout_s = max(0.001, timeout_s - (time.monotonic() - self.came_at))
        told = {
            "priority": urgency.priority, "timeout_s": timeout_s, "flow": self.flow, "cache_salt": asked.cache_salt,
        }  # fmt: skip
        return {name: value for name, value in told.items() if value}


ANYBODY = Caller()


class Calls:
    """Understands requests and starts them. `close` at the end.

    Small bodies are understood here, unless that takes longer than a moment; the others in processes beside this one
    (see `msi.server.preparers`).

    Args:
        template: a chat template in place of the model's.
        spans: of requests; None where they are not traced.

    Raises:
        ConfigError: the chat template is not valid.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        template: str = "",
        requests: RequestLog | None = None,
        spans: OpenSpans | None = None,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._requests = requests or RequestLog(is_told=False)
        self._spans = spans
        setup = Setup(engine.welcome, template)
        self._preparation = Preparation(setup, compiles=False)
        self._preparers = Preparers(SETUP.encode(setup))
        self._names_logged: set[str] = set()

    async def start(self) -> None:
        """Starts the processes, so that the first large request does not wait for one."""
        await self._preparers.start()

    async def close(self) -> None:
        await self._preparers.close()

    @property
    def num_given_up(self) -> int:
        """Requests that took too much to understand."""
        return self._preparers.num_given_up

    def token_text(self, token_id: int) -> TokenText:
        """What a token would add to a text."""
        return self._engine.token_text(token_id)

    async def understand(self, endpoint: str, body: bytes, client: object) -> Understood | Answered | NotUnderstood:
        """What a body asks. Cancellation ends the wait for it.

        Args:
            endpoint: one of `ENDPOINTS`.
            client: who asks, such as a connection: clients take turns.
        """
        asked = await self._understand(endpoint, body, client)
        if isinstance(asked, NotUnderstood):
            self._metrics.refused()
        if isinstance(asked, Answered):
            self._log_ignored(asked.ignored)
        return asked

    async def _understand(self, endpoint: str, body: bytes, client: object) -> Understood | Answered | NotUnderstood:
        is_small = len(body) <= SMALL_BYTES
        if is_small:
            with contextlib.suppress(Interrupted, Elsewhere), for_a_moment(MOMENT_S):
                return self._preparation.understand(endpoint, body)
        try:
            task = bytes([ENDPOINTS.index(endpoint)]) + body
            prepared = await self._preparers.prepare(client, task, is_slow=is_small)
            answer: Understood | Answered | NotUnderstood = ANSWERS.decode(prepared)
        except EngineError as error:
            return NotUnderstood(Failure.of(error))
        if isinstance(answer, Understood) and answer.request is not None:
            self._preparation.remember(answer.request.params)
        return answer

    def call(self, asked: Prepared, request_id: str = "", parent: str = "", caller: Caller = ANYBODY) -> Call:
        """Nothing runs before the first output is asked for.

        Args:
            request_id: the client's own, "" for none.
            parent: the client's traceparent, "" for none.
            caller: who asks, and how long it waits.
        """
        self._log_ignored(asked.ignored)
        engine, num_choices = self._engine, asked.params.n
        has_logprobs = asked.params.logprobs is not None
        request_id = request_id or uuid.uuid4().hex
        scored = prompt_answers(asked, engine.token_text)
        created = int(time.time())
        common = (engine.model_name, created, engine.token_text, num_choices)
        answer: ChunkAnswer | TypedAnswer
        shown_as: dict[str, Any] = {"token_ids": token_ids_of(asked), "names_by_id": asked.streaming.tokens_as_ids}
        if asked.endpoint == RESPONSE:
            answer = ResponseAnswer(request_id, engine.model_name, created, asked)
        elif asked.endpoint == ANTHROPIC:
            answer = MessageAnswer(request_id, engine.model_name, asked)
        elif asked.endpoint == CHAT:
            answer = ChatAnswer(
                f"chatcmpl-{request_id}", *common, has_logprobs, asked.parsing, is_streamed=asked.streaming.stream,
                prompts=scored, **shown_as,
            )  # fmt: skip
        else:
            echoes = [echo.decode() for echo in asked.echoes]
            answer = CompletionAnswer(
                f"cmpl-{request_id}", *common, echoes, has_logprobs=has_logprobs, prompts=scored, **shown_as
            )
        thinking = None if asked.parsing is None else thinking_of(asked.parsing)

        def start(trace: str = "") -> AsyncGenerator[Output, None]:
            context: dict[str, Any] = {"trace": trace} if trace else {}
            if thinking is not None:
                context["thinking"] = thinking
            context |= caller.context(asked)
            counted = partial(self._metrics.request, num_choices)
            logged = partial(self._requests.request, answer.request_id, num_choices)
            outputs = [engine.generate(tokens_of(one), asked.params, **context) for one in asked.prompts]
            if len(outputs) == 1:
                seen = observed(outputs[0], counted, logged)
            else:
                seen = observed(merged([observed(one, counted) for one in outputs], num_choices), logged)
            return seen if scored is None else with_prompts(seen, scored)

        outputs = start() if self._spans is None else traced(self._spans, parent, answer.request_id, start)
        return Call(outputs, answer, asked.streaming, has_logprobs, scored)

    def _log_ignored(self, names: Sequence[str]) -> None:
        """Once per name; of a client that invents names, the first ones."""
        for name in names:
            if name not in self._names_logged and len(self._names_logged) < MAX_NAMES_LOGGED:
                self._names_logged.add(name)
                log.info("field %s of requests is not known here and is ignored", shown(name))


def token_ids_of(asked: Prepared) -> TokenIds | None:
    """Where they are asked for."""
    if not asked.streaming.token_ids:
        return None
    return TokenIds([tokens_of(one) for one in asked.prompts], asked.params.n)


def prompt_answers(asked: Prepared, token_text: Callable[[int], TokenText]) -> PromptAnswers | None:
    """Where the log-probabilities of the prompts are asked for."""
    if asked.params.prompt_logprobs is None:
        return None
    if asked.echo_ends:
        cut = zip(asked.prompts, asked.echoes, asked.echo_ends, strict=True)
        prompts = [ScoredPrompt(tokens_of(one), echo.decode(), ends_of(ends)) for one, echo, ends in cut]
    else:
        prompts = [ScoredPrompt(tokens_of(one)) for one in asked.prompts]
    num_echoed = asked.params.logprobs if asked.echo_ends else None
    return PromptAnswers(
        prompts, asked.params.n, token_text, num_echoed=num_echoed, num_listed=asked.num_listed,
        names_by_id=asked.streaming.tokens_as_ids,
    )  # fmt: skip


async def observed(
    outputs: AsyncGenerator[Output, None], *begin: Callable[[], Observer]
) -> AsyncGenerator[Output, None]:
    """The same outputs, of which observers are told. Closing it closes them.

    Args:
        begin: makes an observer, once the first output is asked for.
    """
    observers = [one() for one in begin]
    why: BaseException | None = None
    try:
        async for output in outputs:
            for observer in observers:
                observer.saw(output)
            yield output
    except BaseException as error:
        why = error
        raise
    finally:
        for observer in observers:
            observer.ended(why)
        await outputs.aclose()


async def with_prompts(outputs: AsyncGenerator[Output, None], prompts: PromptAnswers) -> AsyncGenerator[Output, None]:
    """The same outputs, each prompt's log-probabilities having been taken. Closing it closes them."""
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            if output.prompt_logprobs is not None:
                await prompts.take(output)
            yield output
