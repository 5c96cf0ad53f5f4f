"""A detour for all packets of a network namespace to itself: they are late there, or lost.

    python -m tools.hostility.detour 20 10 0.05        # 20 ms late, give or take 10, and one in twenty lost

Needs nothing of the kernel's but a TUN device: packets to 127.0.0.0/8 are routed to it instead of to the loopback
device, come here, and are written back into it when they are due. It says a line when it is in the way, and is out of
the way when its standard input ends, with what it had on its way delivered at once. `network.py` prepares the namespace
and starts it; it is a process of its own so that nobody whose packets it carries shares an interpreter with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time
from pathlib import Path

DEVICE = "detour"
TABLE = "100"  # of routes
BEFORE_LOCAL = "10"  # priority of the rule by which packets go there; that of the loopback device's is after it
MTU = 65000  # as `network.py` gives the loopback device: connections notice no other way
QUEUE = 10_000  # packets that the device holds for us
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
RULE = ("pref", BEFORE_LOCAL, "iif", "lo", "to", "127.0.0.0/8", "lookup", TABLE)


def main(delay_ms: float, jitter_ms: float, loss: float) -> None:
    """Until standard input ends. Raises OSError, or CalledProcessError: it cannot be had here."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    settings = Path("/proc/sys/net/ipv4/conf", DEVICE)
    for name, value in (("route_localnet", "1"), ("accept_local", "1"), ("rp_filter", "0")):
        (settings / name).write_text(value)
    ip("link", "set", "dev", DEVICE, "mtu", str(MTU), "txqueuelen", str(QUEUE), "up")
    ip("route", "replace", "127.0.0.0/8", "dev", DEVICE, "src", "127.0.0.1", "table", TABLE)
    ip("rule", "add", *RULE)
    try:
        print("in the way", flush=True)
        left = carry(device, delay_ms / 1e3, jitter_ms / 1e3, loss)
    finally:
        ip("rule", "del", *RULE)
    for packet in (*left, *waiting(device)):
        deliver(device, packet)


def ip(*words: str) -> None:
    """Raises CalledProcessError, with what it said."""
    subprocess.run(("ip", *words), check=True, capture_output=True, text=True)


def carry(device: int, delay_s: float, jitter_s: float, loss: float) -> list[bytes]:
    """Until standard input ends; what is on its way then."""
    chance = random.Random(1)
    flying: list[tuple[float, int, bytes]] = []
    count = 0
    while True:
        wait_s = max(0.0, flying[0][0] - time.monotonic()) if flying else None
        there, _, _ = select.select([device, sys.stdin], [], [], wait_s)
        if sys.stdin in there:
            return [packet for _, _, packet in sorted(flying)]
        for packet in waiting(device):
            if chance.random() >= loss:
                count += 1
                due = time.monotonic() + delay_s + chance.uniform(-jitter_s, jitter_s)
                heapq.heappush(flying, (due, count, packet))
        while flying and flying[0][0] <= time.monotonic():
            deliver(device, heapq.heappop(flying)[2])


def waiting(device: int) -> list[bytes]:
    """Packets that have come, at most as many as are looked at in one go."""
    packets: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while len(packets) < 64:
            packets.append(os.read(device, MTU))
    return packets


def deliver(device: int, packet: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody takes it: lost
        os.write(device, packet)


if __name__ == "__main__":
    try:
        main(*map(float, sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)}: {error.stderr.strip()}")
    except OSError as error:
        sys.exit(str(error))
