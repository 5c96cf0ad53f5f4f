"""The check of a GPU machine, without one: its report, its limits, and once, small, every section to its end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.options import InstanceOptions
from tests.everyday import IS_THOROUGH
from tests.test_pages import PAGES, ROOT
from tools.gpu import peers
from tools.gpu.idle import busy_share
from tools.gpu.report import Outcome, Report, Row, line, shown
from tools.gpu.runner import NotHere, Place, Section, run_section
from tools.gpu.shapes import MIXTRAL, SMALL
from tools.gpu.ways import DEFAULT, WAYS

RESULTS = sorted((ROOT / "tools" / "results").glob("gpu_*.json"))
REPORT = Report({"device": "Some Card", "date": "2026-01-02T03:04:05Z"}, (), ()).with_section(
    Outcome("times", "ok", 1.5),
    [Row("a kernel", 200.0, "us", floor=160.0, asked=0.85), Row("it | works", True), Row("found", "yes")],
)


def test_a_report_survives_its_file(tmp_path):
    path = REPORT.write(tmp_path)
    assert path.name == "gpu_some-card_2026-01-02.json"
    assert Report.of_json(path.read_text()) == REPORT
    assert path.with_suffix(".md").read_text() == REPORT.to_markdown()


def test_a_table_says_how_much_of_what_can_be_is_reached():
    page = REPORT.to_markdown()
    assert "| a kernel | 200 | us | 80%, asked 85% |  |" in page
    assert r"| it \| works | yes |" in page
    assert "80%, asked 85%" in line(REPORT.rows[0])
    assert replace(REPORT.rows[0], value="failed").share is None


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_that_are_kept_are_those_of_their_page(path):
    assert path.with_suffix(".md").read_text() == Report.of_json(path.read_text()).to_markdown()


def test_figures_on_the_page_are_those_of_the_results():
    """Of each machine and date, every number of the table with a unit is one that a row has."""
    page = PAGES["tools/README.md"].split("### On a GPU")[1].split("\n### ")[0]
    table = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    found = {
        figure
        for path in RESULTS
        for row in Report.of_json(path.read_text()).rows
        for figure in (shown(row.value), f"{row.value:.1f}" if isinstance(row.value, float) else "")
        if row.unit
    }
    for figure in re.findall(r"([\d.]+) (?:us|TB/s|TF/s|tokens/s)", table):
        assert figure in found, f"{figure} is no result"


@given(st.lists(st.tuples(st.integers(-20, 120), st.integers(0, 60)), max_size=8))
def test_time_that_kernels_share_counts_once(pieces):
    intervals = [(first, first + length) for first, length in pieces]
    covered = {at for first, last in intervals for at in range(max(0, first), min(100, last))}
    assert busy_share(intervals, 0, 100) == pytest.approx(len(covered) / 100)


# -- sections --------------------------------------------------------------------------------------------------------


def quick(place, add):
    add(Row("found", 1))


def wrong(place, add):
    add(Row("found", 1))
    raise ValueError("as it happens")


def dies(place, add):
    os._exit(9)


def hangs(place, add):
    add(Row("found", 1))
    subprocess.Popen(["sleep", "600"])
    time.sleep(600)


def lacks(place, add):
    raise NotHere("there is no card")


@pytest.mark.parametrize(
    ("run", "state", "note", "num_rows"),
    [
        (quick, "ok", "", 1),
        (wrong, "failed", "ValueError: as it happens", 1),
        (dies, "failed", "status 9", 0),
        (hangs, "too late", "ended after", 1),
        (lacks, "left out", "there is no card", 0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # the tool itself has one thread
def test_a_section_ends_whatever_it_does_and_what_it_found_is_kept(run, state, note, num_rows):
    told = []
    place = Place("cpu", {}, time.monotonic() + (1.0 if run is hangs else 60.0))
    outcome, rows = run_section(Section("one", run, 60), place, told.append)
    assert (outcome.state, rows) == (state, [Row("found", 1)] * num_rows)
    assert told == rows
    assert note in outcome.note


def test_a_section_that_is_none_is_refused():
    done = subprocess.run(
        [ROOT / "tools/gpu_check", "--sections", "nonsense"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert re.search(r"'nonsense' is not one; there are: machine, ceilings, ", done.stderr), done.stderr


class FakeVllm(types.ModuleType):
    """vLLM's names as its documentation has them; a token takes a millisecond."""

    __version__ = "0"
    now_s = 0.0

    class SamplingParams:
        def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize):
            assert (temperature, ignore_eos, detokenize) == (0.0, True, False)
            self.max_tokens = max_tokens

    class LLM:
        def __init__(
            self, model, *, load_format, skip_tokenizer_init, dtype, max_model_len, max_num_seqs, enable_prefix_caching
        ):
            assert json.loads((Path(model) / "config.json").read_text())["model_type"] == "mixtral"
            assert (load_format, skip_tokenizer_init, enable_prefix_caching) == ("dummy", True, False)

        def generate(self, prompts, params, *, use_tqdm):
            FakeVllm.now_s += 0.5 + params.max_tokens / 1e3
            output = types.SimpleNamespace(token_ids=[7] * params.max_tokens)
            return [types.SimpleNamespace(outputs=[output]) for prompt in prompts if prompt["prompt_token_ids"]]


def test_vllm_is_measured_where_it_is_installed(monkeypatch):
    rows = []
    place = Place("cpu", {}, time.monotonic() + 60)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(peers, "time", types.SimpleNamespace(perf_counter=lambda: FakeVllm.now_s))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(NotHere, match="vLLM is not installed"):
        peers.vllm(MIXTRAL, SMALL, place, rows.append)
    monkeypatch.setitem(sys.modules, "vllm", FakeVllm("vllm"))
    peers.vllm(MIXTRAL, SMALL, place, rows.append)
    (row,) = rows
    assert (row.name, row.unit) == ("small, 2 of 2 layers, vLLM, 2 sequences: decoding", "tokens/s")
    assert row.value == pytest.approx(2 / 1e-3)


def dry(folder, *flags, limit_s):
    done = subprocess.run(
        [ROOT / "tools/gpu_check", "--dry", "--out", folder, *flags], capture_output=True, text=True, timeout=limit_s
    )
    (path,) = folder.glob("gpu_*.json")
    return done, json.loads(path.read_text())


WITHOUT_AN_ENGINE = ("machine", "ceilings", "gates", "kernels", "times")
REPEATED = {  # on a CPU they compute what others do, as the options that make the difference are a GPU's; or
    "host-memory", "replays", "handles",  # test_gpu_sections runs them
    "tokens-plain", "tokens-threads", "tokens-operators", "tokens-graphs", "mixtral-split-plain", "mixtral-continuous",
    "qwen3-split", "qwen3-split-plain", "qwen3-transformers",
}  # fmt: skip


def test_what_needs_no_engine_runs_on_a_cpu(tmp_path):
    done, found = dry(tmp_path, "--sections", ",".join(WITHOUT_AN_ENGINE), limit_s=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {section["state"] for section in found["sections"]} <= {"ok", "left out"}
    assert not [row for row in found["rows"] if row["note"].endswith("WRONG") or row["value"] == "failed"]


def test_sections_for_which_no_time_is_left_are_said(tmp_path):
    done, found = dry(tmp_path, "--sections", "machine,tokens", "--budget", "1", limit_s=60)
    assert [section["state"] for section in found["sections"]] == ["left out", "left out"], done.stdout


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.ending or "default")
def test_every_way_is_options_that_an_instance_takes(way):
    usual = InstanceOptions.of(device="cuda")
    assert (InstanceOptions.of(device="cuda", **way.options) == usual) is (way is DEFAULT)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_section_runs_to_its_end_on_a_cpu(tmp_path):
    from tools.gpu.sections import SECTIONS

    assert SECTIONS.keys() > REPEATED | {*WITHOUT_AN_ENGINE}
    elsewhere = set() if IS_THOROUGH else REPEATED | {*WITHOUT_AN_ENGINE}
    names = [name for name in SECTIONS if name not in elsewhere]
    done, found = dry(tmp_path, "--sections", ",".join(names), limit_s=590)
    assert done.returncode == 0, done.stdout + done.stderr
    states = {section["section"]: section["state"] for section in found["sections"]}
    assert list(states) == names
    left_out = {name for name, state in states.items() if state == "left out"}
    assert left_out <= {"sanitizer", "mixtral-vllm", "qwen3-vllm"}, states
    equal = [row["value"] for row in found["rows"] if row["name"].startswith("tokens equal")]
    assert len(equal) == 3 * sum(name.startswith("tokens") for name in names)
    assert all(equal)
