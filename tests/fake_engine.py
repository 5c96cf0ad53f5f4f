"""A real engine whose workers compute on fake devices; rows lie in host memory."""

from __future__ import annotations

import asyncio
import contextlib

from msi import Engine
from msi.device.fake.device import FakeDevice
from msi.device.fake.transport import FakeTransport
from msi.device.fake.world import FakeWorld
from msi.instance.instance import create_coordinator, create_worker, listen, worker_ids
from msi.net.socket_dir import SocketDir
from msi.options import InstanceOptions
from msi.worker.torch_host import TorchHost


class FakeHost(TorchHost):
    """The host of a real worker, on a device of a world."""

    def __init__(self, settings, world):
        super().__init__(settings)
        self.device = FakeDevice(world)

    def open_device(self):
        return self.device

    async def load(self, assignment):
        with self.device.memory.opened():  # loading launches torch's own operators, which on a GPU are the device's
            return await super().load(assignment)

    def new_transport(self, assignment):
        return FakeTransport(self.device)


@contextlib.asynccontextmanager
async def fake_engine(world: FakeWorld, make_host=FakeHost, **options):
    """Coordinator and workers as tasks of this event loop; time alone loses nobody, however slow the machine."""
    options = InstanceOptions.of(transport="inproc", peer_timeout_s=120, num_gpu_blocks_override=200, **options)
    sockets = SocketDir()
    coordinator = create_coordinator(options, listen(sockets.address("coordinator")))
    workers = [
        create_worker(options, coordinator.address, role, name, make_host=lambda settings: make_host(settings, world))
        for role, name in worker_ids(options)
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
