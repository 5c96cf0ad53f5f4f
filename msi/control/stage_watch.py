"""What workers measure of their stages, held against the plan that runs, and against the number of lanes.

Says what it finds in the log. Decisions are those of `msi.planner.drift`, `size_watch` and `lane_choice`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from msi.control.client_messages import WorkerStats
from msi.control.counters import AttentionCounters, ExpertCounters
from msi.control.lane_choice import LaneChoice
from msi.control.members import Instruction
from msi.control.membership import Cluster
from msi.control.size_watch import SizeWatch

if TYPE_CHECKING:
    from msi.planner.drift import DriftWatch, Observation  # with numpy, which only an instance with a plan needs

log = logging.getLogger(__name__)


class StageWatch:
    """Of one instance.

    Args:
        lane_choice: made again when workers have come or gone.
        drift: of the plan that runs, if there is one.
    """

    def __init__(self, cluster: Cluster, lane_choice: LaneChoice, drift: DriftWatch | None) -> None:
        self._cluster = cluster
        self._lane_choice = lane_choice
        self._drift = drift
        self._sizes = SizeWatch()

    @property
    def ratios(self) -> dict[str, float]:
        """Of what was measured to what was planned, by worker and stage, and alarms so far; {} without a plan."""
        return {} if self._drift is None else {**self._drift.ratios, "alarms": self._drift.num_alarms}

    def has_drifted(self) -> bool:
        """Whether a stage has parted from the plan since this was asked last; then `say_choice` is worth its time."""
        if self._drift is None:
            return False
        live = [worker for worker in self._cluster.stats() if worker.state == "ready"]
        found = self._drift.look(observed(worker) for worker in live)
        for drift in found:
            log.warning("drift: %s", drift)
        return bool(found)

    async def say_choice(self) -> None:
        """What would be planned now. It may take a second, on a thread."""
        assert self._drift is not None
        log.warning("drift: %s", await asyncio.to_thread(self._drift.choice_now))

    def look_at_size(self, now: float) -> list[Instruction]:
        """What follows where another number of workers serves."""
        cluster = self._cluster
        experts = [one for one in cluster.live("expert") if cluster.is_of_use(one)]
        running = cluster.num_lanes
        resized = self._sizes.look(list(cluster.serving.values()), experts, running, now)
        if resized is None:
            return []
        sentence, stages = resized
        log.info("%s", sentence)
        chosen, why = self._lane_choice.again(running, stages)
        log.info("%s", why)
        return [] if chosen == running else cluster.use_lanes(chosen)


def observed(worker: WorkerStats) -> Observation:
    """What a worker's last heartbeat says of its stages."""
    from msi.planner.drift import Observation

    status = worker.status
    attention, experts = status.attention or AttentionCounters(), status.experts or ExpertCounters()
    is_attention = worker.role == "attention"
    return Observation(
        worker_id=worker.worker_id,
        role=worker.role,
        compute_s=attention.attention_s + attention.shared_experts_s if is_attention else experts.expert_batches_s,
        comm_s=status.times.comm_s,
        batches=experts.batches,
        passes=attention.passes,
        batch_tokens=attention.batch_tokens,
        batch_contexts=attention.batch_contexts,
    )
