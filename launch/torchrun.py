"""Under torchrun: each of its processes is a worker, and rank 0's also starts the coordinator.

The coordinator is published through the store that torchrun keeps at MASTER_ADDR:MASTER_PORT; that port being taken, it
listens on one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from msi.errors import ConfigError

from .world import World


def world_of(environment: Mapping[str, str]) -> World:
    """Raises ConfigError: variables are missing or are no numbers."""
    try:
        return World(
            launcher="torchrun",
            rank=int(environment["RANK"]),
            size=int(environment["WORLD_SIZE"]),
            master_host=environment["MASTER_ADDR"],
            master_port=int(environment["MASTER_PORT"]),
            is_store_there=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            key=f"msi/coordinator/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}",
            is_one_host=environment["WORLD_SIZE"] == environment.get("LOCAL_WORLD_SIZE"),
            can_drain=False,
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(f"torchrun's environment is incomplete: {error}") from error
