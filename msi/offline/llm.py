"""An engine for programs that wait: prompts in, whole answers out, in order.

    with LLM(DIR, attention_workers=2, expert_workers=2) as llm:
        for answer in llm.generate(["It is a truth", "It was a fine morning"], SamplingParams(max_tokens=16)):
            print(answer.prompt, answer.outputs[0].text)

It runs on an event loop and a thread of its own, so that it works in a notebook, too, where a loop runs already. Names
are vLLM's. Ctrl-C cancels what runs, and leaves the engine as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from msi.engine import Engine
from msi.errors import EngineError, Failure, InvalidRequest
from msi.offline.loop_thread import LoopThread
from msi.offline.outputs import Choice, RequestOutput, by_position
from msi.offline.places import Places
from msi.server.chat import parse_chat
from msi.server.chat_template import ChatTemplates
from msi.types import SamplingParams

Tokens: TypeAlias = Sequence[int]
Prompt: TypeAlias = "str | Tokens | Mapping[str, Any]"
Message: TypeAlias = Mapping[str, Any]
Conversation: TypeAlias = Sequence[Message]
AT_ONCE = 256  # choices with the engine; the others wait here, where they cost nothing
READY_WITHIN_S = 120.0  # an instance that runs elsewhere


class LLM:
    """A model on this machine, or with `address` an instance that runs elsewhere. Close it, or use it in a `with`.

    Args:
        model: Hugging Face model directory; None for the bundled demo model.
        address: of a coordinator, in place of starting an instance: tcp://HOST:PORT.
        secret: of that instance; by default that of MSI_SECRET.
        chat_template: in Jinja, in place of the model's.
        options: those of `Engine.local`.

    Raises:
        ConfigError: the options cannot work.
        TypeError: there is no such option; names the nearest.
        Unavailable: the instance did not come up.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        address: str = "",
        secret: str | None = None,
        chat_template: str = "",
        **options: Any,
    ) -> None:
        if address and (model is not None or options):
            raise TypeError("with an address the instance has its model and options already; leave them out")
        engine = Engine.connect(address, secret=secret) if address else Engine.local(model, **options)
        self._thread = LoopThread("msi-llm")
        self._close = weakref.finalize(self, _close, self._thread, engine)  # at the end of the program at the latest
        self._engine = engine
        try:
            self._thread.run(_start(engine))
            welcome = engine.welcome
            sources = {"default": chat_template} if chat_template else welcome.chat_templates
            self._templates = ChatTemplates(sources, welcome.special_tokens)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the instance that it started, if it did. Idempotent."""
        self._close()

    @property
    def engine(self) -> Engine:
        """Runs on this object's own loop: ask it what it is, and nothing that is awaited."""
        return self._engine

    # -- answers -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One output for each prompt, in their order.

        Args:
            prompts: one or several: texts, token ids, or vLLM's {"prompt": ..} and {"prompt_token_ids": ..}.
            sampling_params: for all, or one for each; None for what the model's generation_config.json says.
            use_tqdm: a bar on a terminal or in a notebook; vLLM's name.

        Raises:
            InvalidRequest: a prompt or parameters that cannot be served; says which. None of the others goes on.
            Unavailable, RequestFailed: as `Engine.generate`.
        """
        asked = [_prompt(one, at) for at, one in enumerate(_prompts(prompts))]
        return self._answers(asked, sampling_params, use_tqdm, add_special_tokens=True)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """One output for each conversation, in their order; its `prompt` is what the chat template made.

        Args:
            messages: one conversation or several, each a sequence of {"role": .., "content": ..}.

        Raises:
            InvalidRequest: the model has no chat template, or it refuses a conversation; else as `generate`.
        """
        if not self._templates:
            raise InvalidRequest("this model has no chat template; give `chat_template`, or use generate")
        common = {
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "chat_template_kwargs": None if chat_template_kwargs is None else dict(chat_template_kwargs),
        }
        texts = []
        for at, one in enumerate(_conversations(messages)):
            with _naming("conversation", at):
                texts.append(self._rendered({"messages": list(one), **common}))
        return self._answers(texts, sampling_params, use_tqdm, add_special_tokens=False)

    def _rendered(self, values: dict[str, Any]) -> str:
        """What the template makes of a conversation, in the fields of /v1/chat/completions. Raises InvalidRequest."""
        asked = parse_chat(values, max_tokens=1, no_calls="")
        return self._templates.choose(has_tools=asked.tools is not None).render(
            asked.messages,
            add_generation_prompt=asked.add_generation_prompt,
            values=asked.template_values,
            continue_final_message=asked.continue_final_message,
            tools=asked.tools,
        )

    def _answers(
        self, prompts: list[Any], params: object, has_bar: bool, *, add_special_tokens: bool
    ) -> list[RequestOutput]:
        each = _params_of(params, len(prompts))
        with _bar(len(prompts), shown=has_bar) as advance:
            return self._thread.run(
                _answer_all(self._engine, prompts, each, advance, add_special_tokens=add_special_tokens)
            )


# -- on the loop -----------------------------------------------------------------------------------------------------


async def _start(engine: Engine) -> None:
    await engine.__aenter__()
    await engine.wait_ready(READY_WITHIN_S)


def _close(thread: LoopThread, engine: Engine) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is gone already
        thread.run(engine.close())
    thread.close()


async def _answer_all(
    engine: Engine,
    prompts: Sequence[str | Tokens],
    params: Sequence[SamplingParams | None],
    advance: Callable[[], None],
    *,
    add_special_tokens: bool,
) -> list[RequestOutput]:
    found: list[RequestOutput | None] = [None] * len(prompts)
    places = Places(AT_ONCE, lambda: engine.status[0])

    async def answer(at: int) -> None:
        with _naming("prompt", at):
            asked = params[at] or engine.sampling_defaults.params()
            work = partial(_answer, engine, prompts[at], asked, add_special_tokens)
            found[at] = await places.run(asked.n, work)
        advance()

    try:
        async with asyncio.TaskGroup() as tasks:
            for at in range(len(prompts)):
                tasks.create_task(answer(at))
    except* EngineError as group:
        raise _first_of(group) from None
    return [one for one in found if one is not None]


async def _answer(
    engine: Engine, prompt: str | Tokens, params: SamplingParams, add_special_tokens: bool
) -> RequestOutput:
    encode = partial(engine.encode, prompt, add_special_tokens=add_special_tokens, params=params)
    token_ids = await asyncio.to_thread(encode)
    request_id, num_cached, scored = f"req-{uuid.uuid4().hex}", 0, None
    choices = [Choice() for _ in range(params.n)]
    async for output in engine.generate(token_ids, params, request_id=request_id):
        choices[output.index].add(output)
        num_cached = output.num_cached_tokens if output.index == 0 else num_cached
        scored = scored if output.prompt_logprobs is None else output.prompt_logprobs
    return RequestOutput(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=token_ids,
        outputs=tuple(
            one.whole(index, has_logprobs=params.logprobs is not None, token_text=engine.token_text)
            for index, one in enumerate(choices)
        ),
        num_cached_tokens=num_cached,
        prompt_logprobs=None if scored is None else by_position(token_ids, scored, engine.token_text),
    )


def _first_of(group: BaseExceptionGroup[EngineError]) -> EngineError:
    first = group.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


# -- what is given ---------------------------------------------------------------------------------------------------


def _prompts(prompts: object) -> Sequence[Any]:
    """Several, or one in a list of its own."""
    if isinstance(prompts, str | bytes | bytearray | Mapping) or not isinstance(prompts, Sequence):
        return [prompts]
    return [prompts] if prompts and all(_is_token(one) for one in prompts) else prompts


def _prompt(prompt: object, at: int) -> str | Tokens:
    """Raises InvalidRequest."""
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(prompt, str):
        return prompt
    if (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, bytes | bytearray)
        and all(_is_token(one) for one in prompt)
    ):
        return list(prompt)
    raise InvalidRequest(
        f'prompt {at} is a {type(prompt).__name__}; give a text, token ids, {{"prompt": ..}} or '
        '{"prompt_token_ids": ..}'
    )


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _conversations(messages: object) -> Sequence[Conversation]:
    """Raises InvalidRequest."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidRequest('messages: give a list of {"role": .., "content": ..}, or a list of such lists')
    several = [messages] if isinstance(messages[0], Mapping) else messages
    for at, one in enumerate(several):
        if not isinstance(one, Sequence) or isinstance(one, str):
            raise InvalidRequest(f'conversation {at}: give a list of {{"role": .., "content": ..}}')
    return several


def _params_of(params: object, count: int) -> Sequence[SamplingParams | None]:
    """Raises InvalidRequest."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        raise InvalidRequest("sampling_params: give SamplingParams, or a list with one for each prompt")
    if len(params) != count:
        raise InvalidRequest(f"{len(params)} sampling_params for {count} prompts; give one for each, or one for all")
    return params


@contextlib.contextmanager
def _naming(what: str, at: int) -> Iterator[None]:
    """Errors say which of several it was."""
    try:
        yield
    except EngineError as error:
        failure = Failure.of(error)
        named = Failure(failure.kind, f"{what} {at}: {failure.message}", failure.param, failure.code, failure.peer)
        raise named.error() from error


@contextlib.contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar, and what moves it on; from any thread."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    is_shown = shown and (console.is_terminal or console.is_jupyter or "ipykernel" in sys.modules)
    with Progress(*columns, console=console, disable=not is_shown) as progress:
        bar = progress.add_task("prompts", total=total)
        yield lambda: progress.advance(bar)
