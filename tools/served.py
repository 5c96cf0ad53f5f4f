"""msi-launch as a child of a benchmark: its URL, its processes, and what they cost so far."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from tools.hostility.processes import family, held

START_S = 180.0
ENDS_WITHIN_S = 20.0
LOOK_EVERY_S = 0.2
REST_S = 0.3
RESTING_SHARE = 0.1  # of a core
RESTS_WITHIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Served:
    """A server that runs. `pids`: of its processes, by name."""

    url: str
    pids: dict[str, int]

    def cpu_s(self) -> dict[str, float]:
        """Processor seconds so far, of each process with all its threads."""
        return {name: _cpu_s(pid) for name, pid in self.pids.items()}

    def resident_bytes(self, *names: str) -> int:
        """Of these processes together."""
        return sum(held(self.pids[name]).resident_bytes for name in names)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def at_rest(instances: Iterable[Served]) -> None:
    """Until none computes, as far as that comes: some look for work for a second after their last request (vLLM)."""
    given = list(instances)
    for _ in range(int(RESTS_WITHIN_S / REST_S)):
        before = [sum(one.cpu_s().values()) for one in given]
        await asyncio.sleep(REST_S)
        spent_s = (sum(one.cpu_s().values()) - start for one, start in zip(given, before, strict=True))
        if max(spent_s, default=0.0) < RESTING_SHARE * REST_S:
            return


@contextlib.asynccontextmanager
async def served(*words: str) -> AsyncGenerator[Served, None]:
    """msi-launch with these words, ready. Raises SystemExit: it does not start."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "msi_launch", *words, "--port", "0",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    draining: asyncio.Task[bytes] | None = None
    try:
        async with asyncio.timeout(START_S):
            url = await _url(process.stderr)
            draining = asyncio.create_task(process.stderr.read())
            await wait_ready(url, "/ready", process)
        yield Served(url, await asyncio.to_thread(family, process.pid))
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), ENDS_WITHIN_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        if draining is not None:
            await draining


async def _url(stderr: asyncio.StreamReader) -> str:
    while line := await stderr.readline():
        if found := re.search(rb"(http://\S+:[1-9]\d*)", line):
            return found[1].decode()
    raise SystemExit("msi-launch ended before it was ready")


async def wait_ready(url: str, path: str, process: asyncio.subprocess.Process) -> None:
    """Until a path is answered with 200. Raises SystemExit: the process has ended, or the time is over."""
    async with aiohttp.ClientSession() as session:
        for _ in range(int(START_S / LOOK_EVERY_S)):
            if process.returncode is not None:
                break
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(url + path) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(LOOK_EVERY_S)
    raise SystemExit(f"the server at {url} did not become ready")
