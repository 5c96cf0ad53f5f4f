"""TLS 1.3 between workers of one instance: rows that nobody on the way can read or change.

Both ends show the same certificate, which only who holds the instance's secret can make, and take no other: each proves
to the other who it is before anything else is said. A `TlsSocket` does what a socket does, as far as frames need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from msi.net.certificate import make_certificate

RECORD_BYTES = 16384  # the most that one record holds; less than a record's worth of pieces is joined
Buffer = bytes | memoryview


class HasDescriptor(Protocol):
    def fileno(self) -> int: ...


class Tls:
    """Of one process. `key`: 32 bytes that both ends have to hold."""

    def __init__(self, key: bytes) -> None:
        certificate, private = make_certificate(key)
        self._accepting = _context(ssl.PROTOCOL_TLS_SERVER, certificate, private)
        self._dialling = _context(ssl.PROTOCOL_TLS_CLIENT, certificate, private)
        self._accepting.num_tickets = 0  # nothing is resumed

    async def wrap(self, sock: socket.socket, *, is_accepting: bool) -> TlsSocket:
        """Shakes hands over a connected socket, which it then owns. Whoever calls says how long that may take.

        Raises OSError: the other end speaks no TLS, or holds another key.
        """
        context = self._accepting if is_accepting else self._dialling
        wrapped = context.wrap_socket(sock, server_side=is_accepting, do_handshake_on_connect=False)
        try:
            while True:
                try:
                    wrapped.do_handshake()
                    return TlsSocket(wrapped)
                except ssl.SSLWantReadError:
                    await until_ready(wrapped)
                except ssl.SSLWantWriteError:
                    await until_ready(wrapped, to_write=True)
        except BaseException:
            wrapped.close()
            raise


class TlsSocket:
    """Non-blocking. Receiving and sending may happen on two threads at once."""

    def __init__(self, wrapped: ssl.SSLSocket) -> None:
        self._wrapped = wrapped
        self._using = threading.Lock()  # OpenSSL's own state is for one thread at a time
        self._is_over = False

    def fileno(self) -> int:
        return self._wrapped.fileno()

    def close(self) -> None:
        with self._using:
            self._wrapped.close()

    def sendmsg(self, pieces: Sequence[Buffer]) -> int:
        """How many bytes of the pieces, one after the other, are on their way. Raises OSError, BlockingIOError: none.

        What could not leave is to be offered again from there, with no less behind it: OpenSSL may have begun it.
        """
        sent = 0
        with self._using, contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            for record in _records(pieces):
                sent += self._wrapped.send(record)
        if not sent:
            raise BlockingIOError
        return sent

    def recv_into(self, buffer: memoryview) -> int:
        """As much as there is and fits; 0 at the end. Raises OSError, BlockingIOError: there is nothing yet."""
        return self.recvmsg_into((buffer,))[0]

    def recvmsg_into(self, buffers: Sequence[memoryview]) -> tuple[int, None]:
        received, wrapped = 0, self._wrapped
        with self._using, contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            for buffer in buffers:
                left = buffer
                while left and not self._is_over:
                    count = wrapped.recv_into(left)
                    self._is_over = not count
                    received += count
                    if count < RECORD_BYTES and not wrapped.pending():  # the last of a frame: seldom is there more yet
                        return received, None
                    left = left[count:]
        if not received and not self._is_over:
            raise BlockingIOError
        return received, None


def _records(pieces: Sequence[Buffer]) -> Iterator[Buffer]:
    """The same bytes, a record's worth each but for the last. Only pieces that fill none are copied."""
    joined = b""
    for piece in pieces:
        at = 0
        if joined or len(piece) < RECORD_BYTES:
            at = min(len(piece), RECORD_BYTES - len(joined))
            joined += bytes(piece[:at])
            if len(joined) < RECORD_BYTES:
                continue
            yield joined
            joined = b""
        while len(piece) - at >= RECORD_BYTES:
            yield piece[at : at + RECORD_BYTES]
            at += RECORD_BYTES
        joined = bytes(piece[at:])
    if joined:
        yield joined


def _context(protocol: int, certificate: str, private: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate is the instance's, not a host's
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certificate)
    with _as_file(certificate) as certificate_file, _as_file(private) as private_file:
        context.load_cert_chain(certificate_file, private_file)
    return context


@contextlib.contextmanager
def _as_file(text: str) -> Iterator[str]:
    """A path to read it from, once; it is never on a disk."""
    reading, writing = os.pipe()
    try:
        os.write(writing, text.encode())  # less than a pipe holds
        os.close(writing)
        yield f"/dev/fd/{reading}"
    finally:
        os.close(reading)


async def until_ready(sock: HasDescriptor, *, to_write: bool = False) -> None:
    """Until a descriptor that nobody else watches can be read from, or written to."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if to_write else (loop.add_reader, loop.remove_reader)
    add(sock, ready.set)
    try:
        await ready.wait()
    finally:
        remove(sock)
