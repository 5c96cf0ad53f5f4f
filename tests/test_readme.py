"""README says what is there: its file map, its flags, its scripts and its code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    for script in set(re.findall(r"\btools/[a-z_]+(?:\.py)?", README)):
        assert (ROOT / script).exists(), f"README names {script}, which is not there"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_python_examples_are_python_and_use_what_exists(code):
    import msi

    compile(code, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for name in re.findall(r"from msi import (.*)", code):
        assert all(hasattr(msi, part.strip()) for part in name.split(","))
