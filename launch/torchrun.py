"""Under torchrun the world is the workers: each of its processes is one, and rank 0's also starts the coordinator.

The coordinator listens on a free port of its own (MASTER_PORT is taken by torchrun itself), or where all processes are
on one host on a socket for this user alone; rank 0 publishes where, through the store that torchrun keeps at
MASTER_ADDR:MASTER_PORT. The coordinator chooses roles unless --role says.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from msi.errors import ConfigError, Unavailable
from msi.instance.children import Child
from msi.instance.instance import create_worker
from msi.instance.processes import start_coordinator, stop_children
from msi.net.control import is_address
from msi.net.socket_dir import SocketDir
from msi.net.tcp import address_towards
from msi.options import InstanceOptions

from .arguments import LaunchArguments
from .command import requests_to_end

SAID_GRACE_S = 2.0  # rank 0 stays so long after saying that it cannot start: another's end has torchrun kill it


@dataclass(frozen=True, slots=True)
class World:
    """What torchrun says in environment variables."""

    rank: int
    size: int
    master_host: str
    master_port: int
    is_store_there: bool  # torchrun's agent keeps it; else rank 0 has to
    key: str  # under which this start of the world publishes its coordinator
    is_one_host: bool  # all of its processes are here

    @staticmethod
    def of(environment: Mapping[str, str]) -> World:
        """Raises ConfigError: variables are missing or are no numbers."""
        try:
            return World(
                rank=int(environment["RANK"]),
                size=int(environment["WORLD_SIZE"]),
                master_host=environment["MASTER_ADDR"],
                master_port=int(environment["MASTER_PORT"]),
                is_store_there=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                key=f"msi/coordinator/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}",
                is_one_host=environment["WORLD_SIZE"] == environment.get("LOCAL_WORLD_SIZE"),
            )
        except (KeyError, ValueError) as error:
            raise ConfigError(f"torchrun's environment is incomplete: {error}") from error


def share_out(options: InstanceOptions, num_workers: int) -> InstanceOptions:
    """How many of the world's workers have which role: as told, or evenly when nothing was told.

    Raises:
        ConfigError: what was told is not what torchrun started.
    """
    told = 1 if options.colocated else options.attention_workers + options.expert_workers
    if told == num_workers:
        return options
    is_default = (options.attention_workers, options.expert_workers) == (1, 1) and not options.colocated
    if not is_default or num_workers < 2:
        raise ConfigError(
            f"torchrun started {num_workers} processes for {told} workers; give --attention-workers and "
            f"--expert-workers that add up to them, or start as many processes"
        )
    return replace(options, attention_workers=num_workers // 2, expert_workers=num_workers - num_workers // 2)


async def run_world(arguments: LaunchArguments, world: World) -> None:
    """One process of torchrun's. Until torchrun ends it, or the coordinator does."""
    if arguments.prompt is not None or arguments.role == "coordinator" or arguments.coordinator:
        raise ConfigError("--prompt, --coordinator and --role coordinator have no place under torchrun")
    arguments = replace(arguments, options=share_out(arguments.options, world.size))
    coordinator: Child | None = None
    sockets: SocketDir | None = None
    try:
        store = await _open_store(world, arguments.options.timeouts.start_timeout_s)
        if world.rank == 0:
            sockets = SocketDir() if world.is_one_host else None
            coordinator, address = await _start_coordinator(arguments, world, store, sockets)
        else:
            address = await _look_up(store, world, arguments.options.timeouts.start_timeout_s)
        worker = create_worker(
            arguments.options, address, arguments.role or "worker", arguments.worker_id,
            advertise_host=arguments.advertise_host, trust=arguments.trust,
        )  # fmt: skip
        task = asyncio.ensure_future(worker.run())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, *requests_to_end()):
            loop.add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task
    finally:
        if coordinator is not None:
            await stop_children(coordinator)
        if sockets is not None:
            sockets.close()


async def _open_store(world: World, timeout_s: float) -> TCPStore:
    is_ours = world.rank == 0 and not world.is_store_there
    try:
        return await asyncio.to_thread(
            TCPStore, world.master_host, world.master_port, is_master=is_ours, wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip
    except (DistError, RuntimeError) as error:
        where = f"{world.master_host}:{world.master_port}"
        raise Unavailable(f"torchrun's store at {where} cannot be reached: {_first_line(error)}") from error


async def _start_coordinator(
    arguments: LaunchArguments, world: World, store: TCPStore, sockets: SocketDir | None
) -> tuple[Child, str]:
    """Rank 0's: started and published; or, where it cannot start, why not is published, and raised.

    The store is open to whoever reaches it, so no secret can be published there.
    """
    flags = ["--log-level", arguments.log_level, *arguments.serving_flags]
    if arguments.trust.is_insecure_allowed:
        flags.append("--insecure-network")
    try:
        if sockets is not None:
            where = sockets.address("coordinator")
        else:
            host = arguments.advertise_host or address_towards(world.master_host, world.master_port)
            where = f"tcp://{host}:*"
        coordinator, address = await start_coordinator(arguments.options, where, tuple(flags), arguments.trust.secret)
    except (ConfigError, Unavailable) as error:
        await asyncio.to_thread(store.set, world.key, str(error))
        await asyncio.sleep(SAID_GRACE_S)
        raise
    await asyncio.to_thread(store.set, world.key, address)
    return coordinator, address


async def _look_up(store: TCPStore, world: World, timeout_s: float) -> str:
    try:
        said: str = (await asyncio.to_thread(store.get, world.key)).decode()
    except (DistError, RuntimeError) as error:
        raise Unavailable(
            f"rank 0 at {world.master_host} published no coordinator within {timeout_s:g} s: {_first_line(error)}"
        ) from error
    if not is_address(said):
        raise ConfigError(said)
    return said


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
