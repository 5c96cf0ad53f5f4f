"""The page that tells a token's life names the files that it passes through."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WHERE_IT_IS_SLOW = {"watchdog.py", "control/lateness.py", "net/late_nodes.py", "net/hedging.py"}


@pytest.mark.slow
def test_the_page_names_every_file_that_hands_a_request_on():
    traced = subprocess.run(
        [sys.executable, ROOT / "tools/life_of_a_token.py"], check=True, capture_output=True, text=True, timeout=120
    )
    lines = [line.split() for line in traced.stdout.splitlines()]
    passed = {line[2].removeprefix("msi/") for line in lines if line[1] == ">>"} - WHERE_IT_IS_SLOW
    handing_on = {line[2].removeprefix("msi/") for line in lines if line[1] == ">"} | passed
    _, _, life = (ROOT / "msi/README.md").read_text().partition("## The life of a token")
    life, _, _ = life.partition("\n## ")
    assert {"server/gateway.py", "engine.py", "attention/scheduler.py", "experts/server.py"} <= handing_on
    assert not {name for name in handing_on - WHERE_IT_IS_SLOW if f"`{name}`" not in life}
    _, _, chain = life.partition("### The files that it passes through")
    assert not {name for name in passed if f"`{name}`" not in chain}
    assert {"server/door.py", "control/coordinator.py", "net/turns.py", "net/combine_link.py"} <= passed
    assert len(passed) < 24, "as many as it was before there were queues, gates and requests that outlive workers"
