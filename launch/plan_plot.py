"""The figure of msi-plan: the Pareto front of throughput against TPOT, and the balance of both sides."""

from __future__ import annotations

from pathlib import Path

from msi.errors import ConfigError
from msi.planner.choose import Verdict, pareto_front
from msi.planner.plan import Plan
from msi.planner.search import node_pair_of
from msi.planner.task import Task, score_of


def plot_plan(task: Task, plan: Plan, verdict: Verdict, path: Path) -> None:
    """Draws into `path` (.png, .svg or .pdf).

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('--plot needs matplotlib: pip install "msi[plot]"') from None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    front_axes, balance_axes = figure.subplots(1, 2)
    front = pareto_front(task)
    front_axes.plot(
        [one.tpot_s * 1e3 for one in front], [score_of(one, task.objective) for one in front], "o-", label="best plan"
    )
    for name, other in verdict.colocated.items():
        front_axes.plot(other.tpot_s * 1e3, score_of(other, task.objective), "x", label=f"colocated, {name}")
    front_axes.set(
        xlabel="TPOT (ms)", ylabel=f"tokens/s per {task.objective}", title=f"{task.model.name}: Pareto front"
    )
    front_axes.legend()
    nodes, attention_ms, expert_ms, tokens = balance_curve(task, plan)
    balance_axes.plot(nodes, attention_ms, label="T_a")
    balance_axes.plot(nodes, expert_ms, label="T_e")
    balance_axes.axvline(plan.num_attention_nodes, color="grey", linestyle=":", label="plan")
    balance_axes.set(
        xlabel="attention nodes", ylabel="ms per layer", title=f"balance at {plan.micro_batch} per micro-batch"
    )
    right = balance_axes.twinx()
    right.plot(nodes, tokens, color="black", linewidth=0.8)
    right.set_ylabel("tokens/s per GPU (thin line)")
    balance_axes.legend(loc="upper left")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}") from error


def balance_curve(task: Task, plan: Plan) -> tuple[list[int], list[float], list[float], list[float]]:
    """T_a and T_e in ms and tokens/s per GPU over attention nodes, each with the plan's micro-batch."""
    if task.profile is not None or plan.kind == "colocated":
        return (
            [plan.num_attention_nodes],
            [plan.t_attention_s * 1e3],
            [plan.t_expert_s * 1e3],
            [plan.tokens_per_s_per_gpu],
        )
    nodes = list(range(1, 2 * plan.num_attention_nodes + 3))
    found = [node_pair_of(task, plan).with_attention_nodes(plan, number) for number in nodes]
    return (
        nodes,
        [one.t_attention_s * 1e3 for one in found],
        [one.t_expert_s * 1e3 for one in found],
        [one.tokens_per_s_per_gpu for one in found],
    )
