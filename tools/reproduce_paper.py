#!/usr/bin/env python3
"""The paper's claims (arXiv 2504.02263) beside what the planner's model says: ratios, none measured on such GPUs.

    tools/reproduce_paper.py                                   # a table
    tools/reproduce_paper.py --figures tools/results/paper --write-page
    tools/reproduce_paper.py --json                            # with every plan and every sensitivity

Takes about two minutes. Assumptions are those of msi/planner/assumptions.py, the same for every system; they were
committed before the first comparison, and none is set per figure. Where a claim differs by more than 15 %, each
assumption is varied alone over a stated range, and the reason says what that shows. "Up to" is the best over the
models. End to end is the sum described in tools/paper/systems.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above

from msi_launch.command_line import ScriptLine
from tools.paper.claims import Measured, measure_all
from tools.paper.sensitivity import KNOBS, Swing, by_claim, reason
from tools.paper.simulated import simulated_pass_s
from tools.paper.systems import HETEROGENEOUS, HOMOGENEOUS, MODELS, TITLES, Setting, Systems

PAGE = Path(__file__).resolve().parent / "paper" / "README.md"
BEGIN, END = "<!-- paper:begin -->", "<!-- paper:end -->"
HEADINGS = ("figure", "claim", "paper", "ours", "difference", "each model")
Swings = Mapping[str, Sequence[Swing]]


def main() -> None:
    parser = ScriptLine(__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw the figures into DIR, as PNG")
    parser.add_argument("--write-page", action="store_true", help="rewrite the table in tools/paper/README.md")
    arguments = parser.parse_args()
    if arguments.figures:
        try:
            from tools.paper.figures import draw
        except ImportError as error:
            sys.exit(f"--figures needs matplotlib ({error}); install it with: pip install -e '.[plot]'")
    setting = Setting()
    systems = Systems(setting)
    measured = measure_all(systems)
    found = by_claim(measured, setting, track(KNOBS, "sensitivities", console=Console(stderr=True), transient=True))
    if arguments.figures:
        draw(arguments.figures, systems, measured, found)
    if arguments.write_page:
        PAGE.write_text(with_block(PAGE.read_text(), markdown(measured, found)))
    if arguments.json:
        print(json.dumps(report(systems, measured, found), indent=1))
    else:
        show(measured, found)


def cells(one: Measured) -> tuple[str, ...]:
    """A row of the table, in the order of HEADINGS."""
    claim = one.claim
    each = ", ".join(f"{TITLES[model]} {value:.2f}" for model, value in one.each.items())
    difference = "" if one.difference is None else f"{100 * one.difference:+.1f} %"
    paper = "" if claim.paper is None else f"{claim.paper:.2f}"
    return claim.figure, claim.text, paper, f"{one.ours:.2f}", difference, each if len(one.each) > 1 else ""


def show(measured: Sequence[Measured], found: Swings) -> None:
    table = Table(*HEADINGS, title="The paper's claims, and what the planner's model says")
    for one in measured:
        table.add_row(*cells(one), style="" if one.is_close else "yellow")
    console = Console()
    console.print(table)
    for sentence in reasons(measured, found):
        console.print(sentence)


def reasons(measured: Sequence[Measured], found: Swings) -> list[str]:
    return [
        f"Figure {one.claim.figure}, {one.claim.text}: {why}"
        for one in measured
        if (why := reason(one, found[one.claim.key]))
    ]


def markdown_row(one: Measured) -> str:
    return f"| {' | '.join(cells(one))} |"


def markdown(measured: Sequence[Measured], found: Swings) -> str:
    lines = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS), *map(markdown_row, measured)]
    lines += [
        "",
        "Where they differ by more than 15 %, one assumption varied at a time (its range, then ours over it):",
    ]
    lines += ["", *(f"- {sentence}" for sentence in reasons(measured, found))]
    return "\n".join(lines)


def with_block(text: str, block: str) -> str:
    """`text` with `block` between the two markers, which must be there."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def report(systems: Systems, measured: Sequence[Measured], found: Swings) -> dict[str, Any]:
    setting = systems.setting
    plans: dict[str, Any] = {}
    for model in MODELS:
        for name, cluster in (("a800", HOMOGENEOUS), ("h20+l40s", HETEROGENEOUS)):
            plans[f"{model} on {name}"] = systems.ours(model, cluster).to_json()
            for baseline in setting.baselines:
                plan = systems.baseline(baseline, model, cluster)
                plans[f"{model} by {baseline} on {cluster.baseline_gpu}"] = plan.to_json()
        plans[f"{model} on a800, T_c by NCCL"] = systems.ours(model, HOMOGENEOUS, is_nccl=True).to_json()
        plans[f"{model} of Figure 14"] = systems.pipelined(model).to_json()
    return {
        "assumptions": setting.given.to_json(),
        "workload": {"input_len": setting.workload.input_len, "output_len": setting.workload.output_len,
                     "tpot_s": setting.workload.tpot_s},
        "claims": [
            {
                "figure": one.claim.figure, "claim": one.claim.text, "paper": one.claim.paper, "ours": one.ours,
                "difference": one.difference, "each": one.each, "reason": reason(one, found[one.claim.key]),
                "sensitivity": [swing.to_json() for swing in found[one.claim.key]],
            }
            for one in measured
        ],
        "figure_14": {model: [_passes(systems, model, m) for m in (1, 2, 3, 4)] for model in MODELS},
        "figure_15": [
            {"attention_nodes": degree, "tpot_s": one.tpot_s, "tokens_per_s": one.tokens_per_s,
             "tokens_per_s_per_gpu": one.tokens_per_s_per_gpu, "t_expert_s": one.stages.expert_s}
            for degree, one in systems.sweep().items()
        ],
        "plans": plans,
    }  # fmt: skip


def _passes(systems: Systems, model: str, m: int) -> dict[str, float]:
    plan = systems.pipelined(model)
    simulated_s = simulated_pass_s(plan.stages, m, plan.num_layers)
    return {"m": m, "pass_s": systems.pass_s(model, m), "simulated_pass_s": simulated_s}


if __name__ == "__main__":
    main()
