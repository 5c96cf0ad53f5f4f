"""Processes that want the compiled products at once, on a machine that has none yet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msi.kernels.native import compiled as native

pytestmark = [pytest.mark.timeout(100), pytest.mark.slow]
COMPILER = """#!/bin/sh
echo "$PPID" >> "$MSI_TEST_LOG"
sleep 0.3
for out; do :; done
case "$1" in -shared) printf half > "$out"; sleep 0.3; printf whole > "$out";; esac
"""
ASK = "from msi.kernels.native import compiled; print(open(compiled._compiled()).read())"


def test_one_compiles_for_all_and_another_when_it_is_killed(tmp_path):
    """The compiler takes its time, writes its output piece by piece, and notes who called it."""
    log, compiler = tmp_path / "log", tmp_path / native.COMPILER
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    asking = [
        subprocess.Popen(
            [sys.executable, "-c", ASK], env=environment | {"MSI_TEST_LOG": str(log)},
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    try:
        until = time.monotonic() + 60
        while not log.exists() or not (callers := log.read_text().split()):
            assert time.monotonic() < until, "nobody compiles"
            time.sleep(0.02)
        os.killpg(int(callers[0]), signal.SIGKILL)
        said = {one.pid: one.communicate(timeout=60)[0].strip() for one in asking}
    finally:
        for one in asking:
            one.kill()
            one.wait()
    assert sorted(said.values()) == ["", "whole", "whole"]
    assert said[int(callers[0])] == ""
    callers = log.read_text().split()
    commands = len(native.SOURCES) + 1
    assert len(set(callers)) == 2, "who was killed, and one of the others"
    assert callers.count(callers[-1]) == commands
    assert len(list(Path(tmp_path, "cache", "msi").glob("*.so"))) == 1
