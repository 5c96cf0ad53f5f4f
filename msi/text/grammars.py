"""Grammars that answers are held to, by llguidance: whether they can be compiled, and how far an answer has come.

The library is optional, loaded when it is first needed, and touched here alone. It lets other threads run while it
works, and its own limits bound its time and memory.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from msi.errors import InvalidRequest
from msi.structured_outputs import StructuredOutputs
from msi.text.grammar_text import grammar_text, has_free_rules, is_list, list_of, schema_of, unforced, with_spaces
from msi.text.structural_tags import tag_grammar

MAX_REMEMBERED = 64  # grammars, compiled or checked
MAX_LEXER_STATES = 20_000  # 40 MB at most, for each answer
# Of one token, about 15 ms at most: others wait for it. A schema's grammar has a row for all its optional properties.
STEP_LIMITS = {"step_max_items": 20_000, "step_lexer_fuel": 100_000}
MAX_ROW_ITEMS = 2000
MAX_FREE_ROW_ITEMS = 500  # where a client wrote the rules, which may mean one text in many ways
LOOKS_WITHIN_S = 1.0  # for where a schema goes wrong
MAX_LOOKS = 256
MAX_COMPLAINT_CHARS = 300
NO_EXTENSION = "NoExtensionBias"  # the library's word for it
NO_TEXT = "no text is one of it; does a rule or a `$ref` lead to itself and to nothing else?"
ONE_OF = ("Enable 'coerce_one_of' option to approximate oneOf with anyOf", "Write anyOf where more than one may hold")
NOT_ALLOWED = "satisfy the grammar"  # of a token, as the library says it
WHERE = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # schemas by name
WHERE_LISTED = ("prefixItems", "anyOf", "oneOf", "allOf", "items")
WHERE_SINGLE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")


def library() -> Any:
    """llguidance. Raises InvalidRequest: it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise InvalidRequest(
            "answers held to a grammar or a schema need the package llguidance, which this server lacks; install it "
            "there with `pip install 'msi[grammar]'`"
        ) from error
    return llguidance


class GrammarError(Exception):
    """An answer is no beginning of what its grammar allows; says why."""


class GrammarTooComplex(InvalidRequest):
    """A grammar takes more than its limits in the middle of an answer."""


# -- whether a grammar can be compiled -------------------------------------------------------------------------------


class GrammarChecks:
    """Remembers what was checked. For one thread."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, None] = OrderedDict()

    def knows(self, grammar: str) -> bool:
        """Whether it has been checked, and is good."""
        return grammar in self._known

    def remember(self, grammar: str) -> None:
        self._known[grammar] = None
        self._known.move_to_end(grammar)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)

    def check(self, grammar: str, schemas: Mapping[str, Any]) -> None:
        """Raises InvalidRequest: it cannot be compiled; says where of a schema.

        Args:
            grammar: as `msi.text.grammar_text` writes them.
            schemas: the JSON schemas that it was made of, by the field of the request that holds them.
        """
        if self.knows(grammar):
            return
        if complaint := why_not(grammar):
            for name, schema in schemas.items():
                if found := fault_of(schema):
                    where, why = found
                    raise InvalidRequest(f"the JSON schema in {name} cannot be compiled at {where}: {why}", param=name)
            name = next(iter(schemas), "structured_outputs")
            raise InvalidRequest(f"the grammar cannot be compiled: {complaint}", param=name)
        for name, schema in schemas.items():
            alone = list_of([{"json_schema": with_spaces(schema)}]) if isinstance(schema, Mapping) else grammar
            if complaint := why_not_begun(alone):
                what = "the JSON schema" if isinstance(schema, Mapping) else "the grammar"
                raise InvalidRequest(f"{what} in {name} cannot be held to: {complaint}", param=name)
        self.remember(grammar)


def why_not(grammar: str) -> str:
    """Why a grammar cannot be compiled, on one line; "" where it can. Raises InvalidRequest: there is no library."""
    guidance = library()
    try:
        is_error, messages = guidance.LLMatcher.validate_grammar_with_warnings(
            grammar, limits=_limits(guidance, grammar)
        )
    except BaseException as error:
        if not _is_the_librarys(error):
            raise
        return _short(error)
    return _short(messages[0]) if is_error else ""


def why_not_begun(grammar: str) -> str:
    """Why an answer cannot even begin in a grammar that can be compiled, on one line; "" where it can.

    Tried with bytes as tokens, which every model's tokens are made of; what names special tokens is not tried.
    """
    guidance = library()
    try:
        tokens = guidance.LLTokenizer("byte")
        matcher = guidance.LLMatcher(tokens, grammar, log_level=0, limits=_limits(guidance, grammar))
        if matcher.get_error():
            return ""  # it needs the model's own tokens
        return _short(first_steps(matcher, tokens))
    except BaseException as error:
        if not _is_the_librarys(error):
            raise
        return _short(error)


def first_steps(matcher: Any, tokens: Any) -> str:
    """What goes wrong at the beginning of an answer, as where an object has too many optional properties."""
    matcher.compute_bitmask()
    if not matcher.is_error():
        matcher.try_consume_tokens(tokens.tokenize_str("{"))
        matcher.compute_bitmask()
    error = str(matcher.get_error())
    return NO_TEXT if error.startswith(NO_EXTENSION) else error


def fault_of(schema: Any) -> tuple[str, str] | None:
    """(where, why) a JSON schema cannot be compiled; None where it can. `where` is a JSON pointer behind "#".

    The innermost schema with the same complaint is taken to be the cause.
    """
    why = _complaint(schema) if isinstance(schema, dict) else ""
    if not why:
        return None
    names = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    deadline, looks = time.monotonic() + LOOKS_WITHIN_S, MAX_LOOKS
    where, current = "#", schema
    while True:
        for pointer, inner in _schemas_in(current):
            looks -= 1
            if looks < 0 or time.monotonic() > deadline:
                return where, why
            if _complaint({**names, **inner}) == why:
                where, current = where + pointer, inner
                break
        else:
            return where, why


def _complaint(schema: Mapping[str, Any]) -> str:
    return why_not(list_of([{"json_schema": with_spaces(schema)}]))


def _schemas_in(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas right inside one."""
    for name in WHERE:
        if isinstance(named := schema.get(name), dict):
            for key, inner in named.items():
                if isinstance(inner, dict):
                    yield f"/{name}/{key.replace('~', '~0').replace('/', '~1')}", inner
    for name in WHERE_LISTED:
        if isinstance(listed := schema.get(name), list):
            for at, inner in enumerate(listed):
                if isinstance(inner, dict):
                    yield f"/{name}/{at}", inner
    for name in WHERE_SINGLE:
        if isinstance(inner := schema.get(name), dict):
            yield f"/{name}", inner


def written_out(
    asked: StructuredOutputs, special: Mapping[str, int]
) -> tuple[StructuredOutputs, dict[str, Mapping[str, Any]]]:
    """With a grammar in GBNF ("root ::= ...") or a structural tag in Lark's syntax, and JSON schemas in that.

    Args:
        special: ids of the tokenizer's added tokens, by their texts.

    Raises:
        InvalidRequest: it is none.
    """
    if asked.structural_tag:
        grammar, schemas = tag_grammar(asked.structural_tag, special, in_lark)
        return replace(asked, structural_tag="", grammar=grammar), schemas
    if not asked.grammar or is_list(asked.grammar):
        return asked, {}
    return replace(asked, grammar=in_lark(asked.grammar)), {}


def in_lark(grammar: str) -> str:
    """A grammar that may be in GBNF. Raises InvalidRequest."""
    if "::=" not in grammar:
        return grammar
    library()
    try:
        from llguidance.gbnf_to_lark import any_to_lark

        return str(any_to_lark(grammar))
    except Exception as error:  # it is a parser, which fails in all ways that parsers do
        raise InvalidRequest(f"the grammar cannot be read: {_short(error)}", param="structured_outputs") from error


def _limits(guidance: Any, grammar: str) -> Any:
    most = MAX_FREE_ROW_ITEMS if has_free_rules(grammar) else MAX_ROW_ITEMS
    return guidance.LLParserLimits(
        max_lexer_states=MAX_LEXER_STATES, max_items_in_row=most, verbose_errors=False, **STEP_LIMITS
    )


def _is_the_librarys(error: BaseException) -> bool:
    """Its panics are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _short(error: object) -> str:
    text = " ".join(str(error).split()).replace(*ONE_OF)
    return text if len(text) <= MAX_COMPLAINT_CHARS else text[: MAX_COMPLAINT_CHARS - 3] + "..."


# -- an answer in a grammar ------------------------------------------------------------------------------------------


class Grammars:
    """Compiles grammars for the tokens of one model; slow, for any thread, one at a time.

    Args:
        tokenizer: gives the text of tokenizer.json, "" where there is none.
        vocab_size: of the logits.
        eos_token_ids: tokens with which an answer may end.
    """

    def __init__(self, tokenizer: Callable[[], str], vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._read_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._tokenizer: Any = None
        self._special: dict[str, int] = {}  # ids of added tokens, by their texts
        self._added: list[str] = []  # texts of its added tokens, as a grammar has them, without backslashes
        self._compiled: OrderedDict[StructuredOutputs, Any] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, asked: StructuredOutputs) -> GrammarState:
        """An answer that has not begun. Raises InvalidRequest: the grammar cannot be compiled."""
        with self._lock:
            matcher = self._compiled.get(asked)
            if matcher is None:
                matcher = self._compiled[asked] = self._compile(asked)
                while len(self._compiled) > MAX_REMEMBERED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(asked)
            return GrammarState(matcher.deep_copy(), self._eos_token_ids)

    def _compile(self, asked: StructuredOutputs) -> Any:
        guidance = library()
        try:
            if self._tokenizer is None:
                self._tokenizer = self._load(guidance)
            grammar = grammar_text(written_out(asked, self._special)[0])
            if self._names_added_token(grammar):
                grammar = unforced(grammar)
            matcher = guidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=_limits(guidance, grammar))
            complaint = matcher.get_error() or first_steps(matcher.deep_copy(), self._tokenizer)
        except BaseException as error:
            if not _is_the_librarys(error) or isinstance(error, InvalidRequest):
                raise
            complaint = str(error)
        if complaint:
            found = fault_of(schema_of(asked)) if asked.json else None
            what = "the grammar" if found is None else f"the JSON schema at {found[0]}"
            complaint = complaint if found is None else found[1]
            raise InvalidRequest(f"{what} cannot be compiled: {_short(complaint)}", param="structured_outputs")
        return matcher

    def _names_added_token(self, grammar: str) -> bool:
        """Whether a tokenizer would take a part of its text for an added token, which is no text to llguidance."""
        plain = grammar.replace("\\", "")
        return any(text in plain for text in self._added)

    def _load(self, guidance: Any) -> Any:
        text = self._read_tokenizer()
        if not text:
            raise InvalidRequest(
                "answers held to a grammar need a tokenizer.json, which this model lacks", param="structured_outputs"
            )
        eos = list(self._eos_token_ids) or None
        tokenizer = Tokenizer.from_str(text)
        num_tokens = tokenizer.get_vocab_size()  # of which the model may have fewer
        self._special = added_tokens(tokenizer, self._vocab_size)
        texts = (one.content for one in tokenizer.get_added_tokens_decoder().values())
        self._added = [json.dumps(text)[1:-1].replace("\\", "") for text in texts if text]
        decoder: bytes = b"" if tokenizer.decoder is None else tokenizer.decoder.__getstate__()
        try:
            if b'"ByteLevel"' not in decoder and (b'"ByteFallback"' not in decoder or b'"Metaspace"' in decoder):
                raise ValueError("it decodes neither as byte-level vocabularies do nor as Llama's")
            num_vocab = max(self._vocab_size, num_tokens)
            return guidance.LLTokenizer(_without_prefix(text), n_vocab=num_vocab, eos_token=eos)
        except BaseException as error:
            if not _is_the_librarys(error):
                raise
            raise InvalidRequest(
                f"answers of this model cannot be held to a grammar, as its tokenizer is not supported: "
                f"{_short(error)}",
                param="structured_outputs",
            ) from error


def added_tokens(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int]:
    """Ids by texts: llguidance takes no added token for text, be it special or not."""
    return {one.content: at for at, one in tokenizer.get_added_tokens_decoder().items() if at < vocab_size}


def _without_prefix(tokenizer: str) -> str:
    """A tokenizer.json that puts no space before a text: llguidance has it encode parts of answers."""
    values = json.loads(tokenizer)
    step = values.get("pre_tokenizer") or {}
    for one in step.get("pretokenizers") or [step]:
        if one.get("type") == "ByteLevel":
            one["add_prefix_space"] = False
        elif one.get("type") == "Metaspace":
            one["prepend_scheme"] = "never"
    return json.dumps(values)


class GrammarState:
    """How far one answer has come. For one thread at a time.

    It follows from the answer's tokens alone: whatever became of a pass, what counts is what it is told next.
    """

    def __init__(self, matcher: Any, eos_token_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids
        self._tokens: list[int] = []  # those that the matcher has seen

    def allowed(self, token_ids: Sequence[int]) -> bytes:
        """A bit for each token that may follow these, the lowest of each byte first.

        Raises:
            GrammarError: they are no beginning of what the grammar allows.
            GrammarTooComplex: it is.
        """
        try:
            self._go_to(token_ids)
            mask = bytes(self._matcher.compute_bitmask())
            self._check()
        except BaseException as error:
            if not _is_the_librarys(error) or isinstance(error, (GrammarError, GrammarTooComplex)):
                raise
            raise GrammarError(_short(error)) from error
        return mask

    def ends_with(self, token_id: int) -> bool:
        """Whether nothing may follow this one, which follows those that `allowed` was asked about last.

        Raises:
            GrammarError: it was not allowed.
            GrammarTooComplex: the grammar is.
        """
        if token_id in self._eos_token_ids:
            return False  # it is an end by itself
        try:
            self._take(token_id)
        except BaseException as error:
            if not _is_the_librarys(error) or isinstance(error, (GrammarError, GrammarTooComplex)):
                raise
            raise GrammarError(_short(error)) from error
        return bool(self._matcher.is_stopped())

    def _go_to(self, token_ids: Sequence[int]) -> None:
        seen = self._tokens
        if seen != list(token_ids[: len(seen)]):
            self._matcher.reset()
            seen.clear()
        for token_id in token_ids[len(seen) :]:
            self._take(token_id)

    def _take(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()
        self._tokens.append(token_id)

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        why = _short(self._matcher.get_error())
        if NOT_ALLOWED in why:
            raise GrammarError(why)
        if why.startswith(NO_EXTENSION):
            raise GrammarTooComplex(
                f"the answer cannot go on in its grammar behind {len(self._tokens)} tokens of it: {NO_TEXT}",
                code="no_token_allowed",
            )
        raise GrammarTooComplex(
            f"the answer cannot go on in its grammar, which is too complex behind {len(self._tokens)} tokens of it: "
            f"{why}; ask for a simpler one, in which a text has one meaning",
            code="grammar_too_complex",
        )
