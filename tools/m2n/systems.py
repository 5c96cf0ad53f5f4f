"""The systems that can be compared: how each is started, and why one cannot be here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from msi.errors import ConfigError
from msi.net.rdma.drivers import check_rdma
from msi.net.rdma.options import RdmaOptions
from tools.m2n.fabric import Fabric, Place

ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
MPIRUN = (
    "mpirun", "--allow-run-as-root", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none",
    "--mca", "mpi_yield_when_idle", "1", "--mca", "pml", "ob1",
)  # fmt: skip
EXTRA = "pip install -e '.[m2n]'"


@dataclass(frozen=True, slots=True)
class System:
    """How to compare one.

    Attributes:
        title: for figures and sentences.
        open: makes a rank's end of it, in the rank's process.
        is_ours: whether the others are compared with it.
        by_mpi: options of `mpirun`, which then starts the ranks.
        needs: Python modules.
        lacks: what else this machine lacks for so many ranks, as the end of a sentence.
    """

    title: str
    open: Callable[[Place], Fabric]
    is_ours: bool = False
    by_mpi: tuple[str, ...] | None = None
    needs: tuple[str, ...] = ()
    lacks: Callable[[int], str] = lambda num_ranks: ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def why_not(self, num_ranks: int) -> str:
        """Why this machine cannot run so many ranks of it, as the end of a sentence; "" if it can."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"needs the Python package {module} ({EXTRA})"
        if self.by_mpi is not None and mpirun() is None:
            return f"needs mpirun ({EXTRA}, or apt-get install openmpi-bin)"
        return self.lacks(num_ranks)

    def command(self, num_ranks: int) -> list[str]:
        """What comes before a rank's own words."""
        python = [sys.executable, "-m", "tools.m2n.rank"]
        if self.by_mpi is None:
            return python
        return [str(mpirun()), *MPIRUN[1:], *self.by_mpi, "-n", str(num_ranks), *python]


def mpirun() -> str | None:
    beside = Path(sys.prefix) / "bin" / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _lacks_gpus(num_ranks: int) -> str:
    count = _num_gpus()
    return "" if count >= num_ranks else f"needs a GPU for each of the {num_ranks} processes, and {count} are here"


def _lacks_cards(num_ranks: int) -> str:
    try:
        check_rdma(RdmaOptions())
    except ConfigError as error:
        return f"needs an RDMA card: {error}"
    return ""


def _ours(place: Place) -> Fabric:
    from tools.m2n.ours import OurFabric

    return OurFabric(place)


def _torch(place: Place) -> Fabric:
    from tools.m2n.torch_groups import TorchFabric

    return TorchFabric(place)


def _mpi(place: Place) -> Fabric:
    from tools.m2n.mpi import MpiFabric

    return MpiFabric(place)


def _zeromq(place: Place) -> Fabric:
    from tools.m2n.zeromq import ZeromqFabric

    return ZeromqFabric(place)


def _copies(place: Place) -> Fabric:
    from tools.m2n.copies import CopiesFabric

    return CopiesFabric(place)


def _ucx(place: Place) -> Fabric:
    from tools.m2n.ucx import UcxFabric

    return UcxFabric(place)


TCP_ONLY = ("--mca", "btl", "self,tcp", "--mca", "btl_tcp_if_include", "lo")
SYSTEMS: dict[str, System] = {
    "shm": System("ours, shared memory", _ours, is_ours=True),
    "shm-poll": System("ours, shared memory, polling", _ours, is_ours=True),
    "tcp": System("ours, TCP", _ours, is_ours=True),
    "tls": System("ours, TCP with TLS", _ours, is_ours=True),
    "rdma": System("ours, RDMA", _ours, is_ours=True, lacks=_lacks_cards),
    "gloo": System("Gloo", _torch),
    "mpi": System("Open MPI", _mpi, by_mpi=("--mca", "btl", "self,sm"), needs=("mpi4py",)),
    "mpi-tcp": System("Open MPI, TCP", _mpi, by_mpi=TCP_ONLY, needs=("mpi4py",)),
    "zmq": System("ZeroMQ, TCP", _zeromq),
    "zmq-ipc": System("ZeroMQ, ipc", _zeromq),
    "ucx": System("UCX", _ucx, needs=("ucxx",), environment={"UCX_TLS": "self,sm"}),
    "ucx-tcp": System("UCX, TCP", _ucx, needs=("ucxx",), environment={"UCX_TLS": "self,tcp"}),
    "copies": System("bare copies", _copies),
    "nccl": System("NCCL", _torch, lacks=_lacks_gpus),
}
TRANSPORTS = tuple(name for name, system in SYSTEMS.items() if system.is_ours)
PEERS = tuple(name for name, system in SYSTEMS.items() if not system.is_ours)


def environment_of(system: System) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, **system.environment}
