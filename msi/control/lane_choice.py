"""How many micro-batches run: as given, or chosen by measuring the stages once every worker is connected. Pure."""

from __future__ import annotations

import logging

from msi.control.calibration import Calibration
from msi.control.members import InstancePlan, Instruction, Send
from msi.control.membership import Cluster
from msi.control.messages import Calibrated, CalibrationCutShort
from msi.planner.pipeline import Stages

log = logging.getLogger(__name__)


class LaneChoice:
    """Of one instance, made once, and looked at again when workers have come or gone.

    Args:
        num_micro_batches: m, or 0 to choose by measurement.
        num_layers: of the model.
    """

    def __init__(self, plan: InstancePlan, num_micro_batches: int, num_layers: int) -> None:
        self._given = num_micro_batches
        self._is_colocated = plan.is_colocated
        self._calibration = Calibration(min(plan.limits.max_num_seqs, plan.limits.max_num_batched_tokens), num_layers)
        self._said = ""

    @property
    def remark(self) -> str:
        """What holds it up, "" for nothing."""
        note = self._calibration.note
        return f" (cut short: {note}; asked again)" if note else ""

    def hear(self, answer: Calibrated | CalibrationCutShort, now: float) -> None:
        """From the member that it names."""
        if isinstance(answer, Calibrated):
            self._calibration.answered(answer)
        else:
            self._calibration.cut_short(answer, now)

    def next(self, cluster: Cluster, now: float) -> list[Instruction]:
        """What follows from the state of the cluster, as long as no lanes run: an order to measure, or the choice."""
        if cluster.num_lanes:
            return []
        if not cluster.is_linked:
            self._calibration.interrupt("a worker was lost", now)
            return []
        if chosen := self._chosen(cluster):
            return cluster.use_lanes(chosen)
        members = {member.worker_id: member for member in cluster.live("attention")}
        lives = {worker_id: member.incarnation for worker_id, member in members.items()}
        orders = self._calibration.ask(lives, now)
        if (note := self._calibration.note) != self._said:
            self._said = note
            if note:
                log.warning("measuring stages was cut short (%s) and is asked again", note)
        return [Send(members[worker_id].route, order) for worker_id, order in orders]

    def again(self, running: int, now: Stages) -> tuple[int, str]:
        """Another number of workers serves: m from now on, and why. Stages are as they are with what runs."""
        if self._given or self._is_colocated:
            return running, f"m={running} stays: it was given"
        found = self._calibration.choice_now(running, now)
        return found or (running, f"m={running} stays until a restart measures anew: nothing else was measured here")

    def _chosen(self, cluster: Cluster) -> int:
        """0 as long as it is not known."""
        if self._given:
            return self._given
        if self._is_colocated:
            log.info("1 micro-batch: both roles share one compute queue, so nothing could overlap")
            return 1
        if not self._calibration.is_done:
            return 0
        chosen, why = self._calibration.choice()
        log.info("%s", why)
        attention, experts = cluster.live("attention"), cluster.live("expert")
        if len(attention) == len(experts) == 1 and attention[0].host == experts[0].host:
            log.info("%s", self._calibration.together_or_apart(chosen))
        return chosen
