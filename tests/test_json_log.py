"""--log-json: each line is an object that says when, how bad, who and what, whatever is in the message."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.json_log import JsonLine, with_fields
from msi.server import preparers
from msi.server.prepare import SETUP
from msi.server.request_log import Served
from tests.test_launch import free_port, launched
from tests.test_preparers import setup_of


def record(message, *arguments, level=logging.INFO, **more):
    made = logging.LogRecord("msi.x", level, __file__, 1, message, arguments, more.pop("exc_info", None))
    made.__dict__.update(more)
    return made


@given(st.text(), st.dictionaries(st.text(max_size=9), st.none() | st.integers() | st.text(), max_size=3))
def test_any_message_is_one_object_on_one_line(text, fields):
    line = JsonLine("me").format(record("said %s", text, **with_fields(**fields)))
    assert line.isascii()
    assert "\n" not in line
    said = json.loads(line)
    assert said["message"] == f"said {text}"
    assert said["level"] == "info"
    assert said["process"] == "me"
    assert said["logger"] == "msi.x"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", said["time"])
    assert said.get("fields", {}) == fields


def test_a_traceback_stays_in_its_object():
    try:
        raise ValueError("a\nb")
    except ValueError:
        line = JsonLine("me").format(record("failed", level=logging.ERROR, exc_info=sys.exc_info()))
    said = json.loads(line)
    assert said["message"] == "failed"
    assert said["traceback"].endswith("ValueError: a\nb")


def test_what_no_json_has_is_written_as_text():
    said = json.loads(JsonLine("me").format(record("x" * 10_000, **with_fields(path=JsonLine))))
    assert said["message"].endswith("... (10000 characters)")
    assert "JsonLine" in said["fields"]["path"]


def test_a_request_says_its_numbers_as_fields():
    served = Served("cmpl-1", 10.0, {0: 3, 1: 4}, 5, 10.5, "length")
    assert served.fields(12.0) == {
        "request_id": "cmpl-1", "prompt_tokens": 7, "generated_tokens": 5, "first_token_s": 0.5, "total_s": 2.0,
        "outcome": "length",
    }  # fmt: skip


@pytest.mark.parametrize("words", [["/nowhere"], ["--role", "gateway", "--coordinator", "nonsense"]])
def test_the_sentence_that_a_command_ends_with_is_an_object_too(words):
    command = [sys.executable, "-m", "msi_launch", "--log-json", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert lines
    assert lines[-1]["level"] == "error"


@pytest.mark.slow
async def test_every_line_of_a_server_is_an_object(tiny_model):
    import aiohttp

    port = free_port()
    arguments = (tiny_model, "--port", port, "--threads-per-worker", 1, "--log-json")
    async with launched(*arguments) as child, aiohttp.ClientSession() as session:
        await child.until_said('"ready: ')
        body = {"prompt": "It is", "max_tokens": 3}
        async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response:
            assert response.status == 200
        await child.until_said("generated_tokens")
        child.process.terminate()
        assert await child.ended() == 0
        lines = [json.loads(line) for line in child.said.splitlines()]
    fields = {name: value for line in lines for name, value in line.get("fields", {}).items()}
    assert fields["generated_tokens"] == 3
    assert fields["url"] == f"http://127.0.0.1:{port}"
    assert "coordinator" in fields["pids"]
    assert {line["process"] for line in lines} >= {"msi-launch", "gateway", "coordinator"}


def last_word(pid):
    """Of a process's command line."""
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[-2]


@pytest.mark.parametrize("is_json", [True, False])
async def test_processes_that_understand_large_requests_log_as_their_gateway(is_json, tiny_model, monkeypatch):
    monkeypatch.setattr(preparers, "is_json_logged", lambda: is_json)
    pool = preparers.Preparers(SETUP.encode(setup_of(tiny_model)))
    try:
        await pool.start()
        words = [last_word(one._process.pid) for one in pool._idle]
    finally:
        await pool.close()
    assert {word == "json" for word in words} == {is_json}
