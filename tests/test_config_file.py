"""Options from a file: the same values as on a command line, which wins; whatever is wrong names its line."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msi.errors import ConfigError
from msi.options import PARAMETERS, flag_of
from msi_launch import arguments, plan_arguments, profile, simulate
from msi_launch.arguments import parse
from msi_launch.command_line import as_flags


@pytest.fixture
def config(tmp_path):
    """Writes a file, and is its path's flag."""

    def write(text):
        path = tmp_path / "options.toml"
        path.write_text(text + "\n")
        return ["--config", str(path)]

    return write


SAME = [
    ("port = 8001", ["--port", "8001"]),
    ('host = "::1"\nport = 0', ["--host", "::1", "--port", "0"]),
    ('"--port" = 8001', ["--port", "8001"]),
    ("max_num_seqs = 3", ["--max-num-seqs", "3"]),
    ("peer-timeout = 2", ["--peer-timeout", "2"]),
    ("peer-timeout = 0.5", ["--peer-timeout", "0.5"]),
    ('micro-batches = "auto"', ["--micro-batches", "auto"]),
    ("micro-batches = 2", ["--micro-batches", "2"]),
    ('model = "/models/a"\ndtype = "bfloat16"', ["/models/a", "--dtype", "bfloat16"]),
    ('dtype = "half"', ["--dtype", "float16"]),
    ("enable-prefix-caching = false", ["--no-enable-prefix-caching"]),
    ("no-enable-prefix-caching = true", ["--no-enable-prefix-caching"]),
    ("enable_prefix_caching = true", ["--enable-prefix-caching"]),
    ("colocated = true", ["--colocated"]),
    ("colocated = false", []),
    ("disable-log-requests = true", ["--disable-log-requests"]),
    ('allowed-origins = ["http://a", "http://b"]', ["--allowed-origins", "http://a,http://b"]),
    ('allowed-origins = "*"', ["--allowed-origins", "*"]),
    ('block-size = 16\n"trust-remote-code" = true', ["--block-size", "16", "--trust-remote-code"]),
    ("trust-remote-code = false", []),
    ("# nothing\n", []),
]


@pytest.mark.parametrize(("text", "words"), SAME, ids=range(len(SAME)))
def test_a_file_says_what_flags_say(config, text, words):
    assert parse(config(text)) == parse(words)


def test_the_command_line_wins(config):
    said = config('port = 1\nmodel = "/a"\nenable-prefix-caching = false\nmicro-batches = 3')
    told = parse(["/b", "--port", "2", *said, "--enable-prefix-caching"])
    assert (told.port, str(told.options.source.model)) == (2, "/b")
    assert told.options.limits.enable_prefix_caching
    assert told.options.micro_batches == 3


def test_what_a_file_says_of_serving_reaches_the_process_that_serves(config):
    told = parse(config("port = 0\ndisable-log-stats = true"))
    again = parse(["--role", "coordinator", *told.serving_flags])
    assert again.port == 0
    assert again.disable_log_stats


WRONG = [
    ('\nport = "8000"', "line 2: port is text; give a number, without quotes"),
    ('port = "http"', "line 1: --port http: give a port from 0 to 65535"),
    ("port = 99999", "line 1: --port 99999: give a port"),
    ("port = 8000.5", "line 1: --port 8000.5: give a port"),
    ("port = true", "line 1: port is a switch's value; give a value of its own"),
    ("port = []", "line 1: port is an array; give one value"),
    ("port = 2026-11-01", "line 1: port is a date or a time; give one value"),
    ("host = 5", "line 1: host is an integer; give text, in quotes"),
    ("host = nan", "line 1: host is a number; give text, in quotes"),
    ("\n\nmax_num_seqs = 'many'", "line 3: --max-num-seqs many: give an integer"),
    ("max-num-seqs = nan", "line 1: --max-num-seqs nan: give an integer"),
    ("peer-timeout = inf", "line 1: --peer-timeout inf: give a number"),
    ('colocated = "yes"', "line 1: colocated is text; give true or false"),
    ("colocated = 1", "line 1: colocated is an integer; give true or false"),
    ("dtype = 'int4'", "line 1: --dtype 'int4' is not one; supported: auto"),
    ("# a\nmax-num-sequences = 3", "line 2: there is no option 'max-num-sequences'; did you mean --max-num-seqs?"),
    ("parent = 3", "line 1: there is no option 'parent'"),
    ("announce = 3", "line 1: there is no option 'announce'"),
    ("config = 'b.toml'", "line 1: there is no option 'config'"),
    ("help = true", "line 1: there is no option 'help'"),
    ("max-num-seqs = 3\nmax_num_seqs = 4", "line 2: max_num_seqs and max-num-seqs are the same option; give one"),
    ("enable-prefix-caching = true\nno-enable-prefix-caching = true", "line 2: no-enable-prefix-caching and"),
    ("[limits]\nmax-num-seqs = 3", "line 1: there is no option 'limits'"),
    ("[port]\na = 3", "line 1: port is a table; give one value"),
    ("api-key = 'k'", "line 1: a key does not belong into a file of options; name its own as --api-key-file"),
    ("tensor-parallel-size = 2", "line 1: --tensor-parallel-size 2 is not built yet"),
    ("enable-lora = true", "line 1: --enable-lora is not built yet"),
    ("port = ", "is not TOML: Invalid value (at line 1, column 8)"),
    ("port: 8000", "is not TOML: "),
    ("port = 1\nport = 2", "is not TOML: Cannot overwrite a value (at line 2"),
    ("a = " + "[" * 100_000, "options.toml is "),
    ("port = " + "9" * 5000, "options.toml"),
]


@pytest.mark.parametrize(("text", "complaint"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_in_a_file_names_the_line(config, text, complaint):
    with pytest.raises(ConfigError) as refused:
        parse(config(text))
    said = as_flags(str(refused.value))
    assert complaint in said
    assert "options.toml" in said
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize("kind", ["nothing", "a folder", "a fifo", "binary", "too large", "no value", "two"])
def test_a_file_that_is_none_is_a_sentence_at_once(tmp_path, kind):
    path = tmp_path / "options.toml"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a fifo":
        os.mkfifo(path)
    elif kind == "binary":
        path.write_bytes(b"\xff\0")
    elif kind == "too large":
        path.write_text("#" * (1 << 21))
    elif kind == "two":
        path.write_text("")
    words = ["--config", str(path)]
    words = {"no value": words[:1], "two": words * 2}.get(kind, words)
    with pytest.raises(ConfigError) as refused:
        parse(words)
    assert "--config" in str(refused.value) or "options.toml" in str(refused.value)


def test_every_parameter_of_an_instance_can_stand_in_a_file(config, tmp_path):
    """By its default, or something else that is allowed."""
    values = {"model": str(tmp_path), "served_model_name": "m", "device": "cpu", "rdma_device": "d", "rdma_gid": "3"}
    lines = []
    for one in PARAMETERS:
        value = values.get(one.name, one.about.zero or one.default)
        if value is None:
            continue  # files, which are to be there
        shown = {bool: str(value).lower(), str: f'"{value}"'}.get(type(value), value)
        lines.append(f"{flag_of(one).strip('-') if one.about.file != 'directory' else one.name} = {shown}")
    told = parse(config("\n".join(lines))).options
    assert told.source.model == tmp_path
    assert told.host.rdma.rdma_gid == "3"


@pytest.mark.parametrize(
    ("command", "text", "name", "value"),
    [
        (plan_arguments, 'model = "dbrx"\ngpu = "h20"\ntpot-ms = 100\nnum-plans = 2', "num_plans", 2),
        (simulate, "requests = 7\nmicro-batches = 2\nattention-ms = 1.5", "requests", 7),
        (profile, 'model = "demo"\nbatches = "4,8"\noutput = "p.json"', "model", "demo"),
    ],
)
def test_the_other_commands_take_one_too(config, command, text, name, value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    told = getattr(command.parse(config(text)), name)
    assert str(told) == str(value)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["port", "host", "colocated", "max_num_seqs", "micro-batches", "dtype", "x", "model", "tp"]),
        st.booleans()
        | st.integers(-(10**20), 10**20)
        | st.floats()
        | st.from_regex(r"[a-z0-9/ ]{0,9}", fullmatch=True),
        max_size=4,
    )
)
def test_any_values_are_understood_or_refused_in_a_sentence(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("config") / "options.toml"
    shown = {key: str(value).lower() if not isinstance(value, str) else f'"{value}"' for key, value in values.items()}
    path.write_text("".join(f"{key} = {value}\n" for key, value in shown.items()))
    try:
        arguments.parse(["--config", str(path)])
    except ConfigError as error:
        said = str(error)
    else:
        said = "understood"
    assert "\n" not in said
    assert len(said) < 500
