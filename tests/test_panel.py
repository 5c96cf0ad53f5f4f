"""The live lines of a terminal: they fit, whatever is in them, and the log erases them before it writes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from msi.control.client_messages import Stats, WorkerStats
from msi.control.counters import AttentionCounters, PeerDelay
from msi.control.worker_status import WorkerStatus
from msi.options import InstanceOptions
from msi.types import StageTimes
from msi_launch.local import Rate
from msi_launch.panel import bar, panel, tokens_of, why_this_transport
from tests.test_logs import on_terminal


def worker(role, index, busy=0.5, **status):
    times = StageTimes(attention_s=0.001, expert_s=0.002, busy=busy)
    counters = AttentionCounters(blocks=100, batch_tokens=50) if role == "attention" else None
    values = {"loaded_bytes": 1, "total_bytes": 1, "num_running": 2, "num_waiting": 1, "num_free_blocks": 75} | status
    return WorkerStats(
        f"{role}-{index}", role, 1, "host", 0, "ready", WorkerStatus(times=times, attention=counters, **values)
    )


def stats(num_attention=1, num_expert=1):
    peers = (PeerDelay("expert-0", 0.0001, 0.001, 0.002, 0.003),)
    return Stats(2, 3, tuple(
        [worker("attention", at, peers=peers) for at in range(num_attention)]
        + [worker("expert", at) for at in range(num_expert)]
    ))  # fmt: skip


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_it_says_what_runs_where():
    said = plain(panel(stats(), 512.4, "demo at http://h:1/v1", "rows go by TCP", columns=120, rows=30)).splitlines()
    assert said[0] == "demo at http://h:1/v1   3 requests: 2 running, 1 waiting   512 tokens/s   m = 2"
    assert said[1].split() == ["worker", "busy", "stage", "queue", "KV", "slowest", "peer"]
    assert said[2].split() == ["attention-0", "███", "50", "%", "T_a", "1.00", "ms", "2", "running,", "1", "waiting",
                               "25", "%", "expert-0", "0.10", "ms"]  # fmt: skip
    assert said[3].split() == ["expert-0", "███", "50", "%", "T_e", "2.00", "ms"]
    assert said[4] == "rows go by TCP"


def test_workers_stand_in_the_order_of_their_numbers():
    said = plain(panel(Stats(1, 0, stats(11, 1).workers[::-1]), 0.0, "demo", "", columns=100, rows=30)).splitlines()
    assert [line.split()[0] for line in said[2:14]] == [*(f"attention-{at}" for at in range(11)), "expert-0"]


@given(
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 200),
    st.integers(1, 40),
    st.text(max_size=300),
    st.booleans(),
)
def test_it_fits_any_terminal(num_attention, num_expert, columns, rows, where, is_long):
    links = where if is_long else "rows go by TCP"
    said = panel(stats(num_attention, num_expert), 1.0, where, links, columns=columns, rows=rows)
    lines = said.splitlines()
    assert len(lines) < rows
    assert all(cell_len(plain(line)) < columns for line in lines)
    assert not re.search(r"[\x00-\x09\x0b-\x1a\x1c-\x1f]|\x1b(?!\[[0-9;]*m)", said)


def test_workers_that_load_say_how_far():
    loading = Stats(0, 0, (WorkerStats("expert-0", "expert", 1, "h", 0, "loading",
                                       WorkerStatus(50, 200, 0, 0, 0, StageTimes())),))  # fmt: skip
    assert "loading 25 %" in plain(panel(loading, 0.0, "demo", "", columns=100, rows=30))


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0, "      "), (0.5, "███   "), (1, "██████"), (7, "██████"), (-1, "      "), (1 / 48, "▏     ")],
)
def test_a_bar_is_drawn_in_eighths(share, shown):
    assert bar(share) == shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"colocated": True}, "no rows travel"),
        ({"transport": "inproc"}, "rows go by memory of this process"),
        ({"transport": "tcp"}, "rows go by TCP, as --transport says"),
        ({"transport": "shm"}, "rows go by shared memory, as --transport says"),
        ({}, "rows go by shared memory: all workers are on this host"),
    ],
)
def test_why_rows_travel_as_they_do_is_said(options, said, monkeypatch):
    monkeypatch.setattr("msi.net.shm.is_available", lambda: None)
    assert why_this_transport(InstanceOptions.of(**options)).startswith(said)
    monkeypatch.setattr("msi.net.shm.is_available", lambda: "there is no memfd")
    assert why_this_transport(InstanceOptions()) == "rows go by TCP: there is no memfd"


def test_rates_are_of_what_was_added_and_never_below_zero():
    rate = Rate()
    assert [rate.of(count, now) for count, now in [(5, 1.0), (25, 3.0), (25, 3.0), (3, 4.0), (4, 5.0)]] == [
        0.0, 10.0, 0.0, 0.0, 1.0,
    ]  # fmt: skip
    assert tokens_of(stats(3, 1)) == 150


LIVE = """
import logging
from msi_launch.display import StatusLine
from msi_launch.logs import set_up_log
set_up_log("me", "info")
line = StatusLine()
with line.shown():
    line.update("3 requests", is_usual=True, panel="one\\ntwo\\nthree")
    line.redraw()
    logging.getLogger("child").info("a line of the log")
"""


def test_the_cursor_waits_above_so_that_a_line_of_the_log_erases_all_of_it():
    said = on_terminal(LIVE).replace("\r\n", "\n")
    first, again, logged, end = re.split(r"(?<!^)(?=\r\x1b\[J)", said)
    assert first == again == "\r\x1b[Jone\ntwo\nthree\r\x1b[2A"
    assert re.fullmatch(r"\r\x1b\[J\S+ me: a line of the log\n", logged)
    assert end == "\r\x1b[J"
