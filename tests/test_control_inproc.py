"""The control plane inside one process, and beside a socket for others."""

from __future__ import annotations

import asyncio

import pytest

from msi import Engine, SamplingParams
from msi.control.client_messages import StatsRequest
from msi.control.messages import CLIENT_END, COORDINATOR_END, Cancel, Refused
from msi.net.codec import Codec
from msi.net.control import ControlClient
from msi.net.control_inproc import InprocServer
from msi.net.control_server import ControlServer
from msi.net.socket_dir import SocketDir


@pytest.fixture
def sockets():
    directory = SocketDir()
    yield directory
    directory.close()


async def test_messages_pass_as_the_objects_that_they_are():
    server = InprocServer()
    one, other = server.connect("one"), server.connect("other")
    asked, answer = StatsRequest(), Refused("ended")
    one.send(asked)
    assert server.has_unread
    route, message = await server.receive()
    assert message is asked
    server.send(route, answer)
    assert (await one.receive()) is answer
    assert not other.has_unread
    one.close()
    one.send(asked)
    server.send(route, answer)
    assert not server.has_unread
    assert not one.has_unread


async def test_others_come_through_the_socket_beside_it_and_take_nobodys_route(sockets):
    server = InprocServer(beside=ControlServer(sockets.address("coordinator"), COORDINATOR_END))
    here, far = server.connect("x"), ControlClient(server.address, CLIENT_END)
    try:
        for number in range(100):
            here.send(Cancel(f"here {number}"))
            far.send(Cancel(f"far {number}"))
        heard = {}
        for _ in range(200):
            route, message = await asyncio.wait_for(server.receive(), 10)
            heard.setdefault(route, []).append(message.request_id)
        assert sorted(heard.values()) == [[f"{who} {number}" for number in range(100)] for who in ("far", "here")]
        for route in heard:
            server.send(route, Refused(heard[route][0]))
        assert (await here.receive()).reason == "here 0"
        assert (await asyncio.wait_for(far.receive(), 10)).reason == "far 0"
    finally:
        far.close()
        server.close()


async def test_an_instance_inside_one_process_encodes_none_of_its_own_messages(tiny_model, monkeypatch):
    encoded = []

    encode = Codec.encode

    def recording(self, message):
        encoded.append(type(message).__name__)
        return encode(self, message)

    monkeypatch.setattr(Codec, "encode", recording)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    async with Engine.local(model=tiny_model, transport="inproc", expert_workers=2, micro_batches=2) as engine:
        assert sum([len(output.token_ids) async for output in engine.generate([1, 2, 3], params)]) == 4
    assert set(encoded) == {"LinkHello", "LinkWelcome"}, "what links say when they connect"
