"""A process that ends with the one that started it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, grace_s: float = 0.0) -> None:
    """This process is killed as soon as its parent is gone, however that ends; after a grace, where it has one."""
    if sys.platform == "linux" and not grace_s:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    elif sys.platform == "linux":
        threading.Thread(target=_outlive, args=(parent, grace_s), name="parent", daemon=True).start()
    if os.getppid() != parent:
        raise SystemExit("the launcher is gone already")


def _outlive(parent: int, grace_s: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(parent)], [], [])
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)
