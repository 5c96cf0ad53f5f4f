"""Simulating a plan: its deployment, and the stage times that the planner predicts for it."""

from __future__ import annotations

from pathlib import Path

from msi.errors import ConfigError
from msi.kernels.paged_attention import BLOCK_TOKENS
from msi.planner.choose import costs_of
from msi.planner.performance import kv_shards
from msi.planner.plan_file import PlanFile, read_plan_file
from msi.planner.stage_costs import StageCosts
from msi.simulator.deployment import Deployment

SLOT_ROWS = 512  # what slots have by default; more where a plan's micro-batch needs it


def read_planned(path: Path) -> tuple[Deployment, StageCosts]:
    """What `msi-plan -o` wrote.

    Raises:
        ConfigError: the file is no plan, or one of a colocated baseline, which is not a deployment of ours.
    """
    file = read_plan_file(path)
    if file.plan.kind == "colocated" and file.task.profile is None:
        raise ConfigError(
            f"{path} is a colocated plan by the roofline, with another system's tensor parallelism in place of "
            f"messages; give a disaggregated one, or one for a profiled machine"
        )
    return deployment_of_plan(file), costs_of(file.task, file.plan)


def deployment_of_plan(file: PlanFile) -> Deployment:
    """One attention worker per attention node: a node of several GPUs computes as one."""
    plan, model = file.plan, file.task.model
    seqs_per_node = plan.micro_batch * plan.num_micro_batches
    slot_rows = max(SLOT_ROWS, plan.micro_batch)
    token_bytes = model.kv_bytes_per_token * plan.tp_attention / kv_shards(model, plan.tp_attention)
    spare_bytes = max(0.0, plan.attention_memory_limit_bytes - plan.attention_memory_bytes)
    kv_tokens = seqs_per_node * file.task.workload.mean_len + spare_bytes / token_bytes
    return Deployment(
        num_layers=plan.num_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        num_attention=plan.num_attention_nodes,
        num_expert=plan.num_expert_nodes,
        num_micro_batches=plan.num_micro_batches,
        is_colocated=plan.kind == "colocated",
        row_bytes=model.hidden_size * model.value_bytes,
        answer_row_bytes=model.hidden_size * model.value_bytes,
        num_kv_blocks=max(1, int(kv_tokens / BLOCK_TOKENS)),
        max_num_seqs=seqs_per_node,
        slot_rows=slot_rows,
    )
