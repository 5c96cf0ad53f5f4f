"""What a worker runs on, and what its roles get from there: the halves of a model on a device, transports, a clock.

`msi.worker.torch_host` is the real thing; the simulator has another. Above this line nobody asks which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from msi.attention.lanes import AttentionCompute
from msi.control.counters import ProcessCounters
from msi.control.messages import Assignment
from msi.experts.server import ExpertCompute
from msi.meter import StageMeter
from msi.net.combine_link import CombineLink
from msi.net.dispatch_link import DispatchLink
from msi.net.regions import Allocator, Region
from msi.net.transport import Transport
from msi.placement import Placement
from msi.precision import Precision
from msi.text.grammars import Grammars
from msi.tracing import Spans


@dataclass(frozen=True, slots=True)
class ServedShape:
    """What the roles need to know of a model.

    Attributes:
        num_sparse_layers: turns of one pass.
        row_bytes: of one row on its way to the experts.
        answer_row_bytes: of one row on its way back.
    """

    num_sparse_layers: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    row_bytes: int
    answer_row_bytes: int


class BlockMemory(Protocol):
    """KV blocks as bytes, all layers of one after another."""

    block_bytes: int
    shape: str  # of those that may be exchanged

    def read(self, block: int, into: memoryview) -> None:
        """Copies a block that nothing is written to any more."""

    def write(self, block: int, content: memoryview) -> None:
        """Into a block that no sequence has."""


class AttentionPart(AttentionCompute, Protocol):
    """The attention half, and what it measures."""

    block_memory: BlockMemory | None  # None where the host does not reach it

    meter: StageMeter  # T_a, without shared experts
    shared_meter: StageMeter
    pass_meter: StageMeter  # head and sampling, once per pass
    weight_bytes_read: int

    @property
    def beside_s(self) -> float:
        """T_e where it has the experts, too; else 0."""

    def attach(self, node: int, out_rows: Region) -> None:
        """Rows for this expert node go into `out_rows` from now on."""

    async def prepare(self) -> None:
        """What may take long before the first pass, once all nodes are attached. Cancelling leaves nothing behind that
        hinders."""

    def use_placement(self, placement: Placement) -> None:
        """Passes that begin from now on send rows where it says."""

    def use_nodes(self, missing: tuple[int, ...]) -> None:
        """These expert nodes are not there: rows that others can compute do not go to them."""

    def close(self) -> None:
        """The device, which outlives it, lets go of it. No pass is in flight any more."""


class ExpertPart(ExpertCompute, Protocol):
    """The experts of one node, and what they measure."""

    meter: StageMeter  # T_e

    @property
    def weight_bytes_read(self) -> int: ...

    def rows_by_layer(self) -> list[dict[int, int]]:
        """Rows that each expert has computed, layer by layer, by its id in the model; [] where nobody counts."""

    def close(self) -> None:
        """The device, which outlives it, lets go of it; of a batch in progress nothing is heard."""


class LoadedModel(Protocol):
    """The weights of one assignment on a device."""

    shape: ServedShape
    memory: Allocator  # of rows on their way
    grammars: Grammars | None  # that answers can be held to; None where there are none

    @property
    def has_attention(self) -> bool: ...

    @property
    def has_experts(self) -> bool: ...

    def num_kv_blocks(self) -> int:
        """KV blocks that there is room for, the padding block included. Raises ConfigError: not even one."""

    def attention_half(self, link: DispatchLink, num_blocks: int) -> AttentionPart:
        """Reads rows from the link's landing; outboxes are attached as nodes connect."""

    def expert_half(self, link: CombineLink, num_seats: int) -> ExpertPart:
        """Reads rows from the link's landing; outboxes are attached as seats are taken."""

    def lend_experts(self, half: ExpertPart) -> None:
        """To a half that runs: it computes with these experts from now on. Those that its rows name have the same local
        ids.
        """


class Host(Protocol):
    """One per worker; outlives its incarnations."""

    clock: Callable[[], float]  # seconds, monotonic
    products: str  # as `WorkerHello` says; once `introduce` has been called

    @property
    def busy_s(self) -> float:
        """Time spent computing since the start."""

    @property
    def loaded(self) -> tuple[int, int]:
        """Bytes of weights read, and how many there are to read (0 until the role is known)."""

    async def prepare(self) -> None:
        """What may be slow the first time on a machine; before `introduce`."""

    def introduce(self) -> tuple[str, Precision]:
        """The model's fingerprint, and what to hold, send and compute it in. Raises ConfigError."""

    def use_tracer(self, tracer: Spans | None) -> None:
        """All work gets a span from now on; None: no longer. Not before `introduce`."""

    def free_former(self) -> None:
        """What earlier lives of the worker had, its rows and KV cache, goes; before `load` for the next one."""

    async def load(self, assignment: Assignment) -> LoadedModel:
        """The weights of an assignment; those that are loaded already where they fit.

        Raises:
            CheckpointError: a tensor is missing, truncated or misshapen.
            ConfigError: the memory that is free cannot hold them.
        """

    def new_transport(self, assignment: Assignment) -> Transport: ...

    def new_block_transport(self, assignment: Assignment) -> Transport:
        """For KV blocks between attention workers, which are taken on the event loop."""

    def counters(self) -> ProcessCounters:
        """What is countable here; the rest of them is the worker's to fill in."""

    async def close(self) -> None:
        """Idempotent."""
