"""What a user can say of RDMA, in one frozen section; `msi/net/rdma/README.md` says what switches and cards need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msi.parameters import check_parameters, parameter

GROUP = "RDMA"
DRIVERS = ("auto", "ibverbs", "pyverbs")
TrafficClass = Annotated[int, range(256)]  # DSCP in the upper six bits, ECN in the lower two


@dataclass(frozen=True, slots=True)
class RdmaOptions:
    """One device of a worker's, and how its queue pairs are set up.

    Attributes:
        rdma_gid_index: -1 searches: RoCE v2 over IPv4 first, then over IPv6, then InfiniBand's only one.
        rdma_dispatch_class, rdma_combine_class, rdma_ack_class: of what the dialling end of a connection writes, of
            what the accepting end writes, and of acknowledgements.
        rdma_timeout: an acknowledgement is waited for 4.096 us * 2 ** rdma_timeout, rdma_retries times more before the
            peer is lost: with the defaults about half a second.
    """

    rdma_driver: str = parameter(
        "auto", "auto (ibverbs where it is installed), ibverbs or pyverbs", metavar="D", group=GROUP, choices=DRIVERS
    )
    rdma_device: str = parameter("", "by default the first one with an active port", metavar="NAME", group=GROUP)
    rdma_port: Annotated[int, range(1, 256)] = parameter(1, "port of the device", metavar="N", group=GROUP)
    rdma_gid_index: Annotated[int, range(-1, 256)] = parameter(
        -1, "entry of the GID table; -1 searches (RoCE v2 over IPv4 first)", metavar="N", group=GROUP
    )
    rdma_dispatch_class: TrafficClass = parameter(0, "traffic class of rows to experts", metavar="N", group=GROUP)
    rdma_combine_class: TrafficClass = parameter(0, "traffic class of their answers", metavar="N", group=GROUP)
    rdma_ack_class: TrafficClass = parameter(0, "traffic class of acknowledgements", metavar="N", group=GROUP)
    rdma_service_level: Annotated[int, range(16)] = parameter(0, "service level", metavar="N", group=GROUP)
    rdma_timeout: Annotated[int, range(1, 32)] = parameter(
        14, "an acknowledgement is waited for 4.096 us * 2^N", metavar="N", group=GROUP
    )
    rdma_retries: Annotated[int, range(1, 8)] = parameter(
        6, "what is not acknowledged is sent again so often, then the peer is lost", metavar="N", group=GROUP
    )
    rdma_rnr_retries: Annotated[int, range(8)] = parameter(
        7, "so often to a peer that has no receive left; 7 is without end", metavar="N", group=GROUP
    )
    rdma_outstanding_bytes: Annotated[int, range(1 << 12, 1 << 31)] = parameter(
        8 << 20, "bytes on their way to one peer, beyond which posts wait", metavar="N", group=GROUP
    )

    def __post_init__(self) -> None:
        check_parameters(self)
