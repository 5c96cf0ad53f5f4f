"""A plan, simulated: the deployment and stage times that it stands for."""

from __future__ import annotations

from dataclasses import replace

from msi.errors import ConfigError
from msi.kernels import BLOCK_TOKENS
from msi.planner.choose import costs_of
from msi.planner.plan_file import PlanFile
from msi.planner.stage_costs import StageCosts
from msi.settings import SLOT_ROWS, LinkShape
from msi.simulator.deployment import LIMITS, Deployment


def deployment_of_plan(file: PlanFile) -> tuple[Deployment, StageCosts]:
    """One worker per node, whatever its tensor parallelism: the stage times hold it.

    Raises:
        ConfigError: a colocated plan over several GPUs, whose stages no process here has.
    """
    plan, model, workload = file.plan, file.task.model, file.task.workload
    if plan.kind == "colocated" and plan.baseline:
        raise ConfigError(f"this is a plan of {plan.baseline}'s deployment; only plans of this runtime are simulated")
    if plan.kind == "colocated":
        num_attention = num_expert = 1
    else:
        num_attention, num_expert = plan.num_attention_nodes, plan.num_expert_nodes
    per_node = plan.micro_batch * plan.num_micro_batches
    kv_bytes_each = workload.mean_len * model.kv_bytes_per_token
    spare_bytes = plan.attention_memory_limit_bytes - plan.attention_memory_bytes
    num_blocks = int((per_node * kv_bytes_each + spare_bytes) / (BLOCK_TOKENS * model.kv_bytes_per_token))
    longest = int(workload.input_len + workload.output_len) + BLOCK_TOKENS
    deployment = Deployment(
        num_layers=plan.num_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        num_attention=num_attention,
        num_expert=num_expert,
        num_micro_batches=plan.num_micro_batches,
        is_colocated=plan.kind == "colocated",
        row_bytes=model.sent_row_bytes,
        answer_row_bytes=model.answer_row_bytes,
        limits=replace(
            LIMITS, max_num_seqs=per_node, num_gpu_blocks_override=max(num_blocks, 2 + longest // BLOCK_TOKENS)
        ),
        link=LinkShape(slot_rows=max(SLOT_ROWS, plan.micro_batch)),
    )
    return deployment, costs_of(file.task, plan)
