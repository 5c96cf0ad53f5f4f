"""Signs of life from a thread of their own: a busy loop is not a dead process, and says how long it has been busy."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from msi.control.client_messages import ClientPulse
from msi.control.messages import CLIENT_END, COORDINATOR_END
from msi.net.control import ControlClient
from msi.net.control_server import ControlServer
from msi.net.secret import Secret
from msi.net.socket_dir import SocketDir
from tests.test_faults import SHORT, checkpoint, local, outcome, running_requests
from tests.waiting import until as soon

__all__ = ["checkpoint"]  # a fixture


class ListeningThread:
    """A control server on a loop and a thread of its own."""

    def __init__(self, bind, secret):
        self.heard = []
        self._bind, self._secret = bind, secret
        self._is_open = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self):
        server = ControlServer(self._bind, COORDINATOR_END, self._secret)
        self.address, self._loop = server.address, asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._is_open.set()
        try:
            while True:
                self.heard.append((await server.receive())[1])
        except asyncio.CancelledError:
            server.close()

    def __enter__(self):
        self._thread.start()
        self._is_open.wait()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()


@pytest.mark.parametrize("secret", [None, Secret("the secret of this test")])
async def test_signs_of_life_come_while_the_loop_of_their_sender_stands(secret):
    sockets = SocketDir()
    bind = "tcp://127.0.0.1:*" if secret else sockets.address("coordinator")
    with ListeningThread(bind, secret) as server:
        client = ControlClient(server.address, CLIENT_END, secret)
        client.keep_alive(lambda late_s: ClientPulse("it"), 0.05)
        await soon(lambda: server.heard)
        before = len(server.heard)
        deadline = time.monotonic() + 10
        while len(server.heard) < before + 5 and time.monotonic() < deadline:
            time.sleep(0.05)  # noqa: ASYNC251  # the loop stands
        assert len(server.heard) >= before + 5
        assert set(server.heard) == {ClientPulse("it")}
        client.close()
        after = len(server.heard)
        time.sleep(0.3)  # noqa: ASYNC251
        assert len(server.heard) <= after + 1, "none after its end"
    sockets.close()


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_client_whose_loop_stands_for_longer_than_a_dead_one_may_keeps_its_requests(checkpoint):
    async with local(checkpoint, attention=1, expert=1) as engine:
        tasks = await running_requests(engine, 1)
        time.sleep(13)  # noqa: ASYNC251  # the process that embeds the engine has other things to do
        ((how, num_tokens),) = await asyncio.gather(*tasks)
        assert (how, num_tokens) == ("done", 450)
        assert await outcome(engine, [5], SHORT) == ("done", 4)
