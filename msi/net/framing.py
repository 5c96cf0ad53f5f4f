"""Byte strings of any length over a stream between two of our own processes: a 32-bit length, then the bytes.

One end lives on an event loop and takes long ones in slices, so that nobody waits for them; the other one blocks.
"""

from __future__ import annotations

import asyncio
import socket
import struct

LENGTH = struct.Struct("<I")
SLICE_BYTES = 256 * 1024
MAX_FRAME_BYTES = 256 * 1024 * 1024


async def write_frame(writer: asyncio.StreamWriter, payload: bytes) -> None:
    """Raises OSError when the other end is gone. After a cancellation the stream is of no use."""
    writer.write(LENGTH.pack(len(payload)))
    view = memoryview(payload)
    for start in range(0, len(payload), SLICE_BYTES):
        writer.write(view[start : start + SLICE_BYTES])
        await writer.drain()


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """Raises OSError or EOFError when the other end is gone."""
    return await reader.readexactly(_length(await reader.readexactly(LENGTH.size)))


def send_frame(sock: socket.socket, payload: bytes) -> None:
    """Raises OSError when the other end is gone."""
    sock.sendall(LENGTH.pack(len(payload)))
    sock.sendall(payload)


def receive_frame(sock: socket.socket) -> bytes:
    """Raises OSError or EOFError when the other end is gone."""
    return _receive(sock, _length(_receive(sock, LENGTH.size)))


def _receive(sock: socket.socket, num_bytes: int) -> bytes:
    payload = bytearray(num_bytes)
    view, received = memoryview(payload), 0
    while received < num_bytes:
        count = sock.recv_into(view[received:])
        if not count:
            raise EOFError
        received += count
    return bytes(payload)


def _length(header: bytes) -> int:
    (length,) = LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise EOFError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed")
    return int(length)
