"""Under Slurm: `srun --ntasks=N msi-launch MODEL --slurm`. Each task is a worker; task 0 starts the coordinator, too.

As under torchrun, the coordinator's address is published through a store; here it is task 0's own, on the job's first
host at a port that follows from the job's number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from msi.errors import ConfigError

from .world import World

FIRST_PORT, NUM_PORTS = 20_000, 10_000  # below those that the system gives out by itself
HOSTS = re.compile(r"([^,\[]+)(?:\[([0-9]+)[^\]]*\]([^,\[]*))?")


def world_of(environment: Mapping[str, str]) -> World:
    """Raises ConfigError: this is no task of srun's, or what it says of itself makes no sense."""
    try:
        return World(
            launcher="srun",
            rank=int(environment["SLURM_PROCID"]),
            size=int(environment["SLURM_NTASKS"]),
            master_host=first_host(environment["SLURM_JOB_NODELIST"]),
            master_port=FIRST_PORT + int(environment["SLURM_JOB_ID"]) % NUM_PORTS,
            is_store_there=False,
            key=f"msi/coordinator/{environment.get('SLURM_RESTART_COUNT', '0')}",
            is_one_host=environment.get("SLURM_NNODES", "") == "1",
            can_drain=True,
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"--slurm: Slurm's environment is incomplete ({error}); start it by srun, as in "
            "`srun --ntasks=4 msi-launch MODEL --slurm`"
        ) from error


def first_host(nodes: str) -> str:
    """Of a list as Slurm writes it: "gpu[07-09,12],login1" is gpu07 and others. Raises ValueError."""
    found = HOSTS.match(nodes.strip())
    if found is None:
        raise ValueError(f"{nodes!r} names no host")
    before, number, after = found.groups("")
    return f"{before}{number}{after}"
