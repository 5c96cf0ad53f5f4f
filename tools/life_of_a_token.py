#!/usr/bin/env python3
"""Which files a request passes through from HTTP to its first token, traced on the demo model, in order of appearance.

    tools/life_of_a_token.py [--functions]

A file is listed if any function of it runs for the request. Those marked with > hand it on: they call another file for
it. The others are asked something, and answer. What several processes do happens in this one, with the same sockets
between the parts, so that one trace sees all of it. Functions that also run while there is no request (heartbeats,
ticks) are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above

from msi import Engine
from msi.instance.instance import create_coordinator, create_worker, listen, worker_ids
from msi.net.socket_dir import SocketDir
from msi.options import InstanceOptions
from msi.server.gateway import Gateway

ROOT = Path(__file__).resolve().parent.parent
IDLE_S = 3.0  # several heartbeats of everybody
BODY = {"prompt": "It was a fine morning", "max_tokens": 4, "temperature": 0, "stream": True}
Function = tuple[str, str]  # file, qualified name
Functions = dict[Function, set[str]]  # in the order of the first calls, and the files that they were called from


class Trace:
    """Calls of msi's functions on every thread that starts after this."""

    def __init__(self) -> None:
        self._found: Functions | None = None
        threading.setprofile(self._called)
        sys.setprofile(self._called)

    def _called(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and (found := self._found) is not None and (file := _ours(frame)) is not None:
            found.setdefault((file, frame.f_code.co_qualname), set()).update({_caller_of(frame)} - {file, ""})

    @contextmanager
    def recording(self) -> Iterator[Functions]:
        found: Functions = {}
        self._found = found
        yield found
        self._found = None


def _ours(frame: FrameType) -> str | None:
    file = frame.f_code.co_filename
    return file.removeprefix(f"{ROOT}/") if file.startswith(f"{ROOT}/msi/") else None


def _caller_of(frame: FrameType) -> str:
    """The file that called it, be it by way of a library; "" for none."""
    above = frame.f_back
    while above is not None:
        if (file := _ours(above)) is not None:
            return file
        above = above.f_back
    return ""


async def first_token(url: str) -> None:
    """Streams a completion until its first text has come; the rest is read, too."""
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json=BODY) as response:
        async for line in response.content:
            if b'"text"' in line:
                return


async def traced() -> Functions:
    """Functions that ran for a request, and do not run without one."""
    trace = Trace()
    options = InstanceOptions.of(expert_workers=2, micro_batches=2, threads_per_worker=1)
    sockets = SocketDir()
    coordinator = create_coordinator(options, listen(sockets.address("coordinator")))
    parts = [coordinator.run()]
    parts += [create_worker(options, coordinator.address, role, name).run() for role, name in worker_ids(options)]
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        async with Engine.connect(coordinator.address) as engine:
            await engine.wait_ready(options.timeouts.start_timeout_s)
            gateway = Gateway(engine, host="127.0.0.1", port=0)
            url = await gateway.start()
            try:
                with trace.recording() as idle:
                    await asyncio.sleep(IDLE_S)
                with trace.recording() as busy:
                    await first_token(url)
            finally:
                await gateway.close()
    finally:
        sys.setprofile(None)
        for task in reversed(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        sockets.close()
    return {function: callers for function, callers in busy.items() if function not in idle}


def by_file(functions: Functions) -> dict[str, list[str]]:
    """Names by file, in order of appearance."""
    files: dict[str, list[str]] = {}
    for file, name in functions:
        files.setdefault(file, []).append(name)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--functions", action="store_true", help="what is called in each file, too")
    arguments = parser.parse_args()
    functions = asyncio.run(traced())
    files, handing_on = by_file(functions), set().union(*functions.values())
    for number, (file, names) in enumerate(files.items(), 1):
        mark = ">" if file in handing_on else " "
        print(f"{number:3} {mark} {file}" + (f"  {', '.join(names)}" if arguments.functions else ""))
    print(f"{len(files)} files, of which {len(handing_on & files.keys())} hand it on")


if __name__ == "__main__":
    main()
