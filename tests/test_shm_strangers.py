"""Strangers at the sockets of shared memory: other users, and this user's processes that do not hold the secret."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import socket
import struct

import pytest

from msi.errors import TransportError
from msi.net import shm
from msi.net.link_proof import CHALLENGE_BYTES, PROOF_BYTES
from msi.net.regions import HOST_MEMORY
from msi.net.shm import ShmTransport
from tests.test_strangers import KEY, LAYOUT, OTHER, available, link, listening, num_descriptors, stranger_socket, where
from tests.waiting import until

# -- other instances of this user ----------------------------------------------------------------------


@available
@pytest.mark.parametrize("key", [OTHER, None])
@pytest.mark.parametrize("goes_on", [False, True])
async def test_who_does_not_hold_the_secret_gets_no_seat_of_shared_memory(key, goes_on, caplog):
    async with listening(ShmTransport(key=KEY)) as one:
        stranger = ShmTransport(key=key)
        if goes_on:  # though it cannot tell whether that is the one it looked for
            stranger._proofs.check_welcome = lambda challenge, said, proof, name: b""
        with pytest.raises(TransportError, match="does not prove that it is of this instance"):
            await stranger.connect(one.address, b"anna", stranger.register(1, LAYOUT, HOST_MEMORY), 0)
        await stranger.close()
        await until(lambda: one.transport._complain.counts["refused"] == 1)
        assert (one.admitted, one.delivered) == ([], [])
        await link(one, ShmTransport(key=KEY))
        assert one.admitted == [b"anna"]
        assert "Traceback" not in caplog.text


@available
@pytest.mark.parametrize("passes_on", [False, True])
async def test_a_listener_without_the_secret_gets_none_of_our_memory(passes_on):
    """It took the name of a worker that is gone; and it may ask another one of the instance's for the proof."""
    loop, name = asyncio.get_running_loop(), f"msi-{os.getpid()}-taken"
    async with listening(ShmTransport(key=KEY)) as other:
        with stranger_socket("shm://") as listener, stranger_socket("shm://") as asks:
            listener.bind("\0" + name)
            listener.listen()
            listener.setblocking(False)
            ours = ShmTransport(key=KEY)
            landing = ours.register(1, LAYOUT, HOST_MEMORY)
            connecting = asyncio.create_task(ours.connect(f"shm://{name}", b"anna", landing, 0))
            sock, _ = await loop.sock_accept(listener)
            with sock:
                sock.setblocking(False)
                challenge = await loop.sock_recv(sock, 1000)
                proof = shm.CHALLENGED + bytes(CHALLENGE_BYTES + PROOF_BYTES)
                if passes_on:
                    asks.connect(where(other.address))
                    asks.setblocking(False)
                    asks.send(challenge)
                    proof = await loop.sock_recv(asks, 1000)
                sock.send(proof)
                with pytest.raises(TransportError, match="does not prove that it is of this instance"):
                    await connecting
                message, fds, _, _ = socket.recv_fds(sock, 1000, 4)
                assert (message, fds) == (b"", [])
            await ours.close()
        assert not other.admitted


# -- other users ---------------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
ignores_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def as_nobody(task, pipe):
    os.setgid(65534)
    os.setuid(65534)
    pipe.send(task(pipe))


def start_as_nobody(task):
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=as_nobody, args=(task, there))
    child.start()
    return child, here


@available
@needs_root
@ignores_fork
async def test_1500_idle_connections_of_another_user_cost_no_descriptor_and_no_line_each(caplog):
    async with listening(ShmTransport()) as one:
        before = num_descriptors()
        name = where(one.address)

        def flood(pipe):
            held = []
            for _ in range(1500):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # waits while the queue is full
                with contextlib.suppress(OSError):
                    sock.connect(name)
                    held.append(sock)
            pipe.send("connected")
            pipe.recv()
            return len(held)

        child, pipe = await asyncio.to_thread(start_as_nobody, flood)
        await asyncio.to_thread(pipe.poll, 30)
        assert pipe.recv() == "connected"
        await until(lambda: one.transport._complain.counts["other user"] >= 1400)
        assert num_descriptors() - before < 20
        assert len(one.transport._acceptor._strangers) == 0
        assert caplog.text.count("runs as user 65534") == 1
        await link(one, ShmTransport())
        pipe.send("end")
        await asyncio.to_thread(child.join, 10)
        assert one.admitted == [b"anna"]


@available
@needs_root
@ignores_fork
async def test_a_listener_of_another_user_gets_none_of_our_memory():
    """It took the name of a worker that is gone."""
    name = f"msi-{os.getpid()}-squatted"

    def squat(pipe):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind("\0" + name)
            listener.listen()
            pipe.send("listening")
            listener.settimeout(20)
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(20)
                message, fds, _, _ = socket.recv_fds(sock, 1000, 2)
                return len(message), len(fds)

    child, pipe = await asyncio.to_thread(start_as_nobody, squat)
    assert await asyncio.to_thread(pipe.recv) == "listening"
    ours = ShmTransport()
    with pytest.raises(TransportError, match="runs as user 65534, not 0"):
        await ours.connect(f"shm://{name}", b"anna", ours.register(1, LAYOUT, HOST_MEMORY), 0)
    assert await asyncio.to_thread(pipe.recv) == (0, 0)
    await asyncio.to_thread(child.join, 10)
    await ours.close()


@available
async def test_a_process_that_says_no_hello_in_time_is_cut_off(monkeypatch):
    monkeypatch.setattr(shm, "CONNECT_TIMEOUT_S", 0.2)
    async with listening(ShmTransport()) as one:
        with stranger_socket(one.address) as sock:
            sock.connect(where(one.address))
            sock.settimeout(5)
            assert (await asyncio.to_thread(sock.recv, 100))[:1] == shm.REFUSED
        assert not one.admitted


@available
async def test_frames_of_garbage_at_the_shared_memory_socket_change_nothing():
    async with listening(ShmTransport()) as one:
        for message in (b"", b"x", os.urandom(1000), struct.pack("<4sHHIQ", b"MSIT", 1, 1, 4, 9), b"\0" * 60_000):
            with stranger_socket(one.address) as sock:
                sock.connect(where(one.address))
                sock.send(message)
                sock.settimeout(5)
                await asyncio.to_thread(sock.recv, 100)
        assert not one.admitted
        await link(one, ShmTransport())
