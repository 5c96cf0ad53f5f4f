"""What a user can say of RDMA, in one frozen section; `msi/net/rdma/README.md` says what switches and cards need."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated

from msi.errors import ConfigError, shown
from msi.parameters import check_parameters, parameter

GROUP = "RDMA"
IPV4_MAPPED = bytes(10) + b"\xff\xff"
DRIVERS = ("auto", "direct", "ibverbs", "pyverbs")
TrafficClass = Annotated[int, range(256)]  # DSCP in the upper six bits, ECN in the lower two


@dataclass(frozen=True, slots=True)
class RdmaOptions:
    """One device of a worker's, and how its queue pairs are set up.

    Attributes:
        rdma_gid: index or address; "" searches: RoCE v2 over IPv4 first, then over IPv6; InfiniBand's first.
        rdma_dispatch_class, rdma_combine_class, rdma_ack_class: of what the dialling end of a connection writes, of
            what the accepting end writes, and of acknowledgements.
        rdma_timeout: an acknowledgement is waited for 4.096 us * 2 ** rdma_timeout, rdma_retries times more before the
            peer is lost: with the defaults about half a second.
    """

    rdma_driver: str = parameter(
        "auto", "auto (the first that is there), direct (libibverbs itself), ibverbs or pyverbs", metavar="D",
        group=GROUP, choices=DRIVERS,
    )  # fmt: skip
    rdma_device: str = parameter("", "by default the first one with an active port", metavar="NAME", group=GROUP)
    rdma_port: Annotated[int, range(1, 256)] = parameter(1, "port of the device", metavar="N", group=GROUP)
    rdma_gid: str = parameter(
        "", "entry of the GID table, its index or address; by default searched (RoCE v2 over IPv4 first)", metavar="G",
        group=GROUP, form=(r"[0-9a-fA-F:.]{1,45}", "an index or an address"),
    )  # fmt: skip
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
        try:
            read_gid(self.rdma_gid)
        except ValueError as error:
            raise ConfigError(f"`rdma_gid` {shown(self.rdma_gid)} is neither an index nor an address") from error


def read_gid(text: str) -> int | bytes | None:
    """An index, a GID, or None for none. Raises ValueError."""
    if not text:
        return None
    if text.isdecimal() and len(text) <= 3:
        return int(text)
    address = ipaddress.ip_address(text)
    return address.packed if address.version == 6 else IPV4_MAPPED + address.packed
