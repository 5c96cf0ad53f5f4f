"""What this machine gives a process: devices, memory that can be shared, limits. Each judges numbers that it is given;
`measured_limits` is what reads them here.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msi.errors import ConfigError
from msi.net import shm
from msi.net.shared_memory import SharedRegion
from msi.server.listening import KEPT_DESCRIPTORS, MAX_CONNECTIONS

from .findings import Finding, failed, ok, refused, warning

WITHOUT_LIMIT = resource.RLIM_INFINITY
LEAST_DESCRIPTORS = 256  # links, workers, libraries, and a few clients
DESCRIPTORS = MAX_CONNECTIONS + KEPT_DESCRIPTORS
LEAST_SHM_BYTES = 16 << 20
SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of this process; -1 is no limit.

    Attributes:
        descriptors: the hard limit: the gateway raises its own as far.
        memlock_bytes: what may be kept from being swapped, as RDMA needs it.
        shm_bytes: that are free in /dev/shm; -1 where there is none.
        free_bytes: of memory, less what its cgroup keeps from it.
        num_cores: that it may use.
    """

    descriptors: int
    memlock_bytes: int
    shm_bytes: int
    free_bytes: int
    num_cores: int


def measured_limits(root: Path = Path("/")) -> Limits:
    return Limits(
        descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        memlock_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        shm_bytes=_free_of(root / SHM.relative_to("/")),
        free_bytes=free_memory_bytes(root),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def _free_of(folder: Path) -> int:
    try:
        status = os.statvfs(folder)
    except OSError:
        return -1
    return status.f_bavail * status.f_frsize


def free_memory_bytes(root: Path = Path("/")) -> int:
    """That can be had without swapping, and that a container's limit leaves; -1 where the system does not say."""
    found = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = (root / "sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdecimal():
            found.append(max(0, int(limit) - int((root / "sys/fs/cgroup/memory.current").read_text())))
    except (OSError, ValueError):
        pass  # another system, or an older kernel
    return min(found, default=-1)


def check_device(device: str, num_workers: int, threads: int, limits: Limits) -> Finding:
    """`num_workers` of each role run here, with `threads` each."""
    if device != "cpu":
        from msi.device import choice  # torch, which takes a second

        try:
            choice.check_device(device)
        except ConfigError as error:
            return refused("device", error, "use `device=cpu`")
        return ok("device", f"{device} is there")
    found = f"cpu: {limits.num_cores} cores, {threads} threads for each worker"
    if threads * num_workers > limits.num_cores:
        return warning(
            "device", f"{found}, {num_workers} workers of a role", "more threads than cores wait for each other: fewer "
            "`threads_per_worker` or workers are faster",
        )  # fmt: skip
    return ok("device", found)


def check_sharing(
    transport: str, seat_bytes: int, *, reason: str | None = None,
    create: Callable[[int], SharedRegion] = SharedRegion.create,
) -> Finding:  # fmt: skip
    """Memory for rows that another process of this host maps, too: made here once, and given back.

    Args:
        seat_bytes: of the largest piece.
        reason: why this host has no such memory; None to ask it.
    """
    if transport in ("tcp", "rdma", "inproc"):
        return ok("shared memory", f"is not used by the transport {transport}")
    if reason := reason or shm.is_available():
        sentence = f"workers of this host cannot share memory: {reason}"
        if transport == "shm":
            return failed("shared memory", sentence, "give `transport=tcp`, or auto")
        return warning("shared memory", f"{sentence}; they talk over TCP")
    try:
        with create(seat_bytes):
            pass
    except (OSError, ConfigError) as error:
        return failed(
            "shared memory", f"a seat of {seat_bytes / 1e6:.1f} MB cannot be made: {error}",
            "give fewer `slot_rows`, or `transport=tcp`",
        )  # fmt: skip
    return ok("shared memory", f"a seat of {seat_bytes / 1e6:.1f} MB can be made and mapped")


def check_shm_folder(limits: Limits) -> Finding:
    """Rows lie in memory without a name, which /dev/shm does not bound; libraries put files there."""
    if 0 <= limits.shm_bytes < LEAST_SHM_BYTES:
        return warning(
            "/dev/shm", f"has {limits.shm_bytes / 1e6:.0f} MB free", "rows do not lie there, but GPU libraries' files "
            "do: in a container, give it more (docker run --shm-size=1g)",
        )  # fmt: skip
    free = "is not there" if limits.shm_bytes < 0 else f"has {limits.shm_bytes / 1e9:.1f} GB free"
    return ok("/dev/shm", free)


def check_descriptors(limits: Limits) -> Finding:
    if limits.descriptors in (WITHOUT_LIMIT, -1) or limits.descriptors >= DESCRIPTORS:
        return ok("file descriptors", f"{'any number' if limits.descriptors < 0 else limits.descriptors} may be open")
    sentence = f"this process may have {limits.descriptors} at most"
    advice = f"raise the limit to {DESCRIPTORS} (`ulimit -n`, LimitNOFILE= of systemd, docker run --ulimit nofile)"
    if limits.descriptors < LEAST_DESCRIPTORS:
        return failed("file descriptors", sentence, advice)
    connections = max(8, limits.descriptors - KEPT_DESCRIPTORS)
    return warning("file descriptors", f"{sentence}: HTTP takes {connections} connections at a time", advice)


def check_memlock(limits: Limits, needed_bytes: int, *, uses_rdma: bool) -> Finding:
    """What a card reads and writes may not be swapped.

    Args:
        needed_bytes: that this host's workers register.
    """
    if not uses_rdma:
        return ok("locked memory", "is not needed: no rows go by RDMA")
    if limits.memlock_bytes in (WITHOUT_LIMIT, -1) or limits.memlock_bytes >= needed_bytes:
        return ok("locked memory", f"{needed_bytes / 1e6:.1f} MB are registered with the card, and may be")
    return failed(
        "locked memory",
        f"{needed_bytes / 1e6:.1f} MB are registered with the card, and {limits.memlock_bytes / 1e6:.1f} MB may be",
        "raise the limit (`ulimit -l unlimited`, LimitMEMLOCK=infinity of systemd, docker run --ulimit memlock=-1)",
    )
