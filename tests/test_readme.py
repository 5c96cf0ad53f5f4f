"""README says what is there: its file map, its flags, its scripts and its code."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from msi.models.shape import read_shape
from msi.planner.profile import to_json
from msi_launch import plan as msi_plan
from msi_launch import profile as msi_profile
from msi_launch import simulate as msi_simulate
from msi_launch.arguments import parse
from tests.test_launch import free_port, launched
from tests.test_machine_plans import profile

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_map_names_every_module_and_nothing_that_is_not_there():
    section = README.split("## Where things are")[1].split("\n## ")[0]
    named: set[str] = set()
    for row in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE):
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):
            if "/" in name:
                folder = str(Path(name).parent) if not name.endswith("/") else ""
            named.add(name if "/" in name else f"{folder}/{name}")
    for name in named:
        assert (ROOT / name).exists(), f"README's map names {name}, which is not there"
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "msi").glob("*.py")}
    modules |= {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in (ROOT / "msi").glob("*/__init__.py")}
    basics = {"msi/__init__.py", "msi/errors.py", "msi/types.py", "msi/meter.py", "msi/tracing.py"}
    assert modules - named <= basics, f"README's map leaves out {sorted(modules - named - basics)}"


def test_every_flag_and_script_exists():
    said = subprocess.run(
        [sys.executable, "-m", "msi_launch", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    options = README.split("## Options")[1].split("\n## ")[0]
    for flag in set(re.findall(r"`(--[a-z][a-z-]+)", options)):
        assert re.search(rf"{flag}\b", said), f"README names {flag}, msi-launch does not know it"
    for flag in set(re.findall(r"^  (?:-\w, )?(--[a-z][a-z-]+)", said, flags=re.MULTILINE)) - {"--help"}:
        named = flag in options or flag.replace("--", "--no-", 1) in options
        assert named, f"README's options leave out {flag}"
    for script in set(re.findall(r"\btools/[a-z_]+(?:\.py)?", README)):
        assert (ROOT / script).exists(), f"README names {script}, which is not there"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_python_examples_are_python_and_use_what_exists(code):
    import msi

    compile(code, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for name in re.findall(r"from msi import (.*)", code):
        assert all(hasattr(msi, part.strip()) for part in name.split(","))


SHELL = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)


def commands(block):
    """A block's command lines, without comments and prompts; those joined by && apart."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def test_shell_blocks_are_shell():
    for block in SHELL:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=60)
    used = {words[0] for block in SHELL for words in commands(block)}
    assert {"msi-launch", "msi-plan", "curl", "."} <= used


@pytest.fixture
def model_in_place(tiny_model, tmp_path, monkeypatch):
    """Plans and profiles land in a folder of their own, beside the scripts that README names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    return lambda words: [str(tiny_model) if word == "/models/mixtral" else word for word in words]


@pytest.mark.slow
def test_every_command_is_understood_and_what_plans_is_run(model_in_place, tmp_path, capsys):
    """In the order of the page: what one writes, another reads."""
    profiled = False
    for block in SHELL:
        for name, *words in commands(block):
            words = model_in_place(words)
            if name == "msi-launch":
                parse(words)
            elif name == "msi-plan" and "--profile" in words:
                assert profiled
                words[words.index("profile.json")] = str(_profile(words[0], tmp_path))
                assert msi_plan.run(words) == 0, capsys.readouterr().err
            elif name == "msi-plan":
                assert msi_plan.run(words) == 0, capsys.readouterr().err
            elif name == "msi-profile":
                msi_profile.parse(words)
                profiled = True
            elif name == "msi-simulate":
                msi_simulate.parse(words)
            elif name.startswith("tools/"):
                _check_script(name, words)
            else:
                assert name in ("curl", "."), f"README runs {name}"


def _profile(model, folder):
    """As msi-profile would have measured, which takes minutes."""
    shape = read_shape(Path(model))
    measured = replace(profile(), model=shape.name, config_digest=shape.config_digest)
    path = folder / "profile.json"
    path.write_text(json.dumps(to_json(measured)))
    return path


def _check_script(name, words):
    assert os.access(ROOT / name, os.X_OK)
    if name.endswith(".py"):
        listed = subprocess.run(
            [sys.executable, str(ROOT / name), "--help"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
        for flag in re.findall(r"^--?[a-z][a-z-]*", "\n".join(words), flags=re.MULTILINE):
            assert re.search(rf"{flag}\b", listed), f"README gives {flag} to {name}"


def test_what_setup_makes_is_on_the_path_once_it_is_activated():
    activate = ROOT / ".venv/bin/activate"
    if not activate.exists() or f'"{ROOT}/.venv"' not in activate.read_text():
        pytest.skip("msi is installed elsewhere")
    commands = ["msi-launch", "msi-plan", "msi-profile", "msi-simulate"]
    script = " && ".join([". .venv/bin/activate", *(f"{command} --version" for command in commands)])
    said = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert [line.split()[0] for line in said.stdout.splitlines()] == commands


@pytest.mark.slow
async def test_the_curl_line_streams(tiny_model):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    port = free_port()
    lines = [words for block in SHELL for words in commands(block) if words[0] == "curl"]
    assert lines
    async with launched(tiny_model, "--port", port, "--threads-per-worker", 1) as child:
        await child.until_said("ready: ")
        for words in lines:
            words = [word.replace("127.0.0.1:8000", f"127.0.0.1:{port}") for word in words]
            done = await asyncio.create_subprocess_exec(*words, "-sS", stdout=asyncio.subprocess.PIPE)
            said, _ = await asyncio.wait_for(done.communicate(), 60)
            assert said.count(b"data: ") > 2
            assert said.rstrip().endswith(b"data: [DONE]")


@pytest.mark.slow
@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
async def test_python_examples_run(code, tiny_model, capsys):
    code = code.replace("/models/mixtral", str(tiny_model))
    compiled = compile(code, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    running = eval(compiled, {"__name__": "example"})
    if inspect.isawaitable(running):
        await asyncio.wait_for(running, 100)
    assert capsys.readouterr().out.strip()
