"""Readers of whole answers: what was thought, calls among text; and gpt-oss, which writes everything in messages."""

from __future__ import annotations

import re
from collections.abc import Sequence

from msi.server.parsing.deltas import Call, Content, Reasoning
from msi.server.parsing.source import Ended, NotACall, Reader, Source
from msi.server.parsing.syntaxes import Syntax
from msi.server.parsing.tools import Tools, loads


def read_calls(source: Source, syntax: Syntax, tools: Tools) -> Reader[None]:
    """Text, and calls in it; white space around a call belongs to neither. What is no call is text, all of it."""
    while (yield from source.pieces(Content, *syntax.openings, holds_space=True)):
        start = source.at
        yield from source.space()
        has_call = False
        try:
            for one in syntax.read(source, tools):
                if isinstance(one, Call):
                    start, has_call = source.at, True
                yield one
        except NotACall:
            yield from _text(source.text[start : source.at])
            has_call = False
        except Ended:
            source.at = len(source.text)
            yield from _text(source.text[start:])
            return
        if has_call:
            start = source.at
            yield from source.space()
            if source.is_at_end:
                return
            source.at = start


def _text(text: str) -> Reader[None]:
    if text:
        yield Content(text)


def read_thinking(
    source: Source, start: str, ends: Sequence[str], is_inside: bool, *, keeps: bool = False
) -> Reader[None]:
    """What was thought, and the text behind it, in which the markers mean nothing any more.

    Args:
        ends: the first one is passed over; the others begin what follows.
        is_inside: the prompt has begun it, or the model leaves `start` out.
        keeps: the markers are part of what was thought, `start` even where the prompt has it.
    """
    space = yield from source.space()
    if (yield from source.take(start)):
        is_inside = True
    elif space:
        yield Reasoning(space) if is_inside else Content(space)
    if is_inside:
        if keeps:
            yield Reasoning(start)
        yield from source.pieces(Reasoning, *ends)
        if (yield from source.take(ends[0])) and keeps:
            yield Reasoning(ends[0])
    yield from source.pieces(Content)


# -- harmony ---------------------------------------------------------------------------------------------------------

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
FINAL = f"{CHANNEL}final{MESSAGE}"  # the answer itself
HARMONY_MARKERS = (START, CHANNEL, MESSAGE, "<|constrain|>", *ENDS)
MAX_HEADER_CHARS = 512
RECIPIENT = re.compile(r"\bto=([^\s<]+)")


def read_harmony(source: Source, tools: Tools) -> Reader[None]:
    """<|start|>assistant<|channel|>NAME to=functions.N<|message|>TEXT<|end|>, the prompt having written the beginning.

    analysis was thought; commentary to a function is a call, ended by <|call|>; final and other commentary is for the
    user. Text outside of messages is, too.
    """
    is_first = True
    while not source.is_at_end:
        start = source.at
        yield from source.space()
        # the prompt has written <|start|>assistant already
        begins = (START, CHANNEL, "to=") if is_first else (START, CHANNEL)
        found = yield from source.take(*begins)
        is_first = False
        if not found:
            source.at = start
            yield from source.pieces(Content, START, CHANNEL)
            continue
        try:
            header = found + (yield from source.until(MESSAGE, MAX_HEADER_CHARS))
        except (NotACall, Ended):
            yield from _text(source.text[start : source.at])
            continue
        if (recipient := RECIPIENT.search(header)) is not None:
            yield from _read_call(source, tools, start, recipient[1])
        else:
            is_thought = header.partition(CHANNEL)[2].strip().startswith("analysis")
            yield from source.pieces(Reasoning if is_thought else Content, START, *ENDS)
            yield from source.take(*ENDS)


def _read_call(source: Source, tools: Tools, start: int, recipient: str) -> Reader[None]:
    """A message to a function; it is text, from `start` on, if it is no call."""
    try:
        name = tools.check(recipient.removeprefix("functions."))
        yield from source.space()
        end = yield from source.take(*ENDS)
        call = tools.call(name, {} if end else loads((yield from source.json_object())))
    except NotACall:
        yield from _text(source.text[start : source.at])
        return
    except Ended:
        source.at = len(source.text)
        yield from _text(source.text[start:])
        return
    yield call
    yield from source.maybe(*ENDS)
