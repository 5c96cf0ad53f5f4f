"""The two files of a batch: requests that are read line by line, and answers that survive whoever writes them.

An answer is one write of one line. What a run left behind is taken up by the next: answered ids are known by the file
alone, and a last line that was cut in half is taken off.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from msi.errors import ConfigError, shown

MAX_LINE_BYTES = 16 * 1024 * 1024  # as of a body over HTTP
MAX_ID_CHARS = 512


@dataclass(frozen=True, slots=True)
class Line:
    """One line of requests.

    Attributes:
        number: counted from 1.
        text: None where it is longer than a request may be.
    """

    number: int
    text: bytes | None

    @property
    def answer_id(self) -> str:
        """By which its answer is known where it has no custom_id."""
        return f"line-{self.number}"


def lines_of(path: Path) -> Iterator[Line]:
    """All that are not empty. Raises ConfigError."""
    with _open(path, "rb") as file:
        number = 0
        while text := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            is_long = len(text) > MAX_LINE_BYTES
            while is_long and not text.endswith(b"\n") and text:
                text = file.readline(MAX_LINE_BYTES)
            if is_long or text.strip():
                yield Line(number, None if is_long else text)


class Answers:
    """The file of answers, open for adding, and held against a second run. `close` at the end.

    Attributes:
        ids: custom_ids that have an answer.
        lines: `Line.answer_id` of lines without a custom_id that have one; a custom_id may look like it.

    Raises:
        ConfigError: the file cannot be written, another run writes it, or it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open(path, "a+b")
        try:
            self._hold()
            self.ids: set[str] = set()
            self.lines: set[str] = set()
            end = self._read()
            self._repair(end)
        except BaseException:
            self._file.close()
            raise

    def add(self, line: bytes) -> None:
        """One answer, with its newline, in one write. Raises ConfigError: there is no room."""
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(self._file.fileno(), left) :]
        except OSError as error:
            raise ConfigError(
                f"{self._path} cannot be written: {error.strerror}; what it holds stays: make room, and run the same "
                "command again"
            ) from error

    def close(self) -> None:
        self._file.close()

    def _hold(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return  # a file system without locks
            raise ConfigError(f"{self._path} is being written by another run; wait for it, or name another file") from (
                error
            )

    def _read(self) -> int:
        """The ids; returns where the last whole line ends."""
        end = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            answer = _answer_of(line)
            if answer is None:
                is_last_cut = not line.endswith(b"\n") and (number > 1 or line.startswith(b'{"id":"line-'))
                if is_last_cut or not line.strip():
                    break
                raise ConfigError(
                    f"line {number} of {self._path} is no answer of a batch; name another file, or move this one away"
                )
            custom_id, answer_id = answer
            if custom_id:
                self.ids.add(custom_id)
            else:
                self.lines.add(answer_id)
            end += len(line)
        return end

    def _repair(self, end: int) -> None:
        self._file.truncate(end)
        if end:
            self._file.seek(end - 1)
            if self._file.read(1) != b"\n":
                self.add(b"\n")


def _answer_of(line: bytes) -> tuple[str, str] | None:
    """(custom_id or "", id) of what it answers; None where it is no answer."""
    try:
        values = orjson.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or "response" not in values:
        return None
    custom_id, answer_id = values.get("custom_id") or "", values.get("id") or ""
    is_answer = isinstance(custom_id, str) and isinstance(answer_id, str) and (custom_id or answer_id)
    return (custom_id, answer_id) if is_answer else None


def _open(path: Path, mode: str) -> IO[Any]:
    try:
        return open(path, mode, buffering=-1 if mode == "rb" else 1 << 20)
    except OSError as error:
        raise ConfigError(f"{path} cannot be opened: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """Attributes:
    body: of the endpoint, in JSON.
    """

    custom_id: str
    url: str
    body: bytes


class NotARequestError(Exception):
    """Says what is wrong with a line; `custom_id` where it has one."""

    def __init__(self, sentence: str, custom_id: str | None = None) -> None:
        super().__init__(sentence)
        self.custom_id = custom_id


def parse_line(text: bytes | None, urls: tuple[str, ...]) -> BatchRequest:
    """One request in OpenAI's form. Raises NotARequestError.

    Args:
        urls: of the endpoints that answer.
    """
    if text is None:
        raise NotARequestError(f"it is longer than {MAX_LINE_BYTES} bytes")
    try:
        values = orjson.loads(text)
    except ValueError as error:
        raise NotARequestError(f"it is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise NotARequestError('give an object: {"custom_id": .., "method": "POST", "url": .., "body": {..}}')
    custom_id = values.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        raise NotARequestError(f"custom_id is {shown(custom_id)}; give a string of 1 to {MAX_ID_CHARS} characters")
    method, url, body = values.get("method", "POST"), values.get("url"), values.get("body")
    if method != "POST":
        raise NotARequestError(f'method is {shown(method)}; it must be "POST"', custom_id)
    if url not in urls:
        raise NotARequestError(f"url is {shown(url)}; supported: {', '.join(urls)}", custom_id)
    if not isinstance(body, dict):
        raise NotARequestError("body is no object; give what would be sent to the url", custom_id)
    if body.get("stream"):
        raise NotARequestError("stream: the answers of a batch are whole; leave it out", custom_id)
    return BatchRequest(custom_id, str(url), orjson.dumps(body))


def answered(line: Line, custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """A line of answers; `body` is JSON, and so is what comes out."""
    head = orjson.dumps({"id": line.answer_id, "custom_id": custom_id})[:-1]
    response = orjson.dumps({"status_code": status, "request_id": request_id})[:-1]
    return head + b',"response":' + response + b',"body":' + body + b'},"error":null}\n'


def not_answered(line: Line, custom_id: str | None, code: str, sentence: str) -> bytes:
    """A line that says why there is no answer."""
    error = {"code": code, "message": sentence}
    values = {"id": line.answer_id, "custom_id": custom_id, "response": None, "error": error}
    return orjson.dumps(values) + b"\n"


@contextlib.contextmanager
def answers_in(path: Path) -> Iterator[Answers]:
    """Raises ConfigError."""
    answers = Answers(path)
    try:
        yield answers
    finally:
        answers.close()
