"""Under Slurm the tasks of srun are the workers: its environment, and real processes that have it, on loopback."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import sys

import aiohttp
import pytest

from msi.errors import ConfigError
from msi_launch.arguments import parse
from msi_launch.slurm import FIRST_PORT, NUM_PORTS, first_host, world_of
from msi_launch.world import World
from tests.test_launch import free_port, running

pytestmark = [pytest.mark.timeout(180)]

ENVIRONMENT = {
    "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "1234567",
    "SLURM_NNODES": "2", "SLURM_RESTART_COUNT": "3",
}  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login1", "login1"),
        ("a,b", "a"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,7-9]", "gpu3"),
        ("rack2-gpu[001-128]-ib", "rack2-gpu001-ib"),
        ("node-1.cluster.example", "node-1.cluster.example"),
        ("10.0.0.5", "10.0.0.5"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",", "[1-2]", "   "])
def test_a_list_without_a_host_is_none(nodes):
    with pytest.raises(ValueError, match="names no host"):
        first_host(nodes)


def test_the_environment_says_who_we_are():
    port = FIRST_PORT + 1234567 % NUM_PORTS
    assert world_of(ENVIRONMENT) == World(
        "srun", 1, 4, "gpu07", port, False, "msi/coordinator/3", is_one_host=False, can_drain=True
    )
    assert world_of({**ENVIRONMENT, "SLURM_NNODES": "1"}).is_one_host


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_NODELIST", "SLURM_JOB_ID"])
@pytest.mark.parametrize("value", [None, "", "many["])
def test_whoever_is_no_task_of_sruns_is_told_how_to_become_one(name, value):
    environment = {key: text for key, text in ENVIRONMENT.items() if key != name}
    if value is not None:
        environment[name] = value
    if name == "SLURM_JOB_NODELIST" and value == "many[":
        return  # a name that nobody has: it is looked for
    with pytest.raises(ConfigError, match=r"--slurm: Slurm's environment is incomplete .*start it by srun"):
        world_of(environment)


def test_a_secret_is_for_slurm_too(monkeypatch, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o600)
    assert parse(["--slurm", "--secret-file", str(secret)]).trust.secret is not None


def job_number():
    """One whose port is free."""
    while True:
        number = random.randrange(NUM_PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", FIRST_PORT + number)):
                return str(number)


@pytest.mark.slow
async def test_two_tasks_serve_and_finish_what_runs_when_the_job_is_to_end():
    port = free_port()
    job = {"SLURM_JOB_ID": job_number(), "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_NNODES": "1", "SLURM_NTASKS": "2"}

    def task(rank):
        values = [f"{name}={value}" for name, value in {**job, "SLURM_PROCID": rank}.items()]
        command = (sys.executable, "-m", "msi_launch", "--slurm", "--port", port, "--threads-per-worker", 1)
        return running("env", *values, *command)

    async with task(0) as first, task(1) as second, aiohttp.ClientSession() as session:
        await first.until_said("HTTP at")
        url = f"http://127.0.0.1:{port}/v1/completions"
        body = {"prompt": "It is a truth", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
        async with session.post(url, json=body) as response:
            assert response.status == 200, await response.text()
            await response.content.readuntil(b"\n")
            for child in (first, second):  # as scancel --signal=TERM does
                child.process.send_signal(signal.SIGTERM)
            rest = (await response.content.read()).decode()
        assert '"finish_reason":"length"' in rest
        assert rest.rstrip().endswith("data: [DONE]")
        assert await asyncio.gather(first.ended(), second.ended()) == [0, 0]
