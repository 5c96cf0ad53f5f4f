"""Hosts that are network namespaces of this machine, on a switch of their own: nothing outside sees their traffic.

Run as `python -m tests.hosts ADDRESS REQUESTS TOKENS` it is a client: says "running" once every request has tokens, and
at the end a line of JSON, [how it ended, its tokens, seconds since the start] for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import struct
import subprocess
import sys
import threading
import time

from msi import Engine, RequestFailed, SamplingParams, Unavailable

SUBNET = "10.213.77"
PROMPT = "It is a truth universally acknowledged"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why there can be no such hosts here; "" if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"msi-{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces: {getattr(error, 'stderr', error)}"
    return ""


class Hosts:
    """Named hosts, each with an address; a context manager that removes them.

    Args:
        slow: name of the host whose cable delays every packet by `delay_s` and loses a share of `loss`.
    """

    def __init__(self, *names: str, slow: str = "", delay_s: float = 0.0, loss: float = 0.0) -> None:
        self.addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(names, 1)}
        self._slow = slow
        self._delay_s = delay_s
        self._loss = loss
        self._prefix = f"msi-{os.getpid()}-"
        self._stop = threading.Event()
        self._cable: threading.Thread | None = None

    def __enter__(self) -> Hosts:
        switch = self._prefix + "switch"
        try:
            ip("netns", "add", switch)
            ip("-n", switch, "link", "add", "name", "br", "type", "bridge")
            ip("-n", switch, "link", "set", "dev", "br", "up")
            for number, (name, address) in enumerate(self.addresses.items(), 1):
                host, port = self._prefix + name, f"port{number}"
                ip("netns", "add", host)
                if name == self._slow:
                    ends = _open_tap(host, "eth0"), _open_tap(switch, port)
                    self._cable = threading.Thread(target=self._carry, args=ends, daemon=True)
                    self._cable.start()
                else:
                    ip("-n", switch, "link", "add", "name", port, "type", "veth", "peer", "name", "eth0", "netns", host)
                ip("-n", switch, "link", "set", port, "master", "br", "up")
                ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
                ip("-n", host, "link", "set", "eth0", "up")
                ip("-n", host, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._cable is not None:
            self._cable.join()
        for name in (*self.addresses, "switch"):
            subprocess.run(["ip", "netns", "del", self._prefix + name], check=False, capture_output=True)

    def on(self, name: str, *command: object) -> tuple[object, ...]:
        """A command line that runs on a host."""
        return ("ip", "netns", "exec", self._prefix + name, *command)

    def set_link(self, name: str, state: str) -> None:
        """Pulls a host's cable out at the switch ("down"), so that nobody is told, or puts it back ("up")."""
        number = list(self.addresses).index(name) + 1
        ip("-n", self._prefix + "switch", "link", "set", f"port{number}", state)

    def _carry(self, *ends: int) -> None:
        """The slow cable: a network emulator that needs no module of the kernel's."""
        chance, order = random.Random(1), itertools.count()
        flying: list[tuple[float, int, int, bytes]] = []
        while not self._stop.is_set():
            wait_s = max(0.0, flying[0][0] - time.monotonic()) if flying else 0.1
            for end in select.select(ends, [], [], min(wait_s, 0.1))[0]:
                packet = os.read(end, 65536)
                if chance.random() >= self._loss:
                    other = ends[1] if end == ends[0] else ends[0]
                    heapq.heappush(flying, (time.monotonic() + self._delay_s, next(order), other, packet))
            while flying and flying[0][0] <= time.monotonic():
                _, _, other, packet = heapq.heappop(flying)
                with contextlib.suppress(OSError):
                    os.write(other, packet)
        for end in ends:
            os.close(end)


def _open_tap(namespace: str, device: str) -> int:
    """The raw end of a network device in a namespace. Only the calling thread of a moment visits it."""
    found: list[int | OSError] = []

    def visit() -> None:
        try:
            with open(f"/run/netns/{namespace}") as there:
                if ctypes.CDLL(None, use_errno=True).setns(there.fileno(), 0):
                    raise OSError(ctypes.get_errno(), "setns")
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", device.encode(), 0x1002))  # TUNSETIFF: TAP, no header
            found.append(fd)
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=visit)
    thread.start()
    thread.join()
    (result,) = found
    if isinstance(result, OSError):
        raise result
    return result


async def client(address: str, num_requests: int, num_tokens: int) -> None:
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    have_tokens: set[int] = set()

    async def one(engine: Engine, index: int) -> tuple[str, list[int], float]:
        started, tokens = time.monotonic(), []
        try:
            async for output in engine.generate(PROMPT, params):
                tokens += output.token_ids
                have_tokens.add(index)
                if len(have_tokens) == num_requests:
                    have_tokens.add(-1)
                    print("running", flush=True)
        except (RequestFailed, Unavailable) as error:
            return str(error), tokens, time.monotonic() - started
        return "done", tokens, time.monotonic() - started

    async with Engine.connect(address) as engine:
        await engine.wait_ready(60)
        print(json.dumps(await asyncio.gather(*(one(engine, index) for index in range(num_requests)))), flush=True)


if __name__ == "__main__":
    asyncio.run(client(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
