"""The log: one line a message whatever is in it, beside a live line, into whatever standard error is."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi_launch import display, logs
from msi_launch.logs import LineHandler, OneLine, printable

WORST = "a\nb\r\x1b[2J\x00\x07\x9b31m\u2028\u202e\x7f\udcff"


def formatted(message, *arguments, level=logging.INFO, exc_info=None):
    record = logging.LogRecord("x", level, __file__, 1, message, arguments, exc_info)
    return OneLine("me", "T").format(record)


@given(st.text())
def test_a_message_is_one_line_that_no_terminal_obeys(text):
    line = formatted("said %s", text)
    assert line.startswith("T me: said ")
    assert line.isprintable() or all(char.isprintable() or char.isspace() for char in line)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", line)
    assert len(line.splitlines()) == 1
    if text.isprintable():
        assert line == f"T me: said {text}"


def test_what_clients_say_starts_no_line_and_moves_no_cursor():
    said = "a\\nb\\r\\x1b[2J\\x00\\x07\\x9b31m\\u2028\\u202e\\x7f\\udcff"
    assert formatted("%s", WORST) == f"T me: {said}"


def test_who_speaks_is_said_once():
    assert formatted("me: weights read") == formatted("weights read") == "T me: weights read"
    assert formatted("me: stands", level=logging.WARNING) == "T me: warning: stands"
    assert formatted("you: me: stand") == "T me: you: me: stand"


def test_long_messages_are_cut_and_warnings_are_named():
    assert formatted("x" * 10_000).endswith("... (10000 characters)")
    assert formatted("gone", level=logging.WARNING) == "T me: warning: gone"


def test_a_traceback_is_kept_on_lines_of_its_own():
    try:
        raise ValueError("forged\n12:00:00 msi-launch: all is well")
    except ValueError:
        text = formatted("failed", level=logging.ERROR, exc_info=sys.exc_info())
    first, *rest = text.splitlines()
    assert first == "T me: error: failed"
    assert rest
    assert all(line.startswith("    ") for line in rest)


@pytest.mark.parametrize("text", ["plain", "naïve 東京 🦙", "tab\there", ""])
def test_printable_keeps_what_is(text):
    assert printable(text) == text.replace("\t", "\\t")


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_a_log_that_nobody_reads_any_more_is_no_error(monkeypatch):
    for stream in (Broken(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        handler = LineHandler()
        handler.setFormatter(OneLine("%(message)s"))
        handler.emit(logging.LogRecord("x", logging.INFO, "", 1, "said", (), None))


UNREAD = """
import logging, time
from msi_launch import logs
logs.MAX_WAITING, logs.FLUSHED_WITHIN_S = 2000, 0.1
logs.set_up_log("me", "info")
began = time.monotonic()
for index in range(5000):
    logging.getLogger("x").info("line %d", index)
print(time.monotonic() - began < 10, flush=True)
input()
logs.write_error("the last\\n")
logs.write_error("is this\\n")
logs.flush_errors()
"""


CHATTY = """
import logging
from msi_launch.logs import set_up_log
set_up_log("me", {level!r})
logging.getLogger("aiohttp.websocket").warning("Client protocols %r do not overlap", ["x" * 3000])
logging.getLogger("aiohttp.websocket").error("said")
"""


@pytest.mark.parametrize("level", ["debug", "info"])
def test_what_clients_of_a_websocket_ask_for_is_not_quoted_each_time(level):
    command = [sys.executable, "-c", CHATTY.format(level=level)]
    lines = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True).stderr.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["said"]


def test_a_log_that_nobody_reads_stops_nobody_and_counts_what_it_lost():
    """The pipe takes 64 KB; what is read later is whole lines in order."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", UNREAD], text=True, **pipes) as process:
        assert process.stdout.readline() == "True\n"  # nothing was read, and it went on
        lines, reader = [], threading.Thread(target=lambda: lines.extend(process.stderr))
        reader.start()
        while not any("left out" in line for line in lines):
            time.sleep(0.01)
        process.stdin.write("\n")
        process.stdin.close()
        reader.join(30)
        assert process.wait(30) == 0
    numbers = [int(line.rsplit(" ", 1)[1]) for line in lines if "me: line" in line]
    assert numbers == sorted(set(numbers))
    (said,) = [line for line in lines if "left out" in line]
    assert int(said.split()[0]) == 5000 - len(numbers)
    assert lines[-2:] == ["the last\n", "is this\n"]


def on_terminal(code, columns=40, **environment):
    """What a program writes to standard error where that is a terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **environment}
    received = []

    def read():
        try:
            while chunk := os.read(ours, 4096):
                received.append(chunk)
        except OSError:
            pass

    reader = threading.Thread(target=read)
    reader.start()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stderr=theirs, env=environment)
    os.close(theirs)
    reader.join(10)
    os.close(ours)
    return b"".join(received).decode()


LIVE = """
import logging, time
from msi_launch.display import StatusLine
from msi_launch.logs import set_up_log
set_up_log("me", {level!r})
line = StatusLine()
with line.shown():
    line.update("waiting for 3 of 4 \\x1b[31m " + "東京" * 40)
    logging.getLogger("child").info("a line of the log")
    line.update("3 requests", is_usual=True)
    line.say("a line that stays")
"""


def test_a_live_line_is_cut_to_the_terminal_and_the_log_erases_it_first():
    said = on_terminal(LIVE.format(level="info"))
    live, log_line, again, stays, end = re.split(r"(?<!^)(?=\r\x1b\[J)", said)
    assert live.startswith("\r\x1b[Jwaiting for 3 of 4 \\x1b[31m ")
    assert live.endswith("\r")
    assert "\n" not in live
    assert display.cell_len(live.removeprefix("\r\x1b[J").rstrip("\r")) < 40
    assert re.fullmatch(r"\r\x1b\[J\S+ me: a line of the log\r?\n", log_line)
    assert again == "\r\x1b[J3 requests\r"
    assert re.fullmatch(r"\r\x1b\[J\S+ me: a line that stays\r?\n", stays)
    assert end == "\r\x1b[J"


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": ""}, {"COLUMNS": "10"}])
def test_a_terminal_that_cannot_erase_or_is_too_narrow_gets_lines(environment):
    said = on_terminal(
        LIVE.format(level="info"), **{"columns": 40} | {"columns": environment.pop("COLUMNS", 40)}, **environment
    )
    assert "\r" not in said.replace("\r\n", "\n").replace("\r\x1b[J", "")
    assert "waiting for 3 of 4" in said
    assert "a line of the log" in said


@pytest.mark.parametrize("environment", [{}, {"TERM": "dumb"}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}])
def test_at_level_warning_nothing_is_shown(environment):
    assert on_terminal(LIVE.format(level="warning"), **environment) == ""


def test_elsewhere_a_state_is_said_when_it_is_new(caplog):
    caplog.set_level(logging.INFO)
    line = display.StatusLine()
    with line.shown():
        for second in range(3):
            line.update(f"waiting for expert-0, {second} s")
        line.update("10 requests", is_usual=True)
        line.update("11 requests", is_usual=True)
        line.update("expert-0 was lost")
        line.update("12 requests", is_usual=True)
    assert caplog.messages == ["waiting for expert-0, 0 s", "expert-0 was lost", "requests are taken again"]


def test_colours_are_never_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not logs.has_live_terminal()
