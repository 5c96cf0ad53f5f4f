"""One answer's parser: pieces of text in; reasoning, text, and calls of tools out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import orjson

from msi.server.parsing.choice import ReasoningSyntax, is_harmony, reasoning_syntax, tool_syntax
from msi.server.parsing.deltas import Arguments, Call, CallBegun, Content, Delta, Found
from msi.server.parsing.readers import FINAL, read_calls, read_harmony, read_thinking
from msi.server.parsing.source import Machine
from msi.server.parsing.syntaxes import SYNTAXES, Syntax
from msi.server.parsing.tools import Tools
from msi.text.stop_strings import Thinking


@dataclass(frozen=True, slots=True)
class Parsing:
    """What is looked for in the answers of one request; a plain value that crosses processes.

    Attributes:
        tool_parser: name of the calls' syntax, "" to look for none.
        reasoning_parser: name of the syntax of what is thought, "" to leave it in the text.
        tools: the parameters' JSON schemas by the tools' names, as JSON.
        is_thinking: the answer begins with what is thought, without a marker; see `begins_thinking`.
        has_parallel_calls: more calls than the first count.
        has_reasoning: what is thought is told.
    """

    tool_parser: str = ""
    reasoning_parser: str = ""
    tools: bytes = b"{}"
    is_thinking: bool = False
    has_parallel_calls: bool = True
    has_reasoning: bool = True

    def parser(self, new_id: Callable[[], str] | None = None) -> AnswerParser:
        """A parser for one choice.

        Args:
            new_id: of calls that the model gave none; as the syntax wants it by default.
        """
        return AnswerParser(self, new_id)


class AnswerParser:
    """See `Parsing.parser`. `push` text as it comes, then `close` once.

    Attributes:
        num_calls: that were found so far.
        num_found: pieces of text and calls that became certain so far, whether they are told or not.
        last_found: what the last of them is.
    """

    def __init__(self, parsing: Parsing, new_id: Callable[[], str] | None = None) -> None:
        self.num_calls = 0
        self.num_found = 0
        self.last_found: type[Found] | None = None
        self._parsing = parsing
        tools = Tools(orjson.loads(parsing.tools))
        syntax = tool_syntax(parsing.tool_parser)
        thinking = reasoning_syntax(parsing.reasoning_parser)
        self._shows_thinking = thinking is not None and thinking.is_shown
        self._new_id = new_id or (syntax or SYNTAXES["hermes"]).new_id
        self._splitter: Machine | None = None
        self._calls: Machine | None = None
        if is_harmony(parsing.tool_parser) or is_harmony(parsing.reasoning_parser):
            self._splitter = Machine(lambda source: read_harmony(source, tools))
            self._shows_thinking = not parsing.reasoning_parser
            return
        if thinking is not None:
            self._splitter = _splitter(thinking, syntax, parsing.is_thinking)
        if syntax is not None:
            self._calls = Machine(lambda source: read_calls(source, syntax, tools))

    def push(self, text: str) -> list[Delta]:
        """What more text makes certain."""
        found: list[Found] = [Content(text)] if self._splitter is None else self._splitter.push(text)
        return list(self._deltas(self._content(found)))

    def close(self, *, is_cut: bool = False) -> list[Delta]:
        """All that is left. Nothing may follow.

        Args:
            is_cut: the answer ended because there was no room for more: what it was writing is half of a call.
        """
        found = self._content([] if self._splitter is None else self._splitter.close(is_cut))
        if self._calls is not None:
            found += self._calls.close(is_cut)
        return list(self._deltas(found))

    def _content(self, found: list[Found]) -> list[Found]:
        """With calls that stand in the text."""
        if self._calls is None:
            return found
        inner: list[Found] = []
        for one in found:
            inner += self._calls.push(one.text) if isinstance(one, Content) else [one]
        return inner

    def _deltas(self, found: Iterable[Found]) -> Iterable[Delta]:
        for one in found:
            self.num_found += 1
            self.last_found = type(one)
            if isinstance(one, Call):
                yield from self._call(one)
            elif isinstance(one, Content):
                if one.text:
                    yield one
            elif self._shows_thinking:
                yield Content(one.text)
            elif self._parsing.has_reasoning:
                yield one

    def _call(self, call: Call) -> Iterable[Delta]:
        if self.num_calls and not self._parsing.has_parallel_calls:
            return
        yield CallBegun(self.num_calls, call.id or self._new_id(), call.name)
        yield Arguments(self.num_calls, call.arguments)
        self.num_calls += 1


def thinking_of(parsing: Parsing) -> Thinking | None:
    """Where in an answer stop strings do not count; None where what is thought is not told apart."""
    if is_harmony(parsing.reasoning_parser):
        return Thinking("", (FINAL,), is_inside=True)
    syntax = reasoning_syntax(parsing.reasoning_parser)
    if syntax is None:
        return None
    return Thinking(syntax.start, _ends(syntax, tool_syntax(parsing.tool_parser)), parsing.is_thinking)


def _ends(thinking: ReasoningSyntax, syntax: Syntax | None) -> tuple[str, ...]:
    """What ends a thought: its own marker, and a call where the family writes none."""
    return (thinking.end, *(syntax.openings if syntax is not None and syntax.ends_reasoning else ()))


def _splitter(thinking: ReasoningSyntax, syntax: Syntax | None, is_inside: bool) -> Machine:
    ends = _ends(thinking, syntax)
    return Machine(lambda source: read_thinking(source, thinking.start, ends, is_inside, keeps=thinking.is_shown))
