"""Host memory that several processes map: a sealed memfd, and address ranges into which such memory is put."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from typing import Any, Protocol

from msi.errors import ConfigError, TransportError

PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


def pages(num_bytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-num_bytes // PAGE) * PAGE


class SharedRegion:
    """A region that another process maps, too: a memfd that cannot shrink under those who do.

    Use it as a context: its descriptor is closed at the end, what is mapped stays.
    """

    is_host = True
    flush = None
    remapping = None

    def __init__(self, fd: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.fd = fd
        self._memory = memoryview(mmap.mmap(fd, num_bytes))

    @classmethod
    def create(cls, num_bytes: int) -> SharedRegion:
        fd = os.memfd_create("msi-seat", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return cls(fd, num_bytes)

    @classmethod
    def of_peer(cls, fd: int, num_bytes: int, peer: str) -> SharedRegion:
        """What another process exported. Raises TransportError: it is not so long, or could shrink under us."""
        size = os.fstat(fd).st_size
        try:
            is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        except OSError:
            is_sealed = 0
        if not is_sealed or size != num_bytes:
            raise TransportError(peer, f"offered {size} bytes that are not a sealed seat of {num_bytes}")
        return cls(os.dup(fd), num_bytes)

    def __enter__(self) -> SharedRegion:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self.fd)

    def host(self) -> memoryview:
        return self._memory

    def tensor(self) -> Any:
        raise ConfigError(f"these {self.num_bytes} bytes are a transport's; have a device adopt what it is to see")

    def export(self) -> int:
        return os.dup(self.fd)

    def map_into(self, place: Place, at: int, offset: int, size: int) -> None:
        """Its bytes [offset, offset + size) are seen at `at` of an address range from now on."""
        place.map(at, size, mmap.MAP_SHARED, self.fd, offset)


class Place(Protocol):
    """Addresses into which memory is put."""

    def map(self, at: int, size: int, flags: int, fd: int, offset: int) -> None: ...


class AddressRange:
    """Addresses that stay, whatever memory is put there; at first zeroes of our own, which cost nothing.

    Raises ConfigError: there is no room.
    """

    def __init__(self, size: int) -> None:
        self._base = _map(None, size, _ANONYMOUS)
        array = (ctypes.c_char * size).from_address(self._base)
        weakref.finalize(array, _libc.munmap, self._base, size)  # once no view of it is left
        self.memory = memoryview(array).cast("B")

    def map(self, at: int, size: int, flags: int, fd: int, offset: int) -> None:
        map_at(self._base + at, size, flags, fd, offset)

    def clear(self, at: int, size: int) -> None:
        """Zeroes of our own again."""
        clear_at(self._base + at, size)


def map_at(address: int, size: int, flags: int, fd: int, offset: int) -> None:
    """Puts memory at an address of ours. Raises ConfigError: there is no room."""
    _map(address, size, flags | _MAP_FIXED, fd, offset)


def clear_at(address: int, size: int) -> None:
    """Puts zeroes of our own there."""
    _map(address, size, _ANONYMOUS | _MAP_FIXED)


def _map(address: int | None, size: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    mapped = _libc.mmap(address, size, _READ_WRITE, flags, fd, offset)
    if mapped is None or mapped == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise ConfigError(f"cannot map {size} bytes: {os.strerror(code)}; use fewer or smaller slots")
    return int(mapped)
