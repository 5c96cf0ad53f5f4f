"""Opening the device that a worker was told to use."""

from __future__ import annotations

import os

import torch

from msi.device.cpu import CpuDevice
from msi.device.cuda import CudaDevice, why_unavailable
from msi.errors import ConfigError


def check_device(name: str) -> None:
    """Raises ConfigError where this machine has no such device."""
    if name != "cpu" and (reason := why_unavailable()) is not None:
        raise ConfigError(f"`device` {name} cannot work: {reason}; without one, use `device=cpu`")


def open_device(name: str, num_threads: int, poll_s: float = 0.0) -> CpuDevice | CudaDevice:
    """The device of this process: "cpu", "cuda:N", or "cuda": that of torchrun's LOCAL_RANK, else the first.

    Args:
        num_threads: torch's threads on a CPU; 0 leaves it to torch.
        poll_s: how long a CPU's compute thread looks for something to do before it sleeps.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "cpu":
        return CpuDevice(num_threads=num_threads or torch.get_num_threads(), poll_s=poll_s)
    _, _, index = name.partition(":")
    return CudaDevice(index=int(index or os.environ.get("LOCAL_RANK", "0")))
