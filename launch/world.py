"""A world of workers that another launcher started: torchrun's processes, or the tasks of Slurm's srun.

Each is a worker, and rank 0's also starts the coordinator. That listens on a free port of its own, or, where all
processes are on one host, on a socket for this user alone; rank 0 publishes where, through a store at
`master_host:master_port`. The coordinator chooses roles unless --role says.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
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
from msi.worker.worker import Worker

from .arguments import LaunchArguments
from .command import requests_to_end
from .processes import Ending

SAID_GRACE_S = 2.0  # rank 0 stays so long after saying that it cannot start: another's end has its launcher kill it


@dataclass(frozen=True, slots=True)
class World:
    """What a launcher of many processes says in environment variables.

    Attributes:
        launcher: its name, for sentences.
        is_store_there: the launcher keeps it; else rank 0 has to.
        key: under which this start of the world publishes its coordinator.
        is_one_host: all of its processes are here.
        can_drain: after a SIGTERM it leaves time for requests to finish.
    """

    launcher: str
    rank: int
    size: int
    master_host: str
    master_port: int
    is_store_there: bool
    key: str
    is_one_host: bool
    can_drain: bool


def share_out(options: InstanceOptions, world: World) -> InstanceOptions:
    """How many of the world's workers have which role: as told, or evenly when nothing was told.

    Raises:
        ConfigError: what was told is not what was started.
    """
    num_workers = world.size
    told = 1 if options.colocated else options.attention_workers + options.expert_workers
    if told == num_workers:
        return options
    is_default = (options.attention_workers, options.expert_workers) == (1, 1) and not options.colocated
    if not is_default or num_workers < 2:
        raise ConfigError(
            f"{world.launcher} started {num_workers} processes for {told} workers; give --attention-workers and "
            f"--expert-workers that add up to them, or start as many processes"
        )
    return replace(options, attention_workers=num_workers // 2, expert_workers=num_workers - num_workers // 2)


async def run_world(arguments: LaunchArguments, world: World) -> None:
    """One process of a world. Until its launcher ends it, or the coordinator does."""
    if arguments.prompt is not None or arguments.role == "coordinator" or arguments.coordinator:
        raise ConfigError(f"--prompt, --coordinator and --role coordinator have no place under {world.launcher}")
    arguments = replace(arguments, options=share_out(arguments.options, world))
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
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        ending = Ending(drain=_drain(worker, coordinator) if world.can_drain else task.cancel, end=task.cancel)
        for number in requests_to_end():
            loop.add_signal_handler(number, ending.asked)
        with contextlib.suppress(asyncio.CancelledError):
            await task
    finally:
        if coordinator is not None:
            await stop_children(coordinator)
        if sockets is not None:
            sockets.close()


def _drain(worker: Worker, coordinator: Child | None) -> Callable[[], object]:
    """How this process drains: rank 0 has the coordinator drain, which ends all workers then."""
    return worker.drain if coordinator is None else lambda: coordinator.tell(drain=True)


async def _open_store(world: World, timeout_s: float) -> TCPStore:
    is_ours = world.rank == 0 and not world.is_store_there
    try:
        return await asyncio.to_thread(
            TCPStore, world.master_host, world.master_port, is_master=is_ours, wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip
    except (DistError, RuntimeError) as error:
        where = f"{world.master_host}:{world.master_port}"
        raise Unavailable(
            f"the store of {world.launcher}'s world at {where} cannot be reached: {_first_line(error)}"
        ) from error


async def _start_coordinator(
    arguments: LaunchArguments, world: World, store: TCPStore, sockets: SocketDir | None
) -> tuple[Child, str]:
    """Rank 0's: started and published; or, where it cannot start, why not is published, and raised.

    The store is open to whoever reaches it, so no secret can be published there.
    """
    flags = [*arguments.log_flags, *arguments.serving_flags]
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
