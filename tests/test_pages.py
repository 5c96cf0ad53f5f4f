"""Pages say what is there: their links, paths, flags, commands and code, and their maps of the files."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from msi.models.shape import read_shape
from msi.planner.profile import to_json
from msi_launch import arguments as msi_launch
from msi_launch import batch_arguments as run_batch
from msi_launch import ctl as msi_ctl
from msi_launch import plan as msi_plan
from msi_launch import profile as msi_profile
from msi_launch import simulate as msi_simulate
from tests.test_command_line import flags_of
from tests.test_imports import LAYERS, layer_of
from tests.test_launch import free_port, launched
from tests.test_machine_plans import profile

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in ("launch", "msi", "tools", "tests")
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / folder).rglob("*.md")])
}
COMMANDS = {
    "msi-launch": msi_launch.parse,
    "msi-plan": msi_plan.parse,
    "msi-profile": msi_profile.parse,
    "msi-simulate": msi_simulate.parse,
    "msi-ctl": msi_ctl.parse,
}
PARSERS = {**COMMANDS, "msi-launch run-batch": run_batch.parse}
of_each_page = pytest.mark.parametrize("page", PAGES)


# -- links -----------------------------------------------------------------------------------------------------------


def test_the_first_page_is_short_and_leads_to_all_others():
    assert PAGES["README.md"].count("\n") <= 150
    found: set[str] = set()
    left = ["README.md"]
    while left:
        page = left.pop()
        if page in found or page not in PAGES:
            continue
        found.add(page)
        left += [target for target, _ in links(page)]
    assert set(PAGES) == found


@of_each_page
def test_links_lead_somewhere(page):
    for target, anchor in links(page):
        path = ROOT / target
        assert path.exists(), f"{page} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(PAGES[target]), (
                f"{page} links to {target}#{anchor}; it has {anchors(PAGES[target])}"
            )


def links(page: str) -> list[tuple[str, str]]:
    """(path from the root, anchor) of every link that stays here."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not re.match(r"[a-z]+:", link):
            target, _, anchor = link.partition("#")
            path = (ROOT / page).parent / target if target else ROOT / page
            named = Path(os.path.normpath(path))
            found.append((named.relative_to(ROOT).as_posix(), anchor))
            if (named / "README.md").exists():
                found.append(((named / "README.md").relative_to(ROOT).as_posix(), anchor))
    return found


def anchors(text: str) -> list[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


# -- paths -----------------------------------------------------------------------------------------------------------


@of_each_page
def test_paths_that_a_page_names_are_there(page):
    for named, resolved in paths(page):
        assert resolved is not None, f"{page} names {named}, which is not there"


def paths(page: str, since: str = "") -> list[tuple[str, str | None]]:
    """Paths in backticks, and where they are: from the root, the page's folder, or one named before."""
    found = []
    for line in PAGES[page][PAGES[page].index(since) :].splitlines():
        folders = [ROOT, (ROOT / page).parent]
        for named in re.findall(r"`([\w./-]+)`", line):
            is_path = re.match(r"(msi|launch|tools|tests|\.ci)/", named) or re.search(r"\w\.py$", named)
            if not is_path:
                continue
            where = next((folder / named for folder in reversed(folders) if (folder / named).exists()), None)
            if where is not None and "/" in named:
                folders.append(where if where.is_dir() else where.parent)
            found.append((named, where and where.relative_to(ROOT).as_posix()))
    return found


def test_maps_leave_nothing_out():
    """Each folder and module stands on the page nearest to it; where a page lists a folder's files, all of them."""
    maps = {
        page: {where for _, where in paths(page, "## Where" if page == "msi/README.md" else "## Files")}
        for page in PAGES
        if page.startswith(("msi/", "launch/")) and page != "msi/demo_model/README.md"
    }
    maps["msi/README.md"] |= {
        where for where in maps["msi/planner/README.md"] if str(where).startswith("msi/profiler/")
    }
    for path in sorted([*(ROOT / "msi").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]):
        folder = path.parent
        while (folder / "README.md").relative_to(ROOT).as_posix() not in maps:
            folder = folder.parent
        page = (folder / "README.md").relative_to(ROOT).as_posix()
        named = maps[page]
        relative = path.relative_to(ROOT)
        wing = relative.parent.as_posix()
        is_listed = wing in named and not any(
            one and Path(one).parent.as_posix() == wing and one.endswith(".py") for one in named
        )
        if not path.name.startswith("__"):
            assert is_listed or relative.as_posix() in named, f"{page} leaves out {relative}: add it to the map"
    assert maps["msi/README.md"] >= {
        path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "msi").glob("*/__init__.py")
    }


def test_the_import_table_is_that_of_the_test():
    """From top to bottom; each row is one layer of tests/test_imports.py, or its neighbours."""
    table = PAGES["CONTRIBUTING.md"].split("## Imports")[1].split("\n\nEach library")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    layers = []
    for row in rows:
        named = re.findall(r"`([\w/.]+)`", row.split(", and what ")[0])
        modules = [name.removesuffix(".py").strip("/").replace("/", ".") for name in named]
        layers.append({layer_of(module) for module in modules})
        assert len(layers[-1]) == 1, f"{row} is {layers[-1]}"
    assert [layer for (layer,) in layers] == sorted((layer for (layer,) in layers), reverse=True)
    assert {layer for (layer,) in layers} == set(range(len(LAYERS))) - {LAYERS.index({"msi"})}


# -- flags and commands ----------------------------------------------------------------------------------------------


@cache
def known_flags(command: str) -> frozenset[str]:
    """Of an installed command, from its help; of a script, from its source."""
    if command in PARSERS:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
            PARSERS[command](["--help"])
        return frozenset(re.findall(r"(?<![\w-])--[a-z][a-z-]+", said.getvalue()))
    assert (ROOT / command).exists(), f"{command} is not there"
    assert os.access(ROOT / command, os.X_OK), f"{command} cannot be run"
    if command.endswith(".py"):
        return frozenset(flags_of(ROOT / command) | {"--help", "--version"})
    return frozenset(re.findall(r"--[a-z]+", (ROOT / command).read_text()))


def test_every_option_of_msi_launch_is_on_its_page():
    options = PAGES["launch/README.md"].split("## Options")[1].split("\n## ")[0]
    for flag in known_flags("msi-launch") - {"--help"}:
        assert flag in options or flag.replace("--", "--no-", 1) in options, f"launch/README.md leaves out {flag}"


@of_each_page
def test_flags_that_a_page_names_exist(page):
    """Any of a command of ours; or of those that the page runs."""
    known = {flag for command in PARSERS for flag in known_flags(command)}
    for path in [*(ROOT / "tools").rglob("*.py"), ROOT / "tools/check"]:
        known |= flags_of(path) if path.suffix else known_flags("tools/check")
    for flag in re.findall(r"`(--[a-z][a-z-]+)", PAGES[page]):
        assert flag in known, f"{page} names {flag}, which nothing here knows"


@of_each_page
def test_commands_that_a_page_names_take_those_flags(page):
    """Those in blocks, in indented lines and in backticks."""
    text = PAGES[page]
    indented = re.findall(r"^    (?:host \w\$ )?(.*)$", text, flags=re.MULTILINE)
    for line in [*indented, *re.findall(r"`([^`\n]+)`", text)]:
        name, *words = line.split(" #")[0].split()[:1] + line.split(" #")[0].split()[1:] or [""]
        if name in COMMANDS or (re.match(r"tools/\w+", name) and words):
            for flag in (word.strip("[]").partition("=")[0] for word in words):
                assert not flag.startswith("--") or flag in known_flags(name), f"{page} gives {flag} to {name}"


SHELL = {name: re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) for name, text in PAGES.items()}


def commands(block: str):
    """A block's command lines, without comments and prompts; those joined by && apart."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, blocks in SHELL.items() if blocks])
def test_every_command_is_understood_and_what_plans_is_run(page, tiny_model, tmp_path, monkeypatch, capsys):
    """In the order of the page: what one writes, another reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    profiled = False
    for block in SHELL[page]:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=60)
        for name, *words in commands(block):
            words = [str(tiny_model) if word == "/models/mixtral" else word for word in words]
            if name == "msi-plan":
                if "--profile" in words:
                    assert profiled
                    words[words.index("profile.json")] = str(_profile(words[0], tmp_path))
                assert msi_plan.run(words) == 0, capsys.readouterr().err
            elif name in COMMANDS:
                COMMANDS[name](words)
                profiled |= name == "msi-profile"
            elif name.startswith("tools/"):
                assert {word for word in words if word.startswith("--")} <= known_flags(name)
            elif name == ".venv/bin/python":
                assert words[:2] == ["-m", "pytest"]
                assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
            else:
                assert name in ("curl", "."), f"{page} runs {name}"


def _profile(model: str, folder: Path) -> Path:
    """As msi-profile would have measured, which takes minutes."""
    shape = read_shape(Path(model))
    measured = replace(profile(), model=shape.name, config_digest=shape.config_digest)
    path = folder / "profile.json"
    path.write_text(json.dumps(to_json(measured)))
    return path


def test_what_setup_makes_is_on_the_path_once_it_is_activated():
    activate = ROOT / ".venv/bin/activate"
    if not activate.exists() or f'"{ROOT}/.venv"' not in activate.read_text():
        pytest.skip("msi is installed elsewhere")
    script = " && ".join([". .venv/bin/activate", *(f"{command} --version" for command in COMMANDS)])
    said = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert [line.split()[0] for line in said.stdout.splitlines()] == list(COMMANDS)


@pytest.mark.slow
async def test_the_curl_line_streams(tiny_model):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    port = free_port()
    lines = [words for block in SHELL["README.md"] for words in commands(block) if words[0] == "curl"]
    assert lines
    async with launched(tiny_model, "--port", port, "--threads-per-worker", 1) as child:
        await child.until_said("ready: ")
        for words in lines:
            words = [word.replace("127.0.0.1:8000", f"127.0.0.1:{port}") for word in words]
            done = await asyncio.create_subprocess_exec(*words, "-sS", stdout=asyncio.subprocess.PIPE)
            said, _ = await asyncio.wait_for(done.communicate(), 60)
            assert said.count(b"data: ") > 2
            assert said.rstrip().endswith(b"data: [DONE]")


# -- code ------------------------------------------------------------------------------------------------------------


CODE = [code for text in PAGES.values() for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)]


@pytest.mark.parametrize("code", CODE)
def test_python_examples_are_python_and_use_what_exists(code):
    import msi

    compile(code, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for name in re.findall(r"from msi import (.*)", code):
        assert all(hasattr(msi, part.strip()) for part in name.split(","))


@pytest.mark.slow
@pytest.mark.parametrize("code", CODE)
async def test_python_examples_run(code, tiny_model, capsys):
    code = code.replace("/models/mixtral", str(tiny_model))
    compiled = compile(code, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    running = eval(compiled, {"__name__": "example"})
    if inspect.isawaitable(running):
        await asyncio.wait_for(running, 100)
    assert capsys.readouterr().out  # a random model may say nothing but control characters
