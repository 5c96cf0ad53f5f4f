"""Strings that end a text, looked for while it comes piece by piece.

Knuth, Morris and Pratt's search: for each string no more is remembered than how much of its beginning the text ends
with, and no character of the text is looked at twice. So nothing grows with the lengths of the strings but one table
for each, which all answers share.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from typing import NamedTuple

MAX_SPACE = 64  # before the marker that begins a thought
MAX_TABLES = 256  # of the strings that were asked for last; four bytes for each of their characters


class Thinking(NamedTuple):
    """How a model marks what it thinks before it answers: stop strings do not count there, as a thought repeats much.

    Attributes:
        start: what begins it, at the beginning of a text, perhaps behind white space.
        ends: what ends it; the first of them that comes.
        is_inside: the text begins within it.
    """

    start: str
    ends: tuple[str, ...]
    is_inside: bool = False


class ThinkingGate:
    """Parts what a text thinks from what it says. Of the text no more is kept than a marker may need."""

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._is_inside = thinking.is_inside
        self._longest = max(map(len, thinking.ends))
        self._held = ""  # while it may be the beginning of a marker
        self.is_passed = False

    def push(self, text: str) -> tuple[str, str]:
        """(of what is thought, of what is said): all that is certain. Once it `is_passed`, nothing may follow."""
        text, self._held = self._held + text, ""
        if not self._is_inside:
            begin = text.lstrip()
            if self._thinking.start.startswith(begin) and len(text) - len(begin) <= MAX_SPACE:
                if begin != self._thinking.start:
                    self._held = text
                    return "", ""
            elif not begin.startswith(self._thinking.start):
                self.is_passed = True
                return "", text
            self._is_inside = True
        found = [(at + len(end), end) for end in self._thinking.ends if (at := text.find(end)) >= 0]
        if found:
            self.is_passed = True
            end, _ = min(found)
            return text[:end], text[end:]
        certain = max(0, len(text) - self._longest + 1)
        self._held = text[certain:]
        return text[:certain], ""

    def close(self) -> str:
        """What is left; nothing follows."""
        return self._held


class Found(NamedTuple):
    """What a piece of text has made certain.

    Attributes:
        start: where the first stop string begins, in characters before the piece's end; 0 where none has ended.
        num_open: so many characters at the text's end may turn out to begin one.
        end: where it ends, in characters before the piece's end.
    """

    start: int
    num_open: int
    end: int = 0


class StopSearch:
    """Over one text.

    Args:
        stop: strings of at least one character.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._searches = [(one, _borders(one)) for one in stop]
        self._lengths = [0] * len(stop)  # of the longest beginning of each that the text ends with

    def push(self, text: str) -> Found:
        """The next piece; none may follow once a stop string was found."""
        start, end_of_first, lengths = 0, 0, self._lengths
        for index, (stop, borders) in enumerate(self._searches):
            length, end = _advance(stop, borders, lengths[index], text)
            lengths[index] = length
            if length == len(stop):
                # of two that begin at the same place the shorter one has ended first
                start, end_of_first = max((start, end_of_first), (len(text) - end + length, len(text) - end))
        return Found(start, max(lengths, default=0), end_of_first)


def _advance(stop: str, borders: array[int], length: int, text: str) -> tuple[int, int]:
    """The length of the longest beginning of `stop` at the text's end or where it is whole, and where that is."""
    at = 0
    while at < len(text):
        if not length:
            at = text.find(stop[0], at)
            if at < 0:
                break
        while length and stop[length] != text[at]:
            length = borders[length]
        if stop[length] == text[at]:
            length += 1
        at += 1
        if length == len(stop):
            return length, at
    return length, len(text)


@lru_cache(MAX_TABLES)
def _borders(stop: str) -> array[int]:
    """[len(stop)]: of each beginning, by its length, the longest shorter beginning that it ends with."""
    borders = array("i", bytes(4 * len(stop)))
    length = 0
    for end in range(1, len(stop) - 1):
        while length and stop[length] != stop[end]:
            length = borders[length]
        length += stop[length] == stop[end]
        borders[end + 1] = length
    return borders
