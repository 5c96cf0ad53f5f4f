"""What is right and how fast on the GPU of this machine, section by section.

    tools/gpu_check --out tools/results
    tools/gpu_check --sections machine,ceilings,gates,tokens --budget 200
    tools/gpu_check --dry          every section end to end on a CPU, in its smallest size; figures mean nothing

Needs python3 with torch, and Triton, cuda-bindings, transformers and pytest for the sections that use them; nothing has
to be installed for this repository. Each section runs in a process of its own with a time limit; one that fails stops
no other. Status 1 if one failed. Prints a line per finding, then a table.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent.parent
if TYPE_CHECKING:
    import argparse


def main() -> None:
    """Finds this repository's packages wherever it lies, then runs."""
    with tempfile.TemporaryDirectory(prefix="msi-gpu-check-") as folder:
        find_packages(Path(folder), sys.argv)
        sys.exit(run(sys.argv[1:]))


def find_packages(folder: Path, words: list[str]) -> None:
    """Puts the repository, `msi_launch` and what --wheels holds on the path of this process and of its children."""
    (folder / "msi_launch").symlink_to(ROOT / "launch")
    if "--wheels" in words[:-1]:
        for wheel in Path(words[words.index("--wheels") + 1]).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
    ours = [str(ROOT), str(folder)]
    sys.path[:1] = ours  # in place of this file's own folder, whose modules would hide those of the same name
    os.environ["PYTHONPATH"] = os.pathsep.join([*ours, *filter(None, [os.environ.get("PYTHONPATH")])])
    if "--dry" in words:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything loads it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run(argv: list[str]) -> int:
    """The exit status."""
    from tools.gpu.ceilings import UNITS
    from tools.gpu.report import Outcome, Report, line
    from tools.gpu.runner import Place, run_section
    from tools.gpu.sections import SECTIONS

    values = parse(argv, list(SECTIONS))
    is_dry = values.dry
    ends_at = time.monotonic() + values.budget
    report = Report(about(is_dry, values.engine), (), ())
    ceilings: dict[str, float] = {}
    for name in values.sections:
        section = SECTIONS[name]
        left = ends_at - time.monotonic()
        if left < LEAST_S:
            report = report.with_section(Outcome(name, "left out", 0.0, f"the {values.budget:.0f} s were up"), ())
            print(f"-- {name}: left out, the {values.budget:.0f} s were up", flush=True)
            continue
        limit = min(section.dry_limit_s if is_dry else section.limit_s, left)
        print(f"-- {name} (at most {limit:.0f} s)", flush=True)
        place = Place("cpu" if is_dry else "cuda", dict(ceilings), time.monotonic() + limit, values.engine)
        outcome, rows = run_section(section, place, lambda row: print(line(row), flush=True))
        for row in rows:
            if row.name in UNITS and isinstance(row.value, float):
                ceiling, unit = UNITS[row.name]
                ceilings[ceiling] = row.value * unit
        report = report.with_section(outcome, rows)
        print(f"   {outcome.state} after {outcome.seconds:.1f} s {outcome.note}".rstrip(), flush=True)
        if values.out is not None:  # as far as it is, should somebody end this
            report.write(values.out)
    if values.out is not None:
        print(report.write(values.out))
    print("\n" + report.to_markdown())
    return int(any(outcome.state in ("failed", "too late") for outcome in report.outcomes))


LEAST_S = 3.0  # in which a section may come to something


def parse(argv: list[str], names: list[str]) -> argparse.Namespace:
    import argparse

    from msi_launch.command_line import ScriptLine, number

    def sections(word: str) -> list[str]:
        wanted = word.split(",")
        for name in wanted:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name!r} is not one; there are: {', '.join(names)}")
        return wanted

    def options(word: str) -> dict[str, str]:
        pairs = [one.partition("=") for one in word.split(",")]
        if not all(name and value for name, _, value in pairs):
            raise argparse.ArgumentTypeError(f"{word!r} is not OPTION=VALUE[,...]")
        return {name: value for name, _, value in pairs}

    parser = ScriptLine(__doc__)
    parser.add_argument("--sections", type=sections, default=names, metavar="S[,S...]",
        help=f"in this order; all of them: {', '.join(names)}")  # fmt: skip
    parser.add_argument("--budget", type=number(1, 86_400), default=3600.0, metavar="S",
        help="seconds for all; sections for which none are left are left out; 3600")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also gpu_DEVICE_DATE.json and .md there")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels to use that are not installed")
    parser.add_argument("--engine", type=options, default={}, metavar="OPTION=VALUE[,...]",
        help="of instances, as Engine.local takes them")  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="on a CPU: that every section runs")
    values: argparse.Namespace = parser.parse_args(argv)
    return values


def about(is_dry: bool, engine: dict[str, str]) -> dict[str, str]:
    """What it runs on, without touching the GPU: sections fork from this process."""
    import subprocess

    def said(*words: str) -> str:
        try:
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return "unknown"
        return done.stdout.strip().splitlines()[0]

    device, _, driver = said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").partition(", ")
    found = {
        "device": "dry run" if is_dry else device,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "driver": driver or "none",
        "commit": os.environ.get("GPU_CHECK_COMMIT") or said("git", "rev-parse", "--short", "HEAD"),
        "processors": str(os.cpu_count()),
    }
    if engine:
        found["engine"] = ", ".join(f"{name}={value}" for name, value in engine.items())
    return found


if __name__ == "__main__":
    main()
