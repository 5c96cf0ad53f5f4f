"""What a local instance does, as a few lines for a terminal: a head line, a line for each worker, and how rows travel.

demo at http://127.0.0.1:8000/v1   3 requests: 2 running, 1 waiting   512 tokens/s   m = 2
worker       busy         stage         queue                 KV     slowest peer
attention-0  ███▌   87 %  T_a  1.20 ms  2 running, 1 waiting  12 %   expert-0 0.08 ms
expert-0     ██▎    55 %  T_e  0.81 ms
rows go by shared memory: all workers are on this host
"""

from __future__ import annotations

import io
import os

from rich.console import Console
from rich.table import Table
from rich.text import Text

from msi.control.client_messages import Stats, WorkerStats
from msi.net import shm
from msi.options import InstanceOptions

from .logs import printable

BAR_CHARS = 6
EIGHTHS = " ▏▎▍▌▋▊▉"
LEAST_COLUMNS, LEAST_ROWS = 60, 8  # of a terminal that gets more than one line
PLAIN_STATES = ("ready", "serving")


def panel(stats: Stats, tokens_per_s: float, where: str, links: str, *, columns: int, rows: int) -> str:
    """At most `rows` lines of less than `columns`; "" where there is no room.

    Args:
        tokens_per_s: that passed through the model, those of prompts too.
        where: what is served, and at which address.
        links: see `why_this_transport`.
    """
    if columns < LEAST_COLUMNS or rows < LEAST_ROWS:
        return ""
    workers = sorted(stats.workers, key=lambda one: (one.role, natural(one.worker_id)))
    shown = workers[: rows - 4]
    table = Table(
        "worker", "busy", "stage", "queue", "KV", "slowest peer", box=None, padding=(0, 2, 0, 0), pad_edge=False
    )
    for column in table.columns:
        column.no_wrap, column.overflow, column.header_style = True, "ellipsis", "dim"
    for worker in shown:
        table.add_row(*_row(worker))
    written = io.StringIO()
    console = Console(
        file=written, width=columns - 1, force_terminal=True, no_color="NO_COLOR" in os.environ, highlight=False,
        color_system="standard", legacy_windows=False,
    )  # fmt: skip
    console.print(_head(stats, tokens_per_s, where), no_wrap=True, overflow="ellipsis", crop=True)
    console.print(table, no_wrap=True, crop=True)
    more = f"; {len(workers) - len(shown)} more workers" if len(workers) > len(shown) else ""
    console.print(Text(printable(links) + more, style="dim"), no_wrap=True, overflow="ellipsis", crop=True)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def _head(stats: Stats, tokens_per_s: float, where: str) -> Text:
    attention = [worker.status for worker in stats.workers if worker.role == "attention"]
    running = sum(one.num_running for one in attention)
    waiting = stats.num_waiting + sum(one.num_waiting for one in attention)
    return Text.assemble(
        (printable(where), "bold"), f"   {stats.num_requests} requests: {running} running, {waiting} waiting",
        f"   {tokens_per_s:.0f} tokens/s   m = {stats.num_lanes}",
    )  # fmt: skip


def _row(worker: WorkerStats) -> tuple[str | Text, ...]:
    status, times = worker.status, worker.status.times
    if worker.state not in PLAIN_STATES and not times.busy and status.total_bytes > status.loaded_bytes:
        return worker.worker_id, Text(f"loading {100 * status.loaded_bytes / status.total_bytes:.0f} %", "yellow")
    busy = f"{bar(times.busy)} {100 * times.busy:3.0f} %"
    if worker.role != "attention":
        return worker.worker_id, busy, f"T_e {times.expert_s * 1e3:5.2f} ms"
    blocks = status.attention.blocks if status.attention is not None else 0
    used = f"{100 * (1 - status.num_free_blocks / blocks):.0f} %" if blocks else ""
    queue = f"{status.num_running} running, {status.num_waiting} waiting"
    slowest = f"{status.peers[0].worker_id} {status.peers[0].delay_s * 1e3:.2f} ms" if status.peers else ""
    return worker.worker_id, busy, f"T_a {times.attention_s * 1e3:5.2f} ms", queue, used, slowest


def natural(name: str) -> tuple[str, int, str]:
    """By which worker-2 comes before worker-10."""
    word, _, number = name.rpartition("-")
    return word, int(number) if number.isdecimal() and len(number) < 10 else 0, name


def bar(share: float) -> str:
    """A share from 0 to 1, in eighths of a character."""
    eighths = round(max(0.0, min(1.0, share)) * BAR_CHARS * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[rest] if rest else "")).ljust(BAR_CHARS)


def tokens_of(stats: Stats) -> int:
    """That passed through the model since its workers live."""
    counted = (worker.status.attention for worker in stats.workers)
    return sum(one.batch_tokens for one in counted if one is not None)


def why_this_transport(options: InstanceOptions) -> str:
    """How the rows of a local instance travel, and why so."""
    chosen = options.chosen_transport
    if options.colocated:
        return "no rows travel: both roles are in one process"
    if chosen == "inproc":
        return "rows go by memory of this process: all workers are in it"
    names = {"shm": "shared memory", "tcp": "TCP", "rdma": "RDMA"}
    if options.host.transport != "auto":
        return f"rows go by {names[chosen]}, as --transport says"
    if chosen == "shm":
        return "rows go by shared memory: all workers are on this host"
    return f"rows go by TCP: {shm.is_available()}"
