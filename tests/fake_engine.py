"""A real engine whose workers compute on fake devices; rows lie in host memory."""

from __future__ import annotations

from msi.device.fake.device import FakeDevice
from msi.device.fake.transport import FakeTransport
from msi.device.fake.world import FakeWorld
from msi.worker.torch_host import TorchHost
from tests.engine_in_tasks import engine_in_tasks


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


def fake_engine(world: FakeWorld, make_host=FakeHost, **options):
    """An engine whose workers are of that world."""
    return engine_in_tasks(lambda settings: make_host(settings, world), **options)
