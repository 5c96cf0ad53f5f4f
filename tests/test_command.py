"""What a command does with the streams it is given: closed, full, unread, or in another alphabet; never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from msi.errors import ConfigError
from msi_launch.command import requests_to_end, run_command
from tests.everyday import mostly_slow

PLAN = [sys.executable, "-m", "tests.test_command", "dbrx", "--gpu", "h20"]


def bash(script, **environment):
    """What a shell's command line ended with, and what it said."""
    return subprocess.run(
        ["bash", "-c", "set -o pipefail; " + script], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PLAN": " ".join(PLAN), "LAUNCH": f"{sys.executable} -m msi_launch", **environment},
        errors="backslashreplace",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "status"),
    mostly_slow(
        [
            ("$PLAN --json | head -1", 141),
            ("$PLAN --explain | true", 141),
            ("$LAUNCH --help | head -1", 0),
            ("$PLAN --json >&-", 0),
            ("$PLAN --json 2>&-", 0),
            ("$PLAN <&-", 0),
            ("$PLAN --json <&- >&- 2>&-", 0),
            ("$LAUNCH --help >&-", 0),
            ("$LAUNCH --version <&- 2>&-", 0),
            ("$LAUNCH --experts 3 2>&-", 2),
            ("$LAUNCH --experts 3 >&- <&-", 2),
            ("$LAUNCH /nowhere <&- >&-", 2),
        ],
        keep=4,
    ),
)
def test_streams_that_are_closed_or_unread_are_no_traceback(script, status):
    done = bash(script)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode in (status, 0 if status == 141 else status)  # all may have fitted into the pipe
    assert len(done.stderr.splitlines()) <= 1


def test_a_full_disk_is_a_sentence():
    done = bash("$PLAN --json > /dev/full")
    assert done.returncode == 2
    assert done.stderr == "msi-plan: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1", "TERM": "dumb"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX", "NO_COLOR": "1"},
        {"COLUMNS": "10"},
        {"COLUMNS": "1", "TERM": ""},
        {"FORCE_COLOR": "1", "COLUMNS": "0"},
    ],
)
@pytest.mark.parametrize("script", mostly_slow(["$LAUNCH --device 東京", "$PLAN --explain", "$PLAN --gpu böse"]))
def test_any_locale_and_terminal_will_do(script, environment):
    done = bash(script, **environment)
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if "--explain" in script else 2)


# -- statuses --------------------------------------------------------------------------------------------------------


def failing(error):
    def work():
        raise error

    return work


def test_the_status_says_what_happened(capsys):
    assert run_command("msi-x", lambda: None) == 0
    assert run_command("msi-x", failing(ConfigError("give\nmore"))) == 2
    assert capsys.readouterr().err == "msi-x: give\\nmore\n"
    assert run_command("msi-x", failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""


def test_a_bug_is_said_in_one_line_after_its_traceback(capsys):
    assert run_command("msi-x", failing(KeyError("forged\nline"))) == 1
    *trace, last = capsys.readouterr().err.splitlines()
    assert trace
    assert all(line.startswith("    ") for line in trace)
    assert last.startswith("msi-x: this is a bug of msi, at test_command.py:")
    assert "KeyError" in last


def test_a_hang_up_asks_to_end_but_not_one_that_is_to_outlive_its_terminal(monkeypatch):
    assert signal.SIGTERM in requests_to_end()
    for handler, counts in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        monkeypatch.setattr(signal, "getsignal", lambda _, handler=handler: handler)
        assert (signal.SIGHUP in requests_to_end()) is counts


if __name__ == "__main__":
    from msi_launch.plan import main

    main()
