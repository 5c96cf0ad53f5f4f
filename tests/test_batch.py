"""msi-launch run-batch: every line gets an answer, once, whatever ends a run in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msi.errors import ConfigError
from msi_launch import batch, batch_arguments
from msi_launch.batch_file import Answers, Line, NotARequestError, answered, lines_of, not_answered, parse_line
from msi_launch.command_line import as_flags
from msi_launch.main import run
from tests.test_launch import launched

URLS = ("/v1/completions", "/v1/chat/completions")


def request(custom_id="a", url=URLS[0], **body):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"prompt": "It is", "max_tokens": 3} | body}


def written(path, *requests):
    path.write_text("".join(json.dumps(one) + "\n" if not isinstance(one, str) else one for one in requests))
    return path


def answers_of(path):
    """By custom_id, or else by id."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    found = {one["custom_id"] or one["id"]: one for one in lines}
    assert len(found) == len(lines), "each is answered once"
    return found


# -- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint", "custom_id"),
    [
        ("{", "it is not JSON", None),
        ("[]", "give an object", None),
        ("{}", "custom_id is None", None),
        ('{"custom_id": 3}', "custom_id is 3; give a string", None),
        ('{"custom_id": ""}', "custom_id is ''", None),
        (json.dumps(request() | {"method": "GET"}), "method is 'GET'", "a"),
        (json.dumps(request(url="/v1/embeddings")), "url is '/v1/embeddings'; supported: /v1/completions", "a"),
        (json.dumps(request(url=["x"])), "url is ['x']", "a"),
        (json.dumps(request() | {"body": "x"}), "body is no object", "a"),
        (json.dumps(request(stream=True)), "stream: the answers of a batch are whole", "a"),
    ],
)
def test_a_line_that_asks_nothing_says_why(line, complaint, custom_id):
    with pytest.raises(NotARequestError) as refused:
        parse_line(line.encode(), URLS)
    assert complaint in str(refused.value)
    assert refused.value.custom_id == custom_id


@settings(max_examples=300)
@given(st.binary(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_any_line_is_a_request_or_refused_in_a_sentence(text):
    try:
        parse_line(text.encode() if isinstance(text, str) else text, URLS)
    except NotARequestError as error:
        said = str(error)
    else:
        said = "understood"
    assert len(said) < 500


def test_lines_are_counted_and_long_ones_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("msi_launch.batch_file.MAX_LINE_BYTES", 10)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"a\n\n" + b"x" * 35 + b"\n  \nb\n" + b"y" * 11 + b"\nc")
    assert list(lines_of(path)) == [
        Line(1, b"a\n"), Line(3, None), Line(5, b"b\n"), Line(6, None), Line(7, b"c"),
    ]  # fmt: skip


# -- answers ---------------------------------------------------------------------------------------------------------

WHOLE = answered(Line(1, b""), "a", 200, "r", b"{}") + not_answered(Line(2, b""), None, "invalid_request", "no")


@pytest.mark.parametrize("cut", range(len(WHOLE) + 1))
def test_a_file_that_was_cut_anywhere_is_repaired(tmp_path, cut):
    """What is whole stays, also without its newline; the rest is taken off."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(WHOLE[:cut])
    if 0 < cut < len(b'{"id":"line-'):
        with pytest.raises(ConfigError, match="is no answer of a batch"):
            Answers(path)
        return
    first = WHOLE.index(b"\n")
    expected = {"a"} if first <= cut < len(WHOLE) - 1 else {"a", "line-2"} if cut >= len(WHOLE) - 1 else set()
    answers = Answers(path)
    assert (answers.ids, answers.lines) == (expected & {"a"}, expected & {"line-2"})
    answers.add(answered(Line(3, b""), "c", 200, "r", b"{}"))
    answers.close()
    assert answers_of(path).keys() == expected | {"c"}


def test_a_custom_id_that_looks_like_a_line_answers_no_line(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(answered(Line(1, b""), "line-2", 200, "r", b"{}"))
    answers = Answers(path)
    assert (answers.ids, answers.lines) == ({"line-2"}, set())
    answers.close()


@pytest.mark.parametrize("text", ["{}\n", "notes\n", "notes", '{"a": 1}\n{"id":"line-', WHOLE.decode() + "notes\n"])
def test_a_file_that_holds_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "out.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is no answer of a batch; name another file"):
        Answers(path)
    assert path.read_text() == text


def test_two_runs_do_not_write_one_file(tmp_path):
    first = Answers(tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="is being written by another run"):
        Answers(tmp_path / "out.jsonl")
    first.close()
    Answers(tmp_path / "out.jsonl").close()


def test_a_disk_that_is_full_is_a_sentence(tmp_path, monkeypatch):
    answers = Answers(tmp_path / "out.jsonl")

    def full(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ConfigError, match="make room, and run the same command again"):
        answers.add(b"x\n")
    answers.close()


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "-i is missing"),
        (["-i", "IN"], "-o is missing"),
        (["-i", "/nowhere", "-o", "OUT"], "/nowhere is not a file"),
        (["-i", "IN", "-o", "/nowhere/out"], "there is no directory /nowhere"),
        (["-i", "IN", "-o", "IN"], "give the answers a file of their own"),
        (["-i", "IN", "-o", "OUT", "--at-once", "0"], "--at-once 0: give an integer"),
        (["-i", "IN", "-o", "OUT", "--coordinator", "tcp://h:1", "--dtype", "float32"], "--dtype is for an instance"),
        (["-i", "IN", "-o", "OUT", "--model", "x"], "give the directory itself, as MODEL"),
        (["-i", "IN", "-o", "OUT", "--port", "1"], "there is no option --port"),
    ],
)
def test_a_wrong_command_line_is_a_sentence(tmp_path, capsys, words, complaint):
    written(tmp_path / "in", request())
    given = [str(tmp_path / word.lower()) if word in ("IN", "OUT") else word for word in words]
    assert run(["run-batch", *given]) == 2
    assert complaint in capsys.readouterr().err


def test_what_is_left_is_said():
    counts = batch.Counts(total=10, known=2, answered=3, refused=1, tokens=50, started_at=0.0)
    assert counts.sentence(10.0) == ("6 of 10 lines, 2 were answered before, 1 with an error, 5 tokens/s, 10 s left")
    assert [batch.duration(seconds) for seconds in (5, 600, 7200)] == ["5 s", "10 min", "2.0 h"]


def test_its_options_are_those_of_an_instance(tmp_path):
    path = str(written(tmp_path / "in", request()))
    told = batch_arguments.parse(["-i", path, "-o", str(tmp_path / "out"), "/m", "--expert-workers", "2"])
    assert told.options.expert_workers == 2
    assert as_flags("`output_file`") == "-o"


@pytest.mark.timeout(180)
def test_a_batch_is_answered_and_a_second_run_computes_nothing_again(tiny_model, tmp_path, capsys):
    requests = [request(f"r{at}", temperature=0) for at in range(5)]
    requests += ["{\n", request("r1"), request("bad", temperature=-1), request("other", url="/v1/embeddings")]
    requests += [request("chat", url=URLS[1], messages=[{"role": "user", "content": "It is"}])]
    source, target = written(tmp_path / "in.jsonl", *requests), tmp_path / "out.jsonl"
    words = ["run-batch", "-i", str(source), "-o", str(target), str(tiny_model), "--threads-per-worker", "1"]
    words += ["--transport", "inproc", "--micro-batches", "1"]
    assert in_a_process(words) == 0
    found = answers_of(target)
    assert found.keys() == {"r0", "r1", "r2", "r3", "r4", "line-6", "line-7", "bad", "other", "chat"}
    good = [found[f"r{at}"]["response"] for at in range(5)]
    assert all(one["status_code"] == 200 and one["body"]["usage"]["completion_tokens"] == 3 for one in good)
    assert len({one["body"]["choices"][0]["text"] for one in good}) == 1
    assert found["bad"]["response"]["status_code"] == 400
    assert "temperature" in found["bad"]["response"]["body"]["error"]["message"]
    assert found["chat"]["response"]["status_code"] == 400  # the model has no chat template
    assert found["line-6"]["error"]["message"].startswith("line 6: it is not JSON")
    assert "is on a line before" in found["line-7"]["error"]["message"]
    assert found["other"]["error"]["code"] == "invalid_request"
    lines = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(lines[:6]) + lines[6][:20])
    kept = answers_of(written(tmp_path / "kept", *(line.decode() for line in lines[:6])))
    assert in_a_process(words) == 0
    again = answers_of(target)
    assert again.keys() == found.keys()
    assert all(again[name] == kept[name] for name in kept)


def in_a_process(words):
    command = [sys.executable, "-m", "msi_launch", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_an_interrupted_run_goes_on_where_it_was(tiny_model, tmp_path):
    requests = [request(f"r{at}", max_tokens=100, ignore_eos=True) for at in range(30)]
    source, target = written(tmp_path / "in.jsonl", *requests), tmp_path / "out.jsonl"
    words = ("run-batch", "-i", source, "-o", target, tiny_model, "--threads-per-worker", 1, "--at-once", 4)
    async with launched(*words) as child:
        while not target.exists() or target.read_bytes().count(b"\n") < 3:
            assert child.process.returncode is None, child.said
            await child_pause()
        child.process.send_signal(signal.SIGINT)
        assert await child.ended() == 130
        assert "the same command goes on from there" in child.said
    before = answers_of(target)
    assert 3 <= len(before) < 30
    async with launched(*words) as child:
        assert await child.ended(180) == 0
        assert f"{len(before)} were answered before" in child.said
    after = answers_of(target)
    assert len(after) == 30
    assert all(after[name] == before[name] for name in before)


async def child_pause():
    import asyncio

    await asyncio.sleep(0.05)
