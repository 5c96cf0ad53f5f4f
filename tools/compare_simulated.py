#!/usr/bin/env python3
"""What a profile predicts of layouts on this machine, beside what they do: decode tokens per second.

    tools/compare_simulated.py MODEL --profile profile.json
    tools/compare_simulated.py MODEL --profile profile.json --best

Predicted by the simulator (the product's lanes, links and waves on a virtual clock) and by the closed form of the
steady pass, both from the profile's stage times; measured by `tools/bench_decode.py`. Nothing is fitted to what is
measured. `--best`: of colocated and 1 + 1 workers, m = 1 to 4 and several batches, is the predicted best the best?
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from msi import Engine
from msi.errors import EngineError
from msi.models.config import config_digest
from msi.models.families import load_config
from msi.models.shape import shape_of
from msi.planner.hardware import read_catalogue
from msi.planner.machine import Layout, machine_for
from msi.planner.model_shape import ModelShape
from msi.planner.pipeline import Stages, steady_pass_s
from msi.planner.plan import Workload
from msi.planner.profile import Profile, read_profile
from msi.planner.task import Pool, Task
from msi.profiler.calm import CALM, Others
from msi.simulator.clock import run_virtual
from msi.simulator.instance import Shape, SimulatedInstance
from msi_launch.command_line import ScriptLine, as_flags
from tools import bench_decode

SIMULATED_PASSES = 40
SIMULATED_SKIP = 10  # until the pipeline is steady


def parse_layout(text: str) -> Layout:
    """Workers of one machine, as on the command line: "colocated/t2", "1+1/m2/t1"."""
    workers, *settings = text.split("/")
    given = {setting[:1]: setting[1:] for setting in settings}
    try:
        m, threads = int(given.pop("m", "1")), int(given.pop("t", "1"))
        attention, expert = (1, 1) if workers == "colocated" else (int(part) for part in workers.split("+"))
    except ValueError:
        given["?"] = ""
    if given or min(attention, expert, m, threads) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no layout; give colocated/t2 or 2+1/m2/t1")
    return Layout(attention, expert, threads, m, workers == "colocated")


SIX = ("colocated/t2", "1+1/m1/t1", "1+1/m2/t1", "1+1/m3/t1", "2+1/m1/t1", "1+2/m2/t1")


@dataclass(frozen=True, slots=True)
class Prediction:
    """Tokens per second, and what they follow from."""

    simulated_tokens_per_s: float
    closed_form_tokens_per_s: float
    t_attention_s: float
    t_expert_s: float
    t_comm_s: float
    t_pass_s: float


@dataclass(frozen=True, slots=True)
class Compared:
    layout: str
    batch: int
    predicted: Prediction
    measured_tokens_per_s: list[float]
    measured_t_attention_s: float
    measured_t_expert_s: float
    measured_t_comm_s: float

    @property
    def tokens_per_s(self) -> float:
        return median(self.measured_tokens_per_s)

    @property
    def difference(self) -> float:
        """Of the simulated from the measured, as a share of the measured."""
        return self.predicted.simulated_tokens_per_s / self.tokens_per_s - 1


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--layout", type=parse_layout, action="append", help=f"by default {' '.join(SIX)}")
    parser.add_argument("--batch", type=int, default=24, help="sequences; a multiple of lanes times attention workers")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    parser.add_argument(
        "--best", action="store_true", help="the best of many layouts and batches, predicted and measured"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32], help="for --best")
    parser.add_argument("--predict-only", action="store_true", help="measure nothing")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds per layout to wait for a calm machine")
    parser.add_argument("--json", action="store_true")
    values: argparse.Namespace = parser.parse_args()
    return values


# -- predicted -------------------------------------------------------------------------------------------------------


def predict(task: Task, layout: Layout, batch: int) -> Prediction:
    """Raises ConfigError: the profile has nothing for this layout."""
    machine = machine_for(task, layout)
    per_lane = batch / (layout.num_micro_batches * layout.num_attention)
    stages, pass_s, num_layers = machine.layer_stages(per_lane), machine.pass_s(per_lane), task.model.num_sparse_layers
    return Prediction(
        simulated_tokens_per_s=batch / simulated_pass_s(layout, num_layers, stages, pass_s),
        closed_form_tokens_per_s=batch / closed_form_pass_s(layout, num_layers, stages, pass_s),
        t_attention_s=stages.attention_s,
        t_expert_s=stages.expert_s,
        t_comm_s=stages.comm_s,
        t_pass_s=pass_s,
    )


def closed_form_pass_s(layout: Layout, num_layers: int, stages: Stages, pass_s: float) -> float:
    """The steady pass; what comes once per pass is shared out to the layers, and a colocated device computes both."""
    attention_s = stages.attention_s + pass_s / num_layers
    if layout.is_colocated:
        one_device = Stages(attention_s + stages.expert_s, 0.0, stages.comm_s)
        return steady_pass_s(one_device, layout.num_micro_batches, num_layers)
    return steady_pass_s(Stages(attention_s, stages.expert_s, stages.comm_s), layout.num_micro_batches, num_layers)


def simulated_pass_s(layout: Layout, num_layers: int, stages: Stages, pass_s: float) -> float:
    """Mean time of a pass of each lane once the pipeline is steady."""

    async def simulate() -> float:
        shape = Shape(
            layout.num_attention, layout.num_expert, layout.num_micro_batches, num_layers, stages, pass_s=pass_s,
            is_colocated=layout.is_colocated,
        )  # fmt: skip
        async with SimulatedInstance(shape) as instance:
            passes = [await worker.start(SIMULATED_PASSES) for worker in instance.attention]
            await asyncio.gather(*(one.done.wait() for one in passes))
            return sum(one.log.mean_pass_s(SIMULATED_SKIP) for one in passes) / len(passes)

    return run_virtual(simulate())


# -- measured --------------------------------------------------------------------------------------------------------


async def measure(
    arguments: argparse.Namespace, layout: Layout, batches: list[int]
) -> dict[int, list[bench_decode.Run]]:
    """Runs of each batch on one instance."""
    config, _ = load_config(arguments.model)
    chance = Random(0)
    prompts = [
        tuple(chance.randrange(3, config.vocab_size) for _ in range(arguments.input_len)) for _ in range(max(batches))
    ]
    engine = Engine.local(
        model=arguments.model, colocated=layout.is_colocated, attention_workers=layout.num_attention,
        expert_workers=layout.num_expert, micro_batches=layout.num_micro_batches, threads_per_worker=layout.threads,
        load_format=arguments.load_format, max_num_seqs=max(64, *batches),
    )  # fmt: skip
    found: dict[int, list[bench_decode.Run]] = {batch: [] for batch in batches}
    async with engine:
        others = Others(engine.pids.values, arguments.patience)
        await bench_decode.drive(engine, prompts, 8)  # warm up
        for _ in range(arguments.repeat):
            for batch in batches:
                found[batch].append(await undisturbed(engine, prompts[:batch], arguments.output_len, others))
    return found


async def undisturbed(
    engine: Engine, prompts: list[tuple[int, ...]], output_len: int, others: Others
) -> bench_decode.Run:
    """A run during which others hardly took anything, or the least disturbed when patience is at an end."""
    runs: list[tuple[float, bench_decode.Run]] = []
    while True:
        await asyncio.to_thread(others.wait_calm)
        mark = others.mark()
        run = await bench_decode.run_ours(engine, prompts, output_len)
        runs.append((others.share_since(mark), run))
        if runs[-1][0] <= CALM or others.left_s <= 0:
            return min(runs, key=lambda one: one[0])[1]
        others.left_s -= others.mark()[0] - mark[0]


def compare(arguments: argparse.Namespace, profile: Profile, shape: ModelShape) -> list[Compared]:
    workload = Workload(input_len=arguments.input_len, output_len=arguments.output_len, tpot_s=math.inf)
    cores = (Pool(read_catalogue().gpu("cpu"), profile.num_cores),)
    task = Task(model=shape, workload=workload, attention=cores, expert=cores, profile=profile)
    compared = []
    if arguments.best:
        layouts = [Layout(1, 1, 2, m, True) for m in range(1, 5)] + [Layout(1, 1, 1, m) for m in range(1, 5)]
        batches = arguments.batches
    else:
        layouts, batches = arguments.layout or [parse_layout(text) for text in SIX], [arguments.batch]
    for layout in layouts:
        runs = {} if arguments.predict_only else asyncio.run(measure(arguments, layout, batches))
        for batch in batches:
            of_batch = runs.get(batch, [])
            times = [(run.t_attention_s, run.t_expert_s, run.t_comm_s) for run in of_batch] or [(0.0, 0.0, 0.0)]
            compared.append(
                Compared(
                    str(layout),
                    batch,
                    predict(task, layout, batch),
                    [run.decode_tokens_per_s for run in of_batch],
                    *(median(values) for values in zip(*times, strict=True)),
                )
            )
            print(f"{layout}, batch {batch}: {_rates(compared[-1])}", file=sys.stderr)
    return compared


def _rates(one: Compared) -> str:
    predicted = f"predicted {one.predicted.simulated_tokens_per_s:.1f} tokens/s"
    return predicted + (f", measured {one.measured_tokens_per_s}" if one.measured_tokens_per_s else "")


# -- shown -----------------------------------------------------------------------------------------------------------


def verdict(compared: list[Compared], is_best: bool) -> dict[str, Any]:
    """The figures that count."""
    if is_best:
        chosen = max(compared, key=lambda one: one.predicted.simulated_tokens_per_s)
        best = max(compared, key=lambda one: one.tokens_per_s)
        return {
            "predicted_best": f"{chosen.layout}, batch {chosen.batch}",
            "measured_best": f"{best.layout}, batch {best.batch}",
            "chosen_over_best": chosen.tokens_per_s / best.tokens_per_s,
        }
    return {"median_absolute_difference": median(abs(one.difference) for one in compared)}


def show(compared: list[Compared]) -> None:
    table = Table("layout", "batch", "simulated", "closed form", "measured tokens/s", "difference",
                  "T_a ms, measured", "T_e ms, measured", "T_c ms, measured", "once ms")  # fmt: skip
    for one in compared:
        predicted, has_runs = one.predicted, bool(one.measured_tokens_per_s)
        table.add_row(
            one.layout, str(one.batch), f"{predicted.simulated_tokens_per_s:.1f}",
            f"{predicted.closed_form_tokens_per_s:.1f}",
            " ".join(f"{rate:.1f}" for rate in one.measured_tokens_per_s),
            f"{one.difference:+.1%}" if has_runs else "",
            f"{predicted.t_attention_s * 1e3:.2f}, {one.measured_t_attention_s * 1e3:.2f}",
            f"{predicted.t_expert_s * 1e3:.2f}, {one.measured_t_expert_s * 1e3:.2f}",
            f"{predicted.t_comm_s * 1e3:.2f}, {one.measured_t_comm_s * 1e3:.2f}",
            f"{predicted.t_pass_s * 1e3:.1f}",
        )  # fmt: skip
    Console(width=160).print(table)


def main() -> int:
    arguments = parse()
    try:
        profile = read_profile(arguments.profile)
        config, values = load_config(arguments.model)
        shape = shape_of(config, name=arguments.model.name, digest=config_digest(values), precision=profile.precision)
        if shape.config_digest != profile.config_digest:
            print(f"{arguments.profile} is of another model, {profile.model}; measure this one", file=sys.stderr)
            return 2
        compared = compare(arguments, profile, shape)
    except EngineError as error:
        print(f"compare_simulated: {as_flags(str(error))}", file=sys.stderr)
        return 2
    figures = {} if arguments.predict_only else verdict(compared, arguments.best)
    if arguments.json:
        rows = [asdict(one) for one in compared]
        print(json.dumps({"schema_version": 1, "host": profile.host, "model": profile.model, "rows": rows, **figures}))
    else:
        show(compared)
        for name, value in figures.items():
            print(f"{name}: {value if isinstance(value, str) else f'{value:.3f}'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
