"""What kernels, networks and other systems are assumed to reach: one place, the same for every system compared.

The first block was measured where it says so; the rest are stated assumptions. They were written down before the first
comparison with the paper's figures and are not tuned to them; tools/reproduce_paper.py shows how the ratios move when
they change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Quantity = float | NDArray[np.float64]  # formulas take arrays of candidates as well as one number
Curve = tuple[tuple[float, float], ...]  # (size, fraction of nominal), sizes ascending


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Fractions of the catalogue's nominal figures, and fixed costs in seconds and bytes.

    Attributes:
        compute: of peak FLOPS, by rows of a GEMM. 770 to 800 of 989 TFLOPS in an 8192^3 bf16 product on an H200.
        memory: of memory bandwidth. A device copy on an H200 reaches 4.3 of 4.8 TB/s.
        network: of a NIC's bandwidth, for long messages.
        network_half_bytes: Util of Eq 6: a message to one peer of this size reaches half of that.
        network_latency_s: of one M2N transfer: event, post, wire, completion, flush.
        tail: T_c planned over its mean, since one slow hop stalls the pipeline (defect 7).
        intra_node: of NVLink or PCIe bandwidth, in the collectives of a tensor-parallel group.
        collective_latency_s: of one such collective within a node; `cross_node_latency_s` across nodes.
        attention_launch_s, expert_launch_s: gaps between the kernels of one layer, replayed from a graph.
        memory_utilization: of a GPU's memory, that may be planned.
        reserved_bytes: per GPU, for graph pools and the runtime.
        nccl_over_m2n: time of an M-to-N exchange by NCCL over ours: Figure 11's medians at 256 KB, 1 / (1 - 0.682).
    """

    compute: Curve = ((1.0, 0.79),)
    memory: float = 0.90
    network: float = 0.90
    network_half_bytes: float = 32e3
    network_latency_s: float = 12e-6
    tail: float = 1.2
    intra_node: float = 0.75
    collective_latency_s: float = 15e-6
    cross_node_latency_s: float = 40e-6
    attention_launch_s: float = 12e-6
    expert_launch_s: float = 8e-6
    memory_utilization: float = 0.90
    reserved_bytes: float = 2e9
    nccl_over_m2n: float = 3.14

    def compute_at(self, rows: Quantity) -> Quantity:
        """Fraction of peak FLOPS that a GEMM of so many rows reaches, interpolated over the logarithm of rows."""
        if len(self.compute) == 1:
            return self.compute[0][1]
        sizes, fractions = zip(*self.compute, strict=True)
        at: Quantity = np.interp(np.log(np.maximum(rows, 1.0)), np.log(sizes), fractions)
        return at

    def network_at(self, message_bytes: Quantity) -> Quantity:
        """Util of Eq 6: fraction of a NIC's bandwidth, from the message of one pair (defect 1)."""
        return self.network * message_bytes / (message_bytes + self.network_half_bytes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


DEFAULTS = Assumptions()


@dataclass(frozen=True, slots=True)
class Baseline:
    """How another system serves the same model on the same GPUs, attention and experts together.

    Attributes:
        experts: "sharded": tensor parallelism slices every expert; "placed": each GPU of the group holds whole experts.
        max_num_seqs: sequences that it batches at most, as it is shipped.
    """

    name: str
    experts: Literal["sharded", "placed"]
    max_num_seqs: int


# Both serve from one tensor-parallel group of GPUs, of the size that suits them best, across nodes where the model does
# not fit into one. Neither overlaps collectives with compute. Their kernels reach the same fractions as ours.
BASELINES: Mapping[str, Baseline] = {
    "vllm": Baseline("vllm", "sharded", 256),
    "tensorrt-llm": Baseline("tensorrt-llm", "placed", 2048),
}
