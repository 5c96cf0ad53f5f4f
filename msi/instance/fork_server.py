"""A launcher's side of a process that has loaded what others need, and forks them (`launch/fork_server.py`).

torch takes two seconds of a core to load: here once, however many workers there are, and not again when one is started
anew. What a coordinator needs takes half a second, which everybody waits for when one dies: a second such process has
that alone. Packets pass over a pair of sockets: there, the words of a command line and its own socket; back, its
process id, and how it ended. Who was forked ends with the process that forked it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal

from msi.net.secret import without_secret

MAX_PACKET_BYTES = 1 << 16
HAS_ENDED = "the process that forks it has ended"
CAN_FORK = sys.platform == "linux"
EMPTY: Mapping[str, str] = MappingProxyType({})
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # of these an operator's own count
ROOM_BYTES = 4096  # of its command line, in which who is forked shows its own


def forks_workers(device: str) -> bool:
    """Whether workers on this device are forked; those on a GPU load for themselves what its driver needs."""
    return CAN_FORK and device == "cpu"


def waiting_asleep(num_workers: int, num_threads: int) -> Mapping[str, str]:
    """Variables by which OpenMP's threads sleep from one product to the next, where workers have more of them than this
    machine has cores: those that spin take the core that another worker computes on.
    """
    is_crowded = num_threads > 1 and num_workers * num_threads > (os.cpu_count() or 1)
    return EMPTY if not is_crowded or any(name in os.environ for name in WAITING) else {WAITING[0]: "passive"}


class Forked:
    """A process that was forked: as much of `asyncio.subprocess.Process` as a launcher needs.

    Attributes:
        returncode: as `subprocess` has it; None while it runs.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._has_ended = asyncio.Event()

    async def wait(self) -> int:
        """Until it has ended; its return code."""
        await self._has_ended.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError: it has just ended."""
        os.kill(self.pid, number)

    def ended(self, returncode: int) -> None:
        self.returncode = returncode
        self._has_ended.set()


class ForkServer:
    """Started when it is first needed, and again where it has ended.

    Args:
        what: "workers" or "coordinator": who is forked.
        environment: variables that they have beside ours.
    """

    def __init__(self, what: Literal["workers", "coordinator"], environment: Mapping[str, str] = EMPTY) -> None:
        self._what = what
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None
        self._socket: socket.socket | None = None
        self._asked: deque[asyncio.Future[Forked]] = deque()
        self._running: dict[int, Forked] = {}
        self._alone = asyncio.Lock()

    async def start(self) -> None:
        """Nothing happens where it runs. Raises OSError: the machine has no room for it."""
        async with self._alone:
            if self._socket is None:
                await self._start()

    async def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "msi_launch.fork_server", self._what, str(theirs.fileno()),
                    str(os.getpid()), "-" * ROOM_BYTES, stdin=asyncio.subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
                    env={**without_secret(os.environ), **self._environment},
                )  # fmt: skip
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._hear)

    async def fork(self, words: Iterable[str], theirs: socket.socket) -> Forked:
        """A process with these words of msi-launch's, and its end of a socket. Raises OSError: it cannot be started."""
        await self.start()
        assert self._socket is not None
        asked: asyncio.Future[Forked] = asyncio.get_running_loop().create_future()
        try:
            socket.send_fds(self._socket, [json.dumps(list(words)).encode()], [theirs.fileno()])
        except ConnectionError:  # it ended before we were told
            raise OSError(HAS_ENDED) from None
        self._asked.append(asked)
        return await asked

    def _hear(self) -> None:
        assert self._socket is not None
        try:
            packet = self._socket.recv(MAX_PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._lose()
            return
        said = json.loads(packet)
        if "ended" in said:
            self._running.pop(said["ended"]).ended(said["returncode"])
            return
        asked = self._asked.popleft()
        if "pid" in said:
            forked = self._running[said["pid"]] = Forked(said["pid"])
            if asked.done():  # who asked does not wait any more
                forked.send_signal(signal.SIGKILL)
            else:
                asked.set_result(forked)
        elif not asked.done():
            asked.set_exception(OSError(said["errno"], os.strerror(said["errno"])))

    def _lose(self) -> None:
        """It has ended, and with it all that it had forked."""
        assert self._socket is not None
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self._socket = None
        for forked in self._running.values():
            forked.ended(-signal.SIGKILL)
        self._running.clear()
        while self._asked:
            if not (asked := self._asked.popleft()).done():
                asked.set_exception(OSError(HAS_ENDED))

    async def stop(self) -> None:
        """What was forked and has not ended is killed. Idempotent."""
        if self._socket is not None:
            self._lose()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
