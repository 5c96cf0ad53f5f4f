"""What answers of one model are held to: where a grammar begins, as models think before they answer; forced calls."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from msi.errors import InvalidRequest
from msi.server.chat import ChatRequest
from msi.server.parsing.choice import begins_thinking, is_harmony, reasoning_syntax
from msi.server.parsing.parser import Parsing
from msi.server.parsing.readers import CHANNEL, MESSAGE, START
from msi.server.parsing.writing import calls_rules, form_of
from msi.structured_outputs import MAX_BYTES, StructuredOutputs
from msi.text.grammar_text import grammar_behind, lark_text, list_of, schema_of
from msi.text.grammars import added_tokens, written_out

ANSWER, CALLS = "@answer", "calls"
ANYTHING = "/(?s:.*)/"
MOST_THOUGHTS = 8  # of gpt-oss, before it answers
GAP = '"\\n"{0,2}'  # between a thought and a call


@dataclass(frozen=True, slots=True)
class Held:
    """What an answer is held to.

    Attributes:
        schemas: the JSON schemas that it was made of, by the field of the request that holds them.
    """

    structured: StructuredOutputs
    schemas: dict[str, Any]


class Constraints:
    """Of one model.

    Args:
        tokenizer: None for a model that has none.
        templates: of chats; they show how the model writes.
    """

    def __init__(self, tokenizer: Tokenizer | None, templates: Collection[str], vocab_size: int) -> None:
        self._special = {} if tokenizer is None else added_tokens(tokenizer, vocab_size)
        self._templates = tuple(templates)

    def plain(self, structured: StructuredOutputs, field: str) -> Held:
        """Of an answer that has to fit from its beginning. Raises InvalidRequest."""
        try:
            structured, schemas = written_out(structured, self._special)
            has_schema = structured.kind in ("json", "json_object")
            return Held(structured, {field: schema_of(structured) if has_schema else None, **schemas})
        except InvalidRequest as error:
            raise InvalidRequest(str(error), param=field) from error

    def of_chat(
        self, asked: ChatRequest, parsing: Parsing | None, reasoning_parser: str, prompt: str, field: str
    ) -> Held | None:
        """Of a chat's answer; None where it may be anything. Beside a form, a model may call its tools all the same.

        Args:
            parsing: what is looked for in it.
            prompt: its text, whose end says whether the model is thinking already.
            field: of the request, that says what the answer has to be.

        Raises:
            InvalidRequest: a tool cannot be forced, or a schema is none.
        """
        structured = None if asked.forced_tools else asked.params.structured_outputs
        if structured is None and not asked.forced_tools:
            return None
        goals, lark = [], ""
        schemas: dict[str, Any] = {}
        if structured is not None:
            held = self.plain(structured, field)
            structured, schemas = held.structured, held.schemas
            goals.append(ANSWER)
        if parsing is not None and parsing.tool_parser:
            goals.append(CALLS)
            lark, of_tools = self._calls(asked, parsing)
            schemas |= of_tools
        begin = self._begin(reasoning_parser, prompt, goals)
        if begin == f"start: {ANSWER}" and structured is not None:
            return Held(structured, schemas)
        if structured is None:
            grammar = list_of([{"lark_grammar": f"{begin}\n{lark}"}])
        else:
            grammar = grammar_behind(f"{begin}\n{lark}", structured)
        try:
            return Held(StructuredOutputs(grammar=grammar), schemas)
        except InvalidRequest as error:
            what = field if structured is not None else "tools"
            raise InvalidRequest(
                f"what {what} asks for is a grammar of {len(grammar.encode())} bytes; at most {MAX_BYTES} are allowed: "
                "send smaller schemas, or fewer tools",
                param=what,
            ) from error

    def _calls(self, asked: ChatRequest, parsing: Parsing) -> tuple[str, dict[str, Any]]:
        """Rules for calls of tools, and the tools' schemas by the fields that hold them."""
        functions = {tool["function"]["name"]: tool["function"].get("parameters") for tool in asked.tools or ()}
        tools = {name: functions[name] for name in asked.forced_tools or functions}
        form = form_of(parsing.tool_parser, self._templates, self._special)
        is_one = not asked.has_parallel_calls or asked.is_named_tool
        names = list(functions)
        schemas = {f"tools[{names.index(name)}].function.parameters": schema for name, schema in tools.items()}
        return calls_rules(form, tools, is_one=is_one, special=self._special), schemas

    def _begin(self, reasoning_parser: str, prompt: str, goals: list[str]) -> str:
        """Rules of which `start` is one of these, behind what the model thinks."""
        if is_harmony(reasoning_parser):
            return self._harmony(goals)
        syntax = reasoning_syntax(reasoning_parser)
        goal = " | ".join(goals)
        if syntax is None or prompt.rstrip().endswith(syntax.end):
            return f"start: {goal}"
        behind = f"thought ({' | '.join(f'{GAP} {one}' if one == CALLS else one for one in goals)})"
        is_thinking = begins_thinking(prompt, reasoning_parser)
        start = behind if is_thinking else f"{goal} | {self._text(syntax.start)} {behind}"
        return f"start: {start}\n{self._up_to('thought', syntax.end)}"

    def _harmony(self, goals: list[str]) -> str:
        """Messages of the analysis channel first; a call is a message, and an answer is one of the final channel."""
        final = self._text(f"{CHANNEL}final{MESSAGE}")
        goal = " | ".join(f"{final} {one}" if one == ANSWER else one for one in goals)
        return (
            f"start: thought{{0,{MOST_THOUGHTS}}} ({goal})\n"
            f"thought: {self._text(f'{CHANNEL}analysis{MESSAGE}')} said {self._text(f'{START}assistant')}\n"
            f"{self._up_to('said', '<|end|>')}"
        )

    def _up_to(self, rule: str, end: str) -> str:
        """A rule for any text, up to a marker and with it."""
        if end in self._special:
            return f"{rule}: {ANYTHING} {self._text(end)}"
        return f"{rule}[lazy]: {ANYTHING} {self._text(end)}"

    def _text(self, text: str) -> str:
        return lark_text(text, self._special)
