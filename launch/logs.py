"""The log on standard error: one line for each message, whatever is in it, and beside a live line on a terminal.

What clients, peers and files say may be part of a message, so control characters come out escaped: nobody starts a
line, moves a cursor or colours a terminal with a prompt. Several processes write to one terminal; each line is one
write, which first erases what stands there: those are the launcher's live lines, which are drawn anew (`display.py`).

Writing waits for whoever reads: a full pipe, a terminal that was stopped, a slow disk. A thread does it, so that no
loop stands meanwhile; what it cannot hold is counted and left out.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import unicodedata
from collections import deque

from msi.json_log import JsonLine, is_json_logged

from .command_line import as_flags

ERASE_LIVE = "\r\x1b[J"  # what stands below, too: the cursor waits at its beginning
MAX_CHARS = 4000  # of a message
NAMED_FROM = logging.WARNING  # lines of this level and above say their level
MAX_WAITING = 10_000  # lines that nobody has read yet
FLUSHED_WITHIN_S = 2.0  # at the end; a reader that is slower loses the rest


def set_up_log(name: str, level: str, *, is_json: bool = False) -> None:
    """Logs to standard error from here on, as `name`; with `is_json` an object a line."""
    _writer.start()
    handler = LineHandler()
    handler.setFormatter(JsonLine(name, as_flags) if is_json else OneLine(name))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.raiseExceptions = False  # a log that nobody reads any more is no reason to complain, there least of all
    for chatty in ("asyncio", "aiohttp"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    logging.getLogger("aiohttp.websocket").setLevel(logging.ERROR)  # else it quotes what each client that comes wants


class LineHandler(logging.Handler):
    """One write for each record."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            write_error(f"{ERASE_LIVE}{line}\n" if has_live_terminal() else f"{line}\n")
        except Exception:
            self.handleError(record)


class OneLine(logging.Formatter):
    """Escapes what is not printable; a traceback follows on lines of its own, indented.

    Args:
        name: of the process; a message that begins with it does not say it again.
    """

    def __init__(self, name: str, time_format: str = "%H:%M:%S") -> None:
        super().__init__("%(asctime)s %(process_name)s: %(message)s", time_format, defaults={"process_name": name})
        self._name = name

    def formatMessage(self, record: logging.LogRecord) -> str:
        message = as_flags(printable(record.message)).removeprefix(f"{self._name}: ")
        if len(message) > MAX_CHARS:
            message = f"{message[:MAX_CHARS]}... ({len(message)} characters)"
        named = f"{record.levelname.lower()}: " if record.levelno >= NAMED_FROM else ""
        record.message = named + message
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        lines = super().formatException(ei).splitlines()  # type: ignore[arg-type]
        return "\n".join(f"    {printable(line)}" for line in lines)

    def formatStack(self, stack_info: str) -> str:
        return "\n".join(f"    {printable(line)}" for line in stack_info.splitlines())


def say_at_end(name: str, sentence: str, details: str = "") -> None:
    """Why a command ends, on standard error: a line of its own, or an object where the log has such.

    Args:
        details: lines that come before it.
    """
    if not is_json_logged():
        lines = "".join(f"    {printable(line)}\n" for line in details.splitlines())
        write_error(f"{lines}{name}: {as_flags(printable(sentence))}\n")
        return
    record = logging.LogRecord(name, logging.ERROR, "", 0, "%s", (sentence,), None, sinfo=details or None)
    write_error(JsonLine(name, as_flags).format(record) + "\n")


def printable(text: str) -> str:
    """On one line, with whatever a terminal would obey written out."""
    if text.isprintable():
        return text
    return "".join(char if _is_harmless(char) else char.encode("unicode_escape").decode() for char in text)


def _is_harmless(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"


class ErrorWriter:
    """Writes to standard error in order, each text at once and in one piece; once started, from a thread of its own."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[str] = deque()
        self._num_left_out = 0
        self._is_writing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """From here on `write` waits for nobody."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()
            atexit.register(self.flush)

    def write(self, text: str) -> None:
        if self._thread is None:
            _write_now(text)
            return
        with self._changed:
            if len(self._waiting) < MAX_WAITING:
                self._waiting.append(text)
                self._changed.notify_all()
            else:
                self._num_left_out += 1

    def flush(self, within_s: float = FLUSHED_WITHIN_S) -> None:
        """Waits until all of it is written, but no longer than that."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._is_writing, within_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting)
                self._is_writing = True
                text = self._waiting.popleft()
                if self._num_left_out and not self._waiting:
                    text += f"{self._num_left_out} lines of the log were left out: nobody read them in time\n"
                    self._num_left_out = 0
            _write_now(text)


_writer = ErrorWriter()


def write_error(text: str) -> None:
    """To standard error, in one piece, after what was written before."""
    _writer.write(text)


def flush_errors() -> None:
    """Waits, not for long, until what was written is read."""
    _writer.flush()


def _write_now(text: str) -> None:
    stream = sys.stderr
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError, AttributeError):  # it was closed
        pass


def has_live_terminal() -> bool:
    """Whether standard error is a terminal that can erase a line, and is to have more than lines of a program."""
    try:
        return (
            not is_json_logged()
            and sys.stderr.isatty()
            and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")
        )
    except (ValueError, AttributeError):
        return False
