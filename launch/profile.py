"""msi-profile: measures what the stages of a model take on this machine, for msi-plan and msi-simulate."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from msi.planner.profile import Profile, to_json
from msi.precision import AUTO, QUANTISATIONS, VALUE_BYTES, Precision

from .command import open_missing_streams, run_command
from .command_line import CommandLine, file_to_write, integer, number, one_of, quoted
from .precision_flags import add_eight_bits, with_eight_bits

if TYPE_CHECKING:
    from msi.profiler.measure import Measuring, Steps

TRANSPORTS = ("inproc", "shm", "tcp")  # those that can be measured here
MOST_THREADS = 1024
MOST_TOKENS = 100_000_000
MOST_PATIENCE_S = 86_400.0


def main() -> None:
    """Runs msi-profile with the arguments of this process; does not return."""
    open_missing_streams()
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Runs msi-profile; the exit status."""
    return run_command("msi-profile", lambda: _run(argv))


def _run(argv: list[str]) -> None:
    values = parse(argv)
    from msi.profiler.measure import measure  # loads torch: whoever asks for help waits for nothing

    with progress() as begin:
        profile = measure(measuring(values), begin)
    values.output.write_text(json.dumps(to_json(profile), indent=1) + "\n")
    print(f"{values.output}: {summary(profile)}")


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises ConfigError. --help and --version print, and end the process."""
    parser = CommandLine(
        "msi-profile",
        "Measure what attention, experts and messages of a model take on this machine, through the runtime's own code; "
        "msi-plan --profile and msi-simulate --plan go by it. Takes minutes, best on a machine that does nothing else.",
        usage="msi-profile MODEL [options]",
    )
    add = parser.add_argument_group("what is measured").add_argument
    add("model", metavar="MODEL", type=Path, help="a directory with config.json and weights")
    add("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N; on a GPU each side is measured alone")
    add(
        "--dtype",
        default="auto",
        type=one_of("auto", *VALUE_BYTES),
        metavar="D",
        help=f"auto, {', '.join(VALUE_BYTES)}",
    )
    add("--quantization", default=AUTO, type=one_of(*QUANTISATIONS), metavar="Q",
        help=f"of matrices: {', '.join(QUANTISATIONS[1:])}; auto: as the checkpoint is")  # fmt: skip
    add_eight_bits(add)
    add("--load-format", default="auto", type=one_of("auto", "dummy"), metavar="F",
        help="dummy: random weights, from config.json alone")  # fmt: skip
    add("--threads", type=numbers(MOST_THREADS), default=(), metavar="N[,N...]", help="torch threads per worker; 1,2")
    add("--batches", type=numbers(MOST_TOKENS), default=(), metavar="N[,N...]",
        help="sequences per micro-batch; 1,2,4,8,16,32,64")  # fmt: skip
    add("--contexts", type=numbers(MOST_TOKENS), default=(), metavar="N[,N...]",
        help="tokens of each sequence in the KV cache; 64,256,1024")  # fmt: skip
    add("--transport", type=transports, default=TRANSPORTS, metavar="T[,T...]",
        help=f"between the two sides; {','.join(TRANSPORTS)}")  # fmt: skip
    add = parser.add_argument_group("how carefully").add_argument
    add("--repeat", type=integer(1, 1000), default=3, metavar="N", help="how often all sizes are gone through; 3")
    add("--patience", type=number(0, MOST_PATIENCE_S), default=300.0, metavar="S",
        help="seconds to wait, in all, while others take the processors; 300")  # fmt: skip
    add("--quick", action="store_true", help="few sizes, once: to see that it works")
    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", type=file_to_write, default=Path("profile.json"), metavar="FILE",
        help="where the profile goes; profile.json")  # fmt: skip
    values: argparse.Namespace = parser.parse_args(argv)
    return values


def measuring(values: argparse.Namespace) -> Measuring:
    from msi.profiler.measure import Measuring

    return Measuring(
        model_dir=values.model,
        device=values.device,
        precision=with_eight_bits(Precision(compute=values.dtype, quantization=values.quantization), values),
        load_format=values.load_format,
        threads=values.threads,
        batches=values.batches,
        contexts=values.contexts,
        transports=values.transport,
        repeat=values.repeat,
        patience_s=values.patience,
        is_quick=values.quick,
    )


def numbers(most: int) -> Callable[[str], tuple[int, ...]]:
    """Whole numbers with commas between them, each once, ascending."""
    read = integer(1, most, of="numbers with commas between them, each")

    def each(word: str) -> tuple[int, ...]:
        return tuple(sorted({read(part) for part in word.split(",")}))

    return each


def transports(word: str) -> tuple[str, ...]:
    """Names of transports with commas between them, each once."""
    names = tuple(dict.fromkeys(word.split(",")))
    for name in names:
        if name not in TRANSPORTS:
            raise argparse.ArgumentTypeError(f"{quoted(name)} is not one; supported: {', '.join(TRANSPORTS)}")
    return names


@contextlib.contextmanager
def progress() -> Iterator[Steps]:
    """Bars on standard error, where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        def begin(what: str, num_steps: int) -> Callable[[], None]:
            task = bars.add_task(what, total=num_steps)
            return lambda: bars.advance(task)

        yield begin


def summary(profile: Profile) -> str:
    """The paper's constants at the middle context, for whoever waited."""
    threads = profile.attention[0].threads
    contexts = sorted({point.context_len for point in profile.attention})
    context_len = contexts[len(contexts) // 2]
    fits = profile.fits(threads=threads, context_len=context_len)
    k1, k2, k3, k4 = (1e3 * k for k in (fits.k1, fits.k2, fits.k3, fits.k4))
    return (
        f"with {threads} threads and {context_len} tokens of context T_a = {k1:.3f} b + {k2:.3f} ms, "
        f"T_e of an expert = {k3:.3f} b + {k4:.3f} ms"
    )
