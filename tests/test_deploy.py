"""The files of launch/deploy: what stands in them is understood, and their command lines run."""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
import yaml

from msi_launch.arguments import parse
from msi_launch.command import EXIT_SENTENCE
from tests.test_launch import free_port, running
from tests.test_slurm import job_number

pytestmark = [pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "launch" / "deploy"
MODEL = str(ROOT / "msi" / "demo_model")
SECRET = "0123456789abcdef0123456789abcdef"


def dockerfile():
    """(instruction, arguments) in order, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def manifest():
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "leaderworkerset.yaml").read_text())}


def container(which):
    return manifest()["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"][which]["spec"]["containers"][0]


def service():
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read(DEPLOY / "msi.service")
    return unit["Service"]


def test_the_image_runs_as_nobody_in_particular_and_is_looked_after():
    told = dockerfile()
    names = [name for name, _ in told]
    assert names[0] == "FROM"
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    assert dict(told)["USER"] == "msi"
    assert "/health" in dict(told)["HEALTHCHECK"]
    for sources in (arguments for name, arguments in told if name == "COPY"):
        assert all((ROOT / source).exists() for source in sources.split()[:-1]), sources
    assert yaml.safe_load(dict(told)["ENTRYPOINT"]) == ["msi-launch"]
    assert parse(yaml.safe_load(dict(told)["CMD"])).host == "0.0.0.0"


def test_the_manifest_starts_as_many_workers_as_the_coordinator_waits_for():
    group = manifest()["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    options = parse([*container("leaderTemplate")["args"][1:]]).options
    assert group["size"] == 1 + options.attention_workers + options.expert_workers
    leader = group["leaderTemplate"]
    assert manifest()["Service"]["spec"]["selector"].items() <= leader["metadata"]["labels"].items()
    assert leader["spec"]["terminationGracePeriodSeconds"] > parse([]).shutdown_timeout_s


def test_the_unit_gives_time_to_finish_and_does_not_repeat_what_cannot_work():
    unit = service()
    command = shlex.split(unit["ExecStart"].replace("${MODEL}", MODEL))
    assert Path(command[0]).name == "msi-launch"
    assert float(unit["TimeoutStopSec"]) > parse(command[1:]).shutdown_timeout_s
    assert int(unit["RestartPreventExitStatus"]) == EXIT_SENTENCE


def test_the_job_wants_as_many_tasks_as_it_has_workers():
    script = (DEPLOY / "msi.sbatch").read_text()
    told = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script, re.MULTILINE))
    line = re.search(r"msi-launch \"\$MODEL\" (.*?)\\\n", script).group(1)
    options = parse(shlex.split(line)).options
    assert int(told["nodes"]) * int(told["ntasks-per-node"]) == options.attention_workers + options.expert_workers
    subprocess.run(["bash", "-n", DEPLOY / "msi.sbatch"], check=True)
    without = subprocess.run(
        ["bash", DEPLOY / "msi.sbatch"], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert without.returncode != 0
    assert "give the model's folder" in without.stderr


async def answers(port):
    body = {"prompt": "It is a truth", "max_tokens": 8, "temperature": 0}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response,
    ):
        assert response.status == 200, await response.text()
        assert (await response.json())["usage"]["completion_tokens"] == 8


@pytest.mark.slow
async def test_the_pods_of_the_manifest_become_an_instance():
    control, http = free_port(), free_port()
    values = {"POD_IP": "127.0.0.1", "LWS_LEADER_ADDRESS": "localhost", "LWS_GROUP_SIZE": "4", "MSI_SECRET": SECRET}

    def pod(which, index):
        told = []
        for word in container(which)["args"]:
            word = re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], word)
            told.append(word.replace("/models/model", MODEL).replace(":5555", f":{control}").replace("8000", str(http)))
        environment = [f"{name}={value}" for name, value in {**values, "LWS_WORKER_INDEX": index}.items()]
        return running("env", *environment, sys.executable, "-m", "msi_launch", *told, "--threads-per-worker", 1)

    async with contextlib.AsyncExitStack() as stack:
        for index in (3, 2, 1):  # workers may come first
            await stack.enter_async_context(pod("workerTemplate", index))
        leader = await stack.enter_async_context(pod("leaderTemplate", 0))
        await leader.until_said("HTTP at")
        await answers(http)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


SRUN = """#!{python}
import os, subprocess, sys
command = sys.argv[next(index for index, word in enumerate(sys.argv) if index and not word.startswith("-")) :]
tasks = [subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": str(rank)}}) for rank in range(4)]
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.mark.slow
async def test_the_job_becomes_an_instance(tmp_path):
    srun, launch = tmp_path / "srun", tmp_path / "msi-launch"
    srun.write_text(SRUN.format(python=sys.executable))
    launch.write_text(f'#!/bin/sh\nexec {sys.executable} -m msi_launch "$@" --threads-per-worker 1\n')
    for script in (srun, launch):
        script.chmod(0o755)
    port = free_port()
    job = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": MODEL, "MSI_HOST": "127.0.0.1", "MSI_PORT": port,
        "SLURM_JOB_ID": job_number(), "SLURM_NTASKS": 4, "SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "127.0.0.1",
    }  # fmt: skip
    environment = [f"{name}={value}" for name, value in job.items()]
    async with running("env", *environment, "bash", DEPLOY / "msi.sbatch") as child:
        await child.until_said("HTTP at")
        await answers(port)
        tasks = children(child.process.pid)
        assert len(tasks) == 4
        for task in tasks:
            os.kill(task, signal.SIGTERM)
        assert await asyncio.wait_for(child.ended(), 60) == 0


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here to check the unit")
def test_systemd_understands_the_unit(tmp_path):
    unit = tmp_path / "msi.service"
    text = (DEPLOY / "msi.service").read_text()
    unit.write_text(text.replace("/opt/msi/bin/msi-launch", "/bin/true").replace("User=msi", "User=root"))
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
