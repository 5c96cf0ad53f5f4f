"""msi-plan: chooses deployments, explains them, and writes the one that msi-launch --plan runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from msi.errors import ConfigError
from msi.planner.choose import Marginal, Verdict, balances, best_plans, is_it_worth_it, one_more
from msi.planner.plan import Plan
from msi.planner.plan_file import SCHEMA_VERSION, PlanFile, task_to_json
from msi.planner.task import Task, score_of

from .command import open_missing_streams, run_command
from .plan_arguments import PlanArguments, parse

PLAIN_WIDTH = 140  # columns, where the output is no terminal
UNITS = {"gpu": "tokens/s per GPU", "cost": "tokens/s per price of an L20", "watt": "tokens/s per watt",
         "cluster": "tokens/s of all GPUs"}  # fmt: skip


def main() -> None:
    """Runs msi-plan with the arguments of this process; does not return."""
    open_missing_streams()
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Runs msi-plan; the exit status."""
    return run_command("msi-plan", lambda: _run(argv))


def _run(argv: list[str]) -> None:
    arguments = parse(argv)
    plans = _plans(arguments)
    verdict = is_it_worth_it(arguments.task, plans)
    if arguments.is_json:
        sys.stdout.write(orjson.dumps(as_json(arguments.task, plans, verdict), option=orjson.OPT_INDENT_2).decode())
        sys.stdout.write("\n")
    else:
        show(arguments, plans, verdict)
    if arguments.output is not None:
        _write(arguments, plans[0])
    if arguments.plot is not None:
        from .plan_plot import plot_plan  # imports matplotlib, which nobody else needs

        plot_plan(arguments.task, plans[0], verdict, arguments.plot)


def _plans(arguments: PlanArguments) -> list[Plan]:
    if arguments.algorithm == "search":
        return best_plans(arguments.task, num_plans=arguments.num_plans)
    from msi.planner.algorithm1 import algorithm1

    plans = algorithm1(arguments.task, equations="paper" if arguments.algorithm == "paper" else "corrected")
    return plans[: arguments.num_plans]


def _write(arguments: PlanArguments, plan: Plan) -> None:
    assert arguments.output is not None
    file = PlanFile(plan, arguments.task, arguments.task.model.config_digest)
    try:
        arguments.output.write_bytes(orjson.dumps(file.to_json(), option=orjson.OPT_INDENT_2) + b"\n")
    except OSError as error:
        raise ConfigError(f"-o {arguments.output} cannot be written: {error.strerror}") from error


def as_json(task: Task, plans: Sequence[Plan], verdict: Verdict) -> dict[str, Any]:
    """What --json prints: the plans under "plans", best first; the same hardware colocated under "colocated"."""
    return {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": task.model.config_digest,
        "model": task.model.name,
        "objective": task.objective,
        "plans": [plan.to_json() for plan in plans],
        "colocated": {name: plan.to_json() for name, plan in verdict.colocated.items()},
        "is_worth_it": verdict.is_worth_it,
        "gain_over_colocated": None if verdict.gain == float("inf") else verdict.gain,
        "task": task_to_json(task),
    }


class _Output(Console):
    def on_broken_pipe(self) -> None:
        raise  # as what it is, and not as the end of the process


# -- for people ------------------------------------------------------------------------------------------------------


def show(arguments: PlanArguments, plans: Sequence[Plan], verdict: Verdict) -> None:
    """The plans as a table, the verdict, and what was asked beside them."""
    console = _Output()
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    task = arguments.task
    workload = task.workload
    console.print(
        f"{task.model.name}: {workload.input_len:g} tokens in, {workload.output_len:g} out, TPOT at most "
        f"{workload.tpot_s * 1e3:g} ms; best {UNITS[task.objective]} first",
        highlight=False,
    )
    console.print(table([*plans, *(plan for plan in verdict.colocated.values() if plan not in plans)], task))
    console.print(sentence(verdict, task), highlight=False, soft_wrap=True)
    if arguments.is_explained:
        for line in explanation(plans[0], one_more(task, plans[0])):
            console.print(line, highlight=False, soft_wrap=True)
        if (balanced := balances(task, plans[0])) is not None:
            nearest, within = balanced
            console.print(
                f"With micro-batches of {plans[0].micro_batch}, T_a is nearest T_e at {nearest} attention nodes; the "
                f"most with T_e <= T_a are {within}.",
                highlight=False,
                soft_wrap=True,
            )
    if arguments.output is not None:
        runs = plans[0].tp_attention == plans[0].tp_expert == 1
        how = "" if runs else " (msi-launch cannot run it yet: it needs tensor parallelism; see --runnable)"
        console.print(f"the first plan is in {arguments.output}{how}", highlight=False, soft_wrap=True)


def table(plans: Sequence[Plan], task: Task) -> Table:
    shown = Table(header_style="bold", caption="times in ms; memory per node in GB, used of what may be planned")
    unit = UNITS[task.objective].replace("tokens/s", "tokens/s\n")
    for column in ("attention", "experts", "m", "B", "T_a\nT_e\nT_c", "bubbles", "TPOT", "tokens/s", unit, "memory"):
        shown.add_column(column, justify="left" if column in ("attention", "experts") else "right")
    shown.add_column("limited by")
    for plan in plans:
        is_split = plan.kind == "disaggregated"
        experts = (
            f"{plan.num_expert_nodes} x {_node(plan.expert_gpu, plan.tp_expert)}\n{plan.experts_per_node} experts each"
        )
        what = {"vllm": "tensor parallel", "tensorrt-llm": "tensor + expert parallel"}.get(plan.baseline, "one process")
        shown.add_row(
            f"{plan.num_attention_nodes} x {_node(plan.attention_gpu, plan.tp_attention, plan.threads_per_worker)}",
            experts if is_split else f"colocated ({what})",
            str(plan.num_micro_batches),
            str(plan.batch_size),
            "\n".join(f"{time_s * 1e3:.3f}" for time_s in (plan.t_attention_s, plan.t_expert_s, plan.t_comm_s)),
            f"{100 * plan.attention_bubble:.0f} %\n{100 * plan.expert_bubble:.0f} %" if is_split else "",
            f"{plan.tpot_s * 1e3:.1f}",
            f"{plan.tokens_per_s:.0f}",
            f"{score_of(plan, task.objective):.3g}"
            if task.objective == "watt"
            else f"{score_of(plan, task.objective):.0f}",
            _memory(plan),
            plan.limited_by,
        )
    return shown


def _node(gpu: str, tp: int, threads: int = 0) -> str:
    return (gpu if tp == 1 else f"{tp} {gpu}") + (f" ({threads} threads)" if threads else "")


def _memory(plan: Plan) -> str:
    if plan.kind == "colocated":
        used = plan.attention_memory_bytes + plan.expert_memory_bytes
        return f"{used / 1e9:.1f} of {(plan.attention_memory_bytes + plan.expert_memory_limit_bytes) / 1e9:.1f}"
    sides = (
        (plan.attention_memory_bytes, plan.attention_memory_limit_bytes),
        (plan.expert_memory_bytes, plan.expert_memory_limit_bytes),
    )
    return "\n".join(f"{used / 1e9:.1f} of {limit / 1e9:.1f}" for used, limit in sides)


def sentence(verdict: Verdict, task: Task) -> str:
    """The answer to "is disaggregation worth it here?"."""
    unit = UNITS[task.objective]
    if not verdict.colocated:
        return "Is disaggregation worth it here? Yes: the model does not fit these limits colocated."
    name, other = max(verdict.colocated.items(), key=lambda one: score_of(one[1], task.objective))
    theirs = f"{score_of(other, task.objective):.4g} colocated ({name})"
    if verdict.best is None:
        return f"Is disaggregation worth it here? No: only colocated deployments keep the limits; {unit}: {theirs}."
    ours = f"{score_of(verdict.best, task.objective):.4g} disaggregated"
    word = "Yes" if verdict.is_worth_it else "No"
    return f"Is disaggregation worth it here? {word}: {unit}: {ours}, {theirs}, a factor of {verdict.gain:.2f}."


def explanation(plan: Plan, marginals: Sequence[Marginal]) -> list[str]:
    """Which constraint binds, how full the pipeline is, and what one more node would bring."""
    limits = {
        "tpot": f"the TPOT limit: a pass already takes {plan.tpot_s * 1e3:.1f} ms",
        "attention memory": f"the attention nodes' memory: {plan.attention_memory_bytes / 1e9:.1f} GB of "
        f"{plan.attention_memory_limit_bytes / 1e9:.1f} GB hold weights, KV cache and buffers",
        "expert memory": f"the expert nodes' memory: {plan.expert_memory_bytes / 1e9:.1f} GB of "
        f"{plan.expert_memory_limit_bytes / 1e9:.1f} GB hold weights and buffers",
        "batch limit": "the limit on sequences that was given",
    }
    lines = [f"The batch is limited by {limits[plan.limited_by]}."]
    if plan.kind == "colocated":
        return [*lines, "Colocated stages never overlap: a layer takes T_a + T_e and the exchange between them."]
    stages, m = plan.stages, plan.num_micro_batches
    slower = "attention" if stages.attention_s > stages.expert_s else "expert"
    turn = max(m * stages.forward_s, stages.round_trip_s)
    if m * stages.forward_s >= stages.round_trip_s:
        lines.append(f"The pipeline is full: the {slower} nodes are the slower side and never wait.")
    else:
        lines.append(
            f"The pipeline is not full: a round trip takes {stages.round_trip_s * 1e3:.3f} ms, {m} micro-batches fill "
            f"{m * stages.forward_s * 1e3:.3f} ms of {turn * 1e3:.3f} ms."
        )
    for one in marginals:
        gpus = f"{one.num_gpus} {one.gpu}" if one.gpu != "cpu" else "core"
        change = "cannot be used here" if one.change is None else f"brings {100 * one.change:+.1f} % tokens/s"
        lines.append(f"One more {one.side} node ({gpus}) {change}.")
    return lines
