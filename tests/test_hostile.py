"""A short run of tools/hostile.py: what is hostile in a request ends that request, and nobody else notices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ATTACKS = (
    "numbers", "extreme_sampling", "ids", "texts", "types", "grammars", "broken_json", "smuggled", "paths", "frames",
    "websocket_requests", "leavers", "compressed",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_hostile_requests_end_alone_and_live_streams_keep_their_texts():
    done = subprocess.run(
        [
            sys.executable, "tools/hostile.py", "--minutes", "0.5", "--no-faults", "--only", *ATTACKS,
            "--delay-ms", "60000",  # a busy machine may be slow
            "--growth", "2",  # six seconds after its start an instance still warms up
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
