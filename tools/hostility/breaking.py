"""Connections of other processes, broken from outside: as a middlebox does it, while both ends live on.

Linux only, of processes that this one started (or as root): the descriptor is copied with pidfd_getfd.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

PIDFD_GETFD = 438  # the system call's number, the same on all machines
CREDENTIALS = struct.Struct("iII")


def break_control(coordinator: int, worker: int) -> bool:
    """Breaks connections of a worker to its coordinator, local ones or one over TCP, by their process ids; False where
    there is none.
    """
    return _break(coordinator, worker) or _break_tcp(worker, coordinator)


def break_data(attention: int, expert: int) -> bool:
    """The same for the first connection between two workers, over TCP or beside shared memory."""
    return _break(attention, expert) or _break(expert, attention) or _break_tcp(attention, expert)


def _break(owner: int, peer: int) -> bool:
    count = 0
    for one in _sockets(owner):
        if one.family == socket.AF_UNIX and _peer_pid(one) == peer:
            one.shutdown(socket.SHUT_RDWR)
            count += 1
    return count > 0


def _break_tcp(attention: int, expert: int) -> bool:
    addresses = set()
    for one in _sockets(expert):
        if one.family == socket.AF_INET:
            addresses.add(one.getsockname())
    for one in _sockets(attention):
        if one.family == socket.AF_INET and _peer_name(one) in addresses:
            nobody = (ctypes.c_char * 16)()  # AF_UNSPEC: the kernel resets it
            return int(ctypes.CDLL(None).connect(one.fileno(), nobody, 16)) == 0
    return False


def _sockets(pid: int) -> Iterator[socket.socket]:
    """Copies of a process's sockets, each closed before the next; nothing of one that is gone."""
    try:
        handle = os.pidfd_open(pid)
        links = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return
    with contextlib.ExitStack() as closing:
        closing.callback(os.close, handle)
        for link in links:
            with contextlib.suppress(OSError):
                if not str(link.readlink()).startswith("socket:"):
                    continue
                copy = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, handle, int(link.name), 0)
                if copy >= 0:
                    with socket.socket(fileno=copy) as one:
                        yield one


def _peer_pid(one: socket.socket) -> int:
    try:
        credentials = one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    except OSError:
        return 0
    return int(CREDENTIALS.unpack(credentials)[0])


def _peer_name(one: socket.socket) -> object:
    try:
        return one.getpeername()
    except OSError:
        return None
