"""Strangers at the data sockets: who cannot prove to be of the instance gets nothing, and costs others nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi import Engine, SamplingParams
from msi.errors import ConfigError, ProtocolError, TransportError
from msi.net import acceptor, shm, tcp
from msi.net.landing import seat_rows
from msi.net.link_proof import CHALLENGE_BYTES, PROOF_BYTES, PROVED_BYTES, Proofs
from msi.net.regions import HOST_MEMORY
from msi.net.secret import Secret, Trust
from msi.net.shm import ShmTransport
from msi.net.slots import SlotLayout
from msi.net.tcp import ACCEPTED, CHALLENGE, GREETING, GREETING_MAGIC, HELLO, TcpTransport, split_address
from msi.net.transport import Admission, CompletionKind
from msi.precision import Precision
from msi.profiler.process import Hosting, StageHost
from tests.everyday import mostly_slow, thorough
from tests.test_launch import free_port, launched
from tests.waiting import until

LAYOUT = SlotLayout(1, 32, 128)
LARGE = SlotLayout(8, 1 << 20, 1 << 17).encode()  # a terabyte, the most that is taken for a seat
THEIRS, OURS = SlotLayout(1, 7, 128).encode(), SlotLayout(1, 9, 128).encode()
available = pytest.mark.skipif(shm.is_available() is not None, reason=str(shm.is_available()))
KEY, OTHER = Trust(Secret("the secret of this test")).link_key("token"), Trust(None).link_key("token")


class Listening:
    """A transport that listens with one seat, whom it admitted, and what was delivered."""

    def __init__(self, transport):
        self.transport = transport
        self.landing = transport.register(1, LAYOUT, HOST_MEMORY)
        self.admitted = []
        self.delivered = []
        transport.deliver(lambda *completion: self.delivered.append(completion))

    def accept(self, hello):
        self.admitted.append(hello)
        return Admission(self.landing, 0, b"welcome")


@contextlib.asynccontextmanager
async def listening(transport):
    one = Listening(transport)
    one.address = await transport.listen(one.accept)
    try:
        yield one
    finally:
        await transport.close()


async def link(one, transport):
    """A peer of the instance's can connect, and its bytes land."""
    endpoint = await transport.connect(one.address, b"anna", transport.register(1, LAYOUT, HOST_MEMORY), 0)
    endpoint.out_rows.host()[:4] = b"fine"
    endpoint.post(0, 5, num_rows=1)
    await until(lambda: any(kind is CompletionKind.IMMEDIATE for _, kind, _, _ in one.delivered))
    assert bytes(seat_rows(one.landing, 0)[:4]) == b"fine"
    await transport.close()


# -- proofs -----------------------------------------------------------------------------------------------------------


def test_who_holds_the_key_is_believed_and_says_what_it_said():
    ours, theirs = Proofs(KEY), Proofs(KEY)
    challenge = ours.challenge()
    said = theirs.hello(challenge, b"hello", THEIRS)
    assert ours.check_hello(challenge, said, THEIRS) == b"hello"
    answer = ours.welcome(challenge, said, b"welcome", OURS)
    assert theirs.check_welcome(challenge, said, answer, OURS) == b"welcome"
    assert KEY not in challenge + said + answer


@given(st.data())
def test_nothing_that_differs_anywhere_is_believed(data):
    ours, theirs = Proofs(KEY), Proofs(KEY)
    challenge, said = ours.challenge(), b""
    said = theirs.hello(challenge, b"hello", THEIRS)
    answer = ours.welcome(challenge, said, b"welcome", OURS)

    def changed(text):
        at, by = data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(1, 255))
        return text[:at] + bytes([text[at] ^ by]) + text[at + 1 :]

    for check in (
        lambda: ours.check_hello(changed(challenge), said, THEIRS),
        lambda: ours.check_hello(challenge, changed(said), THEIRS),
        lambda: ours.check_hello(challenge, said, changed(THEIRS)),
        lambda: ours.check_hello(challenge, said[: data.draw(st.integers(0, len(said) - 1))], THEIRS),
        lambda: ours.check_hello(ours.challenge(), said, THEIRS),  # said once, and again
        lambda: theirs.check_welcome(changed(challenge), said, answer, OURS),
        lambda: theirs.check_welcome(challenge, changed(said), answer, OURS),
        lambda: theirs.check_welcome(challenge, said, changed(answer), OURS),
        lambda: theirs.check_welcome(challenge, said, answer, changed(OURS)),
        lambda: theirs.check_welcome(challenge, said, said, OURS),  # its own words sent back
        lambda: ours.check_hello(challenge, answer, OURS),
        lambda: Proofs(OTHER).check_hello(challenge, said, THEIRS),
        lambda: Proofs(None).check_hello(challenge, said, THEIRS),
        lambda: ours.check_hello(challenge, Proofs(None).hello(challenge, b"hello", THEIRS), THEIRS),
    ):
        with pytest.raises(ProtocolError):
            check()


def test_a_challenge_of_another_length_is_none():
    for length in (0, CHALLENGE_BYTES - 1, CHALLENGE_BYTES + 1):
        with pytest.raises(ProtocolError, match="a challenge of"):
            Proofs(KEY).hello(bytes(length), b"hello", THEIRS)


# -- TCP --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [OTHER, None, bytes(32)])
async def test_a_dialler_without_the_secret_is_not_admitted_and_told_why(key, caplog):
    async with listening(TcpTransport(key=KEY)) as one:
        stranger = TcpTransport(key=key)
        with pytest.raises(TransportError, match="refused: it does not prove that it is of this instance"):
            await stranger.connect(one.address, b"anna", stranger.register(1, LAYOUT, HOST_MEMORY), 0)
        await stranger.close()
        assert (one.admitted, one.delivered) == ([], [])
        assert one.transport.num_cut_off == {"refused": 1}
        assert "does not prove that it is of this instance" in caplog.text
        await link(one, TcpTransport(key=KEY))


@pytest.mark.parametrize("key", [OTHER, None])
async def test_a_listener_without_the_secret_gets_neither_seat_nor_rows(key):
    """A stranger took the address of a worker that is gone."""
    async with listening(TcpTransport(key=key)) as stranger:
        stranger.transport._proofs.check_hello = lambda challenge, said, layout: said[PROVED_BYTES:]
        ours = TcpTransport(key=KEY)
        with pytest.raises(TransportError, match="does not prove that it is of this instance"):
            await ours.connect(stranger.address, b"anna", ours.register(1, LAYOUT, HOST_MEMORY), 0)
        assert not ours._endpoints
        await ours.close()


async def test_a_proof_that_was_overheard_is_of_no_use():
    async with listening(TcpTransport(key=KEY)) as one:
        heard = []

        class Overheard(Proofs):
            def hello(self, challenge, hello, layout):
                heard.append(super().hello(challenge, hello, layout))
                return heard[-1]

        member = TcpTransport(key=KEY)
        member._proofs = Overheard(KEY)
        await link(one, member)
        reader, writer = await asyncio.open_connection(*split_address(one.address))
        await reader.readexactly(GREETING.size + CHALLENGE_BYTES)
        writer.write(GREETING.pack(GREETING_MAGIC, tcp.VERSION, HELLO, len(heard[0]), LAYOUT.encode()) + heard[0])
        answer = await asyncio.wait_for(reader.read(), 5)
        assert b"does not prove" in answer
        assert one.admitted == [b"anna"]
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_nothing_is_made_for_a_stranger_that_claims_a_large_seat():
    async with listening(TcpTransport(key=KEY)) as one:
        tracemalloc.start()
        for kind in (HELLO, ACCEPTED, CHALLENGE):
            said = bytes(PROVED_BYTES) + b"anna"
            with socket.create_connection(split_address(one.address), timeout=5) as sock:
                sock.sendall(GREETING.pack(GREETING_MAGIC, tcp.VERSION, kind, len(said), LARGE) + said)
                with contextlib.suppress(ConnectionError):
                    while await asyncio.to_thread(sock.recv, 1000):
                        pass
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()
        assert not one.admitted


async def test_a_listener_that_claims_a_large_seat_without_proof_costs_nothing():
    def claim(listener):
        sock, _ = listener.accept()
        with sock, contextlib.suppress(OSError):
            sock.settimeout(5)
            head = GREETING.pack(GREETING_MAGIC, tcp.VERSION, CHALLENGE, CHALLENGE_BYTES, bytes(12))
            sock.sendall(head + bytes(CHALLENGE_BYTES))
            head = GREETING.pack(GREETING_MAGIC, tcp.VERSION, ACCEPTED, PROOF_BYTES, LARGE)
            sock.sendall(head + bytes(PROOF_BYTES))
            while sock.recv(1000):
                pass

    ours = TcpTransport(key=KEY)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        claiming = asyncio.create_task(asyncio.to_thread(claim, listener))
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(TransportError, match="does not prove"):
            await ours.connect(address, b"anna", ours.register(1, LAYOUT, HOST_MEMORY), 0)
        await claiming
    await ours.close()


@pytest.mark.parametrize("make", [lambda: TcpTransport(key=KEY), ShmTransport])
async def test_a_flood_of_silent_connections_keeps_nobody_out_and_is_bounded(make, caplog):
    async with listening(make()) as one:
        before = num_descriptors()
        with contextlib.ExitStack() as flood:
            for _ in range(1000):
                sock = flood.enter_context(stranger_socket(one.address))
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.connect(where(one.address))
                await asyncio.sleep(0)
            await until(lambda: one.transport._complain.counts["too many"], 30)
            assert len(one.transport._acceptor._strangers) <= acceptor.MAX_STRANGERS
            assert num_descriptors() - before < 1000 + acceptor.MAX_STRANGERS + 20
            await link(one, make())
        assert caplog.text.count("cut ") <= 3, "said once"


def stranger_socket(address):
    if address.startswith("shm://"):
        return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return socket.socket()


def where(address):
    return "\0" + address.removeprefix("shm://") if address.startswith("shm://") else split_address(address)


def num_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("make", [lambda: TcpTransport(key=KEY), ShmTransport])
@pytest.mark.parametrize("number", mostly_slow([errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNABORTED]))
async def test_descriptors_that_ran_out_are_waited_for_and_not_spun_on(make, number, caplog, monkeypatch):
    monkeypatch.setattr(acceptor, "ACCEPT_AGAIN_S", 0.2)
    async with listening(make()) as one:
        listener = one.transport._acceptor._listener
        tries = []

        class Failing:
            def accept(self):
                tries.append(1)
                if len(tries) < 4:
                    raise OSError(number, os.strerror(number))
                return listener.accept()

            def __getattr__(self, name):
                return getattr(listener, name)

        one.transport._acceptor._listener = Failing()
        await link(one, make())
        assert len(tries) < 8
        if number != errno.ECONNABORTED:
            assert one.transport._complain.counts["no descriptors"] == 3
            assert caplog.text.count("no connection can be accepted") == 1
        assert "Traceback" not in caplog.text


# -- whole instances --------------------------------------------------------------------------------------------------


def listening_ports(pids):
    """TCP ports at which any of these processes listens."""
    inodes = set()
    for pid in pids:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


@pytest.mark.parametrize(
    "transport", ["inproc", pytest.param("shm", marks=pytest.mark.slow), pytest.param("tcp", marks=pytest.mark.slow)]
)
async def test_a_local_instance_listens_on_no_port_and_leaves_no_socket(tiny_model, transport):
    before = listening_ports([os.getpid()])
    async with Engine.local(model=tiny_model, transport=transport, threads_per_worker=1) as engine:
        assert engine.address.startswith("ipc://")
        ports = listening_ports([os.getpid(), *engine.pids.values()]) - before
        assert len(ports) == (2 if transport == "tcp" else 0), "but those of either worker, where TCP was asked for"
        path = Path(engine.address.removeprefix("ipc://"))
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        for port in ports:  # the instance's token is needed there, which only its own processes are told
            stranger = TcpTransport(key=OTHER)
            with pytest.raises(TransportError, match="does not prove"):
                await stranger.connect(f"tcp://127.0.0.1:{port}", b"anna", stranger.register(1, LAYOUT, HOST_MEMORY), 0)
            await stranger.close()
        async with Engine.connect(engine.address) as other:
            params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
            assert sum([len(output.token_ids) async for output in other.generate([1, 2, 3], params)]) == 4
    assert not path.parent.exists()


@pytest.mark.parametrize(("transport", "stranger"), [("shm", ShmTransport), ("tcp", TcpTransport)])
async def test_the_sides_of_a_profile_take_nobody_but_each_other(tiny_model, transport, stranger):
    if transport == "shm" and (why_not := shm.is_available()) is not None:
        pytest.skip(why_not)
    side = StageHost(Hosting(tiny_model, "expert", "cpu", Precision(), "auto", 1, 16, link_key=KEY))
    await side.load()
    address = await side.listen(transport)
    try:
        for key in (None, OTHER):
            one = stranger(key=key)
            with pytest.raises(TransportError, match="does not prove"):
                await one.connect(address, b"anna", one.register(1, LAYOUT, HOST_MEMORY), 0)
            await one.close()
    finally:
        await side.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("encryption", [("--encrypt-rows",), thorough(())])
async def test_a_cluster_serves_who_holds_its_secret_and_nobody_else(tiny_model, tmp_path, encryption):
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text("the secret of this cluster\n")
    address = f"tcp://127.0.0.1:{free_port()}"
    common = (tiny_model, "--coordinator", address, "--threads-per-worker", 1)
    ours = (*common, "--secret-file", secret, "--transport", "tcp", *encryption)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    async with (
        launched(*ours, "--role", "coordinator", "--no-gateway") as coordinator,
        launched(*ours, "--role", "expert"),
        launched(*ours, "--role", "attention") as attention,
        Engine.connect(address, secret="the secret of this cluster") as engine,
    ):
        await engine.wait_ready(90)
        async with launched(*common, "--role", "expert", "--worker-id", "expert-0") as stranger:
            assert await stranger.ended() == 2
            assert "asks for a secret, and this process was given none" in stranger.said
        (tmp_path / "other").touch(mode=0o600)
        (tmp_path / "other").write_text("the secret of another cluster\n")
        async with launched(*common, "--role", "attention", "--secret-file", tmp_path / "other") as stranger:
            assert await stranger.ended() == 2
            assert "the secret differs" in stranger.said
        for wrong, complaint in ((None, "asks for a secret"), ("the secret of another", "the secret differs")):
            with pytest.raises(ConfigError, match=complaint):
                async with Engine.connect(address, secret=wrong):
                    pass
        assert "refused a connection" in coordinator.said
        assert (await engine.stats()).dropped["handshake"] >= 4
        assert sum([len(output.token_ids) async for output in engine.generate([1, 2, 3], params)]) == 4
        assert {one.incarnation for one in (await engine.stats()).workers} == {0}, "nobody's place was taken"
        assert attention.process.returncode is None


@pytest.mark.parametrize(
    ("role", "at"), [("coordinator", "0.0.0.0:0"), pytest.param("attention", "192.0.2.1:5555", marks=pytest.mark.slow)]
)
async def test_nobody_listens_on_a_network_without_a_secret_unless_told_to(tiny_model, role, at):
    async with launched(tiny_model, "--role", role, "--coordinator", f"tcp://{at}", "--start-timeout", 2) as child:
        assert await child.ended() == 2
        if "cannot tell by which address" not in child.said:  # a machine without any network
            assert "would listen on" in child.said
            assert "--secret-file FILE (or MSI_SECRET), or --insecure-network" in child.said
        assert "Traceback" not in child.said
