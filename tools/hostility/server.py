"""The server under attack or under chaos: msi-launch as a child."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.hostility.wire import Target, ask

ROOT = Path(__file__).resolve().parent.parent.parent
START_TIMEOUT_S = 180.0
API_KEY = "hostile"


class Server:
    """msi-launch as a child."""

    def __init__(self, process: asyncio.subprocess.Process, target: Target, logging: asyncio.Task[None]) -> None:
        self.process = process
        self.target = target
        self._logging = logging

    @staticmethod
    async def start(arguments: Iterable[str], log: Path, module: str = "msi_launch") -> Server:
        """With these arguments; returns once it serves.

        Args:
            log: gets what it says.
            module: that is run; what it starts says where HTTP is.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, *arguments, "--port", "0", "--api-key", API_KEY, cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        logging = asyncio.ensure_future(_follow(process, log, url))
        async with asyncio.timeout(START_TIMEOUT_S):
            either: set[asyncio.Future[Any]] = {url, logging}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not url.done():
                raise SystemExit("msi-launch ended before it was ready; --log FILE keeps what it said")
            target = Target.of(url.result(), API_KEY)
            while (await ask(target, "GET", "/ready")).status != 200:
                await asyncio.sleep(0.2)
        return Server(process, target, logging)

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), 15.0)
            except TimeoutError:
                self.process.kill()
                await self.process.wait()
        self._logging.cancel()


async def _follow(process: asyncio.subprocess.Process, log: Path, url: asyncio.Future[str]) -> None:
    assert process.stderr is not None
    with log.open("wb") as file:
        while line := await process.stderr.readline():
            file.write(line)
            file.flush()
            found = re.search(rb"(http://\S+:[1-9]\d*)", line)
            if found and not url.done():
                url.set_result(found[1].decode())
