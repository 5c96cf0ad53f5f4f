"""What tools/gpu/ measures of gates and host memory, end to end over the fake streams."""

from __future__ import annotations

import pytest

from tools.gpu.gates import gates
from tools.gpu.handles import handles
from tools.gpu.host_memory import host_memory
from tools.gpu.replays import replays


@pytest.mark.parametrize("section", [gates, handles, host_memory, replays], ids=lambda section: section.__name__)
def test_a_section_runs_dry(section):
    rows = []
    section(lambda name, value, unit="", floor=None, note="": rows.append((name, value)), dry=True)
    assert rows
    assert all(value is not False for _, value in rows), rows
