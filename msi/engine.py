"""The engine: text or tokens in, text and tokens out, from an instance it starts or one that runs elsewhere.

    async with Engine.local(model=DIR, attention_workers=2, expert_workers=2) as engine:
        async for output in engine.generate("It is a truth", SamplingParams(max_tokens=16)):
            print(output.text, end="")

Tokenising, detokenising and stop strings happen here, in the process that asks; the gateway stands on this too.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from msi import tracing
from msi.control.client import CoordinatorClient
from msi.control.client_messages import Stats, Welcome
from msi.control.following import way_to
from msi.control.messages import CLIENT_END
from msi.errors import EngineError, Failure, InvalidRequest, Unavailable
from msi.instance.inproc import InprocInstance
from msi.instance.instance import LocalInstance, new_trace_dir
from msi.instance.processes import HttpServer, ProcessInstance
from msi.net.secret import Secret, find_secret
from msi.options import InstanceOptions, with_plan
from msi.sampling import choices_of
from msi.sampling_params import SamplingDefaults
from msi.scored_prompts import gathered
from msi.text.prompts import Prompts
from msi.text.stop_strings import Thinking
from msi.text.text_stream import text_streams
from msi.text.vocabulary import Vocabulary
from msi.types import Output, Request, SamplingParams, TokenText

log = logging.getLogger(__name__)

MAX_CHARS_HERE = 4096  # longer texts are tokenised in a thread


class Engine:
    """Use `Engine.local` or `Engine.connect`, as an async context manager. One per event loop."""

    def __init__(
        self,
        *,
        address: str = "",
        secret: Secret | None = None,
        options: InstanceOptions | None = None,
        report: Callable[[str], None] = lambda sentence: None,
        process_flags: dict[str, tuple[str, ...]] | None = None,
        http: HttpServer | None = None,
    ) -> None:
        self._address = address
        self._secret = secret
        self._options = options
        self._report = report
        self._process_flags = process_flags or {}
        self._http = http
        self._instance: LocalInstance | None = None
        self._client: CoordinatorClient | None = None
        self._failure: EngineError | None = None
        self._failed = asyncio.Event()
        self._trace_dir: Path | None = None
        self._prompts: Prompts | None = None
        self._vocabulary: Vocabulary | None = None
        self._welcome: Welcome | None = None

    @staticmethod
    def local(
        model: str | Path | None = None, *, report: Callable[[str], None] | None = None, **options: Any
    ) -> Engine:
        """An instance on this machine, started and ended with the context.

        Args:
            model: Hugging Face model directory; None for the bundled demo model.
            report: told what start-up waits for, in sentences.
            options: the parameters of `msi.options.InstanceOptions` and of its sections.

        Raises:
            ConfigError: the options cannot work. Entering the context may raise it too, and Unavailable.
            TypeError: there is no such option; names the nearest.
        """
        given = with_plan(options if model is None else {**options, "model": model})
        return Engine(options=InstanceOptions.of(**given), report=report or (lambda sentence: None))

    @staticmethod
    def connect(address: str, *, secret: str | None = None) -> Engine:
        """An instance that runs elsewhere, by its coordinator's address: tcp://HOST:PORT, or ipc://PATH; several, with
        commas between them, where one coordinator stands by for another.

        Args:
            secret: the instance's; by default that of the environment variable MSI_SECRET, if there is one.

        Raises:
            ConfigError: the secret cannot be one. Entering the context raises it where it is not the instance's.
        """
        return Engine(address=address, secret=find_secret(None) if secret is None else Secret(secret, "secret"))

    # -- life --------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Engine:
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _start(self) -> None:
        options = self._options
        if options is not None:
            if options.trace is not None:
                self._trace_dir = new_trace_dir()
            if options.chosen_transport == "inproc":
                self._instance = InprocInstance(options, self.fail, self._trace_dir)
            else:
                self._instance = ProcessInstance(
                    options, self.fail, trace_dir=self._trace_dir, http=self._http, **self._process_flags
                )
            control = await self._instance.start()
        else:
            control = way_to(self._address, CLIENT_END, self._secret)
        self._address = control.address
        self._client = CoordinatorClient(control)
        self._welcome = await self._client.start()
        welcome = self._welcome
        self._prompts = Prompts.of(
            welcome.tokenizer, welcome.vocab_size, welcome.max_model_len, welcome.special_tokens.values()
        )
        if (tokenizer := self._prompts.tokenizer) is not None:
            self._vocabulary = Vocabulary(tokenizer)
        if options is not None:
            await self.wait_ready(options.timeouts.start_timeout_s)

    async def wait_ready(self, timeout_s: float) -> None:
        """Until requests are taken; a local instance is when its context is entered.

        Raises:
            Unavailable: it will never be, or not within `timeout_s`; says what is waited for.
        """
        assert self._client is not None
        deadline = time.monotonic() + timeout_s + 5  # the coordinator gives up first, and says why
        failed = asyncio.ensure_future(self._failed.wait())
        try:
            status = self._client.status
            while not status.is_ready:
                self._report(status.sentence)
                change = asyncio.ensure_future(self._client.wait_status(status))
                left_s = max(0.0, deadline - time.monotonic())
                done, _ = await asyncio.wait({change, failed}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if change not in done:
                    change.cancel()
                    raise self._failure or Unavailable(f"gave up after {timeout_s:g} s: {status.sentence}")
                status = change.result()
                if status.failure:
                    raise Unavailable(status.failure)
        finally:
            failed.cancel()

    def fail(self, error: EngineError) -> None:
        """The instance cannot go on: what runs ends with this error, and so does what comes."""
        self._failure = self._failure or error
        self._failed.set()
        if self._client is not None:
            self._client.fail(error)

    async def wait_failed(self) -> EngineError:
        """Until the local instance cannot go on; why."""
        await self._failed.wait()
        assert self._failure is not None
        return self._failure

    async def drain(self) -> None:
        """Takes no new requests, for good; returns once those that run have ended, or `ProcessInstance` gives them up.

        What is not a local instance of processes of its own is left alone.
        """
        if isinstance(self._instance, ProcessInstance):
            await self._instance.drain()

    async def close(self) -> None:
        """Ends what was started. Requests in flight end with Unavailable. Idempotent."""
        if self._client is not None:
            await self._client.close()
            self._client = None
        if self._instance is not None:
            await self._instance.stop()
            self._instance = None
        if self._trace_dir is not None:
            assert self._options is not None
            assert self._options.trace is not None
            count = tracing.merge(self._trace_dir, self._options.trace)
            shutil.rmtree(self._trace_dir)
            self._trace_dir = None
            log.info("%d trace events are in %s; open it with ui.perfetto.dev", count, self._options.trace)

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """The coordinator's."""
        return self._address

    @property
    def pids(self) -> dict[str, int]:
        """Child processes by name; empty for an instance that runs elsewhere or in this process."""
        return self._instance.pids if isinstance(self._instance, ProcessInstance) else {}

    @property
    def url(self) -> str:
        """Where a local instance serves HTTP; "" where it does not."""
        return self._instance.url if isinstance(self._instance, ProcessInstance) else ""

    @property
    def welcome(self) -> Welcome:
        """What the coordinator told of the model."""
        return self._require_welcome()

    @property
    def model_name(self) -> str:
        return self._require_welcome().model_name

    @property
    def max_model_len(self) -> int:
        """The longest sequence, prompt included."""
        return self._require_welcome().max_model_len

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """What the model says of parameters that a request leaves out."""
        return self._require_welcome().sampling_defaults

    @property
    def status(self) -> tuple[bool, str]:
        """Whether requests are taken now, and a sentence that says what is waited for if not."""
        if self._failure is not None:
            return False, str(self._failure)
        if self._client is None:
            return False, "the engine is closed"
        return self._client.status.is_ready, self._client.status.sentence

    @property
    def failure(self) -> str:
        """Why the instance will never be ready; "" while it may."""
        if self._failure is not None:
            return str(self._failure)
        return "" if self._client is None else self._client.status.failure

    async def stats(self) -> Stats:
        """Everything countable in the instance. Raises Unavailable."""
        return await self._require_client().stats()

    async def watched_stats(self) -> Stats:
        """The same, and `msi.control.watched`, which workers tell as long as it is asked for. Raises Unavailable."""
        return await self._require_client().stats(is_watching=True)

    # -- requests ----------------------------------------------------------------------------------------------------

    def encode(
        self, prompt: str | Sequence[int], *, add_special_tokens: bool = True, params: SamplingParams | None = None
    ) -> tuple[int, ...]:
        """A prompt's tokens; with those that the tokenizer puts around a text. Raises InvalidRequest.

        Args:
            params: of its request: how much room they leave for a prompt, and what of it they cut off.
        """
        return self._require_prompts().encode(
            prompt,
            add_special_tokens=add_special_tokens,
            max_tokens=1 if params is None else params.max_tokens,
            truncate=None if params is None else params.truncate_prompt_tokens,
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included; "" for a model without tokenizer."""
        return self._require_prompts().decode(token_ids)

    def token_text(self, token_id: int) -> TokenText:
        """What a token would add to a text; a special token by its name."""
        return TokenText("", b"") if self._vocabulary is None else self._vocabulary.text_of(token_id)

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
        trace: str = "",
        thinking: Thinking | None = None,
        priority: int = 0,
        timeout_s: float = 0.0,
        flow: str = "",
        cache_salt: str = "",
    ) -> AsyncGenerator[Output, None]:
        """Generates, yielding what is new as it comes; the last output of each choice has a finish_reason.

        Leaving the iteration early, or being cancelled, cancels the request.

        Args:
            prompt: text, or token ids.
            params: None for what the model's generation_config.json says.
            trace: a traceparent that the instance's spans of it belong to, where it sends spans.
            thinking: how the model marks what it thinks, where stop strings do not count.
            priority: lower is earlier, and is not preempted for what is higher.
            timeout_s: the whole answer has to come in that time; 0 for none.
            flow: who asks; flows share the instance evenly. "" for this engine.
            cache_salt: only requests with the same one find each other's prefixes in the cache.

        Raises:
            InvalidRequest: the prompt or the parameters cannot be served.
            Unavailable: nothing can take it now; Overloaded where it would come too late (see `ttft_slo`).
            DeadlineExceeded: `timeout_s` were over.
            RequestFailed: it was lost on the way; names the worker.
        """
        _check_params(params)
        params = params or self.sampling_defaults.params()
        client = self._require_client()
        prompts = self._require_prompts()
        params = prompts.checked(params)
        encode = partial(prompts.encode, max_tokens=params.max_tokens, truncate=params.truncate_prompt_tokens)
        if isinstance(prompt, str) and len(prompt) > MAX_CHARS_HERE:
            token_ids = await asyncio.to_thread(encode, prompt)
        else:
            token_ids = encode(prompt)
        request_id = request_id or f"req-{uuid.uuid4().hex}"
        seed = secrets.randbits(63) if params.seed is None else params.seed
        names = [request_id if params.n == 1 else f"{request_id}-{index}" for index in range(params.n)]
        choices = choices_of(params, seed, self.max_model_len - len(token_ids))
        texts = text_streams(self._vocabulary, token_ids, params, thinking)
        num_cached = [0] * params.n
        requests = [
            Request(
                name, token_ids, one, trace, priority=priority, timeout_s=timeout_s, flow=flow, cache_salt=cache_salt
            )
            for name, one in zip(names, choices, strict=True)
        ]
        updates = client.generate(requests)
        if params.prompt_logprobs is not None:
            updates = gathered(updates, names[0])
        try:
            async for update in updates:
                index = names.index(update.request_id)
                text, reason = texts[index], update.finish_reason
                num_cached[index] += update.num_cached_tokens
                new = text.push(
                    update.token_ids, update.logprobs, is_last=reason is not None,
                    is_ended_by_token=reason == "stop" and not update.keeps_last,
                )  # fmt: skip
                if text.is_stopped:
                    reason = "stop"
                    client.cancel(update.request_id)
                yield Output(
                    request_id, new.text, update.token_ids, reason, len(token_ids), index, new.logprobs,
                    num_cached[index], new.token_texts, update.queued_s, update.prompt_logprobs, text.stopped_by,
                )  # fmt: skip
        finally:
            await updates.aclose()

    def _require_client(self) -> CoordinatorClient:
        if self._failure is not None:
            raise Failure.of(self._failure).error()
        if self._client is None:
            raise Unavailable("the engine is closed; use it inside `async with`")
        return self._client

    def _require_prompts(self) -> Prompts:
        if self._prompts is None:
            raise Unavailable("the engine has not started; use it inside `async with`")
        return self._prompts

    def _require_welcome(self) -> Welcome:
        if self._welcome is None:
            raise Unavailable("the engine has not started; use it inside `async with`")
        return self._welcome


def _check_params(params: object) -> None:
    """Raises InvalidRequest: they are none."""
    if params is not None and not isinstance(params, SamplingParams):
        raise InvalidRequest(
            f"params is of the type {type(params).__name__}; give SamplingParams, or None", param="params"
        )
