"""Text that comes piece by piece, and readers of it: generators that yield what they find, and None to wait for more.

A reader never looks at a character twice, but for the few that may begin a marker, so an answer costs what it is long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

from msi.server.parsing.deltas import Content, Found, Reasoning

MAX_NAME_CHARS = 256  # of a tool or a parameter
MAX_DEPTH = 100  # of arrays and objects within one another
SPACE = re.compile(r"\s*")
WORD = re.compile(r"[^\s<>{}\[\]\"]*")
SCALAR = re.compile(r"[-+.0-9A-Za-z]+")
STRING = re.compile(r'[^"\\]*')

T = TypeVar("T")
Waiting = Generator[None, None, T]
Reader = Generator[Found | None, None, T]


class NotACall(Exception):
    """Markup that is no well-formed call."""


class Ended(Exception):
    """The text ended in the middle of something."""


class Source:
    """The text so far.

    Attributes:
        at: where reading goes on.
        is_closed: nothing more comes.
        is_cut: it ended because there was no room for more.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.is_closed = False
        self.is_cut = False

    @property
    def is_at_end(self) -> bool:
        """Whether all is read, and nothing more comes."""
        return self.is_closed and self.at == len(self.text)

    def pieces(self, kind: Callable[[str], Content | Reasoning], *ends: str, holds_space: bool = False) -> Reader[str]:
        """Text up to the first of `ends`, as soon as it is certain. Returns that end, which is not passed over.

        Args:
            holds_space: white space before an end is left for who reads on.
        """
        while True:
            text = self.text[self.at :]
            found, end = _first(text, ends)
            if end or self.is_closed:
                sure = text[:found] if end else text
            else:
                sure = text[: len(text) - num_held_back(text, ends)]
            if holds_space and not (self.is_closed and not end):
                sure = sure.rstrip()
            self.text, self.at = text[len(sure) :], 0
            if sure:
                yield kind(sure)
            if end or self.is_closed:
                return end
            yield None

    def space(self) -> Waiting[str]:
        """White space, if there is any."""
        start = self.at
        while True:
            match = SPACE.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text) or self.is_closed:
                return self.text[start : self.at]
            yield

    def take(self, *texts: str) -> Waiting[str]:
        """The one of these that stands here, or "" for none. None of them begins with another."""
        longest = max(map(len, texts))
        while True:
            here = self.text[self.at : self.at + longest]
            for text in texts:
                if here.startswith(text):
                    self.at += len(text)
                    return text
            if self.is_closed or not any(text.startswith(here) for text in texts):
                return ""
            yield

    def expect(self, *texts: str, at_end: str = "") -> Waiting[str]:
        """The one of these that stands here.

        Args:
            at_end: what a model leaves out that has said all it wanted.

        Raises:
            NotACall: something else stands here.
            Ended: the text ends here, or within one of them.
        """
        found = yield from self.take(*texts)
        if found:
            return found
        rest = self.text[self.at :]
        if not self.is_closed or not any(text.startswith(rest) for text in texts):
            raise NotACall
        if not at_end or self.is_cut:
            raise Ended
        self.at = len(self.text)
        return at_end

    def maybe(self, *texts: str) -> Waiting[str]:
        """The one of these that comes next, behind white space; else "", and nothing is passed over."""
        start = self.at
        yield from self.space()
        found = yield from self.take(*texts)
        if not found:
            self.at = start
        return found

    def until(self, end: str, most: int | None = None) -> Waiting[str]:
        """The text before `end`, which is passed over.

        Args:
            most: characters that it may have.

        Raises:
            NotACall: it has more.
            Ended: the end does not come.
        """
        start = look = self.at
        while (found := self.text.find(end, look)) < 0:
            look = max(start, len(self.text) - len(end) + 1)
            if most is not None and look - start > most:
                raise NotACall
            yield from self._more()
        if most is not None and found - start > most:
            raise NotACall
        self.at = found + len(end)
        return self.text[start:found]

    def word(self) -> Waiting[str]:
        """A name without white space or brackets. Raises NotACall: there is none, or it is too long."""
        while True:
            match = WORD.match(self.text, self.at)
            assert match is not None
            if len(match[0]) > MAX_NAME_CHARS or (not match[0] and match.end() < len(self.text)):
                raise NotACall
            if match.end() < len(self.text) or self.is_closed:
                break
            yield
        if not match[0]:
            raise Ended
        self.at = match.end()
        return match[0]

    # -- JSON --------------------------------------------------------------------------------------------------------

    def json_object(self) -> Waiting[str]:
        """One JSON object's text. What its strings hold is looked at by nobody, whatever it looks like.

        Raises:
            NotACall: something that JSON does not allow here.
            Ended: the text ends within it.
        """
        start, depth, wanted = self.at, "", "{"
        while True:
            yield from self.space()
            if self.at == len(self.text):
                yield from self._more()
                continue
            char = self.text[self.at]
            kind = char if char in '{}[]:,"' else "0"
            if kind not in wanted:
                raise NotACall
            if kind == '"':
                yield from self._string()
                wanted = ":" if wanted in ('"', '"}') else ",}]"
            elif kind == "0":
                yield from self._scalar()
                wanted = ",}]"
            else:
                self.at += 1
                depth, wanted = _next(char, depth)
                if not depth:
                    return self.text[start : self.at]

    def _string(self) -> Waiting[None]:
        self.at += 1
        while True:
            match = STRING.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.text.startswith('"', self.at):
                self.at += 1
                return
            if len(self.text) < self.at + 2:  # nothing, or a backslash without what it escapes
                yield from self._more()
            else:
                self.at += 2

    def _scalar(self) -> Waiting[None]:
        match = SCALAR.match(self.text, self.at)
        if match is None:
            raise NotACall
        while match.end() == len(self.text):
            self.at = match.end()
            yield from self._more()
            match = SCALAR.match(self.text, self.at)
            if match is None:
                return
        self.at = match.end()

    def _more(self) -> Waiting[None]:
        if self.is_closed:
            raise Ended
        yield


_VALUE = '"{[0'


def _next(char: str, depth: str) -> tuple[str, str]:
    """Open brackets behind a bracket, comma or colon of JSON, and what may come next. Raises NotACall."""
    if char in "{[":
        if len(depth) == MAX_DEPTH:
            raise NotACall
        return depth + char, '"}' if char == "{" else _VALUE + "]"
    if char in "}]":
        if (depth[-1] == "{") is not (char == "}"):
            raise NotACall
        return depth[:-1], ",}]"
    return depth, '"' if char == "," and depth[-1] == "{" else _VALUE


def _first(text: str, ends: tuple[str, ...]) -> tuple[int, str]:
    """Where the first of `ends` stands, and which; (-1, "") for none."""
    found = [(at, -len(end), end) for end in ends if (at := text.find(end)) >= 0]
    if not found:
        return -1, ""
    at, _, end = min(found)
    return at, end


def num_held_back(text: str, markers: tuple[str, ...]) -> int:
    """How many characters at the end of a text may turn out to begin one of these."""
    if not markers:
        return 0
    tail = text[max(0, len(text) - max(map(len, markers)) + 1) :]
    begins = {marker[0] for marker in markers}
    for at, char in enumerate(tail):
        if char in begins and any(marker.startswith(tail[at:]) for marker in markers):
            return len(tail) - at
    return 0


class Machine:
    """Runs a reader over text as it comes."""

    def __init__(self, make: Callable[[Source], Reader[None]]) -> None:
        self._source = Source()
        self._reader = make(self._source)

    def push(self, text: str) -> list[Found]:
        """What more text makes certain."""
        self._source.text += text
        return self._run()

    def close(self, is_cut: bool) -> list[Found]:
        """All that is left; nothing more comes.

        Args:
            is_cut: the text ended because there was no room for more.
        """
        self._source.is_closed, self._source.is_cut = True, is_cut
        return self._run()

    def _run(self) -> list[Found]:
        found = []
        for one in self._reader:
            if one is None:
                break
            found.append(one)
        return found
