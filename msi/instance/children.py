"""Child processes of a launcher, and what the two tell each other over a pair of sockets that nobody else has.

A child says where it is reached, that it is ready, or in a sentence why it cannot work; the launcher tells the
coordinator what it sees of the workers, and the gateway why there is nothing to serve any more. One JSON object a line,
with one name for what it is about.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from msi.instance.fork_server import Forked, ForkServer
from msi.net.secret import VARIABLE, Secret, without_secret

CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
MAX_LINE_BYTES = 1 << 20


class Child:
    """A process that ends with this one however it ends.

    Attributes:
        failure: the sentence with which it ended, "" for none.
        is_ready: it has said so.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process | Forked,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.process = process
        self.failure = ""
        self.is_ready = False
        self._reader = reader
        self._writer = writer

    @staticmethod
    async def start(
        arguments: Iterable[str],
        secret: Secret | None = None,
        pass_fds: tuple[int, ...] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Child:
        """Runs msi_launch with these arguments; the secret is what peers on a network have to hold.

        Args:
            environment: besides this process's.
        """
        known = {**without_secret(os.environ), **environment}
        if secret is not None:  # never on a command line, which every user of the machine can read
            known[VARIABLE] = secret.text
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "msi_launch", *arguments,
                "--parent", str(os.getpid()), "--announce", str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL, pass_fds=(theirs.fileno(), *pass_fds), env=known,
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Child(process, *await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES))

    @staticmethod
    async def fork(arguments: Iterable[str], server: ForkServer) -> Child:
        """The same by a process that has loaded what it needs. Raises OSError: there is no room for one more."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await server.fork(arguments, theirs)
            except BaseException:
                ours.close()
                raise
        return Child(process, *await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES))

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def has_ended(self) -> bool:
        return self.process.returncode is not None

    @property
    def end(self) -> str:
        """How it ended."""
        status = self.process.returncode
        assert status is not None, "it runs"
        if self.failure:
            return self.failure
        return f"it was killed by signal {-status}" if status < 0 else f"it ended with status {status}"

    @property
    def has_crashed(self) -> bool:
        """Whether it ended by itself, without a word: nobody ended it."""
        status = self.process.returncode
        assert status is not None, "it runs"
        return not self.failure and (status > 0 or -status in CRASHES)

    async def hear(self) -> dict[str, Any] | None:
        """What it says next; None once it has ended, or is about to."""
        message = await _next_message(self._reader)
        if message is not None:
            self.failure = str(message.get("failure", self.failure))
            self.is_ready |= bool(message.get("ready"))
        return message

    def tell(self, **message: Any) -> None:
        """Nobody says whether it came."""
        if not self._writer.is_closing():
            self._writer.write(_line(message))

    def signal(self, number: int) -> None:
        """Nothing happens if it has ended."""
        if not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def close(self) -> None:
        """Nothing more is said or heard; the process is not touched. Idempotent."""
        self._writer.close()


def tell_launcher(fd: int, **message: Any) -> None:
    """The child's side; nothing happens without a launcher (-1), or when it is gone."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.write(fd, _line(message))


async def follow_launcher(fd: int, told: Callable[[dict[str, Any]], None]) -> None:
    """Calls `told` with what the launcher tells this child, until it is gone; returns at once without one (-1)."""
    if fd < 0:
        return
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=os.dup(fd)), limit=MAX_LINE_BYTES)
    try:
        while (message := await _next_message(reader)) is not None:
            told(message)
    finally:
        writer.close()


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


async def _next_message(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    try:
        line = await reader.readline()
    except ConnectionError:
        return None
    if not line.endswith(b"\n"):  # it was killed while it wrote
        return None
    message: dict[str, Any] = json.loads(line)
    return message
