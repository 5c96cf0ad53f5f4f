#!/usr/bin/env python3
"""One-way latency of dispatching rows from M senders to N receivers: our transports against Gloo and ZeroMQ.

    tools/bench_dispatch.py --size 4096 65536 262144 1048576 --rounds 1000

M + N processes each. In a round every sender sends `size` bytes to every receiver and waits for their empty
acknowledgements. A message's time runs from when its sender begins the round to when its receiver has it, on the clock
that all processes share. Receivers sleep until they are woken; nobody polls. Contents are checked.

    shm    the payload is copied into the receiver's memory within the round: that copy is the transport
    tcp    ours over loopback; the payload lies in the outbox, as rows do that were computed into it
    gloo   isend / irecv over loopback; the payload lies in the tensor that is sent
    zmq    PUSH / PULL over ipc, blocking; the payload lies in the buffer that is sent, large ones are not copied

The kinds alternate, a run of each at a time. Prints a JSON line per kind, size and run, then for each size the medians
and what the best of gloo and zmq needs over what ours do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msi.net.slots import SlotLayout
    from msi.net.transport import Transport

from msi_launch.command_line import ScriptLine

STAMP = struct.Struct("<dI")  # time of the round's begin, round
ACKNOWLEDGED = 1
KINDS = ("shm", "tcp", "gloo", "zmq")
ZERO_COPY_BYTES = 65536  # pyzmq's own threshold: below, a copy is cheaper than telling when it may be reused


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("--senders", type=int, default=2)
    parser.add_argument("--receivers", type=int, default=2)
    parser.add_argument("--size", type=int, nargs="+", default=[65536])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", type=Path, help=argparse.SUPPRESS)
    values: argparse.Namespace = parser.parse_args()
    return values


# -- our transports ---------------------------------------------------------------------------------------------------


def new_transport(kind: str) -> Transport:
    from msi.net.shm import ShmTransport
    from msi.net.tcp import TcpTransport

    return ShmTransport() if kind == "shm" else TcpTransport("127.0.0.1")


def layout_of(size: int) -> SlotLayout:
    """One slot of one row."""
    from msi.net.slots import SlotLayout, aligned_row_bytes

    return SlotLayout(num_lanes=1, slot_rows=1, row_bytes=aligned_row_bytes(size))


async def receiver(arguments: argparse.Namespace) -> list[float]:
    from msi.net.landing import seat_rows
    from msi.net.regions import HOST_MEMORY
    from msi.net.transport import Admission, CompletionKind, Endpoint

    transport = new_transport(arguments.kind)
    landing = transport.register(arguments.senders, layout_of(arguments.size), HOST_MEMORY)
    rows = [seat_rows(landing, seat) for seat in range(arguments.senders)]
    seats = iter(range(arguments.senders))
    address = await transport.listen(lambda hello: Admission(landing, next(seats), b""))
    publish(arguments, address)
    times = []
    is_over = asyncio.Event()

    def landed(endpoint: Endpoint, kind: CompletionKind, round_number: int, _: str) -> None:
        if kind is not CompletionKind.IMMEDIATE:
            return
        now = time.monotonic()
        started, stamped = STAMP.unpack_from(rows[endpoint.seat])
        check(stamped == round_number, rows[endpoint.seat][arguments.size - 1], round_number)
        times.append(now - started)
        endpoint.post(0, ACKNOWLEDGED)
        if len(times) == arguments.senders * arguments.rounds:
            is_over.set()

    transport.deliver(landed)
    await is_over.wait()
    await asyncio.sleep(0.2)  # the last acknowledgements are read before the connections end
    await transport.close()
    return times


async def sender(arguments: argparse.Namespace) -> list[float]:
    from msi.net.regions import HOST_MEMORY

    is_mapped = arguments.kind == "shm"
    transport = new_transport(arguments.kind)
    landing = transport.register(arguments.receivers, layout_of(1), HOST_MEMORY)
    endpoints, outboxes = [], []
    for index in range(arguments.receivers):
        address = await published(arguments, arguments.senders + index)
        endpoints.append(await transport.connect(address, b"sender", landing, index))
        outboxes.append(endpoints[-1].out_rows.host())
    payload = bytearray(arguments.size)
    missing = 0
    acknowledged = asyncio.Event()

    def landed(*_: object) -> None:
        nonlocal missing
        missing -= 1
        if not missing:
            acknowledged.set()

    transport.deliver(landed)
    for round_number in range(arguments.rounds):
        payload[-1] = round_number % 251
        missing = len(endpoints)
        started = time.monotonic()
        STAMP.pack_into(payload, 0, started, round_number)
        for endpoint, outbox in zip(endpoints, outboxes, strict=True):
            if is_mapped:
                outbox[: arguments.size] = payload
            else:
                outbox[: STAMP.size] = payload[: STAMP.size]
                outbox[arguments.size - 1] = payload[-1]
            endpoint.post(0, round_number, num_rows=1)
        await acknowledged.wait()
        acknowledged.clear()
    await transport.close()
    return []


# -- Gloo ------------------------------------------------------------------------------------------------------------


def gloo(arguments: argparse.Namespace) -> list[float]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    world = arguments.senders + arguments.receivers
    dist.init_process_group(
        "gloo", init_method=f"file://{arguments.rendezvous}/store", rank=arguments.rank, world_size=world
    )
    senders, receivers = range(arguments.senders), range(arguments.senders, world)
    acknowledgement = torch.zeros(1, dtype=torch.uint8)
    times = []
    dist.barrier()
    if arguments.rank in senders:
        payload = torch.zeros(arguments.size, dtype=torch.uint8)
        view = payload.numpy().data
        for round_number in range(arguments.rounds):
            payload[-1] = round_number % 251
            STAMP.pack_into(view, 0, time.monotonic(), round_number)
            sends = [dist.isend(payload, peer) for peer in receivers]
            waits = [dist.irecv(acknowledgement, peer) for peer in receivers]
            for work in (*sends, *waits):
                assert work is not None
                work.wait()
    else:
        buffers = [torch.zeros(arguments.size, dtype=torch.uint8) for _ in senders]
        for round_number in range(arguments.rounds):
            works = [dist.irecv(buffer, peer) for buffer, peer in zip(buffers, senders, strict=True)]
            for work, buffer, peer in zip(works, buffers, senders, strict=True):
                assert work is not None
                work.wait()
                now = time.monotonic()
                started, stamped = STAMP.unpack_from(buffer.numpy().data)
                check(stamped == round_number, int(buffer[-1]), round_number)
                times.append(now - started)
                send = dist.isend(acknowledgement, peer)
                assert send is not None
                send.wait()
    dist.barrier()
    dist.destroy_process_group()
    return times


# -- ZeroMQ ----------------------------------------------------------------------------------------------------------


def zeromq(arguments: argparse.Namespace) -> list[float]:
    import zmq

    context = zmq.Context()
    here = context.socket(zmq.PULL)
    here.bind(f"ipc://{arguments.rendezvous}/zmq-{arguments.rank}")
    senders, receivers = range(arguments.senders), range(arguments.senders, arguments.senders + arguments.receivers)
    is_sender = arguments.rank in senders
    there = {}
    for peer in receivers if is_sender else senders:
        there[peer] = context.socket(zmq.PUSH)
        there[peer].connect(f"ipc://{arguments.rendezvous}/zmq-{peer}")
    times = []
    if is_sender:
        payload = bytearray(arguments.size)
        payload[STAMP.size] = arguments.rank
        is_copied = arguments.size < ZERO_COPY_BYTES
        for peer in receivers:  # connections are made before the first round
            there[peer].send(b"hello")
        for _ in receivers:
            here.recv()
        for round_number in range(arguments.rounds):
            payload[-1] = round_number % 251
            STAMP.pack_into(payload, 0, time.monotonic(), round_number)
            for peer in receivers:
                there[peer].send(payload, copy=is_copied)
            for _ in receivers:
                here.recv()
    else:
        for _ in senders:
            here.recv()
        for peer in senders:
            there[peer].send(b"hello")
        for _ in range(arguments.rounds * arguments.senders):
            frame = here.recv(copy=False)
            now = time.monotonic()
            started, round_number = STAMP.unpack_from(frame.buffer)
            check(len(frame.buffer) == arguments.size, frame.buffer[-1], round_number)
            times.append(now - started)
            there[frame.buffer[STAMP.size]].send(b"")
    for socket in (here, *there.values()):
        socket.close()
    context.term()
    return times


# -- all -------------------------------------------------------------------------------------------------------------


def check(is_right: bool, last_byte: int, round_number: int) -> None:
    if not is_right or last_byte != round_number % 251:
        raise SystemExit(f"round {round_number}: wrong contents")


def publish(arguments: argparse.Namespace, address: str) -> None:
    path = arguments.rendezvous / f"address-{arguments.rank}"
    path.with_suffix(".tmp").write_text(address)
    path.with_suffix(".tmp").rename(path)


async def published(arguments: argparse.Namespace, rank: int) -> str:
    path: Path = arguments.rendezvous / f"address-{rank}"
    deadline = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"receiver {rank} did not come within 60 s")
        await asyncio.sleep(0.01)
    return path.read_text()


def run_rank(arguments: argparse.Namespace) -> list[float]:
    if arguments.kind == "gloo":
        return gloo(arguments)
    if arguments.kind == "zmq":
        return zeromq(arguments)
    import uvloop

    role = sender if arguments.rank < arguments.senders else receiver
    times: list[float] = uvloop.run(role(arguments))
    return times


def run_kind(arguments: argparse.Namespace, kind: str, size: int) -> dict[str, float]:
    """All ranks of one kind as processes; microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, __file__, "--kind", kind, "--senders", str(arguments.senders), "--receivers",
            str(arguments.receivers), "--size", str(size), "--rounds", str(arguments.rounds),
            "--rendezvous", folder,
        ]  # fmt: skip
        environment = {"GLOO_SOCKET_IFNAME": "lo", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
        processes = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, env=environment, text=True)
            for rank in range(arguments.senders + arguments.receivers)
        ]
        times = []
        for process in processes:
            output, _ = process.communicate(timeout=600)
            if process.returncode:
                raise SystemExit(f"a {kind} process ended with status {process.returncode}")
            times += json.loads(output)
    times = times[len(times) // 10 :]
    return {"median_us": 1e6 * median(times), "p99_us": 1e6 * quantiles(times, n=100)[98]}


def main() -> None:
    arguments = parse()
    if arguments.rank >= 0:
        (arguments.kind,), (arguments.size,) = arguments.kind, arguments.size
        print(json.dumps(run_rank(arguments)))
        return
    about = {"senders": arguments.senders, "receivers": arguments.receivers}
    found: dict[tuple[str, int], list[float]] = {(kind, size): [] for size in arguments.size for kind in arguments.kind}
    for _ in range(arguments.repeat):
        for kind, size in found:
            result = run_kind(arguments, kind, size)
            found[kind, size].append(result["median_us"])
            print(json.dumps({"kind": kind, "size": size, **about, **result}), flush=True)
    for size in arguments.size:
        medians = {kind: median(found[kind, size]) for kind in arguments.kind}
        summary = {f"{kind}_median_us": value for kind, value in medians.items()}
        peers = [medians[kind] for kind in ("gloo", "zmq") if kind in medians]
        for kind in ("shm", "tcp"):
            if peers and kind in medians:
                summary[f"best_peer_over_{kind}"] = min(peers) / medians[kind]
        print(json.dumps({"size": size, **about, **summary}))


if __name__ == "__main__":
    main()
