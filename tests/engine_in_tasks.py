"""A real engine in one event loop, whatever its workers compute on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from msi import Engine
from msi.instance.instance import create_coordinator, create_worker, listen, worker_ids
from msi.net.socket_dir import SocketDir
from msi.options import InstanceOptions


@contextlib.asynccontextmanager
async def engine_in_tasks(make_host: Callable[..., Any], **options: Any) -> AsyncIterator[Engine]:
    """Coordinator and workers as tasks of this event loop; time alone loses nobody, however slow the machine."""
    told = InstanceOptions.of(
        **{"transport": "inproc", "peer_timeout_s": 120, "num_gpu_blocks_override": 200} | options
    )
    sockets = SocketDir()
    coordinator = create_coordinator(told, listen(sockets.address("coordinator")))
    workers = [
        create_worker(told, coordinator.address, role, name, make_host=make_host) for role, name in worker_ids(told)
    ]
    tasks = [asyncio.ensure_future(one.run()) for one in (coordinator, *workers)]
    try:
        async with Engine.connect(coordinator.address) as engine:
            await engine.wait_ready(60)
            yield engine
    finally:
        for task in reversed(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        sockets.close()
