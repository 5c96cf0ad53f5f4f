"""What an expert worker hosts: the experts placed on it, behind a link, batched by waves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from msi.control.counters import BatchTimes, ExpertCounters, LayerRows, by_reason
from msi.control.messages import Assignment
from msi.experts.server import ExpertServer
from msi.experts.waves import Waves
from msi.net.combine_link import CombineLink
from msi.net.link_hello import PROTOCOL_VERSION, LinkHello
from msi.net.secret import public_name
from msi.net.transport import Transport
from msi.placement import Placement
from msi.types import StageTimes
from msi.worker.host import LoadedModel, ServedShape

MIN_WAIT_S = 0.005  # W on a real host is never less: its scheduler takes a core away for longer than a short turn


def link_hello(assignment: Assignment, shape: ServedShape) -> LinkHello:
    """Who we are to the other side, and what both sides must agree on."""
    return LinkHello(
        protocol_version=PROTOCOL_VERSION,
        instance=public_name(assignment.instance),
        worker_id=assignment.worker_id,
        incarnation=assignment.incarnation,
        node=assignment.place.node,
        rank=assignment.place.rank,
        size=assignment.place.size,
        placement_version=assignment.placement.version,
        num_lanes=assignment.link.num_lanes,
        slot_rows=assignment.link.slot_rows,
        row_bytes=shape.row_bytes,
        answer_row_bytes=shape.answer_row_bytes,
        next_seqs=(0,) * assignment.link.num_lanes,
    )


class ExpertRole:
    """One life (incarnation) of an expert worker; weights and device outlive it.

    Attributes:
        placed: the placement whose rows it takes, and the one before it while that may still be used.
        num_layers: of the model that have experts.
    """

    def __init__(
        self, assignment: Assignment, model: LoadedModel, transport: Transport, *, clock: Callable[[], float]
    ) -> None:
        self.num_layers = num_layers = model.shape.num_sparse_layers
        self.placed = (assignment.placement, assignment.former)
        self._num_loaded, self._loading_s = 0, 0.0
        self._waves = Waves(num_layers=num_layers, num_lanes=assignment.link.num_lanes, min_wait_s=MIN_WAIT_S)
        self._link = CombineLink(
            transport,
            expected=link_hello(assignment, model.shape),
            worker_id=assignment.worker_id,
            incarnation=assignment.incarnation,
            num_seats=assignment.num_seats,
            max_skip=2 * num_layers,
            allocator=model.memory,
            clock=clock,
        )
        self._link.use_placement(*_versions(*self.placed))
        self.half = model.expert_half(self._link, assignment.num_seats)
        self._server = ExpertServer(self._link, self._waves, self.half, clock=clock)

    async def listen(self) -> str:
        """Takes attention workers from now on; the address to give them."""
        return await self._link.listen(self._server)

    def close(self) -> None:
        """Computes nothing more. Idempotent."""
        self._server.close()
        self.half.close()

    def fence(self, worker_id: str) -> None:
        """Frees the seat of an attention worker that was lost."""
        for seat, peer in self._link.peers.items():
            if peer == worker_id:
                self._link.fence(seat)

    def use_placement(self, placement: Placement, former: Placement | None, model: LoadedModel | None) -> None:
        """Takes rows of both, and of no other: nobody sends them any more.

        Args:
            model: with the experts of both (`Assignment.experts`); None where those are none: it keeps what it has.
        """
        if model is not None:
            model.lend_experts(self.half)
        self._link.use_placement(*_versions(placement, former))
        self.placed = (placement, former)

    def has_loaded(self, num_experts: int, spent_s: float) -> None:
        """So many more of a layer were read from where they lie, in that time."""
        self._num_loaded += num_experts
        self._loading_s += spent_s

    def layer_rows(self) -> LayerRows:
        return LayerRows.of(self.half.rows_by_layer())

    def batch_times(self) -> tuple[BatchTimes, ...]:
        return self._server.meter.told()

    @property
    def placement(self) -> Placement:
        return self.placed[0]

    def times(self) -> StageTimes:
        return StageTimes(expert_s=self.half.meter.median_s)

    def counters(self) -> ExpertCounters:
        waves, link = self._waves.counters, self._link.counters
        expert_rows = Counter[int]()
        for of_layer in self.half.rows_by_layer():
            expert_rows.update(of_layer)
        return ExpertCounters(
            batches=waves.batches,
            alone_batches=waves.alone_batches,
            evictions=waves.evictions,
            readmissions=waves.readmissions,
            wait_s=self._waves.wait_s,
            rows_landed=link.rows,
            answers=link.answers,
            seats=len(self._link.peers),
            expert_batches_s=self.half.meter.total_s,
            weight_bytes_read=self.half.weight_bytes_read,
            experts_loaded=self._num_loaded,
            loading_s=self._loading_s,
            wave_sizes=dict(waves.wave_sizes),
            expert_rows=dict(expert_rows),
            dropped=by_reason(link.dropped),
        )


def _versions(placement: Placement, former: Placement | None) -> tuple[int, int | None]:
    return placement.version, None if former is None else former.version
