"""Which worker of this host computes on which of its GPUs. Knows no torch: whoever starts workers does not load it.

A worker has a GPU to itself where there are enough. Where there are not, experts and attention share one before two of
a kind do, as both kinds are there in turns; several processes on one GPU have it in slices of time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def num_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """That a process of this environment sees: what CUDA_VISIBLE_DEVICES lists, else the devices that are there."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in devices.glob("nvidia*"))
    names = [name.strip() for name in listed.split(",")]
    return next((at for at, name in enumerate(names) if name in ("", "-1")), len(names))  # as CUDA reads it


class Gpus:
    """The GPUs of a host, and which worker is on which.

    Args:
        device: that workers were told: "cuda" for any; else, and with fewer than two GPUs, all are on that.
    """

    def __init__(self, device: str, count: int) -> None:
        self._device = device
        self._count = count if device == "cuda" else 0
        self._of: dict[str, int] = {}

    def device_of(self, worker_id: str, role: str, running: Iterable[str] = ()) -> str:
        """Where a worker belongs; where it was, if it is started again.

        Args:
            running: ids of all workers that are there; others have left their GPUs.
        """
        if self._count < 2:
            return self._device
        there = {*running, worker_id}
        self._of = {one: gpu for one, gpu in self._of.items() if one in there}
        if worker_id not in self._of:
            taken = list(self._of.items())
            self._of[worker_id] = min(
                range(self._count),
                key=lambda gpu: (
                    sum(its == gpu for _, its in taken),
                    sum(its == gpu and one.startswith(role) for one, its in taken),
                    gpu,
                ),
            )
        return f"cuda:{self._of[worker_id]}"

    def sharing(self, worker_id: str) -> int:
        """Attention workers on this worker's GPU; 0 where there is nothing to choose."""
        gpu = self._of.get(worker_id)
        return sum(one.startswith("attention") and its == gpu for one, its in self._of.items())

    def said(self, worker_ids: Sequence[str]) -> str:
        """Where workers are, in a sentence; "" where there is nothing to choose."""
        if self._count < 2:
            return ""
        groups: dict[int, list[str]] = {}
        for one in worker_ids:
            groups.setdefault(self._of[one], []).append(one)
        placed = "; ".join(f"cuda:{gpu}: {', '.join(ids)}" for gpu, ids in sorted(groups.items()))
        shared = sum(len(ids) > 1 for ids in groups.values())
        return placed + (f"; workers that share a GPU have it in turns ({shared} of {self._count})" if shared else "")
