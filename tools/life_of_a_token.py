#!/usr/bin/env python3
"""Which files a request passes through from HTTP to its first token, traced on the demo model, in order of appearance.

    tools/life_of_a_token.py [--chain] [--functions]

A file is listed if any function of it runs for the request. Those marked with > hand it on: they call another file for
it. The others are asked something, and answer. What several processes do happens in this one, with the same sockets
between the parts, so that one trace sees all of it; the client is connected already. Functions that also run while
there is no request (heartbeats, ticks) are left out.

Through those marked with >> it passes (--chain: only these): at some moment one of their functions has been called, and
has not returned, when the request, its rows or its token go over to another task, thread or process (a future gets its
result, a task begins, a thread is told, a socket or a bell is written to). So whoever is asked and answers, like a
codec, is none of them. Calls are told apart by all that called them: those that happen without a request, too, are
left out, and those of timers, and those that do not happen for each of three requests.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above

from msi import Engine
from msi.instance.instance import create_coordinator, create_worker, listen, worker_ids
from msi.net.socket_dir import SocketDir
from msi.options import InstanceOptions
from msi.server.gateway import Gateway

ROOT = Path(__file__).resolve().parent.parent
IDLE_S = 3.0  # several heartbeats of everybody
REQUESTS = 3  # what does not happen for each of them happens beside them
BODY = {"prompt": "It was a fine morning", "max_tokens": 4, "temperature": 0, "stream": True}
HANDING_OVER = {
    "Future.set_result", "SimpleQueue.put", "eventfd_write", "socket.send", "socket.sendmsg", "socket.sendall",
    "BaseEventLoop.create_task", "BaseEventLoop.call_soon_threadsafe", "Socket.send",
}  # fmt: skip
Function = tuple[str, str]  # file, qualified name
Stack = tuple[Function, ...]  # msi's own, from the first that was called


@dataclass
class Found:
    """What ran, in the order in which it first did."""

    functions: dict[Function, set[str]] = field(default_factory=dict)  # and the files that they were called from
    stacks: dict[Stack, None] = field(default_factory=dict)  # from which something was handed over
    always: set[Function] = field(default_factory=set)  # in such a stack of every request


class Trace:
    """Calls of msi's functions on every thread that starts after this."""

    def __init__(self) -> None:
        self._found: Found | None = None
        threading.setprofile(self._called)
        sys.setprofile(self._called)

    def _called(self, frame: FrameType, event: str, called: Any) -> None:
        if (found := self._found) is None:
            return
        if event == "call":
            if (file := _ours(frame)) is not None:
                callers = found.functions.setdefault((file, frame.f_code.co_qualname), set())
                callers.update({_caller_of(frame)} - {file, ""})
            elif frame.f_code.co_qualname in HANDING_OVER:
                found.stacks.setdefault(_stack_of(frame))
        elif event == "c_call" and getattr(called, "__qualname__", "") in HANDING_OVER:
            found.stacks.setdefault(_stack_of(frame))

    @contextmanager
    def recording(self) -> Iterator[Found]:
        self._found = found = Found()
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


def _stack_of(frame: FrameType | None) -> Stack:
    """() where a timer called."""
    stack: list[Function] = []
    while frame is not None:
        if (file := _ours(frame)) is not None:
            stack.append((file, frame.f_code.co_qualname))
        elif frame.f_code.co_qualname == "Handle._run" and isinstance(frame.f_locals["self"], asyncio.TimerHandle):
            return ()
        frame = frame.f_back
    return tuple(reversed(stack))


async def first_token(session: aiohttp.ClientSession, url: str) -> None:
    """Streams a completion until its first text has come."""
    async with session.post(f"{url}/v1/completions", json=BODY) as response:
        async for line in response.content:
            if b'"text"' in line:
                return


async def traced() -> Found:
    """What ran for a request, and does not run without one."""
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
                async with aiohttp.ClientSession() as session:
                    async with session.get(f"{url}/health") as response:  # the connection stays
                        await response.read()
                    with trace.recording() as idle:
                        await asyncio.sleep(IDLE_S)
                    busy = []
                    for _ in range(REQUESTS):
                        with trace.recording() as one:
                            await first_token(session, url)
                        busy.append(one)
            finally:
                await gateway.close()
    finally:
        sys.setprofile(None)
        for task in reversed(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        sockets.close()
    stacks = [{stack: None for stack in one.stacks if stack not in idle.stacks} for one in busy]
    always = set[Function].intersection(*({function for stack in one for function in stack} for one in stacks))
    first = busy[0].functions
    return Found(
        {one: callers for one, callers in first.items() if one not in idle.functions or one in always},
        stacks[0],
        always,
    )


def by_file(functions: Iterable[Function]) -> dict[str, list[str]]:
    """Names by file, in order of appearance."""
    files: dict[str, list[str]] = {}
    for file, name in functions:
        files.setdefault(file, []).append(name)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--functions", action="store_true", help="what is called in each file, too")
    parser.add_argument("--chain", action="store_true", help="only the files through which the request passes")
    arguments = parser.parse_args()
    found = asyncio.run(traced())
    passed = dict.fromkeys(function for stack in found.stacks for function in stack if function in found.always)
    chain, files = by_file(passed), by_file(found.functions)
    handing_on = set().union(*found.functions.values())
    for number, (file, names) in enumerate((chain if arguments.chain else files).items(), 1):
        mark = ">>" if file in chain else ">" if file in handing_on else ""
        print(f"{number:3} {mark:2} {file}" + (f"  {', '.join(names)}" if arguments.functions else ""))
    if not arguments.chain:
        print(f"{len(files)} files, of which {len((handing_on | chain.keys()) & files.keys())} hand it on")
    print(f"it passes through {len(chain)} files")


if __name__ == "__main__":
    main()
