"""The two queue pairs of one end of a connection: one writes, the other acknowledges what the peer writes."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from msi.net.rdma.endpoint import NUM_SENDS
from msi.net.rdma.fabric import Place
from msi.net.rdma.introduction import Introduction
from msi.net.rdma.landing import RdmaLanding
from msi.net.rdma.options import RdmaOptions
from msi.net.rdma.verbs import Path, QueuePair, RemoteQueue
from msi.net.slots import HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Queues:
    """Both, and the sequence number that each begins with."""

    place: Place
    options: RdmaOptions
    sends: QueuePair
    receives: QueuePair
    sends_psn: int
    receives_psn: int

    def introduce(self, landing: RdmaLanding, seat: int) -> Introduction:
        """Whoever is told this may write into the seat. Raises ConfigError: it cannot be registered."""
        port, gid = self.place.port, self.place.gid
        return Introduction(
            port.mtu,
            RemoteQueue(self.sends.number, self.sends_psn, gid, port.lid),
            RemoteQueue(self.receives.number, self.receives_psn, gid, port.lid),
            *landing.open(seat).remote(),
            landing.layout,
        )

    def join(self, theirs: Introduction, traffic_class: int) -> None:
        """To the peer's, with a class for what we write. Raises OSError."""
        options = self.options
        path = Path(
            options.rdma_port, self.place.gid_index, min(self.place.port.mtu, theirs.mtu), traffic_class,
            options.rdma_service_level, options.rdma_timeout, options.rdma_retries, options.rdma_rnr_retries,
        )  # fmt: skip
        self.receives.connect(theirs.sends, self.receives_psn, replace(path, traffic_class=options.rdma_ack_class))
        self.sends.connect(theirs.receives, self.sends_psn, path)

    def close(self) -> None:
        self.sends.close()
        self.receives.close()


def open_queues(place: Place, options: RdmaOptions) -> Queues:
    """Raises OSError."""
    sends = place.card.queue_pair(options.rdma_port, NUM_SENDS, HEADER_BYTES)
    try:
        receives = place.card.queue_pair(options.rdma_port, 1, 0)
    except BaseException:
        sends.close()
        raise
    return Queues(place, options, sends, receives, secrets.randbits(24), secrets.randbits(24))
