"""What msi-launch shows while it runs: live lines at the bottom of a terminal; elsewhere, lines for new states.

The cursor waits at the beginning of the live lines, so that whatever another process writes erases them first, and
stands on lines of its own.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len, set_cell_size

from msi.control.client_messages import Stats, WorkerStats
from msi.json_log import with_fields

from .command_line import as_flags
from .logs import ERASE_LIVE, has_live_terminal, printable, write_error

log = logging.getLogger(__name__)

MIN_COLUMNS = 20  # of a terminal that gets a live line


class StatusLine:
    """Says nothing below the log level "info"."""

    def __init__(self) -> None:
        self._is_live = False
        self._live = ""
        self._last = ""  # what was said of how things are, less its figures
        self._was_usual = False

    @contextlib.contextmanager
    def shown(self) -> Iterator[StatusLine]:
        """While this lasts, a terminal has a live line."""
        self._is_live = has_live_terminal() and log.isEnabledFor(logging.INFO) and _columns() >= MIN_COLUMNS
        try:
            yield self
        finally:
            if self._is_live:
                write_error(ERASE_LIVE)
                self._is_live = False

    @property
    def is_live(self) -> bool:
        """Whether it is shown on a terminal."""
        return self._is_live

    def update(self, sentence: str, *, is_usual: bool = False, is_said: bool = False, panel: str = "") -> None:
        """How things are now; what is usual is for terminals only, and said once elsewhere when it is so again.

        Args:
            is_said: some line that stays has said it already.
            panel: lines that a terminal gets instead; they fit.
        """
        self._live = panel or cut(as_flags(printable(sentence)), _columns() - 1)
        self.redraw()
        state = "" if is_usual else re.sub(r"\d+", "", sentence)
        if state != self._last:
            self._last = state
            if is_usual:
                if self._was_usual:
                    self.say("requests are taken again")
            elif not self._is_live and not is_said:
                self.say(sentence)
        self._was_usual |= is_usual

    def redraw(self) -> None:
        """What stood there last, which a line of the log may have erased since."""
        if self._is_live and self._live:
            up = f"\x1b[{count}A" if (count := self._live.count("\n")) else ""
            write_error(f"{ERASE_LIVE}{self._live}\r{up}")

    def say(self, line: str, **fields: Any) -> None:
        """A line that stays; `fields` are for programs that read the log."""
        log.info("%s", line, extra=with_fields(**fields))


def summary(stats: Stats) -> str:
    """What the instance does, on one line."""
    workers = " | ".join(_of_worker(worker) for worker in stats.workers)
    return f"{stats.num_requests} requests, m = {stats.num_lanes} | {workers}"


def _of_worker(worker: WorkerStats) -> str:
    times = worker.status.times
    name, stage_s = ("T_a", times.attention_s) if worker.role == "attention" else ("T_e", times.expert_s)
    return f"{worker.worker_id} {100 * times.busy:.0f} % busy, {name} {stage_s * 1e3:.2f} ms"


def cut(text: str, columns: int) -> str:
    """Text that fits; wide characters take two columns each."""
    return text if cell_len(text) <= columns else set_cell_size(text, columns).rstrip()


def _columns() -> int:
    return shutil.get_terminal_size().columns
