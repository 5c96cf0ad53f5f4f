"""msi-launch's entry point: parses, sets up the log, and picks the event loop."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

from msi.errors import EngineError

from .arguments import API_KEY_VARIABLES, LaunchArguments, parse
from .command import EXIT_SENTENCE, open_missing_streams, run_command
from .logs import set_up_log
from .parent import end_with_parent

log = logging.getLogger(__name__)

T = TypeVar("T")
GATEWAY_GRACE_S = 3.0  # to tell its clients that the coordinator is gone


def main() -> None:
    """Runs msi-launch with the arguments of this process; does not return."""
    open_missing_streams()
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Runs msi-launch; the exit status."""
    if argv[:1] == ["run-batch"]:
        from . import batch  # with what answers HTTP, which a launcher does not need

        return batch.run(argv[1:])
    return run_command("msi-launch", lambda: _run(argv))


def _run(argv: list[str]) -> int | None:
    arguments = parse(argv)
    if arguments.check:
        from .doctor import doctor

        return doctor.run(arguments)
    from msi.instance.children import tell_launcher

    if arguments.parent:
        end_with_parent(arguments.parent, GATEWAY_GRACE_S if arguments.role == "gateway" else 0.0)
    set_up_log(arguments.worker_id or arguments.role or "msi-launch", arguments.log_level, is_json=arguments.log_json)
    if arguments.api_keys:
        os.environ[API_KEY_VARIABLES[0]] = "\n".join(arguments.api_keys)  # for whichever child serves HTTP
    for given in arguments.ignored:
        log.info("%s changes nothing here", given)
    try:
        run_on_uvloop(_chosen(arguments))
    except EngineError as error:
        if arguments.announce < 0:
            raise
        tell_launcher(arguments.announce, failure=str(error))  # who says it, and what it means for the others
        return EXIT_SENTENCE
    return None


def load_loop() -> None:
    """Now, for those that are forked of this process to have it."""
    import uvloop  # noqa: F401


def run_on_uvloop(work: Coroutine[Any, Any, T]) -> T:
    """What the work returns."""
    import uvloop  # whoever asks for help waits for nothing

    result: T = uvloop.run(work)
    return result


def _chosen(arguments: LaunchArguments) -> Coroutine[Any, Any, None]:
    """What the arguments ask for; a process loads what it needs for that, and starts the sooner."""
    if (arguments.slurm or "TORCHELASTIC_RUN_ID" in os.environ) and not arguments.parent:
        from . import slurm, torchrun, world  # imports torch.distributed, which nobody else needs

        launcher = slurm if arguments.slurm else torchrun
        return world.run_world(arguments, launcher.world_of(os.environ))
    if arguments.role == "gateway":
        from . import gateway

        return gateway.run_gateway(arguments)
    if arguments.role:
        from . import processes

        run = processes.run_coordinator if arguments.role == "coordinator" else processes.run_worker
        return run(arguments)
    from . import local

    return local.serve(arguments)
