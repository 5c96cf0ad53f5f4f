"""msi-plan as users run it, the plans that it writes, and what msi-launch and Engine.local make of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from msi.errors import ConfigError
from msi.options import InstanceOptions, with_plan
from msi.planner.choose import balances, best_plans, is_it_worth_it, one_more, pareto_front
from msi.planner.pipeline import Stages, isolated_pass_s, steady_pass_s
from msi.planner.plan_file import PlanFile, read_plan_file
from msi.planner.search import node_pair_of
from msi_launch import plan as msi_plan
from msi_launch.arguments import parse as parse_launch
from msi_launch.main import run as run_launch
from msi_launch.plan_arguments import parse

KEYS = """
    t_attention_s t_expert_s t_comm_s num_micro_batches num_layers tp_attention tp_expert num_attention_nodes
    num_expert_nodes experts_per_node batch_size step_s tpot_s tokens_per_s tokens_per_s_per_gpu tokens_per_s_per_cost
    attention_memory_bytes expert_memory_bytes
"""
DESIGN_COMMAND = "mixtral-8x22b --attention-gpu h20 --expert-gpu l40s --tpot-ms 150 --input-len 571 --output-len 159"


def planned(capsys, *arguments: str) -> dict:
    assert msi_plan.run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    from tests.tiny import save_tiny  # loads torch, which planning does without

    path: Path = tmp_path_factory.mktemp("plan") / "tiny"
    save_tiny(path)
    return path


@pytest.fixture
def plan_path(checkpoint, tmp_path) -> Path:
    """A runnable plan for the tiny model."""
    path = tmp_path / "plan.json"
    arguments = [str(checkpoint), "--gpu", "cpu:4", "--runnable", "--max-batch", "8", "--micro-batches", "2"]
    assert msi_plan.run([*arguments, "-o", str(path)]) == 0
    return path


def test_the_json_has_the_promised_keys_and_they_agree_with_each_other(capsys):
    found = planned(capsys, *DESIGN_COMMAND.split(), "--objective", "cost")
    assert found["schema_version"] == 1
    assert found["plans"] == sorted(found["plans"], key=lambda plan: -plan["tokens_per_s_per_cost"])
    for plan in found["plans"]:
        assert set(KEYS.split()) <= set(plan)
        stages = Stages(plan["t_attention_s"], plan["t_expert_s"], plan["t_comm_s"])
        m, layers = plan["num_micro_batches"], plan["num_layers"]
        assert plan["step_s"] == pytest.approx(isolated_pass_s(stages, m, layers))
        assert plan["tpot_s"] == pytest.approx(steady_pass_s(stages, m, layers))
        assert plan["tpot_s"] <= 0.150
        assert plan["tokens_per_s"] == pytest.approx(plan["batch_size"] / plan["tpot_s"])
        assert (plan["attention_gpu"], plan["expert_gpu"]) == ("h20", "l40s")


def test_the_table_the_verdict_and_the_explanation_are_shown(capsys, tmp_path):
    figure = tmp_path / "plan.png"
    assert msi_plan.run([*DESIGN_COMMAND.split(), "--explain", "--plot", str(figure)]) == 0
    said = capsys.readouterr().out
    assert "Is disaggregation worth it here? Yes" in said
    assert "The batch is limited by" in said
    assert "One more attention node" in said
    assert "T_a is nearest T_e at" in said
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_where_disaggregation_does_not_pay_it_says_no_with_numbers(capsys):
    slow = ("mixtral-8x7b", "--gpu", "h100:16", "--tpot-ms", "30", "--assume", "network_latency_s=0.0002")
    found = planned(capsys, *slow)
    assert not found["is_worth_it"]
    assert 0 < found["gain_over_colocated"] < 1
    assert msi_plan.run(slow) == 0
    assert "worth it here? No: tokens/s per GPU: " in capsys.readouterr().out


def test_where_only_colocated_deployments_are_fast_enough_those_are_the_plans(capsys):
    slower = ("mixtral-8x7b", "--gpu", "h100:8", "--tpot-ms", "30", "--assume", "network_latency_s=0.002")
    assert {plan["kind"] for plan in planned(capsys, *slower)["plans"]} == {"colocated"}
    assert msi_plan.run([*slower, "--explain"]) == 0
    assert "No: only colocated deployments keep the limits" in capsys.readouterr().out


@pytest.mark.parametrize("algorithm", ["paper", "corrected"])
def test_the_papers_own_algorithm_can_be_asked(capsys, algorithm):
    found = planned(capsys, "mixtral-8x22b", "--gpu", "a800", "--algorithm", algorithm)
    assert {plan["experts_per_node"] for plan in found["plans"]} == {1}
    assert {plan["num_micro_batches"] for plan in found["plans"]} <= {3, 4}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("mixtrl-8x7b --gpu h20", "no model is called 'mixtrl-8x7b'; did you mean mixtral-8x7b"),
        ("/nowhere --gpu h20", "/nowhere does not exist; give a directory with a config.json"),
        ("dbrx --gpu h21", "no GPU is called 'h21'; did you mean h20"),
        ("dbrx --gpu h20:0", "0 GPUs of type h20: give at least 1"),
        ("dbrx --gpu h20:-4", "-4 GPUs of type h20: give at least 1"),
        ("dbrx --gpu h20:many", "'many' is not a number of GPUs; write h20:16"),
        ("dbrx --gpu h20,h20:4", "a type is named twice"),
        ("dbrx", "no GPUs for one side: give --gpu NAME[:COUNT]"),
        ("dbrx --gpu h20 --input-len -5", "--input-len -5: give a length above 0 tokens"),
        ("dbrx --gpu h20 --output-len 0", "--output-len 0: give a length above 0 tokens"),
        ("dbrx --gpu h20 --tpot-ms 0", "--tpot-ms 0: give a time above 0"),
        ("dbrx --gpu h20 --tpot-ms 0.5", "no plan keeps a TPOT of 0.5 ms; the fastest possible here is"),
        ("deepseek-v3 --gpu l20:4", "deepseek-v3 (1342 GB of weights) does not fit on 4 l20"),
        ("dbrx --gpu h20 --assume memry=1", "no assumption is called 'memry'; did you mean memory"),
        ("dbrx --gpu h20 --assume memory=x", "'x' is not a number"),
        ("dbrx --gpu h20 --tp 2 --runnable", "tensor parallelism is not built yet; use --tp 1"),
        ("dbrx --gpu h20 --catalogue /nowhere", "/nowhere cannot be read"),
        ("dbrx --gpu h20 --profile /nowhere", "/nowhere cannot be read"),
        ("dbrx --gpu h20 -o /nowhere/plan.json", "-o /nowhere/plan.json cannot be written"),
        ("dbrx --gpu h20 --num-plans 0", "--num-plans 0: give at least 1"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence_and_status_2(capsys, arguments, complaint):
    assert msi_plan.run(arguments.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("msi-plan: ")
    assert complaint in said


def test_a_catalogue_file_adds_gpus_and_models(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(
        "[gpus.mine]\nprice = 1\nmemory_gb = 64\nmemory_gb_per_s = 1000\nbf16_tflops = 200\npower_w = 300\n"
        "network_gbit_per_s = 100\nintra_node_gb_per_s = 50\ngpus_per_node = 4\n"
        "[models.small]\nlayers = 8\nhidden = 1024\nintermediate = 2048\nexperts = 8\ntop_k = 2\nheads = 8\n"
        "kv_heads = 2\nhead_dim = 128\nvocab = 1000\n"
    )
    found = planned(capsys, "small", "--gpu", "mine:8", "--catalogue", str(path))
    assert found["plans"][0]["attention_gpu"] == "mine"


# -- plan.json -------------------------------------------------------------------------------------------------------


def test_a_plan_file_reads_back_as_it_was(plan_path):
    file = read_plan_file(plan_path)
    assert read_plan_file(plan_path) == file
    assert best_plans(file.task, num_plans=1) == [file.plan]  # it holds all that the choice needs
    again = plan_path.with_name("again.json")
    again.write_text(json.dumps(file.to_json()))
    assert read_plan_file(again) == file


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema_version": 99}, "has schema version 99, this msi reads 1"),
        ({"schema_version": None}, "has schema version None"),
        ({"batch_size": None}, "batch_size is None; it must be a number"),
        ({"t_expert_s": -1.0}, "t_expert_s is -1.0; it must be finite and not negative"),
        ({"task": {}}, "its task is not whole ('model')"),
        ({"fingerprint": 3}, "fingerprint is 3; it must be text"),
    ],
)
def test_a_damaged_plan_is_refused_by_key(plan_path, change, complaint):
    plan_path.write_text(json.dumps(json.loads(plan_path.read_text()) | change))
    with pytest.raises(ConfigError, match=r"plan\.json") as raised:
        read_plan_file(plan_path)
    assert complaint in str(raised.value)


def test_a_truncated_plan_or_something_else_is_refused(plan_path):
    text = plan_path.read_text()
    plan_path.write_text(text[: len(text) // 2])
    with pytest.raises(ConfigError, match="is not a whole JSON file"):
        read_plan_file(plan_path)
    plan_path.write_text("{}")
    with pytest.raises(ConfigError, match="is no plan: it has no schema_version"):
        read_plan_file(plan_path)
    plan_path.write_text(json.dumps({key: value for key, value in json.loads(text).items() if key != "tpot_s"}))
    with pytest.raises(ConfigError, match="tpot_s is missing"):
        read_plan_file(plan_path)


def test_options_follow_the_plan_and_what_contradicts_it_is_refused(plan_path, checkpoint, capsys):
    plan = read_plan_file(plan_path).plan
    options = InstanceOptions.of(**with_plan({"plan": plan_path, "model": checkpoint}))
    assert (options.attention_workers, options.expert_workers) == (plan.num_attention_nodes, plan.num_expert_nodes)
    assert options.micro_batches == 2
    assert options.limits.max_num_seqs == plan.micro_batch * 2
    launched = parse_launch([str(checkpoint), "--plan", str(plan_path), "--micro-batches", "2"]).options
    assert launched == options
    assert parse_launch(options.flags()).options == options  # as children of the launcher get it
    with pytest.raises(ConfigError, match=r"`expert_workers` 7 contradicts .*plan.json, which has"):
        parse_launch([str(checkpoint), "--plan", str(plan_path), "--expert-workers", "7"])
    with pytest.raises(ConfigError, match="`micro_batches` auto contradicts"):
        parse_launch([str(checkpoint), "--plan", str(plan_path), "--micro-batches", "auto"])
    assert run_launch([str(checkpoint), "--plan", str(plan_path), "--expert-workers", "7"]) == 2
    assert "msi-launch: --expert-workers 7 contradicts " in capsys.readouterr().err


def test_msi_launch_refuses_what_the_runtime_cannot_do_and_plans_for_other_models(
    plan_path, capsys, tmp_path, checkpoint
):
    file = read_plan_file(plan_path)
    parallel = tmp_path / "parallel.json"
    parallel.write_text(json.dumps(PlanFile(replace(file.plan, tp_attention=2), file.task, file.fingerprint).to_json()))
    assert run_launch([str(checkpoint), "--plan", str(parallel)]) == 2
    assert "tensor parallelism is not built yet; plan with msi-plan --runnable" in capsys.readouterr().err
    assert run_launch(["--plan", str(plan_path)]) == 2  # the demo model
    assert "plan.json is for tiny" in capsys.readouterr().err
    named = tmp_path / "named.json"
    assert msi_plan.run(["mixtral-8x7b", "--gpu", "h20", "--runnable", "-o", str(named)]) == 0
    assert run_launch([str(checkpoint), "--plan", str(named)]) == 2
    assert "known by name only; plan with the model's directory" in capsys.readouterr().err


# -- choosing --------------------------------------------------------------------------------------------------------


def test_one_more_node_of_the_slower_side_brings_more_and_the_front_rises():
    task = parse([*DESIGN_COMMAND.split(), "--objective", "cost"]).task
    plan = best_plans(task, num_plans=1)[0]
    attention, expert = one_more(task, plan)
    assert attention.change is not None
    assert attention.change > -1e-9
    assert (expert.gpu, expert.num_gpus) == ("l40s", plan.tp_expert)
    front = pareto_front(task, num_points=6)
    assert [one.tpot_s for one in front] == sorted(one.tpot_s for one in front)
    assert [one.tokens_per_s_per_cost for one in front] == sorted(one.tokens_per_s_per_cost for one in front)


def test_both_balances_are_reported():
    task = parse(["dbrx", "--gpu", "a800"]).task
    plan = best_plans(task, num_plans=1)[0]
    nearest, within = balances(task, plan)
    pair = node_pair_of(task, plan)
    assert pair.with_attention_nodes(plan, within).stages.expert_s <= plan.t_attention_s
    assert pair.with_attention_nodes(plan, within + 1).stages.expert_s > plan.t_attention_s
    assert nearest in (within, within + 1)


def test_the_verdict_compares_with_the_best_way_to_keep_both_together():
    task = parse(["dbrx", "--gpu", "a800"]).task
    verdict = is_it_worth_it(task, best_plans(task))
    assert set(verdict.colocated) == {"tensor parallel", "tensor + expert parallel"}
    best = max(plan.tokens_per_s_per_gpu for plan in verdict.colocated.values())
    assert verdict.best is not None
    assert verdict.gain == pytest.approx(verdict.best.tokens_per_s_per_gpu / best)
