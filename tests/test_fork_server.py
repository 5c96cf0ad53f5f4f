"""Workers and coordinators that are forked by processes that have loaded what they need."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from msi.errors import Unavailable
from msi.instance import processes as process_instance
from msi.instance.children import Child
from msi.instance.fork_server import WAITING, ForkServer, forks_workers, waiting_asleep
from msi.options import InstanceOptions
from msi_launch import fork_server
from tests.waiting import until

pytestmark = pytest.mark.timeout(120)
WORDS = ("--role", "expert", "--worker-id", "expert-0", "--coordinator")


def of_process(pid, name):
    return Path(f"/proc/{pid}/{name}").read_bytes()


def command_line(pid):
    return tuple(map(os.fsdecode, of_process(pid, "cmdline").rstrip(b"\0").split(b"\0")))


def is_there(pid):
    """Whether it runs; one that has ended stays in the list until its parent, or the system, has asked how."""
    try:
        return of_process(pid, "stat").rpartition(b")")[2].split()[0] != b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_on_gpus_are_not_forked():
    assert forks_workers("cpu") == (sys.platform == "linux")
    assert not forks_workers("cuda")
    assert not forks_workers("cuda:1")


@pytest.mark.parametrize(
    ("num_workers", "num_threads", "given", "is_asleep"),
    [
        (2, 2, None, True), (4, 2, None, True), (1, 3, None, True), (1, 2, None, False), (2, 1, None, False),
        (4, 1, None, False), (2, 2, "OMP_WAIT_POLICY", False), (2, 2, "GOMP_SPINCOUNT", False),
    ],
)  # fmt: skip
def test_threads_sleep_between_products_where_there_are_more_than_cores(
    num_workers, num_threads, given, is_asleep, monkeypatch
):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, "1")
    assert dict(waiting_asleep(num_workers, num_threads)) == ({"OMP_WAIT_POLICY": "passive"} if is_asleep else {})


async def test_workers_are_forked_show_their_command_lines_and_their_ends_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("MSI_SECRET", "not-for-workers-of-this-machine")
    server = ForkServer("workers", {"OMP_WAIT_POLICY": "passive"})
    try:
        nowhere = f"ipc://{tmp_path}/x"  # where nobody is, and nobody else could be
        refused = await Child.fork((*WORDS, "nonsense"), server)
        waiting = await Child.fork((*WORDS, nowhere, "--start-timeout", "60"), server)
        parent = server._process.pid
        assert len(os.listdir(f"/proc/{parent}/task")) == 1, "a fork takes one thread along"
        assert await refused.hear() == {"failure": refused.failure}
        assert "'nonsense' is not a coordinator's address" in refused.failure
        assert await asyncio.wait_for(refused.process.wait(), 30) == 2
        assert refused.end == refused.failure
        for pid, words in (
            (parent, ("msi_launch.fork_server", "workers")),
            (waiting.pid, ("msi_launch", *WORDS, nowhere)),
        ):
            assert command_line(pid)[: len(words) + 2] == (sys.executable, "-m", *words)
            environment = of_process(pid, "environ")
            assert b"MSI_SECRET" not in environment
            assert b"OMP_WAIT_POLICY=passive" in environment
        waiting.signal(signal.SIGKILL)
        assert await asyncio.wait_for(waiting.process.wait(), 30) == -signal.SIGKILL
        assert waiting.end == "it was killed by signal 9"

        orphan = await Child.fork((*WORDS, nowhere), server)
        os.kill(parent, signal.SIGKILL)
        assert await asyncio.wait_for(orphan.process.wait(), 30) == -signal.SIGKILL, "it ends with whoever forked it"
        await until(lambda: not is_there(orphan.pid))
        again = await Child.fork((*WORDS, nowhere), server)
        assert server._process.pid != parent, "and the next is forked by another"
        for child in (refused, waiting, orphan, again):
            child.close()
    finally:
        await server.stop()
    await until(lambda: not is_there(again.pid))


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_a_machine_without_room_for_a_process_is_said_and_the_server_goes_on(pair, monkeypatch):
    ours, theirs = pair

    def fork():
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(fork_server.os, "fork", fork)
    with open(os.devnull) as given:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            socket.send_fds(ours, [b"[]"], [given.fileno()])
        ours.shutdown(socket.SHUT_WR)
        assert fork_server.fork_as_asked(theirs) == []
        assert len(os.listdir("/proc/self/fd")) == before, "sockets that came are closed"
    assert [ours.recv(100) for _ in range(2)] == [b'{"errno": 11}'] * 2


def breaking(broken):
    class Breaking(ForkServer):
        """One of these ends while it loads, as where torch cannot be imported."""

        async def start(self):
            if self._socket is None:
                await super().start()
                if self._what == broken:
                    self._process.kill()

    return Breaking


@pytest.mark.parametrize(("broken", "who"), [("workers", "expert-0"), ("coordinator", "the coordinator")])
async def test_what_cannot_be_loaded_is_said_and_leaves_nothing_behind(tiny_model, monkeypatch, broken, who):
    monkeypatch.setattr(process_instance, "ForkServer", breaking(broken))
    failures = []
    instance = process_instance.ProcessInstance(InstanceOptions.of(model=tiny_model), failures.append)
    with pytest.raises(Unavailable, match=f"{who} cannot be started: the process that forks it has ended"):
        await instance.start()
    pids = list(instance.pids.values())
    await instance.stop()
    assert not any(is_there(pid) for pid in pids)
