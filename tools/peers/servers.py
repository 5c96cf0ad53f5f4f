"""How each server is started: its environment, its command line, and a sentence where it cannot serve a checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from tools.check_clients import CLIENTS, ENVIRONMENTS, OFFLINE, ROOT, environment
from tools.hostility.processes import shared_out_mb

SCRIPTS = ROOT / "tools" / "clients"
START_S = 240.0
ENDS_WITHIN_S = 30.0
GGUF_FAMILY = "mixtral"


@dataclass(frozen=True, slots=True)
class Setting:
    """What all are told.

    Attributes:
        quantization: "none" or "int8"; who has no such weights keeps bfloat16.
        max_num_seqs: that decode at once.
        context: tokens of the longest sequence.
    """

    model: Path
    num_threads: int
    quantization: str
    max_num_seqs: int
    context: int


@dataclass(frozen=True, slots=True)
class Peer:
    """A server.

    Attributes:
        packages, unwanted: as `tools.check_clients.environment` takes them; () for this environment.
        command: its command line at a port, by its Python.
        held_as: what it holds weights in, by the quantization asked for.
    """

    packages: tuple[str, ...]
    unwanted: tuple[str, ...]
    command: Callable[[Path, Setting, int], list[str]]
    held_as: dict[str, str]


def _ours(python: Path, setting: Setting, port: int) -> list[str]:
    return [
        str(python), "-m", "msi_launch", str(setting.model), "--port", str(port), "--colocated",
        "--threads-per-worker", str(setting.num_threads), "--max-num-seqs", str(setting.max_num_seqs),
        "--quantization", setting.quantization, "--log-level", "warning",
    ]  # fmt: skip


def _vllm(python: Path, setting: Setting, port: int) -> list[str]:
    return [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(setting.model), "--port", str(port),
        "--host", "127.0.0.1", "--enforce-eager", "--dtype", "bfloat16", "--max-num-seqs", str(setting.max_num_seqs),
        "--max-model-len", str(setting.context),
    ]  # fmt: skip


def _llama(python: Path, setting: Setting, port: int) -> list[str]:
    """Raises ValueError: no file can be written for it."""
    family = json.loads((setting.model / "config.json").read_text())["model_type"]
    if family != GGUF_FAMILY:
        raise ValueError(f"a GGUF file is written of {GGUF_FAMILY} alone, not of {family}")
    format = "q8_0" if setting.quantization == "int8" else "bf16"
    file = ENVIRONMENTS / f"{setting.model.resolve().name}-{format}.gguf"
    if not file.exists() or file.stat().st_mtime < (setting.model / "config.json").stat().st_mtime:
        half = file.with_suffix(".half")
        subprocess.run([python, SCRIPTS / "write_gguf.py", setting.model, half, format], check=True)
        half.replace(file)
    return [
        str(python), str(SCRIPTS / "llama_server.py"), str(file), str(port), str(setting.num_threads),
        str(setting.max_num_seqs), str(setting.max_num_seqs * setting.context),
    ]  # fmt: skip


def _transformers(python: Path, setting: Setting, port: int) -> list[str]:
    script = str(SCRIPTS / "transformers_server.py")
    return [str(python), script, str(setting.model), "bfloat16", str(port), str(setting.num_threads)]


PEERS = {
    "msi": Peer((), (), _ours, {"none": "bfloat16", "int8": "int8"}),
    "vllm": Peer(
        CLIENTS["vllm"].packages, CLIENTS["vllm"].unwanted, _vllm, {"none": "bfloat16", "int8": "bfloat16"}
    ),
    "llama.cpp": Peer(("xllamacpp==2026.10.11549", "gguf==0.19.0"), (), _llama, {"none": "bf16", "int8": "q8_0"}),
    "transformers": Peer(
        ("transformers==5.24.0", "torch==2.13.0"), (), _transformers, {"none": "bfloat16", "int8": "bfloat16"}
    ),
}  # fmt: skip


def python_of(name: str) -> Path:
    """Of a server's environment, which is made where it is missing. Raises OSError or subprocess's errors."""
    peer = PEERS[name]
    return environment(name, peer.packages, peer.unwanted) if peer.packages else Path(sys.executable)


class Running:
    """A server that answers; it stands still while others are asked.

    Attributes:
        start_s: from the command to the first token.
    """

    def __init__(self, name: str, url: str, process: asyncio.subprocess.Process, start_s: float) -> None:
        self.name = name
        self.url = url
        self.start_s = start_s
        self._process = process

    @staticmethod
    async def start(name: str, python: Path, setting: Setting) -> Running:
        """Raises ValueError, in a sentence: it cannot serve this, or does not start."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = await asyncio.to_thread(PEERS[name].command, python, setting, port)
        told = {
            "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{setting.num_threads - 1}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        }  # fmt: skip
        log = ENVIRONMENTS / f"{name}.log"
        started = time.monotonic()
        with log.open("wb") as said:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=said, stderr=said, cwd="/",
                env=os.environ | OFFLINE | told, start_new_session=True,
            )  # fmt: skip
        url = f"http://127.0.0.1:{port}/v1/completions"
        server = Running(name, url, process, 0.0)
        try:
            async with asyncio.timeout(START_S):
                while not await _answers(url):
                    if process.returncode is not None:
                        raise ValueError(f"it ended; what it said is in {log}")
                    await asyncio.sleep(0.1)
        except TimeoutError:
            await server.end()
            raise ValueError(f"it did not answer within {START_S:g} s; what it said is in {log}") from None
        server.start_s = time.monotonic() - started
        return server

    def stand_still(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def memory_mb(self) -> float:
        """Of all its processes; a page that n of them share is an nth for each."""
        return shared_out_mb(self._process.pid)

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.go_on()
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), ENDS_WITHIN_S)
        except TimeoutError:
            os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()


async def _answers(url: str) -> bool:
    body = {"prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0, "ignore_eos": True, "stream": True}
    try:
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
            return response.status == 200 and b'"error"' not in await response.read()
    except aiohttp.ClientError:
        return False
