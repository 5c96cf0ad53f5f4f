"""Parameters: written once, seen everywhere; named as such by the library, and as flags by the command line alone."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from msi.errors import ConfigError
from msi.options import PARAMETERS
from msi.parameters import check_parameters, parameter, parameters_of, section_of
from msi_launch.arguments import parse
from msi_launch.command_line import CommandLine, as_flags
from msi_launch.plan_arguments import parse as parse_plan

ROOT = Path(__file__).parent.parent
NEW = """
    made_up_limit: Annotated[int, range(1, 10)] = parameter(3, "what nobody had before", metavar="N", group=LIMITS)
"""
SEES_IT = """
from dataclasses import fields
import msgpack
import msi.settings
from msi import ConfigError, Engine, ProtocolError
from msi.control.members import Member, assignment
from msi.control.messages import COORDINATOR_END, WORKER_END
from msi.instance.instance import build_plan
from msi.options import InstanceOptions
from msi.precision import Precision
from msi.types import Place

def refused(kind, call):
    try:
        call()
    except kind as error:
        return str(error)

Engine.local(made_up_limit=7)
assert refused(ConfigError, lambda: Engine.local(made_up_limit=10)) == (
    "`made_up_limit` 10: give an integer from 1 to 9"
)
assert "did you mean 'made_up_limit'" in refused(TypeError, lambda: Engine.local(made_up=7))
options = InstanceOptions.of(made_up_limit=7)
assert options.flags() == ["--made-up-limit=7"]
plan, _ = build_plan(options)
assert plan.limits.made_up_limit == 7
member = Member("expert-0", "expert", Place(0), 0, b"", 1, "h", 0.0)
told = assignment(plan, member, Precision.of("float32"), plan.placement)
payload = COORDINATOR_END.encode(told)
assert WORKER_END.decode(payload) == told
assert WORKER_END.decode(payload).limits.made_up_limit == 7
values = msgpack.unpackb(payload)
limits = next(one for one in values if isinstance(one, list) and 7 in one and len(one) == len(fields(told.limits)))
limits[limits.index(7)] = 10
assert "10 is not from 1 to 9" in refused(ProtocolError, lambda: WORKER_END.decode(msgpack.packb(values)))
print("seen")
"""


@pytest.mark.slow
def test_a_new_parameter_is_one_field_and_is_there_everywhere(tmp_path):
    """In the help, the checks, Engine.local, the flags of children, the plan, and the assignment on the wire."""
    for source, name in (("msi", "msi"), ("launch", "msi_launch")):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / source, tmp_path / name, copy_function=os.symlink, ignore=ignored)
    settings = tmp_path / "msi" / "settings.py"
    text = settings.read_text()
    settings.unlink()
    first, last = text.split("    num_gpu_blocks_override: Count", 1)
    settings.write_text(f"{first}{NEW[1:]}    num_gpu_blocks_override: Count{last}")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "80"}

    def run(*words):
        command = [sys.executable, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path)

    seen = run("-c", SEES_IT)
    assert (seen.stdout, seen.stderr) == ("seen\n", "")
    assert "  --made-up-limit N           what nobody had before; 3\n" in run("-m", "msi_launch", "--help").stdout
    assert run("-m", "msi_launch", "--made-up-limit", "0").stderr == (
        "msi-launch: --made-up-limit 0: give an integer from 1 to 9\n"
    )
    assert "did you mean --made-up-limit?" in run("-m", "msi_launch", "--made-up", "1").stderr


# -- sections --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    size: Annotated[int, range(1, 5)] = parameter(2, "how large")
    told: str = "not a parameter"

    def __post_init__(self) -> None:
        check_parameters(self)


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    patience_s: Annotated[float, (0.0, 9.0)] = parameter(1.5, "how long", metavar="S")
    kind: str = parameter("a", "which", name="sort", choices=("a", "b"))

    def __post_init__(self) -> None:
        check_parameters(self)


def test_sections_within_sections_are_filled_by_the_names_of_their_parameters():
    assert [(one.name, one.path, one.kind, one.default) for one in parameters_of(Outer)] == [
        ("size", ("inner", "size"), int, 2), ("patience_s", ("patience_s",), float, 1.5), ("sort", ("kind",), str, "a"),
    ]  # fmt: skip
    assert section_of(Outer, {"size": 4, "sort": "b"}) == Outer(Inner(4), 1.5, "b")
    assert [one.of(Outer(Inner(3))) for one in parameters_of(Outer)] == [3, 1.5, "a"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"size": 5}, "`size` 5: give an integer from 1 to 4"),
        ({"size": True}, "`size` True: give an integer from 1 to 4"),
        ({"patience_s": 0}, "`patience_s` 0: give a number of seconds > 0, at most 9"),
        ({"patience_s": float("nan")}, "`patience_s` nan: give a number of seconds > 0, at most 9"),
        ({"sort": "c"}, "`sort` 'c' is not one; supported: a, b"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_its_parameters_name(given, sentence):
    with pytest.raises(ConfigError) as refused:
        section_of(Outer, given)
    assert str(refused.value) == sentence


@dataclass(frozen=True)
class Kinds:
    here: Path | None = parameter(None, "a path")
    is_on: bool = parameter(False, "a switch")
    called: str = parameter("", "a text")

    def __post_init__(self) -> None:
        check_parameters(self)


def test_a_path_may_be_given_as_a_text():
    assert section_of(Kinds, {"here": "a/b"}) == section_of(Kinds, {"here": Path("a/b")}) == Kinds(Path("a/b"))
    assert section_of(Kinds, {"here": None}) == section_of(Kinds, {"called": "", "is_on": False}) == Kinds()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"here": 3}, "`here` 3: give a path"),
        ({"is_on": "no"}, "`is_on` 'no': give True or False"),
        ({"is_on": 1}, "`is_on` 1: give True or False"),
        ({"called": None}, "`called` None: give a text"),
        ({"called": b"x"}, "`called` b'x': give a text"),
    ],
)
def test_a_value_of_another_type_is_refused(given, sentence):
    with pytest.raises(ConfigError) as refused:
        section_of(Kinds, given)
    assert str(refused.value) == sentence


def test_every_parameter_of_an_instance_says_what_it_is():
    for one in PARAMETERS:
        assert one.about.help, one.name
        assert one.about.group, one.name
        assert (one.about.metavar is None) == (one.kind is bool), one.name


# -- who speaks of flags ---------------------------------------------------------------------------------------------


def test_the_launcher_says_flags_where_the_library_says_parameters():
    parse([])
    for said, shown in [
        ("`gpu_memory_utilization` 2: give less", "--gpu-memory-utilization 2: give less"),
        ("raise `peer_timeout_s`, or use `transport=inproc`", "raise --peer-timeout, or use --transport inproc"),
        ("`enable_prefix_caching=False` turns it off", "--no-enable-prefix-caching turns it off"),
        ("give `model`, or another `port`", "give MODEL, or another --port"),
        ("`unheard_of` and `chat` of a `prompt text`", "`unheard_of` and `chat` of a `prompt text`"),
        ("a ` alone", "a ` alone"),
    ]:
        assert as_flags(said) == shown


def sentences_of(path):
    """Texts of a file that are more than one word and no docstring."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        if is_text and " " in node.value:
            yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value


def test_the_library_names_parameters_and_no_flags_but_with_their_command():
    """A sentence is for whoever called: from Python, over HTTP, or by a command, which shows it in its own words."""
    own = re.compile(r"\b(hf download|msi-\w+)\b[^;,(]*?--")
    said = [one for path in sorted((ROOT / "msi").rglob("*.py")) for one in sentences_of(path)]
    assert len(said) > 500
    flags = [(where, text) for where, text in said if re.search(r"(?<!\w)--[a-z]", text) and not own.search(text)]
    assert [one for one in flags if "--local-dir" not in one[1]] == []


def test_every_parameter_that_a_sentence_names_has_a_flag():
    parse([])
    parse_plan(["dbrx", "--gpu", "h20"])
    known = {one.name for one in PARAMETERS}
    for path in sorted((ROOT / "msi").rglob("*.py")):
        for where, text in sentences_of(path):
            for name in re.findall(r"(?<!`)`([a-z][a-z0-9_]*)(?:=[^`]*)?`", text):
                assert name in known or not as_flags(f"`{name}`").startswith("`"), f"{where}: {name}"


def test_a_command_line_that_calls_a_parameter_otherwise_is_shown_its_own_name():
    parser = CommandLine("thing", "It does things.")
    parser.add_argument("--much", dest="how_much_s", type=float, default=0.0, help="how much")
    parser.parse_args([])
    assert as_flags("raise `how_much_s`") == "raise --much"
