"""Memory that cards read and write: seats with registrations of their own, outboxes, and who may reach them.

A seat is registered when a peer gets it and closed when the peer is gone or fenced: its keys are told to that peer
alone, and no key of one seat reaches another. Headers are host memory; rows are whatever their allocator gives, which
a card reaches by address where it is the host's, else by a descriptor that the allocator exports (dma-buf).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from typing import NamedTuple

from msi.errors import ConfigError
from msi.net.landing import PlainLanding, SeatedLanding
from msi.net.rdma.verbs import Card, Registration, Span
from msi.net.regions import Allocator, Region, map_zeroed
from msi.net.slots import HEADER_BYTES, NOTE_BYTES, SlotLayout
from msi.net.transport import Landing

HEADER_STRIDE = HEADER_BYTES + NOTE_BYTES


class Registered(NamedTuple):
    """Headers and rows of one seat or outbox, as a card knows them."""

    headers: Registration
    rows: Registration

    def close(self) -> None:
        self.headers.close()
        self.rows.close()

    def local(self) -> tuple[Span, Span]:
        return (Span(self.headers.address, self.headers.local_key), Span(self.rows.address, self.rows.local_key))

    def remote(self) -> tuple[Span, Span]:
        return (Span(self.headers.address, self.headers.remote_key), Span(self.rows.address, self.rows.remote_key))


class DeviceLanding(SeatedLanding):
    """Seats whose rows no host instruction reaches. Raises ConfigError: they cannot be exported to a card."""

    def __init__(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> None:
        super().__init__(num_seats, layout, allocator)
        os.close(self.rows.export())  # or it refuses


class RdmaLanding:
    """Another landing, with registrations."""

    def __init__(self, card: Card, inner: Landing) -> None:
        self.inner = inner
        self.num_seats, self.layout, self.allocator = inner.num_seats, inner.layout, inner.allocator
        self.headers = inner.headers
        self.rows = inner.rows
        self.generation = inner.generation
        self._card = card
        self._registered: list[Registered | None] = [None] * inner.num_seats
        self._told: list[Callable[[], object] | None] = [None] * inner.num_seats

    def open(self, index: int) -> Registered:
        """A peer gets the seat: under keys of its own. Raises ConfigError: the card does not take it."""
        self.shut(index)
        self._told[index] = None
        stride = self.rows.num_bytes // self.num_seats
        headers = _register_host(self._card, address_of(self.headers[index][0]), self.layout.headers_bytes, True)
        try:
            rows = _register(self._card, self.rows, index * stride, self.layout.rows_bytes, True)
        except BaseException:
            headers.close()
            raise
        self._registered[index] = registered = Registered(headers, rows)
        return registered

    def shut(self, index: int) -> None:
        """Whoever had the seat writes there no more."""
        registered, self._registered[index] = self._registered[index], None
        if registered is not None:
            registered.close()

    def tell(self, index: int, revoked: Callable[[], object]) -> None:
        """Calls it once, when the seat is revoked from the peer that has it now."""
        self._told[index] = revoked

    def revoke(self, index: int) -> None:
        told, self._told[index] = self._told[index], None
        self.shut(index)
        self.inner.revoke(index)
        if told is not None:
            told()

    def close(self) -> None:
        for index in range(self.num_seats):
            self.shut(index)


def new_landing(card: Card, num_seats: int, layout: SlotLayout, allocator: Allocator) -> RdmaLanding:
    """Raises ConfigError."""
    if allocator.region(layout.row_bytes).is_host:
        return RdmaLanding(card, PlainLanding(num_seats, layout, allocator))
    return RdmaLanding(card, DeviceLanding(num_seats, layout, allocator))


class RdmaOutbox:
    """Memory laid out as a peer's seat, from which the card reads. Raises ConfigError: there is none, or not for it."""

    def __init__(self, card: Card, layout: SlotLayout, allocator: Allocator) -> None:
        memory = map_zeroed(layout.headers_bytes)
        self.headers = layout.split_headers(memory)
        self.rows: Region = allocator.region(layout.rows_bytes)
        with contextlib.ExitStack() as undo:
            headers = _register_host(card, address_of(memory), layout.headers_bytes, False)
            undo.callback(headers.close)
            self.registered = Registered(headers, _register(card, self.rows, 0, layout.rows_bytes, False))
            undo.pop_all()


def _register(card: Card, rows: Region, start: int, num_bytes: int, is_remote: bool) -> Registration:
    if rows.is_host:
        return _register_host(card, address_of(rows.host()) + start, num_bytes, is_remote)
    fd = rows.export()
    try:
        return card.register_exported(fd, start, num_bytes, is_remote)
    except OSError as error:
        raise ConfigError(
            f"{card.name} does not take {num_bytes} bytes of a device's memory: {error.strerror or error}; its driver "
            "and the kernel have to know dma-buf"
        ) from error
    finally:
        os.close(fd)


def _register_host(card: Card, address: int, num_bytes: int, is_remote: bool) -> Registration:
    try:
        return card.register(address, num_bytes, is_remote)
    except OSError as error:
        raise ConfigError(
            f"{card.name} does not take {num_bytes} bytes of memory: {error.strerror or error}; raise the limit of "
            "locked memory (ulimit -l unlimited), or use fewer or smaller slots"
        ) from error


def address_of(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def lane_spans(headers: Span, rows: Span, lane: int, slot_bytes: int) -> tuple[Span, Span]:
    """Header and rows of one lane of a seat or outbox."""
    return (
        Span(headers.address + lane * HEADER_STRIDE, headers.key),
        Span(rows.address + lane * slot_bytes, rows.key),
    )
