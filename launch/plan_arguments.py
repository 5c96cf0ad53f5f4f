"""The command line of msi-plan, and the planning task that it describes."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

from msi.errors import ConfigError, shown
from msi.models.shape import read_shape
from msi.planner.assumptions import Assumptions
from msi.planner.hardware import Catalogue, nearest, read_catalogue
from msi.planner.model_shape import ModelShape
from msi.planner.pipeline import MAX_MICRO_BATCHES
from msi.planner.plan import Workload
from msi.planner.profile import Profile, read_profile
from msi.planner.task import OBJECTIVES, TP_SIZES, Limits, Pool, Task
from msi.precision import AUTO, QUANTISATIONS, VALUE_BYTES, Precision
from msi.settings import SLOT_ROWS

from .command_line import CommandLine, file_to_ask, file_to_write, integer, number, one_of, quoted
from .precision_flags import add_eight_bits, with_eight_bits

DEFAULT_COUNT = 64  # GPUs of a type, where no count is given
FIGURES = (".png", ".svg", ".pdf")
MAX_GPUS = 1_000_000
MAX_LENGTH = 1e8
MAX_TPOT_MS = 1e7
MAX_PLANS = 1000
MAX_TP = 1024
MAX_ASSUMED = 1e18


@dataclass(frozen=True, slots=True)
class PlanArguments:
    """What msi-plan was told.

    Attributes:
        algorithm: "search", or Algorithm 1 of the paper with its equations "paper" or "corrected".
        output: where plan.json goes; None for nowhere.
        plot: where the figure goes; None for none.
    """

    task: Task
    algorithm: str
    num_plans: int
    is_json: bool
    output: Path | None
    is_runnable: bool
    is_explained: bool
    plot: Path | None


def parse(argv: list[str]) -> PlanArguments:
    """Raises ConfigError. --help and --version print, and end the process."""
    parser = CommandLine(
        "msi-plan",
        "Choose how to deploy a Mixture-of-Experts model: tensor parallelism, attention and expert nodes, "
        "micro-batches and batch, from a performance model or from a profile of this machine. Says, too, whether "
        "attention and experts are better kept together.",
        usage="msi-plan MODEL [options]",
    )
    _add_what(parser)
    _add_hardware(parser)
    _add_output(parser)
    values = parser.parse_args(argv)
    task = _task(values)
    if values.num_plans < 1:
        raise ConfigError(f"--num-plans {values.num_plans}: give at least 1")
    if values.algorithm != "search" and task.profile is not None:
        raise ConfigError(f"--algorithm {values.algorithm} plans for GPUs by the roofline; leave --profile out")
    return PlanArguments(
        task=task,
        algorithm=values.algorithm,
        num_plans=values.num_plans,
        is_json=values.json,
        output=values.output,
        is_runnable=values.runnable,
        is_explained=values.explain,
        plot=values.plot,
    )


def _add_what(parser: CommandLine) -> None:
    add = parser.add_argument_group("what to serve").add_argument
    add(
        "model", metavar="MODEL", help="a name of the catalogue, such as mixtral-8x22b, or a directory with config.json"
    )
    add("--input-len", type=number(None, MAX_LENGTH), default=571.0, metavar="N", help="tokens of the mean prompt; 571")
    add(
        "--output-len", type=number(None, MAX_LENGTH), default=159.0, metavar="N", help="tokens of the mean answer; 159"
    )
    add(
        "--tpot-ms",
        dest="tpot_s",
        type=milliseconds,
        default=0.150,
        metavar="MS",
        help="limit on the time per output token; 150",
    )
    add("--objective", default="gpu", type=one_of(*OBJECTIVES), metavar="O",
        help="gpu, cost, watt or cluster: tokens/s per GPU, per price, per watt, or of all GPUs")  # fmt: skip
    add("--dtype", type=one_of(*VALUE_BYTES), metavar="D",
        help=f"of weights and KV cache: {', '.join(VALUE_BYTES)}; bfloat16 for known names")  # fmt: skip
    add("--quantization", type=one_of(*QUANTISATIONS), metavar="Q", default=AUTO,
        help=f"of matrices: {', '.join(QUANTISATIONS[1:])}; auto: as the checkpoint is")  # fmt: skip

    add_eight_bits(add)


def _add_hardware(parser: CommandLine) -> None:
    add = parser.add_argument_group("on what").add_argument
    some = "NAME[:COUNT][,...]"
    add("--gpu", metavar=some, help="types that either side may use: h20:16,l40s:24; 64 each where no count is given")
    add("--attention-gpu", metavar=some, help="types for attention nodes only")
    add("--expert-gpu", metavar=some, help="types for expert nodes only")
    add(
        "--profile",
        type=file_to_ask,
        metavar="FILE",
        help="of this machine, from msi-profile, for the roofline",
    )
    add(
        "--catalogue",
        type=file_to_ask,
        metavar="FILE",
        help="TOML with more GPUs and models, or other figures for known ones",
    )
    add("--assume", action="append", default=[], metavar="NAME=VALUE", help="another value for one of the assumptions")
    add("--micro-batches", default="auto", type=one_of("auto", *map(str, range(1, MAX_MICRO_BATCHES + 1))), metavar="M",
        help=f"1 to {MAX_MICRO_BATCHES}; auto tries all")  # fmt: skip
    add("--tp", default="", metavar="N[,N...]", help="tensor-parallel sizes to try; 1,2,4,8")
    add("--max-batch", type=integer(None, MAX_GPUS), default=0, metavar="N",
        help="sequences of an instance at most; 0 for any number")  # fmt: skip
    add("--runnable", action="store_true", help="only what msi-launch can run today: no tensor parallelism")
    add("--algorithm", default="search", type=one_of("search", "paper", "corrected"), metavar="A",
        help="search (everything), or the paper's Algorithm 1 with its equations: paper (as written) or corrected"
    )  # fmt: skip


def _add_output(parser: CommandLine) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--num-plans", type=integer(None, MAX_PLANS), default=5, metavar="N", help="how many are shown; 5")
    add("--json", action="store_true", help="the plans, best first, as one JSON object")
    add("-o", "--output", type=file_to_write, metavar="FILE", help="write the best plan for msi-launch --plan")
    add("--explain", action="store_true", help="which limit binds, and what one more node of either side would bring")
    add("--plot", type=figure, metavar="FILE", help="draw the Pareto front and the balance of both sides")


def milliseconds(word: str) -> float:
    """In seconds."""
    given = number(None, MAX_TPOT_MS)(word)
    if given <= 0:
        raise argparse.ArgumentTypeError(f"{quoted(word)}: give a time above 0")
    return given / 1e3


def figure(word: str) -> Path:
    """A file to draw into."""
    if Path(word).suffix not in FIGURES:
        raise argparse.ArgumentTypeError(f"{quoted(word)}: give a file's name that ends in {', '.join(FIGURES)}")
    return file_to_write(word)


def _task(values: argparse.Namespace) -> Task:
    catalogue = read_catalogue(values.catalogue)
    profile = None if values.profile is None else read_profile(values.profile)
    model = _model(values.model, values.dtype or "", catalogue)
    if values.quantization != AUTO:
        model = replace(model, precision=replace(model.precision, quantization=values.quantization))
    model = replace(model, precision=with_eight_bits(model.precision, values))
    if profile is not None:
        model = _profiled(model, profile, values)
        pools: tuple[Pool, ...] = (Pool(catalogue.gpu("cpu"), profile.num_cores),)
        attention, expert = pools, pools
    else:
        attention = _pools(values.attention_gpu or values.gpu, "--attention-gpu", catalogue)
        expert = _pools(values.expert_gpu or values.gpu, "--expert-gpu", catalogue)
    return Task(
        model=model,
        workload=Workload(input_len=values.input_len, output_len=values.output_len, tpot_s=values.tpot_s),
        attention=attention,
        expert=expert,
        objective=values.objective,
        given=_assumptions(values.assume),
        limits=_limits(values),
        profile=profile,
    )


def _model(name: str, dtype: str, catalogue: Catalogue) -> ModelShape:
    path = Path(name)
    if not name:
        raise ConfigError("MODEL is empty; give a directory with a config.json, or a name of the catalogue")
    if os.path.exists(path):
        model = read_shape(path)
    elif "/" in name:
        raise ConfigError(
            f"{quoted(name)} does not exist; give a directory with a config.json, or a name of the catalogue"
        )
    else:
        model = catalogue.model(name)
    if not dtype:
        return model
    return replace(model, precision=replace(Precision.of(dtype), quantization=model.precision.quantization))


def _profiled(model: ModelShape, profile: Profile, values: argparse.Namespace) -> ModelShape:
    """The model as it was measured. Raises ConfigError: it was another one, or GPUs are named beside the profile."""
    if any((values.gpu, values.attention_gpu, values.expert_gpu)):
        raise ConfigError("--profile says what the hardware is; leave --gpu, --attention-gpu and --expert-gpu out")
    if not model.config_digest or model.config_digest != profile.config_digest:
        raise ConfigError(
            f"{values.profile} was measured with {profile.model} (config.json {profile.config_digest[:12]}), and MODEL "
            f"is {model.name} ({model.config_digest[:12] or 'known by name only'}); profile that model's directory"
        )
    return replace(model, precision=profile.precision)


def _pools(listed: str | None, flag: str, catalogue: Catalogue) -> tuple[Pool, ...]:
    if not listed:
        raise ConfigError(f"no GPUs for one side: give --gpu NAME[:COUNT], or {flag}; {nearest('', catalogue.gpus)}")
    pools = []
    for one in listed.split(","):
        name, _, count = one.strip().partition(":")
        if count and not re.fullmatch(r"-?[0-9]{1,18}", count):
            raise ConfigError(f"{flag} {quoted(one)}: {shown(count)} is not a number of GPUs; write {quoted(name)}:16")
        if count and int(count) > MAX_GPUS:
            raise ConfigError(f"{flag} {quoted(one)}: give at most {MAX_GPUS} GPUs of a type")
        pools.append(Pool(catalogue.gpu(name), int(count) if count else DEFAULT_COUNT))
    names = [pool.gpu.name for pool in pools]
    if len(set(names)) < len(names):
        raise ConfigError(f"{flag} {quoted(listed)}: a type is named twice")
    return tuple(pools)


def _assumptions(changes: list[str]) -> Assumptions:
    known = {one.name for one in fields(Assumptions)}
    values: dict[str, object] = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in known:
            raise ConfigError(
                f"--assume {quoted(change)}: no assumption is called {shown(name)}; {nearest(name, known)}"
            )
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(f"--assume {quoted(change)}: {shown(text)} is not a number") from None
        if not 0 < value <= MAX_ASSUMED:
            raise ConfigError(f"--assume {quoted(change)}: give a number above 0")
        values[name] = ((1.0, value),) if name == "compute" else value
    return Assumptions(**values)  # type: ignore[arg-type]


def _limits(values: argparse.Namespace) -> Limits:
    if values.max_batch < 0:
        raise ConfigError(f"--max-batch {values.max_batch}: give 0 or more sequences")
    try:
        tp_sizes = tuple(dict.fromkeys(int(one) for one in values.tp.split(","))) if values.tp else TP_SIZES
    except ValueError:
        raise ConfigError(f"--tp {quoted(values.tp)}: give numbers, such as 1,2,4") from None
    if not all(1 <= size <= MAX_TP for size in tp_sizes):
        raise ConfigError(f"--tp {quoted(values.tp)}: a group has 1 to {MAX_TP} GPUs")
    limits = Limits(tp_sizes=tp_sizes, max_batch=values.max_batch)
    if values.micro_batches != "auto":
        limits = replace(limits, micro_batches=(int(values.micro_batches),))
    if values.runnable:
        if values.tp and tp_sizes != (1,):
            raise ConfigError(f"--tp {values.tp} with --runnable: tensor parallelism is not built yet; use --tp 1")
        limits = replace(limits, tp_sizes=(1,), max_micro_batch=SLOT_ROWS)
    return limits
