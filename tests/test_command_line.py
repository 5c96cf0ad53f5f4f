"""Command lines: whatever is wrong with one is one sentence that says what to do, and nothing is started."""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msi import __version__
from msi.errors import ConfigError
from msi.options import PARAMETERS, InstanceOptions, flag_of
from msi_launch import ctl, main, plan, profile, simulate
from msi_launch.arguments import parse
from msi_launch.command_line import CommandLine, quoted
from msi_launch.gateway import template_of
from msi_launch.vllm_flags import ANY, FOREIGN

ROOT = Path(__file__).parent.parent
DIGITS = "9" * 400
INTEGER_FLAGS = [flag_of(one) for one in PARAMETERS if one.kind is int]
NUMBER_FLAGS = [flag_of(one) for one in PARAMETERS if one.kind is float]


def refused(argv, capsys, monkeypatch, command=main):
    """What msi-launch says to a command line that it must refuse before it starts anything."""
    monkeypatch.setattr("uvloop.run", lambda started: pytest.fail("it was started"))
    assert command.run(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, "one line"
    assert len(captured.err) < 500
    assert "Traceback" not in captured.err
    assert captured.err.isascii() or captured.err.rstrip("\n").isprintable()
    return captured.err.rstrip("\n")


HOSTILE = [
    (["--port", "99999"], "--port 99999: give a port from 0 to 65535"),
    (["--port", "-1"], "--port -1: give a port from 0 to 65535"),
    (["--port=-1"], "--port -1: give a port"),
    (["--port", "http"], "--port http: give a port"),
    (["--port", ""], "--port '': give a port"),
    (["--port", "80 80"], "--port '80 80': give a port"),
    (["--port", "8000.0"], "--port 8000.0: give a port"),
    (["--port", "0x1f40"], "--port 0x1f40: give a port"),
    (["--port", "\uff18\uff10"], "give a port"),
    (["--port", "8_000"], "--port 8_000: give a port"),
    (["--port", DIGITS], "give a port"),
    (["--port", "9" * 5000], "give a port"),
    (["--port"], "--port needs a value"),
    (["--port", "--host"], "--port needs a value"),
    (["--host", ""], "--host is empty; give a host's name or address alone"),
    (["--host", "http://localhost"], "give a host's name or address alone; the port is --port"),
    (["--host", "127.0.0.1:8000"], "--host '127.0.0.1:8000': give a host's name or address alone"),
    (["--host", "a b"], "--host 'a b': give a host's"),
    (["--host", "[::1"], "--host '[::1': give a host's"),
    (["--host", "x" * 400], "give a host's"),
    (["--api-key", ""], "--api-key is empty; give a key"),
    (["--api-key", "two words"], "give a key of visible ASCII characters"),
    (["--api-key", "clé"], "give a key of visible ASCII characters"),
    (["--api-key", "-secret"], "--api-key needs a value; one that begins with - is written --api-key=VALUE"),
    (["--chat-template", "/"], "--chat-template / is not a file"),
    (["--chat-template", ""], "--chat-template '' is not a file"),
    (["--chat-template", "/dev/zero"], "--chat-template /dev/zero is not a file"),
    (["--chat-template", "x" * 400], "cannot be read: File name too long"),
    (["--plan", "/"], "--plan / is not a file"),
    (["--plan", "/dev/zero"], "--plan /dev/zero is not a file"),
    (["--plan", ""], "--plan '' is not a file"),
    (["--plan", "/nowhere"], "/nowhere cannot be read"),
    (["--trace", "/"], "--trace / is not a file"),
    (["--trace", "/nowhere/trace.json"], "cannot be written: there is no directory /nowhere"),
    (["--trace", "/dev/null"], "--trace /dev/null is not a file"),
    (["--trace", ""], "--trace '' is not a file; give a file's name"),
    ([""], "MODEL is empty"),
    (["one", "two"], "two is a word too many"),
    (["--experts", "3"], "there is no option --experts; did you mean --expert-workers?"),
    (["--expert-worker=3"], "did you mean --expert-workers?"),
    (["--max_model_len", "3"], "did you mean --max-model-len?"),
    (["--MAX-NUM-SEQS", "3"], "did you mean --max-num-seqs?"),
    (["--threads", "3"], "did you mean --threads-per-worker?"),
    (["--micro-batch", "2"], "did you mean --micro-batches?"),
    (["--verbose"], "there is no option --verbose"),
    (["-x"], "there is no option -x"),
    (["--" + "x" * 400], "there is no option '--xxx"),
    (["--pr\x1b[31m"], "there is no option '--pr\\x1b[31m'"),
    (["--attention", "2"], "there is no option --attention; did you mean --attention-workers?"),
    (["--colocated=yes"], "--colocated takes no value"),
    (["--no-colocated"], "there is no option --no-colocated; did you mean --colocated?"),
    (["--micro-batches", "0"], "--micro-batches '0' is not one; supported: auto, 1, 2, 3, 4"),
    (["--micro-batches", "5"], "--micro-batches '5' is not one"),
    (["--role", "boss"], "--role 'boss' is not one; supported: coordinator, "),
    (["--role", ""], "--role '' is not one"),
    (["--role", "worker"], "--role worker needs --coordinator tcp://HOST:PORT"),
    (["--role", "worker", "--prompt", "a", "--coordinator", "tcp://h:1"], "--prompt and --role worker"),
    (
        ["--role", "worker", "--coordinator", "tcp://h:1", "--standby", "tcp://h:2"],
        "--standby is for --role coordinator",
    ),
    (["--role", "coordinator", "--coordinator", "tcp://h:1", "--standby", "tcp://h:2"], "with --no-gateway"),
    (
        ["--role", "coordinator", "--coordinator", "tcp://h:1", "--standby", "tcp://h:2", "--no-gateway"],
        "--standby needs a secret",
    ),
    (["--log-level", "loud"], "--log-level 'loud' is not one; supported: debug, info, warning, error"),
    (["--dtype", "int4"], "--dtype 'int4' is not one"),
    (["--load-format", "gguf"], "--load-format 'gguf' is not one"),
    (["--device", "tpu"], "--device 'tpu' is not one"),
    (["--device", "cuda:-1"], "--device 'cuda:-1' is not one"),
    (["--device", "cuda:" + DIGITS], "is not one; supported: cpu, cuda, cuda:N"),
    (["--transport", "pigeon"], "--transport 'pigeon' is not one"),
    (["--transport", "rdma", "--rdma-ack-class", "256"], "--rdma-ack-class 256: give an integer from 0 to 255"),
    (["--worker-id", "a b"], "--worker-id 'a b': give up to 64 letters, digits"),
    (["--worker-id", "a\nb"], "--worker-id 'a\\nb': give up to 64"),
    (["--worker-id", ""], "--worker-id is empty"),
    (["--served-model-name", "a\nb"], "--served-model-name 'a\\nb': give a name"),
    (["--served-model-name", ""], "--served-model-name is empty"),
    (["--served-model-name", "x" * 400], "give a name of 1 to 256"),
    (["--max-tokens", "0", "--prompt", "a"], "--max-tokens 0: give an integer from 1 to"),
    (["--max-tokens", "NaN"], "--max-tokens NaN: give an integer"),
    (["--colocated", "--expert-workers", "2"], "--colocated is one process with both roles"),
    (["--max-num-batched-tokens", "1000"], "is more than a slot's 512 rows"),
    (["--enable-prefix-caching=no"], "takes no value"),
    (["--json"], "--json is for --check; give that, too, or leave it out"),
    (["--config", "/nowhere"], "--config /nowhere cannot be read: there is no such file"),
    (["\udcff"], "is not text in UTF-8"),
    (["--prompt", "caf\udce9"], "is not text in UTF-8"),
    (["--\udcff"], "is not text in UTF-8"),
]


@pytest.mark.parametrize(("argv", "complaint"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_wrong_command_line_is_refused_in_one_sentence(argv, complaint, capsys, monkeypatch):
    said = refused(argv, capsys, monkeypatch)
    assert said.startswith("msi-launch: ")
    assert complaint in said


@pytest.mark.parametrize("flag", INTEGER_FLAGS)
@pytest.mark.parametrize("value", ["-1", "1.5", "", "many", "nan", "inf", "1e3", DIGITS, "9" * 5000, "0b1", " 1"])
def test_counts_have_bounds(flag, value, capsys, monkeypatch):
    assert flag in refused([f"{flag}={value}"], capsys, monkeypatch)


@pytest.mark.parametrize("flag", NUMBER_FLAGS)
@pytest.mark.parametrize("value", ["-1", "0", "", "soon", "nan", "inf", "-inf", "1e999", "1e7", DIGITS, "1_0"])
def test_numbers_are_finite_and_have_bounds(flag, value, capsys, monkeypatch):
    assert flag in refused([f"{flag}={value}"], capsys, monkeypatch)


def test_files_that_are_none_or_cannot_be_read_are_refused_and_not_waited_for(tmp_path, capsys, monkeypatch):
    fifo, secret = tmp_path / "fifo", tmp_path / "secret"
    os.mkfifo(fifo)
    secret.write_text("x")
    secret.chmod(0)
    for flag in ("--plan", "--chat-template", "--trace"):
        assert f"{flag} {fifo} is not a file" in refused([flag, str(fifo)], capsys, monkeypatch)
        if not os.access(secret, os.R_OK):  # root reads everything
            assert "permission denied" in refused([flag, str(secret)], capsys, monkeypatch)
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    assert "deep.json is not a whole JSON file" in refused(["--plan", str(deep)], capsys, monkeypatch)


@pytest.mark.parametrize("flag", FOREIGN, ids=lambda flag: flag.names[0])
def test_a_flag_of_vllms_that_is_not_built_says_what_to_use_instead(flag, capsys, monkeypatch):
    for name in flag.names:
        if flag.neutral != ANY:
            said = refused([name, "7"] if flag.takes_value else [name], capsys, monkeypatch)
            assert said.startswith(f"msi-launch: {name}")
            assert said.endswith(flag.instead)
            assert flag.instead
        for value in [value for value in flag.neutral if value != "*"] or ["7"] * (flag.neutral == ANY):
            given = [name, value] if flag.takes_value else [name]
            assert parse(given).ignored == (" ".join([name, *map(quoted, given[1:])]),)
            assert parse(given).options == InstanceOptions()


VLLM_LINES = [
    "/m --tensor-parallel-size 1 --max-model-len 4096 --gpu-memory-utilization 0.9 --trust-remote-code --dtype half",
    "/m -tp 1 -pp 1 --enforce-eager --swap-space 4 --max-num-seqs 256 --disable-log-requests -O3",
    "/m --served-model-name m --enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3",
    "/m --enable-expert-parallel --no-enable-prefix-caching --max-num-batched-tokens 512 --num-gpu-blocks-override 100",
    "/m --host 0.0.0.0 --port 8001 --api-key k --disable-uvicorn-access-log",
    '/m --kv-cache-dtype auto --block-size 16 --compilation-config {"level":3} --generation-config vllm --dtype float',
    '/m --allowed-origins ["*"] --allowed-methods ["*"] --async-scheduling --stream-interval 1 --seed 0',
    "/m --runner generate --tokenizer-mode auto --config-format hf --scheduling-policy fcfs --load-format dummy",
]


@pytest.mark.parametrize("line", VLLM_LINES)
def test_command_lines_of_vllms_that_ask_for_nothing_missing_are_taken(line):
    told = parse(line.split())
    assert str(told.options.source.model) == "/m"
    assert told.options.precision.compute in ("auto", "float16", "float32")


def test_no_flag_of_vllms_is_both_here_and_not_here():
    parser_flags = {word for flag in FOREIGN for word in flag.names}
    listed = subprocess.run(
        [sys.executable, "-m", "msi_launch", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert not {flag for flag in parser_flags if re.search(rf"{re.escape(flag)}(?![a-z-])", listed)}


@pytest.mark.parametrize(
    ("host", "listened"), [("::1", "::1"), ("[::1]", "::1"), ("localhost", "localhost"), ("0.0.0.0", "0.0.0.0")]
)
def test_hosts_are_addresses_and_names_with_or_without_brackets(host, listened):
    assert parse(["--host", host]).host == listened


def test_what_was_said_of_serving_reaches_the_process_that_serves(tmp_path):
    template = tmp_path / "a b.jinja"
    template.write_text("x")
    given = ["--host", "::1", "--port=0", "--chat-template", str(template), "--disable-log-stats",
             "--no-enable-log-requests"]  # fmt: skip
    first = parse(given)
    again = parse(["--role", "coordinator", *first.serving_flags])
    for name in ("host", "port", "chat_template", "disable_log_stats", "enable_log_requests"):
        assert getattr(again, name) == getattr(first, name)
    assert not again.enable_log_requests
    assert parse(["--disable-log-requests"]).serving_flags == ("--no-enable-log-requests",)
    assert parse([]).serving_flags == ()


@pytest.mark.parametrize("role", [[], ["--role", "coordinator"], ["--role", "gateway", "--coordinator", "tcp://h:1"]])
def test_a_key_reaches_whichever_process_serves_and_no_command_line(role, monkeypatch):
    monkeypatch.setenv("MSI_API_KEY", "")  # and back to what it was, whatever `run` does to it
    monkeypatch.setattr("uvloop.run", lambda started: started.close())
    arguments = parse([*role, "--api-key=-k"])
    assert not any("-k" in word for word in arguments.serving_flags)
    assert main.run([*role, "--api-key=-k"]) == 0
    assert parse(["--role", "gateway", "--coordinator", "tcp://h:1"]).api_keys == ("-k",), "as its child sees it"


def test_options_survive_the_way_to_a_child(tmp_path):
    given = ["--served-model-name=-m", "--max-num-seqs", "3", "--no-enable-prefix-caching", "--peer-timeout", "0.5"]
    options = parse(given).options
    assert parse(options.flags()).options == options
    dashed = InstanceOptions.of(model=Path("-model"))
    assert parse(dashed.flags()).options.source.model_dir.name == "-model"


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(max_size=30) | st.sampled_from(["--port", "--role", "-tp", "--", "-", "--plan", "="]), max_size=5)
)
def test_any_words_are_understood_or_refused_in_a_sentence(words):
    try:
        parse([word.replace("\0", "") for word in words if word not in ("-h", "--help", "--version")])
    except ConfigError as error:
        said = str(error)
    else:
        said = "understood"
    assert "\n" not in said
    assert len(said) < 500


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["msi_launch", "msi_launch.plan"])
def test_help_fits_80_columns_and_every_option_says_what_it_is(module):
    code = f"from {module}{'.main' if module == 'msi_launch' else ''} import main; main()"
    environment = {**os.environ, "COLUMNS": "80"}
    started = time.monotonic()
    said = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=60, check=True, env=environment
    ).stdout
    assert time.monotonic() - started < 30
    assert max(map(len, said.splitlines())) <= 80
    lines = said.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  -"):
            explained = len(line) > 30 and line[28:30].strip() == "" and line[30:].strip()
            assert explained or lines[number + 1].startswith(" " * 30), f"{line!r} has no explanation"


@pytest.mark.parametrize("columns", ["1", "20", "0", "-5", "many"])
def test_help_works_in_any_terminal(columns):
    environment = {**os.environ, "COLUMNS": columns, "TERM": "dumb", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "msi_launch", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
    assert "--attention-workers" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (main, "msi-launch"),
        (plan, "msi-plan"),
        (profile, "msi-profile"),
        (simulate, "msi-simulate"),
        (ctl, "msi-ctl"),
    ],
)
def test_version_is_said(command, name, capsys):
    with pytest.raises(SystemExit) as ended:
        command.run(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{name} {__version__}\n"


def test_every_default_is_a_value_that_is_allowed():
    """A child is told what differs from the defaults only."""
    assert parse([]).options == InstanceOptions()
    assert InstanceOptions().flags() == []


def test_a_parser_knows_its_flags_by_their_whole_names_only():
    parser = CommandLine("thing", "It does things.")
    parser.add_argument("--length", type=int, default=0, help="how long")
    assert parser.parse_args(["--length", "3"]) == argparse.Namespace(length=3)
    with pytest.raises(ConfigError, match=r"there is no option --len; did you mean --length\? \(thing --help"):
        parser.parse_args(["--len", "3"])


# -- msi-plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "MODEL is missing"),
        (["dbrx", "--gpus", "h20"], "there is no option --gpus; did you mean --gpu?"),
        (["dbrx", "--gpu", "h20", "--tpot", "3"], "did you mean --tpot-ms?"),
        (["dbrx", "--gpu", "h20", "--tpot-ms", "nan"], "--tpot-ms"),
        (["dbrx", "--gpu", "h20", "--tpot-ms", "1e999"], "--tpot-ms"),
        (["dbrx", "--gpu", "h20", "--input-len", "inf"], "--input-len"),
        (["dbrx", "--gpu", "h20", "--input-len", DIGITS], "--input-len"),
        (["dbrx", "--gpu", "h20", "--max-batch", "1.5"], "--max-batch"),
        (["dbrx", "--gpu", "h20", "--max-batch", DIGITS], "--max-batch"),
        (["dbrx", "--gpu", "h20", "--num-plans", DIGITS], "--num-plans"),
        (["dbrx", "--gpu", f"h20:{DIGITS}"], "h20"),
        (["dbrx", "--gpu", "h20:²"], "is not a number of GPUs"),
        (["dbrx", "--gpu", ","], "no GPU is called"),
        (["dbrx", "--gpu", "h20", "--tp", DIGITS], "--tp"),
        (["dbrx", "--gpu", "h20", "--tp", "nan"], "--tp nan"),
        (["dbrx", "--gpu", "h20", "--assume", "memory=inf"], "--assume memory=inf"),
        (["dbrx", "--gpu", "h20", "--assume", "memory=nan"], "--assume memory=nan"),
        (["dbrx", "--gpu", "h20", "--assume", "memory"], "--assume memory"),
        (["dbrx", "--gpu", "h20", "--objective", "fame"], "--objective 'fame' is not one"),
        (["dbrx", "--gpu", "h20", "-o", "/"], "/ is not a file"),
        (["dbrx", "--gpu", "h20", "--plot", "/nowhere/a.png"], "--plot /nowhere/a.png cannot be written"),
        (["dbrx", "--gpu", "h20", "--plot", "front.txt"], "--plot"),
        (["dbrx", "--gpu", "h20", "--catalogue", "/"], "--catalogue / is not a file"),
        (["dbrx", "--gpu", "h20", "--profile", "/dev/zero"], "--profile /dev/zero is not a file"),
        (["", "--gpu", "h20"], "MODEL is empty"),
        (["x" * 400, "--gpu", "h20"], "no model is called"),
        (["a\nb", "--gpu", "h20"], "no model is called"),
    ],
)
def test_msi_plan_refuses_in_one_sentence(argv, complaint, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert complaint in refused(argv, capsys, monkeypatch, plan)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "MODEL is missing"),
        (["demo", "--batch", "4"], "there is no option --batch; did you mean --batches?"),
        (["demo", "--batches", "4,0"], "--batches 0: give numbers with commas between them, each from 1"),
        (["demo", "--contexts", ""], "--contexts '': give numbers"),
        (["demo", "--threads", DIGITS], "--threads"),
        (["demo", "--transport", "shm,pigeon"], "--transport pigeon is not one; supported: inproc, shm, tcp"),
        (["demo", "--dtype", "int4"], "--dtype 'int4' is not one"),
        (["demo", "-o", "/nowhere/profile.json"], "there is no directory /nowhere"),
        (["/nowhere/model"], "/nowhere/model"),
        (["demo", "--device", "abacus"], "abacus"),
    ],
)
def test_msi_profile_refuses_in_one_sentence(argv, complaint, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert complaint in refused(argv, capsys, monkeypatch, profile)


# -- what messages advise --------------------------------------------------------------------------------------------


OTHERS = {
    "--local-dir": "hf download",
    "--ntasks": "srun",
    "--shm-size": "docker run",
    "--ulimit": "docker run",
    "--signal": "sbatch",
}


def flags_in_strings():
    """(file and line, flag) for every flag that a string of the sources names, those in docstrings included."""
    for path in sorted([*(ROOT / "msi").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-])", node.value):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", flag


def test_advice_names_flags_that_exist():
    """Of msi-launch, msi-plan or a script; of vLLM where they are refused; of others where those are named."""
    known = {"--help", "--version", "--no-gateway", *OTHERS} | {flag for one in FOREIGN for flag in one.names}
    for path in (*(ROOT / "launch").glob("*.py"), *(ROOT / "tools").glob("*.py")):
        known |= flags_of(path)
    known |= {flag_of(one) for one in PARAMETERS}
    known |= {name.replace("--", "--no-", 1) for name in known}
    unknown = {(where, flag) for where, flag in flags_in_strings() if flag not in known}
    assert not unknown


def flags_of(path):
    """Those that the parser of a file is given."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    adding = [
        call for call in calls if getattr(call.func, "id", getattr(call.func, "attr", "")) in ("add", "add_argument")
    ]
    words = [word for call in adding for word in call.args]
    return {word.value for word in words if isinstance(word, ast.Constant) and str(word.value).startswith("--")}


@pytest.mark.parametrize("kind", ["nothing", "a folder", "a fifo", "a device", "binary", "too large"])
def test_a_chat_template_that_is_no_text_file_is_a_sentence_at_once(tmp_path, kind):
    """A gateway that starts again reads it anew, long after the command line was looked at."""
    path = tmp_path / "template.jinja"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a fifo":
        os.mkfifo(path)
    elif kind == "a device":
        path = Path("/dev/zero")
    elif kind == "binary":
        path.write_bytes(b"\xff\0")
    elif kind == "too large":
        with path.open("wb") as file:
            file.truncate(1 << 30)
    with pytest.raises(ConfigError, match=f"^--chat-template: {re.escape(str(path))} "):
        template_of(path)


def test_a_chat_template_is_read_as_it_is(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_bytes("{{ messages[0].content }} é\n".encode())
    assert template_of(path) == "{{ messages[0].content }} é\n"
    assert template_of(None) == ""
