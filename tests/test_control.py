"""Control sockets: who is heard on them, and what those who are not can bring about."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import socket
import threading

import pytest
import zmq
from zmq.utils import z85

from msi.attention.scheduler import Request
from msi.control.client_messages import ClientHello, InstanceStatus, StatsRequest, Welcome
from msi.control.messages import CLIENT_END, COORDINATOR_END, TO_CLIENT, Cancel, Submit, WorkerHello
from msi.errors import ConfigError
from msi.net import control_server, control_socket
from msi.net.codec import Codec
from msi.net.control import ControlClient
from msi.net.control_server import ControlServer
from msi.net.secret import Secret
from msi.net.socket_dir import SocketDir
from msi.precision import Precision
from msi.types import SamplingParams
from tests.waiting import until

ANYWHERE = "tcp://127.0.0.1:*"
SECRET, OTHER = Secret("the secret of this test"), Secret("the secret of another")
SAID = [
    ClientHello(1), WorkerHello(1, "expert-0", "expert", 1, "h", "f", Precision.of("float32")), StatsRequest(),
    Cancel("r"),
    Submit(Request("r", (1,), SamplingParams(seed=1))),
]  # fmt: skip
TALKATIVE = Codec(TO_CLIENT, [type(one) for one in SAID])  # says what workers say, and clients


class Server:
    """A control server, and what it has heard."""

    def __init__(self, address, secret=None):
        self.server = ControlServer(address, COORDINATOR_END, secret)
        self.address = self.server.address
        self.heard = []

    async def _listen(self):
        while True:
            self.heard.append(await self.server.receive())

    async def __aenter__(self):
        self.task = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_):
        self.task.cancel()
        self.server.close()


@pytest.fixture
def sockets():
    made = SocketDir()
    yield made
    made.close()


@contextlib.asynccontextmanager
async def client(address, secret=None):
    one = ControlClient(address, TALKATIVE, secret)
    try:
        yield one
    finally:
        one.close()


async def test_those_who_hold_the_secret_are_heard_and_answered():
    async with Server(ANYWHERE, SECRET) as server, client(server.address, SECRET) as one:
        for message in SAID:
            one.send(message)
        await until(lambda: len(server.heard) == len(SAID))
        assert [message for _, message in server.heard] == SAID
        server.server.send(server.heard[0][0], InstanceStatus(True, "ready", ""))
        assert await one.receive() == InstanceStatus(True, "ready", "")
        assert not server.server.dropped


@pytest.mark.parametrize(
    ("its", "ours", "complaint"),
    [
        (SECRET, OTHER, "the secret differs: the coordinator at"),
        (SECRET, None, "asks for a secret, and this process was given none"),
        (None, SECRET, "the secret differs: .* has another than this process, or none"),
    ],
)
async def test_who_has_another_secret_is_not_heard_and_told_so_on_both_sides(its, ours, complaint, caplog):
    async with Server(ANYWHERE, its) as server, client(server.address, ours) as stranger:
        for message in SAID:
            stranger.send(message)
        with pytest.raises(ConfigError, match=complaint):
            await asyncio.wait_for(stranger.receive(), 20)
        with pytest.raises(ConfigError, match=complaint):
            await stranger.receive()
        await until(lambda: server.server.dropped["handshake"])
        assert "refused a connection to" in caplog.text
        async with client(server.address, its) as member:
            member.send(SAID[0])
            await until(lambda: server.heard)
        assert [message for _, message in server.heard] == SAID[:1], "nothing that the stranger said"


async def test_whoever_knows_the_servers_key_but_not_the_clients_is_not_heard():
    async with Server(ANYWHERE, SECRET) as server:
        context = zmq.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.linger = 0
        stranger.curve_serverkey = control_socket.curve_pair(SECRET, "server")[0]
        stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
        stranger.connect(server.address)
        stranger.send(TALKATIVE.encode(SAID[0]))
        await until(lambda: server.server.dropped["handshake"])
        assert not server.heard
        stranger.close()
        context.term()


async def test_no_message_and_no_secret_passes_in_the_clear():
    """What a machine between the two sees."""
    seen = bytearray()

    def carry(source, target):
        with contextlib.suppress(OSError):
            while chunk := source.recv(4096):
                seen.extend(chunk)
                target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)

    def relay(listener, port):
        near, _ = listener.accept()
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            back = threading.Thread(target=carry, args=(far, near))
            back.start()
            carry(near, far)
            back.join()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with Server(ANYWHERE, SECRET) as server:
            port = int(server.address.rpartition(":")[2])
            relaying = asyncio.create_task(asyncio.to_thread(relay, listener, port))
            async with client(f"tcp://127.0.0.1:{listener.getsockname()[1]}", SECRET) as one:
                one.send(Cancel("a request of somebody's"))
                await until(lambda: server.heard)
            await relaying
    assert len(seen) > 200
    keys = [z85.decode(key) for end in ("server", "client") for key in control_socket.curve_pair(SECRET, end)]
    for told in (b"somebody", b"Cancel", SECRET.text.encode(), *keys):
        assert told not in seen


# -- sockets of this machine ------------------------------------------------------------------------------------------


CUT_OFF = ("read 0 bytes", "Broken pipe", "Connection reset by peer")


def as_another_user(address, answer):
    """In a child: becomes nobody, tries the socket, and says what happened."""
    os.setgid(65534)
    os.setuid(65534)
    path = address.removeprefix("ipc://")
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(path)
            sock.sendall(b"\xff" + bytes(8) + b"\x7f\x03")
            answer.send(f"read {len(sock.recv(64))} bytes")
    except OSError as error:
        answer.send(error.strerror)


def tried_by_another_user(address):
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=as_another_user, args=(address, there))
    child.start()
    try:
        assert here.poll(20)
        return here.recv()
    finally:
        child.join(10)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
ignores_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


@needs_root
@ignores_fork
async def test_another_user_does_not_reach_the_socket_of_a_local_instance(sockets):
    async with Server(sockets.address("coordinator")) as server:
        assert await asyncio.to_thread(tried_by_another_user, server.address) == "Permission denied"
        sockets.path.chmod(0o711)  # even where the directory lets others through
        assert await asyncio.to_thread(tried_by_another_user, server.address) == "Permission denied"
        os.chmod(server.address.removeprefix("ipc://"), 0o666)  # or the socket, too: the kernel says who it is
        assert await asyncio.to_thread(tried_by_another_user, server.address) in CUT_OFF
        await until(lambda: server.server.dropped["other_user"])
        assert not server.heard
        async with client(server.address) as one:
            one.send(SAID[0])
            await until(lambda: server.heard)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_a_socket_where_others_could_put_theirs_is_neither_made_nor_trusted(tmp_path, mode):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    with pytest.raises(ConfigError, match="can be written by others"):
        ControlServer(f"ipc://{shared}/c", COORDINATOR_END)
    with pytest.raises(ConfigError, match="can be written by others"):
        ControlClient(f"ipc://{shared}/c", CLIENT_END)


@pytest.mark.parametrize("address", ["", "nonsense", "shm://x", "ipc://", "ipc:///nowhere/at/all", "tcp://", "tcp://x",
                                     "udp://127.0.0.1:5555", "inproc://x", "ipc://" + "/tmp" * 60])  # fmt: skip
def test_what_is_no_address_is_a_sentence(address):
    with pytest.raises(ConfigError):
        ControlClient(address, CLIENT_END)


# -- bounds -----------------------------------------------------------------------------------------------------------


async def test_whoever_does_not_read_is_given_up_at_a_bound_and_nobody_else_waits(monkeypatch):
    monkeypatch.setattr(control_socket, "MAX_BEHIND", 50)
    async with Server(ANYWHERE) as server, client(server.address) as reading:
        with peer_that_reads_nothing(server.address):
            await until(lambda: server.heard)
            idle = server.heard[0][0]
            reading.send(SAID[0])
            await until(lambda: len(server.heard) == 2)
            message = InstanceStatus(True, "x" * 50_000, "")
            for _ in range(1000):
                server.server.send(idle, message)
                if server.server.dropped["unread"]:
                    break
            assert server.server.dropped["unread"] == 1
            server.server.send(server.heard[1][0], message)
            assert await asyncio.wait_for(reading.receive(), 10) == message
            assert idle in server.server._given_up, "nothing is sent to it, or heard from it, any more"


@contextlib.contextmanager
def peer_that_reads_nothing(address):
    context = zmq.Context()
    peer = context.socket(zmq.DEALER)
    peer.linger, peer.rcvhwm, peer.rcvbuf = 0, 1, 4096
    peer.connect(address)
    peer.send(TALKATIVE.encode(SAID[0]))
    try:
        yield
    finally:
        peer.close()
        context.term()


async def test_a_large_greeting_costs_its_memory_once_however_many_do_not_read_it():
    welcome = Welcome("model", 10, 10, bytes(8 << 20))
    async with Server(ANYWHERE) as server:
        with peer_that_reads_nothing(server.address):
            await until(lambda: server.heard)
            before = resident_bytes()
            for _ in range(200):
                server.server.send(server.heard[0][0], welcome)
            await asyncio.sleep(0.5)
            assert resident_bytes() - before < 150 << 20
            async with client(server.address) as one:
                one.send(SAID[0])
                await until(lambda: len(server.heard) == 2)
                server.server.send(server.heard[1][0], welcome)
                assert await asyncio.wait_for(one.receive(), 10) == welcome


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_garbage_is_counted_each_time_and_logged_once(caplog):
    async with Server(ANYWHERE) as server:
        context = zmq.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.linger = 0
        stranger.connect(server.address)
        for number in range(500):
            stranger.send(b"\xc1" * number)
        stranger.send_multipart([b"two", b"frames"])
        await until(lambda: server.server.dropped["not_a_message"] == 501)
        assert caplog.text.count("dropped a message") == 1
        stranger.close()
        context.term()


async def test_no_more_than_a_bound_of_connections_and_those_that_are_there_go_on(monkeypatch):
    monkeypatch.setattr(control_server, "MAX_CONNECTIONS", 20)
    async with Server(ANYWHERE) as server, client(server.address) as one:
        one.send(SAID[0])
        await until(lambda: server.heard)
        with contextlib.ExitStack() as silent:
            for _ in range(200):
                with contextlib.suppress(OSError):
                    sock = silent.enter_context(socket.socket())
                    sock.settimeout(0.2)
                    sock.connect(("127.0.0.1", int(server.address.rpartition(":")[2])))
                await asyncio.sleep(0)
            await until(lambda: server.server.dropped["too_many"])
            assert open_descriptors() < 600
            one.send(SAID[2])
            await until(lambda: len(server.heard) == 2)
        async with client(server.address) as late:
            late.send(SAID[0])
            await until(lambda: len(server.heard) == 3)


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


async def test_messages_in_both_directions_arrive_in_order_and_none_is_lost():
    async with Server(ANYWHERE) as server, client(server.address) as one:
        for number in range(2000):
            one.send(Cancel(str(number)))
            if number % 100 == 0:
                await asyncio.sleep(0)
        await until(lambda: len(server.heard) == 2000)
        assert [message.request_id for _, message in server.heard] == [str(number) for number in range(2000)]
        route = server.heard[0][0]
        for number in range(2000):
            server.server.send(route, InstanceStatus(True, str(number), ""))
        for number in range(2000):
            assert (await asyncio.wait_for(one.receive(), 10)).sentence == str(number)


async def test_a_receive_that_is_cancelled_loses_nothing():
    async with Server(ANYWHERE) as server, client(server.address) as one:
        one.send(SAID[0])
        await until(lambda: server.heard)
        came = []
        for number in range(200):
            server.server.send(server.heard[0][0], InstanceStatus(True, str(number), ""))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.0005):
                    came.append((await one.receive()).sentence)
        while len(came) < 200:
            came.append((await asyncio.wait_for(one.receive(), 10)).sentence)
        assert came == [str(number) for number in range(200)]


async def test_routes_cannot_be_guessed():
    """Whoever takes the next one, as a name of its own, has ZeroMQ end the process."""
    routes = set()
    for _ in range(3):
        async with Server(ANYWHERE) as server, client(server.address) as one:
            one.send(SAID[0])
            await until(lambda heard=server.heard: heard)
            routes.add(server.heard[0][0])
    assert len(routes) == 3
