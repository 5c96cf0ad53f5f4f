"""Bodies of requests to what the engine is asked: JSON, fields, chat template, tokens. Pure; knows no HTTP.

Everything here grows with what a client sent, so it runs where nobody waits for it: see `msi.server.preparers`. What
comes out is a plain value that crosses processes.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from msi.control.client_messages import Welcome
from msi.errors import EngineError, Failure, InvalidRequest, ModelNotFound, shown
from msi.net.codec import Codec
from msi.server.anthropic import request as anthropic
from msi.server.chat import NO_PARSER, ChatRequest, parse_chat
from msi.server.chat_template import ChatTemplates
from msi.server.completions import parse_completion
from msi.server.constraints import Constraints, Held
from msi.server.cutting import cut_to_fit
from msi.server.echoes import Echoes, check_size
from msi.server.fields import Streaming, Values, cache_salt, kind_of, parse_object, typed
from msi.server.parsers import ModelParsers
from msi.server.parsing.parser import Parsing
from msi.server.responses import request as responses
from msi.server.structured import field_of
from msi.server.tokenizing import check_number, parse_detokenize, parse_tokenize
from msi.server.translation import Translation
from msi.server.urgency import Urgency, urgency
from msi.text.grammar_text import grammar_text
from msi.text.grammars import GrammarChecks
from msi.text.prompts import Prompts
from msi.types import SamplingParams

log = logging.getLogger(__name__)

COMPLETION, CHAT, MESSAGE, TOKENIZE, DETOKENIZE = "completion", "chat", "message", "tokenize", "detokenize"
RESPONSE, ANTHROPIC, ANTHROPIC_COUNT = "response", "anthropic", "anthropic_count"
ENDPOINTS = (COMPLETION, CHAT, MESSAGE, TOKENIZE, DETOKENIZE, RESPONSE, ANTHROPIC, ANTHROPIC_COUNT)
MAX_PROMPT_TOKENS = 1 << 20  # of all prompts of a request


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that the engine can take.

    Attributes:
        endpoint: COMPLETION, CHAT, RESPONSE or ANTHROPIC.
        prompts: tokens of each, as 32-bit integers of this machine: read them with `tokens_of`.
        echoes: what comes before the text, for each prompt, in UTF-8.
        echo_ends: of each echo, the places in its text where the prompt's tokens end, as `prompts` are packed; () where
            its log-probabilities are not asked for.
        num_listed: see `msi.server.completions.CompletionRequest`.
        ignored: fields that nobody knows.
        parsing: what is looked for in the answers of a chat; None to tell their text as it is.
        told: what the answer repeats of the request, a JSON object.
        urgency: what the body says of it.
        cache_salt: see `msi.types.Request`.
    """

    endpoint: str
    prompts: tuple[bytes, ...]
    params: SamplingParams
    streaming: Streaming
    echoes: tuple[bytes, ...] = ()
    ignored: tuple[str, ...] = ()
    parsing: Parsing | None = None
    echo_ends: tuple[bytes, ...] = ()
    num_listed: int | None = None
    told: bytes = b"{}"
    urgency: Urgency = Urgency()
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Understood:
    """What a body asks.

    Attributes:
        request: None where it cancels one.
        client_id: the client's own id, of a WebSocket's message.
    """

    request: Prepared | None
    client_id: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    """What a body asked that needs no engine.

    Attributes:
        body: the answer, in JSON.
        ignored: fields that nobody knows.
    """

    body: bytes
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NotUnderstood:
    """Why a body asks nothing; `client_id` is None where a message has none."""

    failure: Failure
    client_id: str | None = None


@dataclass(frozen=True, slots=True)
class Setup:
    """What a `Preparation` needs; `template` is a chat template in place of the model's, "" for none."""

    welcome: Welcome
    template: str = ""


SETUP = Codec([Setup])
ANSWERS = Codec([Understood, Answered, NotUnderstood])


class Elsewhere(BaseException):
    """A body takes long to understand: that is for another process. No `Exception`, as it is no error."""


class Preparation:
    """Understands bodies for one model.

    Args:
        compiles: whether grammars are compiled here, to see that they can be; else those that are not known yet raise
            Elsewhere.

    Raises:
        ConfigError: the chat template or the tokenizer is not valid.
    """

    def __init__(self, setup: Setup, *, compiles: bool = True) -> None:
        welcome = setup.welcome
        self._welcome = welcome
        sources = {"default": setup.template} if setup.template else welcome.chat_templates
        self._templates = ChatTemplates(sources, welcome.special_tokens)
        self._prompts = Prompts.of(
            welcome.tokenizer, welcome.vocab_size, welcome.max_model_len, welcome.special_tokens.values()
        )
        self._echoes = Echoes(self._prompts)
        self._parsers = ModelParsers(welcome, sources.values(), self._prompts.special_tokens)
        self._constraints = Constraints(self._prompts.tokenizer, sources.values(), welcome.vocab_size)
        self._compiles = compiles
        self._grammars = GrammarChecks()

    def understand(self, endpoint: str, body: bytes | str) -> Understood | Answered | NotUnderstood:
        """Raises nothing but Elsewhere. Answered is what bodies for TOKENIZE, DETOKENIZE and ANTHROPIC_COUNT are."""
        client_id: str | None = None
        try:
            values: Values = parse_object(body)
            if endpoint in (TOKENIZE, DETOKENIZE):
                return self.tokens(values) if endpoint == TOKENIZE else self.text(values)
            if endpoint == RESPONSE:
                return Understood(self.translated(endpoint, responses.translated(values)))
            if endpoint == ANTHROPIC:
                return Understood(self.translated(endpoint, anthropic.translated(values)))
            if endpoint == ANTHROPIC_COUNT:
                return self.count(anthropic.translated(values, is_counted=True))
            if endpoint == MESSAGE:
                client_id, kind, values = message_of(values)
                if kind != GENERATE:
                    return Understood(None, client_id)
                endpoint = CHAT if "messages" in values else COMPLETION
            if endpoint == CHAT:
                request = self.chat(values, is_message=client_id is not None)
            else:
                request = self.completion(values)
            return Understood(request, client_id or "")
        except EngineError as error:
            if isinstance(error, InvalidMessage):
                client_id = error.client_id
            return NotUnderstood(Failure.of(error), client_id)
        except RecursionError:
            return NotUnderstood(Failure.of(InvalidRequest("the body is nested too deep")), client_id)
        except MemoryError:
            return NotUnderstood(Failure.of(InvalidRequest("the body takes too much memory to understand")), client_id)
        except Exception:
            log.exception("a body of %d bytes could not be understood", len(body))
            return NotUnderstood(Failure.of(EngineError("the server failed at this request")), client_id)

    def completion(self, values: Values) -> Prepared:
        """Raises InvalidRequest."""
        self._check_model(values)
        asked = parse_completion(values, self._welcome.sampling_defaults)
        params = self._prompts.checked(asked.params)
        if params.structured_outputs is not None:
            params = self._held(params, self._constraints.plain(params.structured_outputs, field_of(values)))
        prompts = [
            self._encode(prompt, params, add_special_tokens=asked.add_special_tokens) for prompt in asked.prompts
        ]
        if (num_tokens := sum(map(len, prompts))) > MAX_PROMPT_TOKENS:
            raise InvalidRequest(
                f"the prompts have {num_tokens} tokens together; at most {MAX_PROMPT_TOKENS} are allowed in a request",
                param="prompt",
            )
        check_size(num_tokens, params)
        echoes, echo_ends = self._echoes.of(asked, prompts) if asked.echo else ((b"",) * len(prompts), ())
        prepared = self._prepared(COMPLETION, prompts, params, asked.streaming, echoes, asked.ignored)
        return replace(
            prepared, echo_ends=echo_ends, num_listed=asked.num_listed, urgency=urgency(values),
            cache_salt=cache_salt(values),
        )  # fmt: skip

    def chat(self, values: Values, *, is_message: bool = False) -> Prepared:
        """Raises InvalidRequest.

        Args:
            is_message: the text is told as it is, whatever stands in it, unless it may call tools.
        """
        self._check_model(values)
        asked = parse_chat(
            values,
            max_tokens=self._welcome.max_model_len,
            defaults=self._welcome.sampling_defaults,
            no_calls="" if self._parsers.tool_parser else NO_PARSER,
        )
        text = self._rendered(asked)
        params = self._prompts.checked(asked.params)
        # the template writes special tokens itself
        try:
            prompt = self._encode(text, params, add_special_tokens=asked.add_special_tokens)
        except InvalidRequest as error:
            raise InvalidRequest(str(error), param="messages", code=error.code) from error
        parsing = None if is_message and not asked.calls_tools else self._parsers.parsing(asked, text)
        if parsing is not None:
            params = self._parsers.params(params, parsing)
        reasoning_parser = self._parsers.reasoning_parser
        held = self._constraints.of_chat(asked, parsing, reasoning_parser, text, field_of(values))
        params = params if held is None else self._held(params, held)
        check_size(len(prompt), params)
        prepared = self._prepared(CHAT, [prompt], params, asked.streaming, (b"",), asked.ignored)
        return replace(
            prepared, parsing=parsing, num_listed=params.prompt_logprobs, urgency=urgency(values),
            cache_salt=cache_salt(values),
        )  # fmt: skip

    def translated(self, endpoint: str, asked: Translation) -> Prepared:
        """A chat that another API asked for. Raises InvalidRequest."""
        try:
            request = cut_to_fit(asked.chat, self.chat) if asked.is_cut_to_fit else self.chat(asked.chat)
        except InvalidRequest as error:
            raise asked.renamed(error) from error
        return replace(request, endpoint=endpoint, told=orjson.dumps(asked.told), ignored=asked.ignored)

    def count(self, asked: Translation) -> Answered:
        """The tokens of a prompt, as Anthropic's API has them. Raises InvalidRequest."""
        self._check_model(asked.chat)
        try:
            chat = parse_chat({**asked.chat, "tool_choice": "none"}, max_tokens=1)
            num_tokens = len(self._prompts.tokens_of(self._rendered(chat), add_special_tokens=chat.add_special_tokens))
        except InvalidRequest as error:
            raise asked.renamed(error) from error
        return _answered({"input_tokens": num_tokens}, asked.ignored)

    def tokens(self, values: Values) -> Answered:
        """What /tokenize answers. Raises InvalidRequest."""
        self._check_model(values)
        asked = parse_tokenize(values)
        is_text = isinstance(asked.source, str)
        text = asked.source if isinstance(asked.source, str) else self._rendered(asked.source)
        token_ids = self._prompts.tokens_of(text, add_special_tokens=asked.add_special_tokens)
        check_number(len(token_ids), "prompt" if is_text else "messages")
        names = self._prompts.names_of(token_ids) if asked.return_token_strs else None
        return _answered(
            {"count": len(token_ids), "max_model_len": self._welcome.max_model_len, "tokens": token_ids,
             "token_strs": names}, asked.ignored,
        )  # fmt: skip

    def text(self, values: Values) -> Answered:
        """What /detokenize answers. Raises InvalidRequest."""
        self._check_model(values)
        asked = parse_detokenize(values)
        self._prompts.check_tokens("tokens", asked.token_ids)
        return _answered({"prompt": self._prompts.decode(asked.token_ids)}, asked.ignored)

    def _rendered(self, asked: ChatRequest) -> str:
        """Raises InvalidRequest."""
        if not self._templates:
            raise InvalidRequest("this model has no chat template; use /v1/completions, or serve with `chat_template`")
        return self._templates.choose(has_tools=asked.tools is not None).render(
            asked.messages,
            add_generation_prompt=asked.add_generation_prompt,
            values=asked.template_values,
            continue_final_message=asked.continue_final_message,
            tools=asked.tools,
            documents=asked.documents,
        )

    def _encode(
        self, prompt: str | Sequence[int], params: SamplingParams, *, add_special_tokens: bool
    ) -> tuple[int, ...]:
        return self._prompts.encode(
            prompt,
            add_special_tokens=add_special_tokens,
            max_tokens=params.max_tokens,
            truncate=params.truncate_prompt_tokens,
        )

    def _held(self, params: SamplingParams, held: Held) -> SamplingParams:
        """With what the answer is held to. Raises InvalidRequest: that cannot be compiled; says where."""
        grammar = grammar_text(held.structured)
        if not self._grammars.knows(grammar):
            if not self._compiles:
                raise Elsewhere
            self._grammars.check(grammar, held.schemas)
        return replace(params, structured_outputs=held.structured)

    def remember(self, params: SamplingParams) -> None:
        """What another process found to be good need not be compiled again."""
        if params.structured_outputs is not None:
            self._grammars.remember(grammar_text(params.structured_outputs))

    def _prepared(
        self,
        endpoint: str,
        prompts: Sequence[tuple[int, ...]],
        params: SamplingParams,
        streaming: Streaming,
        echoes: tuple[bytes, ...],
        ignored: tuple[str, ...],
    ) -> Prepared:
        packed = tuple(array("i", prompt).tobytes() for prompt in prompts)
        return Prepared(endpoint, packed, params, streaming, echoes, ignored)

    def _check_model(self, values: Values) -> None:
        model = typed(values, "model", str, "")
        if model and model != self._welcome.model_name:
            raise ModelNotFound(
                f"model {shown(model)} is not served here; this is {self._welcome.model_name!r}",
                param="model",
            )


def _answered(values: dict[str, Any], ignored: tuple[str, ...]) -> Answered:
    return Answered(orjson.dumps(values), ignored)


def tokens_of(prompt: bytes) -> tuple[int, ...]:
    """Of one of `Prepared.prompts`."""
    tokens = array("i")
    tokens.frombytes(prompt)
    return tuple(tokens)


# -- messages of a WebSocket -----------------------------------------------------------------------------------------

GENERATE, CANCEL = "generate", "cancel"
MAX_ID_CHARS = 256
NOT_IN_MESSAGES = ("stream", "stream_options", "echo")


class InvalidMessage(InvalidRequest):
    """A message with an id that asks for nothing."""

    def __init__(self, message: str, client_id: str, *, param: str) -> None:
        super().__init__(message, param=param)
        self.client_id = client_id


def message_of(values: Values) -> tuple[str, str, Values]:
    """(id, GENERATE or CANCEL, the fields that are the endpoint's). Raises InvalidRequest."""
    client_id, kind = values.get("id"), values.get("type")
    if not isinstance(client_id, str) or not 0 < len(client_id) <= MAX_ID_CHARS:
        what = kind_of(client_id) if not isinstance(client_id, str) else f"{len(client_id)} characters long"
        raise InvalidRequest(f"id is {what}; it must be a string of 1 to {MAX_ID_CHARS} characters", param="id")
    if kind not in (GENERATE, CANCEL):
        raise InvalidMessage(f'type is {shown(kind)}; it must be "generate" or "cancel"', client_id, param="type")
    for name in NOT_IN_MESSAGES:
        if values.get(name):
            sentence = f"{name} is not a field of WebSocket requests, which always stream"
            raise InvalidMessage(sentence, client_id, param=name)
    fields = {name: value for name, value in values.items() if name not in ("type", "id")}
    return client_id, kind, fields | {"stream": True}
