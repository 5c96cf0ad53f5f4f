"""Which device, port and GID a worker uses, and by what name two workers know that they share a fabric."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from msi.errors import ConfigError, shown
from msi.net.rdma.options import IPV4_MAPPED, RdmaOptions, read_gid
from msi.net.rdma.verbs import ACTIVE, ETHERNET, Card, Driver, Port

SYSFS = Path("/sys/class/infiniband")
BEST_RANK = 1
LINK_LOCAL = b"\xfe\x80"


class Place(NamedTuple):
    """Where a worker's queue pairs are: an opened card's port, by one of its GIDs."""

    card: Card
    port: Port
    gid_index: int
    gid: bytes

    @property
    def fabric(self) -> str:
        """The same at all who may share a fabric; whether they do shows when they connect."""
        return "roce" if self.port.link_layer == ETHERNET else f"ib-{self.gid[:8].hex()}"


def open_place(driver: Driver, options: RdmaOptions) -> Place:
    """Raises ConfigError: no device, not the one that was asked for, or its port is of no use."""
    try:
        names = list(driver.devices())
    except OSError as error:
        raise ConfigError(
            f"`transport` rdma: no RDMA device can be listed ({error.strerror or error}); {ADVICE}"
        ) from error
    if not names:
        raise ConfigError(f"`transport` rdma: this machine has no RDMA device; {ADVICE}")
    wanted = options.rdma_device
    if wanted and wanted not in names:
        raise ConfigError(f"`rdma_device` {shown(wanted)} is not one; there are: {', '.join(names)}")
    reasons = []
    for name in [wanted] if wanted else names:
        try:
            return _open(driver, name, options)
        except ConfigError as error:
            reasons.append(str(error))
    raise ConfigError("; ".join(reasons))


ADVICE = "load the card's driver and see ibv_devices (package ibverbs-utils), or give another `transport`: auto or tcp"


def _open(driver: Driver, name: str, options: RdmaOptions) -> Place:
    card: Card | None = None
    try:
        card = driver.open(name)
        port = card.port(options.rdma_port)
        if port.state not in ACTIVE:
            raise ConfigError(f"port {options.rdma_port} of {name} is not active; see `ibv_devinfo -d {name}`")
        index, gid = _find_gid(card, port, options)
    except OSError as error:
        if card is not None:
            card.close()
        raise ConfigError(f"RDMA device {name} cannot be used: {error.strerror or error}") from error
    except ConfigError:
        assert card is not None
        card.close()
        raise
    return Place(card, port, index, gid)


def _find_gid(card: Card, port: Port, options: RdmaOptions) -> tuple[int, bytes]:
    wanted = read_gid(options.rdma_gid)
    if isinstance(wanted, int):
        gid = card.gid(options.rdma_port, wanted)
        if not any(gid):
            raise ConfigError(f"`rdma_gid` {wanted} of {card.name} is empty; leave it out to search")
        return wanted, gid
    if wanted is None and port.link_layer != ETHERNET:
        return 0, card.gid(options.rdma_port, 0)
    kinds = gid_kinds(card.name, options.rdma_port)
    best: tuple[int, int, bytes] | None = None
    for index, gid in _gids(card, port, options.rdma_port):
        rank = 0 if wanted not in (None, gid) else _rank(gid, kinds(index) if any(gid) else "")
        if rank and (best is None or rank < best[0]):
            best = rank, index, gid
        if rank == BEST_RANK or (rank and wanted):
            break  # tables are long
    if best is None:
        raise ConfigError(
            f"port {options.rdma_port} of {card.name} has no GID {options.rdma_gid or 'for RoCE v2'}: give its network "
            "interface that address, or say another `rdma_gid`"
        )
    return best[1:]


def _gids(card: Card, port: Port, number: int) -> Iterator[tuple[int, bytes]]:
    for index in range(port.num_gids):
        with contextlib.suppress(OSError):  # of a card with holes in its table
            yield index, card.gid(number, index)


def _rank(gid: bytes, kind: str) -> int:
    """Smaller is better; 0 is of no use."""
    if not any(gid) or kind not in ("", "RoCE v2"):
        return 0
    if gid.startswith(IPV4_MAPPED):
        return BEST_RANK
    return 3 if gid.startswith(LINK_LOCAL) else 2


def gid_kinds(device: str, port: int, sysfs: Path | None = None) -> Callable[[int], str]:
    """The kind of each entry, as the kernel says it; "" where it says nothing."""
    types = (sysfs or SYSFS) / device / "ports" / str(port) / "gid_attrs" / "types"

    def kind(index: int) -> str:
        try:
            return (types / str(index)).read_text().strip()
        except OSError:
            return ""

    return kind


def shown_gid(gid: bytes) -> str:
    """As an address."""
    address = ipaddress.IPv6Address(gid)
    return str(address.ipv4_mapped or address)
