"""The kernels' own tests under compute-sanitizer: memcheck finds accesses outside of what was given, racecheck shared
memory that programs' threads use without waiting for each other.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.gpu.report import Add, Row
from tools.gpu.runner import NotHere, Place

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests" / "kernels"
LOOKS = {"memcheck": 0.6, "racecheck": 1.0}  # and the share of what time is left
KERNELS = "not compiled and not whole_models"  # those that launch kernels one by one


def run(place: Place, add: Add) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not TESTS.exists():
        raise NotHere("there are no tests of kernels")
    if tool is None or place.is_dry:
        raise NotHere("compute-sanitizer is not installed" if tool is None else "a dry run has no device memory")
    for look, share in LOOKS.items():
        _look(tool, look, share * place.left_s, add)


def _look(tool: str, look: str, within_s: float, add: Add) -> None:
    name = f"{look} of the kernels' tests"
    command = [
        tool, "--tool", look, "--error-exitcode", "9", "--target-processes", "all",
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow",
        "-k", KERNELS, str(TESTS),
    ]  # fmt: skip
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor is an allocation of its own
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=max(1.0, within_s - 5),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        add(Row(name, "not at its end", note=_last(said)))
        return
    add(Row(name, done.returncode == 0, note=_last(done.stdout)))
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], flush=True)


def _last(said: str) -> str:
    lines = [line for line in said.splitlines() if "passed" in line or "ERROR SUMMARY" in line or "failed" in line]
    return "; ".join(lines[-2:])[:200]
