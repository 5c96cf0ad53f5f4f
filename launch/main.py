"""msi-launch's entry point: parses, picks the event loop, and turns errors into sentences."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Coroutine
from typing import Any

import uvloop

from msi.children import tell_launcher
from msi.errors import EngineError

from . import local, processes
from .arguments import LaunchArguments, parse

EXIT_SENTENCE = 2  # it said why it cannot work


def main() -> None:
    """Runs msi-launch with the arguments of this process; does not return."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Runs msi-launch; the exit status."""
    announce = -1
    try:
        arguments = parse(argv)
        announce = arguments.announce
        if arguments.parent:
            processes.end_with_parent(arguments.parent)
        name = arguments.worker_id or arguments.role or "msi-launch"
        logging.basicConfig(
            level=arguments.log_level.upper(), format=f"%(asctime)s {name}: %(message)s", datefmt="%H:%M:%S"
        )
        uvloop.run(_chosen(arguments))
    except EngineError as error:
        print(f"msi-launch: {error}", file=sys.stderr)
        tell_launcher(announce, failure=str(error))
        return EXIT_SENTENCE
    except KeyboardInterrupt:
        return 130
    return 0


def _chosen(arguments: LaunchArguments) -> Coroutine[Any, Any, None]:
    if "TORCHELASTIC_RUN_ID" in os.environ and not arguments.parent:
        from . import torchrun  # imports torch.distributed, which nobody else needs

        return torchrun.run_world(arguments, torchrun.World.of(os.environ))
    if arguments.role == "coordinator":
        return processes.run_coordinator(arguments)
    if arguments.role:
        return processes.run_worker(arguments)
    return local.serve(arguments)
