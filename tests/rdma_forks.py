"""Processes that begin where another one stands, in the guest of `tools/rdma_vm.py`.

Loading modules takes most of a minute there; who is forked has them. It must be forked before the other one has opened
a device or started a thread.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

POLL_S = 0.01


class Forked:
    """Runs a function, with pipes for its standard input and output where they are asked for."""

    def __init__(self, run: Callable[[], object], *, has_pipes: bool = False):
        sys.stdout.flush()
        theirs, ours = [], []
        if has_pipes:
            (stdin, into), (out, stdout) = os.pipe(), os.pipe()
            theirs, ours = [stdin, stdout], [into, out]
        self.pid, self._status = os.fork(), None
        if not self.pid:
            _run(run, theirs, ours)
        for fd in theirs:
            os.close(fd)
        if has_pipes:
            self.stdin, self.stdout = open(ours[0], "w"), open(ours[1])  # noqa: SIM115

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, within_s: float = float("inf")) -> int:
        """Its exit status."""
        until = time.monotonic() + within_s
        while self._status is None:
            pid, status = os.waitpid(self.pid, 0 if within_s == float("inf") else os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"process {self.pid} does not end")
            else:
                time.sleep(POLL_S)
        return self._status

    def end(self, within_s: float):
        """By the end of its input."""
        self.stdin.close()
        self.stdout.close()
        self.wait(within_s)


def _run(run: Callable[[], object], theirs: list[int], ours: list[int]) -> None:
    """In the new process, which ends here."""
    status = 1
    try:
        for fd in ours:
            os.close(fd)
        for standard, fd in enumerate(theirs):
            os.dup2(fd, standard)
            os.close(fd)
        run()
        sys.stdout.flush()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)
