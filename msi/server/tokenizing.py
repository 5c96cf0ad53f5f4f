"""vLLM's /tokenize and /detokenize: the fields of their bodies. Pure; knows no HTTP and no tokenizer.

What counts tokens may be longer than the context: whoever asks wants to know by how much.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from msi.errors import InvalidRequest
from msi.server.chat import ChatRequest, parse_chat
from msi.server.field_table import NOT_IN_DETOKENIZE, NOT_IN_TOKENIZE
from msi.server.fields import Values, check_fields, integer_of, kind_of, typed

MAX_TOKENS = 1 << 20  # of one answer, or one request to decode
TEXT_FIELDS = frozenset({"model", "prompt", "add_special_tokens", "return_token_strs"})
TOKEN_FIELDS = frozenset({"model", "tokens"})


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """One parsed body.

    Attributes:
        source: a text, or a chat for the template.
        add_special_tokens: whether the tokenizer puts its own around it.
        return_token_strs: whether each token's name is wanted, too.
        ignored: fields that nobody knows.
    """

    source: str | ChatRequest
    add_special_tokens: bool
    return_token_strs: bool
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DetokenizeRequest:
    """One parsed body; `ignored`: fields that nobody knows."""

    token_ids: tuple[int, ...]
    ignored: tuple[str, ...] = ()


def parse_tokenize(values: Values) -> TokenizeRequest:
    """Raises InvalidRequest: names the field."""
    names = typed(values, "return_token_strs", bool, False)
    if "messages" in values:
        if values.get("prompt") is not None:
            raise InvalidRequest("prompt and messages are two things to tokenize; give one of them", param="prompt")
        rest = {name: value for name, value in values.items() if name != "return_token_strs"}
        # tools are part of the prompt, whatever becomes of the answer; it is never sampled
        chat = parse_chat({**rest, "tool_choice": "none"}, max_tokens=1)
        return TokenizeRequest(replace(chat, ignored=()), chat.add_special_tokens, names, chat.ignored)
    ignored = check_fields(values, TEXT_FIELDS, NOT_IN_TOKENIZE)
    prompt = values.get("prompt")
    if not isinstance(prompt, str):
        raise InvalidRequest(f"prompt is {kind_of(prompt)}; give a string, or messages for a chat", param="prompt")
    return TokenizeRequest(prompt, typed(values, "add_special_tokens", bool, True), names, ignored)


def parse_detokenize(values: Values) -> DetokenizeRequest:
    """Raises InvalidRequest: names the field."""
    ignored = check_fields(values, TOKEN_FIELDS, NOT_IN_DETOKENIZE)
    tokens = values.get("tokens")
    if not isinstance(tokens, list):
        raise InvalidRequest(f"tokens is {kind_of(tokens)}; it must be an array of token ids", param="tokens")
    check_number(len(tokens), "tokens")
    return DetokenizeRequest(tuple(map(integer_of, tokens)), ignored)


def check_number(num_tokens: int, param: str) -> None:
    """Raises InvalidRequest: more tokens than one answer is about."""
    if num_tokens > MAX_TOKENS:
        raise InvalidRequest(
            f"these are {num_tokens} tokens; at most {MAX_TOKENS} are allowed in a request", param=param
        )
