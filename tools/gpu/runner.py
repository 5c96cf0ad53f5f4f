"""Sections one after another, each in a process of its own that has a time limit: none takes the others with it.

Processes are forked from one that has loaded torch and never touched the GPU, so that they start at once; what a
section has found before it fails or its time is up is kept.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from tools.gpu.report import Add, Outcome, Row

MOST_NOTE_CHARS = 4000


@dataclass(frozen=True, slots=True)
class Place:
    """What a section is told.

    Attributes:
        device: "cuda", or "cpu" in a dry run, which goes through everything in its smallest size.
        ceilings: by name, what the machine itself was found to do: "bytes_per_s" and "flop_per_s".
        ends_at: when its time is up, on time.monotonic(); long sections look at it before they begin something.
        engine: options of instances, beside those that a section gives.
    """

    device: str
    ceilings: dict[str, float]
    ends_at: float
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_dry(self) -> bool:
        return self.device == "cpu"

    @property
    def left_s(self) -> float:
        return self.ends_at - time.monotonic()


@dataclass(frozen=True, slots=True)
class Section:
    """A function that adds rows.

    Attributes:
        limit_s: after which it is ended.
        dry_limit_s: the same on a CPU.
    """

    name: str
    run: Callable[[Place, Add], None]
    limit_s: float
    dry_limit_s: float = 100.0


class NotHere(Exception):
    """What a section needs is missing on this machine; the sentence says what."""


def run_section(section: Section, place: Place, told: Add) -> tuple[Outcome, list[Row]]:
    """Runs it to its end, or until `place.ends_at`."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    started = time.monotonic()
    process = context.Process(target=_child, args=(theirs, section, place))
    process.start()
    theirs.close()
    rows: list[Row] = []
    state, note = "too late", f"ended after {place.ends_at - started:.0f} s"
    try:
        while ours.poll(max(0.0, place.left_s)):
            try:
                kind, value = ours.recv()
            except EOFError:
                process.join(10)
                state, note = "failed", f"its process ended with status {process.exitcode}"
                break
            if kind == "row":
                rows.append(value)
                told(value)
            else:
                state, note = kind, value
                break
    finally:
        _end(process)
        ours.close()
    return Outcome(section.name, state, round(time.monotonic() - started, 1), note), rows


def _child(connection: Connection, section: Section, place: Place) -> None:
    os.setsid()  # whatever it starts ends with it
    try:
        section.run(place, lambda row: connection.send(("row", row)))
        connection.send(("ok", ""))
    except NotHere as reason:
        connection.send(("left out", str(reason)))
    except BaseException:
        connection.send(("failed", traceback.format_exc()[-MOST_NOTE_CHARS:]))
    finally:
        connection.close()
        os._exit(0)  # no wait for threads of a device that may hang


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """The process and whatever it has started."""
    process.join(2 if process.exitcode is None else 0)
    try:
        os.killpg(process.pid or 0, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.join()
