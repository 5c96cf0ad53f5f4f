"""Under torchrun the world is the workers: real torchrun, real processes, on loopback."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import aiohttp
import pytest

from msi.errors import ConfigError
from msi.options import InstanceOptions
from msi_launch.torchrun import world_of
from msi_launch.world import World, share_out
from tests.test_launch import free_port, running
from tests.waiting import until

pytestmark = [pytest.mark.timeout(180)]

ENVIRONMENT = {
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2",
    "RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


def of_size(size):
    return world_of({**ENVIRONMENT, "WORLD_SIZE": str(size)})


def torchrun(*arguments, port=0):
    return running(
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-addr", "127.0.0.1",
        "--master-port", port or free_port(), "-m", "msi_launch", *arguments,
    )  # fmt: skip


def test_the_environment_says_who_we_are():
    assert world_of(ENVIRONMENT) == World(
        "torchrun", 1, 4, "10.0.0.1", 29500, True, "msi/coordinator/2", is_one_host=False, can_drain=False
    )
    assert world_of({**ENVIRONMENT, "LOCAL_WORLD_SIZE": "4"}).is_one_host
    assert not world_of({**ENVIRONMENT, "LOCAL_WORLD_SIZE": "2"}).is_one_host
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        world_of({name: value for name, value in ENVIRONMENT.items() if name != "WORLD_SIZE"})


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({}, 2, (1, 1)),
        ({}, 5, (2, 3)),
        ({"attention_workers": 3, "expert_workers": 1}, 4, (3, 1)),
        ({"colocated": True}, 1, (1, 1)),
    ],
)
def test_the_world_is_shared_out_as_told_or_evenly(options, size, expected):
    shared = share_out(InstanceOptions.of(**options), of_size(size))
    assert (shared.attention_workers, shared.expert_workers) == expected


@pytest.mark.parametrize(("options", "size"), [({"attention_workers": 2}, 2), ({}, 1), ({"colocated": True}, 2)])
def test_a_world_that_does_not_fit_is_refused_with_both_numbers(options, size):
    with pytest.raises(ConfigError, match=f"torchrun started {size} processes for"):
        share_out(InstanceOptions.of(**options), of_size(size))


def children_of(pid):
    """Processes below it, by what they were started with."""
    below = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            command = (path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if parent == pid:
            child = int(path.parent.name)
            below |= {child: command, **children_of(child)}
    return below


@pytest.mark.slow
async def test_two_processes_serve_http_and_leave_nothing_behind():
    port = free_port()
    async with torchrun("--port", port, "--threads-per-worker", 1) as child, aiohttp.ClientSession() as session:
        await child.until_said("HTTP at")
        body = {"prompt": "It is a truth", "max_tokens": 8, "temperature": 0}
        async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response:
            assert response.status == 200
            assert (await response.json())["usage"]["completion_tokens"] == 8
        ours = children_of(child.process.pid)
        children = [command for command in ours.values() if "msi_launch" in command]
        assert len(children) == 4, ours  # two workers, the coordinator and the gateway
        child.process.send_signal(signal.SIGTERM)
        await child.ended()
    await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ours), 20)


@pytest.mark.slow
async def test_what_cannot_work_is_said_by_a_sentence():
    async with torchrun("--attention-workers", 3) as child:
        assert await child.ended(90) != 0
        assert "msi-launch: torchrun started 2 processes for 4 workers" in child.said
