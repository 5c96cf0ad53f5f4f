"""The many-to-many benchmark: what it decides and computes, and once, small, that all that is here can be compared."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from msi.errors import ConfigError
from tests.test_pages import ROOT
from tools import bench_m2n
from tools.bench_m2n import Row, ratios, rounds_of, row_of, sizes_of, table
from tools.m2n.fabric import Task, check, stamp
from tools.m2n.group import Run
from tools.m2n.systems import SYSTEMS

RESULTS = ROOT / "tools" / "results"
KEY = "dispatch", 2, 2, 4096


def row(system, median_us, size=4096):
    return Row(system, "dispatch", 2, 2, size, median_us, 2 * median_us, 1.0)


def test_sizes_are_lists_or_ranges_that_double():
    assert sizes_of("2K..16K") == [2048, 4096, 8192, 16384]
    assert sizes_of("1M,4K,128") == [128, 4096, 1 << 20]
    for wrong in ("", "100", "4X", "0", "4K..x"):
        with pytest.raises(ConfigError, match="multiples of 128 bytes"):
            sizes_of(wrong)


def test_large_sizes_take_fewer_rounds():
    assert [rounds_of(size, 4, 200) for size in (2048, 1 << 20, 8 << 20)] == [200, 16, 10]
    assert rounds_of(8 << 20, 4, 3) == 3


def test_a_row_is_the_median_of_the_turns():
    runs = [Run([1e-6 * factor] * 90 + [9e-6 * factor] * 10, 2.0 * factor) for factor in (1, 2, 30)]
    dispatch = row_of("shm", Task("dispatch", 1000, 500), runs, 2, 3)
    assert dispatch == Row("shm", "dispatch", 2, 3, 1000, 2.0, 18.0, round(500 * 1000 * 6 / 4.0 / 1e9, 3))
    exchange = row_of("shm", Task("exchange", 1 << 20, 500), runs, 2, 3)
    assert exchange.gbytes_per_s == round(500 * (1 << 20) * 6 * 2 / 4.0 / 1e9, 3)


def test_ours_are_compared_with_the_best_of_the_others_at_each_size():
    rows = [row("tcp", 100.0), row("gloo", 300.0), row("zmq", 150.0), row("mpi", 1.0), row("tcp", 7.0, size=128)]
    assert ratios(rows, "tcp", ("gloo", "zmq")) == {KEY: ("zmq", 1.5)}
    shown = table(rows[:4], "dispatch", 2, 2)
    assert (shown.row_count, [column.header for column in shown.columns]) == (4, ["", "4 KB"])


def test_contents_are_those_of_their_round_or_the_run_ends():
    payload = bytearray(256)
    stamp(payload, 256, 1.5, 7, 3)
    assert check(payload, 256, 7) == (1.5, 3)
    with pytest.raises(SystemExit, match="round 8: wrong contents"):
        check(payload, 256, 8)
    payload[255] ^= 1
    with pytest.raises(SystemExit, match="round 7"):
        check(payload, 256, 7)


def test_what_cannot_run_here_is_a_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("tools.m2n.systems._num_gpus", lambda: 1)
    assert SYSTEMS["mpi"].why_not(4) == "needs the Python package mpi4py (pip install -e '.[m2n]')"
    assert SYSTEMS["nccl"].why_not(4) == "needs a GPU for each of the 4 processes, and 1 are here"
    assert [SYSTEMS[name].why_not(4) for name in ("shm", "shm-poll", "tcp", "tls", "gloo", "zmq", "zmq-ipc")] == [
        ""
    ] * 7


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--against", "glue"], "'glue' is not one of"),
        (["--senders", "1", "2"], "as many numbers of --senders as of --receivers"),
        (["--sizes", "5"], "multiples of 128"),
    ],
)
def test_what_it_does_not_understand_is_one_line(words, complaint, capsys):
    with pytest.raises(SystemExit) as ended:
        bench_m2n.parse(words)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.slow
def test_all_that_is_here_is_compared_and_drawn(tmp_path):
    few = ["--sizes", "2K..4K", "--turns", "1", "--rounds", "5", "--senders", "2", "--receivers", "1"]
    command = [sys.executable, "tools/bench_m2n.py", *few, "--json", tmp_path / "m2n.json", "--figure", tmp_path / "f"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    kept = json.loads((tmp_path / "m2n.json").read_text())
    rows = [Row(**one) for one in kept["rows"]]
    here = [name for name, system in SYSTEMS.items() if not system.why_not(3)]
    assert {(one.system, one.pattern, one.senders, one.receivers, one.size_bytes) for one in rows} == {
        (name, pattern, 2, 1, size) for name in here for pattern in ("dispatch", "exchange") for size in (2048, 4096)
    }
    assert all(0 < one.median_us <= one.p99_us and one.gbytes_per_s >= 0 for one in rows)
    assert all(f"{name} is left out: it needs" in done.stderr for name in SYSTEMS if name not in here)
    assert "<svg" in (tmp_path / "f.svg").read_text()
    assert (tmp_path / "f.png").stat().st_size > 10_000


@pytest.mark.slow
def test_what_is_kept_is_drawn_again(tmp_path):
    kept = [RESULTS / "m2n.json", RESULTS / "m2n_pairs.json"]
    words = ["--redraw", *map(str, kept), "--figure", str(tmp_path / "again")]
    subprocess.run([sys.executable, "tools/bench_m2n.py", *words], cwd=ROOT, timeout=60, check=True)
    assert "<svg" in (tmp_path / "again.svg").read_text()
    assert {row["senders"] for file in kept for row in json.loads(file.read_text())["rows"]} == {1, 2, 4}


def test_all_systems_at_once_have_looks_of_their_own():
    figure = pytest.importorskip("tools.m2n.figure")
    looks = figure.looks_of(list(SYSTEMS))
    assert len({str(one) for one in looks.values()}) == len(SYSTEMS)
    assert {look["linewidth"] for name, look in looks.items() if SYSTEMS[name].is_ours} == {1.8}
