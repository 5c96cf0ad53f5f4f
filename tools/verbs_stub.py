"""Runs a script over a libibverbs that does nothing (tools/verbs_stub.c), in a process of its own.

Needs a C compiler, libibverbs-dev, and what the drivers need.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

CHILD = "MSI_VERBS_STUB"  # where the stub is, in the process that runs over it


def run_over_stub(script: str, driver: str, arguments: Iterable[str]) -> None:
    """`script --driver DRIVER ARGUMENTS`, which calls `stub_of`. Raises CalledProcessError: it failed."""
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder) / "libibverbs.so.1"
        source = Path(__file__).with_name("verbs_stub.c")
        # pyverbs is linked to the real library, in front of which this goes; the others open it by its name
        is_linked = driver == "pyverbs"
        named = [] if is_linked else ["-Wl,-soname,libibverbs.so.1"]
        compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", stub, source, *named], check=True)
        where = {"LD_PRELOAD": str(stub)} if is_linked else {"LD_LIBRARY_PATH": folder}
        environment = os.environ | where | {CHILD: str(stub)}
        subprocess.run([sys.executable, script, "--driver", driver, *arguments], env=environment, check=True)


def stub_of(driver: str) -> ctypes.CDLL | None:
    """In the process that runs over it: what tells it what to do; None in any other."""
    if CHILD not in os.environ:
        return None
    if driver == "pyverbs":
        from msi.net.rdma import abi, pyverbs_driver

        abi.LIBRARY = os.environ[CHILD]
        pyverbs_driver.EVENTS = "anon_inode:[eventfd]"  # what the stub's channel is
    return ctypes.CDLL(os.environ[CHILD])
