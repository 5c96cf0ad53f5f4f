"""msi-simulate: what it prints, and its sentences."""

from __future__ import annotations

import json

import pytest

from msi.planner.plan_file import read_plan_file
from msi.simulator.planned import deployment_of_plan
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival
from msi_launch.plan import run as plan
from msi_launch.simulate import run

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
    assert run(arguments) == 0
    said = capsys.readouterr().out
    values = json.loads(said)
    assert (values["schema_version"], values["num_requests"], values["num_tokens"]) == (1, 5, 30)
    assert values["deployment"]["num_expert"] == 2
    assert values["ttft_s"]["p50_s"] > 0.4
    assert {worker["worker_id"] for worker in values["workers"]} == {"attention-0", "expert-0", "expert-1"}
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert run(arguments) == 0
    assert capsys.readouterr().out == said


def test_a_table_for_people_names_what_failed_and_why(capsys):
    assert run([*SMALL, "1000", "--fault", "expert-0:dead@0.5"]) == 0
    said = capsys.readouterr().out
    assert "5, of which 5 failed" in said
    assert "5 x RequestFailed: expert worker expert-0 was lost" in said.replace("\n", " ")


def test_requests_come_from_a_file_and_in_bursts(capsys, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"arrival_s": 0.5, "input_len": 3, "output_len": 4}\n')
    assert run(["--layers", "2", "--micro-batches", "1", "--requests-file", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 4
    assert run([*SMALL, "2", "--burst", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 10


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--micro-batches", "many"], "--micro-batches 'many' is not one; supported: auto, 1, 2, 3, 4"),
        (["--lanes", "2"], "there is no option --lanes; did you mean --layers?"),
        (["--rate", "fast"], "--rate fast: give a number"),
        (["--rate", "0"], "0.0 requests per second; give a number above 0"),
        (["--input-len", "5"], "give both --input-len and --output-len, or neither"),
        (["--fault", "expert-7:dead@1"], "fault of 'expert-7', which is not there"),
        (["--popularity", "flat"], "'flat' is not one"),
        (["--popularity", "nothing.json"], "cannot read expert popularity from nothing.json"),
        (["--requests-file", "nothing.jsonl"], "--requests-file nothing.jsonl cannot be read: there is no such file"),
        (["--attention-ms", "-1"], "--attention-ms -1: give a number from 0"),
        (["--comm-ms", "nan"], "--comm-ms nan: give a number from 0"),
        (["--plan", "nothing.json"], "nothing.json cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(capsys, arguments, sentence):
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("msi-simulate: ")
    assert said.count("\n") == 1


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
