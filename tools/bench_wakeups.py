#!/usr/bin/env python3
"""What a wake-up takes on this machine: a bound for whatever sleeps until rows have come.

    tools/bench_wakeups.py [--sizes 0 4096 16384] [--rounds 1000]

One process rings another that sleeps, by an eventfd (size 0), or by so many bytes over TCP on loopback. A JSON line for
each: microseconds that the ring takes of who rings (`ring_us`), and from its beginning to when the other has all
(`heard_us`), medians; both processes on one core, each on a core of its own, and with nobody asleep: then `heard_us`
ends with the ringer's own read. To keep other processes' work out, start it with `chrt -r 5`.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import socket
import time
from collections.abc import Callable
from statistics import median

BETWEEN_NS = 60_000  # rings: long enough to fall asleep
WAYS = {"one core": (0, 0), "two cores": (0, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 4096, 16384], help="bytes; 0: an eventfd")
    parser.add_argument("--rounds", type=int, default=1000)
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    for size in given.sizes:
        for way, (ringing, sleeping) in WAYS.items():
            if sleeping < len(cores):
                say(size, way, measure(size, given.rounds, cores[ringing], cores[sleeping]))
        say(size, "nobody asleep", alone(size, given.rounds))


def say(size: int, way: str, times_ns: list[tuple[int, int]]) -> None:
    ring, heard = (round(median(each) / 1000, 1) for each in zip(*times_ns, strict=True))
    print(json.dumps({"bytes": size, "way": way, "ring_us": ring, "heard_us": heard}), flush=True)


def measure(size: int, rounds: int, ringing: int, sleeping: int) -> list[tuple[int, int]]:
    """(nanoseconds of the ring, until it was heard), by round."""
    heard_at = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
    ring, hear, answer, rest = ways(size)
    before = os.sched_getaffinity(0)
    child = os.fork()
    if not child:
        os.sched_setaffinity(0, {sleeping})
        for _ in range(rounds):
            hear()
            heard_at[0] = time.monotonic_ns()
            answer()
        os._exit(0)
    os.sched_setaffinity(0, {ringing})
    times = []
    for _ in range(rounds):
        until = time.monotonic_ns() + BETWEEN_NS
        while time.monotonic_ns() < until:
            pass
        began = time.monotonic_ns()
        ring()
        rung = time.monotonic_ns()
        rest()
        times.append((rung - began, heard_at[0] - began))
    os.waitpid(child, 0)
    os.sched_setaffinity(0, before)
    return times


def alone(size: int, rounds: int) -> list[tuple[int, int]]:
    ring, hear, _, _ = ways(size)
    times = []
    for _ in range(rounds):
        began = time.monotonic_ns()
        ring()
        rung = time.monotonic_ns()
        hear()
        times.append((rung - began, time.monotonic_ns() - began))
    return times


Four = tuple[Callable[[], object], Callable[[], object], Callable[[], object], Callable[[], object]]


def ways(size: int) -> Four:
    """To ring, to hear it, to answer, to hear that."""
    return sockets(size) if size else bells()


def bells() -> Four:
    there, back = os.eventfd(0), os.eventfd(0)
    return (
        lambda: os.eventfd_write(there, 1), lambda: os.eventfd_read(there),
        lambda: os.eventfd_write(back, 1), lambda: os.eventfd_read(back),
    )  # fmt: skip


def sockets(size: int) -> Four:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
    for one in (here, there):
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    content, room = bytes(size), bytearray(size)
    return (
        lambda: here.sendall(content), lambda: there.recv_into(room, size, socket.MSG_WAITALL),
        lambda: there.send(b"."), lambda: here.recv(1),
    )  # fmt: skip


if __name__ == "__main__":
    main()
