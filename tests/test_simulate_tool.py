"""tools/simulate.py: what it prints, and its sentences."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from msi.planner.plan_file import read_plan_file
from msi.simulator.planned import deployment_of_plan
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival
from msi_launch.plan import run as plan
from tools.simulate import main

SMALL = [
    "--layers",
    "3",
    "--micro-batches",
    "2",
    "--requests",
    "5",
    "--rate",
    "50",
    "--input-len",
    "20",
    "--output-len",
]


def test_json_has_everything_and_is_the_same_again(capsys, tmp_path):
    (tmp_path / "popularity.json").write_text(json.dumps([5, 3, 2, 1, 1, 1, 1, 1]))
    arguments = [
        *SMALL, "6", "--expert-workers", "2", "--popularity", str(tmp_path / "popularity.json"),
        "--fault", "attention-0:stalled:0.5@0.02", "--trace", str(tmp_path / "trace.json"), "--json",
    ]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out
    values = json.loads(said)
    assert (values["schema_version"], values["num_requests"], values["num_tokens"]) == (1, 5, 30)
    assert values["deployment"]["num_expert"] == 2
    assert values["ttft_s"]["p50_s"] > 0.4
    assert {worker["worker_id"] for worker in values["workers"]} == {"attention-0", "expert-0", "expert-1"}
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == said


def test_a_table_for_people_names_what_failed_and_why(capsys):
    assert main([*SMALL, "1000", "--fault", "expert-0:dead@0.5"]) == 0
    said = capsys.readouterr().out
    assert "5, of which 5 failed" in said
    assert "5 x RequestFailed: expert worker expert-0 was lost" in said.replace("\n", " ")


def test_requests_come_from_a_file_and_in_bursts(capsys, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"arrival_s": 0.5, "input_len": 3, "output_len": 4}\n')
    assert main(["--layers", "2", "--micro-batches", "1", "--requests-file", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 4
    assert main([*SMALL, "2", "--burst", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 10


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--micro-batches", "many"], "--micro-batches many: give auto or 1 to 4"),
        (["--input-len", "5"], "give both --input-len and --output-len, or neither"),
        (["--fault", "expert-7:dead@1"], "fault of 'expert-7', which is not there"),
        (["--popularity", "flat"], "'flat' is not one"),
        (["--popularity", "nothing.json"], "cannot read expert popularity from nothing.json"),
        (["--requests-file", "nothing.jsonl"], "cannot read the trace nothing.jsonl"),
        (["--attention-ms", "-1"], "--attention-ms -1: give milliseconds of at least 0"),
        (["--comm-ms", "nan"], "--comm-ms nan: give milliseconds of at least 0"),
        (["--plan", "nothing.json"], "nothing.json cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(capsys, arguments, sentence):
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_it_runs_as_a_script():
    script = Path(__file__).parent.parent / "tools" / "simulate.py"
    done = subprocess.run(
        [sys.executable, script, *SMALL, "2"], capture_output=True, text=True, timeout=60, check=True, cwd="/"
    )
    assert "of which 0 failed" in done.stdout


@pytest.mark.slow
def test_a_plan_is_simulated_at_the_pace_that_it_predicts(tmp_path, capsys):
    file = tmp_path / "plan.json"
    lengths = ["--input-len", "571", "--output-len", "159"]
    gpus = ["--attention-gpu", "h20", "--expert-gpu", "l40s"]
    assert plan(["mixtral-8x22b", *gpus, "--tpot-ms", "150", *lengths, "-o", str(file)]) == 0
    capsys.readouterr()
    planned = read_plan_file(file).plan
    deployment, costs = deployment_of_plan(read_plan_file(file))
    # every lane decodes as many sequences as planned; the experts are the bottleneck, so contexts do not matter
    assert planned.t_expert_s > planned.t_attention_s
    report = simulate(deployment, costs, [Arrival(0.0, 1, 5)] * planned.batch_size)
    assert report.num_failed == 0
    assert report.tpot_s.p50_s == pytest.approx(planned.tpot_s, rel=0.03)
