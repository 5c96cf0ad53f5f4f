"""When experts are placed anew by what they had to do: counts in, a question for the planner out, a change asked for.

Knows workers by their heartbeats. `msi.planner.rebalance` decides, on a thread of its own, and
`msi.control.changes` does it; requests notice neither.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from msi.control.changes import ChangesOfPlacement
from msi.control.expert_load import ExpertLoad, Window
from msi.control.members import Member
from msi.control.membership import Cluster
from msi.errors import ConfigError, EngineError, one_line
from msi.placement import Placement
from msi.placement_change import ByLayer, copies_of
from msi.planner.rebalance import Decision, Load, Question, decide
from msi.settings import Rebalance

log = logging.getLogger(__name__)

LEAST_ROWS = 32  # of an expert of a layer in the mean, for a window to say anything
LOOK_AGAIN_S = 1.0  # at a window in which too little has run
REST_AFTER_FAILURE = 10  # windows


class _Stale(ConfigError):
    """What was planned is for another instance than there is by now."""


class Rebalancing:
    """Of one instance.

    Attributes:
        num_changes: of placement, that came to their end.
        num_moved: experts of layers that workers loaded for them.
        last_gain: that was predicted of the last, as a share of the slowest worker's time.
    """

    def __init__(self, settings: Rebalance, cluster: Cluster, changes: ChangesOfPlacement, now: float) -> None:
        placement = cluster.plan.placement
        self.num_changes = self.num_moved = 0
        self.last_gain = 0.0
        self._settings = settings
        self._cluster = cluster
        self._changes = changes
        self._redundancy = min(copies_of(placement)) - 1
        self._slots = sum(placement.num_held_by(node) for node in range(placement.num_nodes))
        self._load = ExpertLoad(placement.num_experts)
        self._least_rows = LEAST_ROWS * placement.num_experts
        self._due = now + settings.rebalance_interval_s
        self._num_resting = 0
        self._is_planning = False

    def counters(self) -> dict[str, float]:
        return {
            "rebalances": float(self.num_changes),
            "rebalanced_experts": float(self.num_moved),
            "rebalance_gain": self.last_gain,
            "placement_version": float(self._cluster.placing.placement.version),
        }

    def rows(self) -> list[list[float]]:
        """That each expert of each layer computed since this coordinator began to count."""
        return self._load.total

    def expert_rows(self) -> list[float]:
        """The same, of all layers together."""
        num_experts = self._cluster.plan.placement.num_experts
        return [sum(of_layer[expert] for of_layer in self._load.total) for expert in range(num_experts)]

    def hear(self, member: Member) -> None:
        """A heartbeat of a member has come."""
        if member.role == "expert":
            self._load.hear(member.worker_id, member.incarnation, member.place.node, member.status)

    def next(self, now: float) -> Question | None:
        """What is to be decided now, where that is done by itself and a window is over."""
        if self._settings.rebalance != "auto" or self._is_planning or now < self._due:
            return None
        self._due = now + LOOK_AGAIN_S
        if not self._is_steady or (window := self._load.close(self._least_rows)) is None:
            return None
        self._due = now + self._settings.rebalance_interval_s
        if self._num_resting or not self._load.before or not self._is_of_all_layers(window):
            self._num_resting = max(0, self._num_resting - 1)
            return None
        return self._question(window, tuple(self._load.before))

    def asked(self) -> Question | None:
        """As somebody wants to know now: by all that was counted; None where that is too little."""
        window = self._load.close(self._least_rows) or self._load.last
        if window is None or not self._is_steady or not self._is_of_all_layers(window):
            return None
        return self._question(window, tuple(self._load.before) or (window.load,))

    async def answer(self, question: Question, *, is_asked: bool = False) -> Placement | None:
        """Decides, and does it where that pays; the placement that is used from then on, None where it stays.

        Args:
            is_asked: somebody wants it: whatever is better pays.

        Raises:
            EngineError: it was to change, and could not; or, where `is_asked`, nothing better was found.
        """
        self._is_planning = True
        try:
            least = 0.0 if is_asked else self._settings.rebalance_threshold
            decision = await asyncio.to_thread(decide, replace(question, least_gain=least))
            if decision.gain <= least or not (decision.is_worth or is_asked):
                log.debug("experts stay: %s", _told(decision))
                return None
            return await self._change(question, decision)
        finally:
            self._is_planning = False

    async def look(self, question: Question) -> None:
        """`answer`, for ever: what could not be is said, and left alone for a while."""
        try:
            await self.answer(question)
        except _Stale as error:  # the next window is as good as any
            log.info("experts stay where they are: %s", error)
        except (EngineError, ValueError) as error:
            self._num_resting = REST_AFTER_FAILURE
            log.warning("experts stay where they are: %s", one_line(error))

    async def _change(self, question: Question, decision: Decision) -> Placement:
        def choose(placement: Placement, nodes: Sequence[int]) -> ByLayer:
            if (placement.version, tuple(nodes)) != (question.placement.version, question.nodes):
                raise _Stale("workers or experts have come or gone while the plan was made")
            return decision.chosen

        clock = asyncio.get_running_loop().time
        started = clock()
        placement = await self._changes.ask(choose, "rebalanced by load")
        self.num_changes += 1
        self.num_moved += decision.num_moved
        self.last_gain = decision.gain
        self._num_resting = 1  # a whole window of the new one
        log.info(
            "rebalanced: placement %d, %s; swapped in %.1f s",
            placement.version, _told(decision), clock() - started,
        )  # fmt: skip
        return placement

    @property
    def _is_steady(self) -> bool:
        cluster = self._cluster
        experts = cluster.live("expert")
        there, placement = {member.place.node for member in experts}, cluster.placing.placement
        return bool(
            cluster.serving
            and len(experts) > 1
            and not any(placement.held_by(node) for node in range(placement.num_nodes) if node not in there)
            and not cluster.placing.is_changing
            and all(member.state == "ready" for member in experts)
        )

    def _is_of_all_layers(self, window: Window) -> bool:
        return len(self._cluster.placing.placement.layers) in (1, len(window.load))

    def _question(self, window: Window, before: tuple[Load, ...]) -> Question:
        experts = self._cluster.live("expert")
        counted = [one.status.experts for one in experts if one.status.experts is not None]
        num_loaded = sum(one.experts_loaded for one in counted)
        loading_s = sum(one.loading_s for one in counted)
        return Question(
            placement=self._cluster.placing.placement,
            nodes=tuple(member.place.node for member in experts),
            redundancy=min(self._redundancy, len(experts) - 1),
            slots=self._slots,
            windows=before,
            latest=window.load,
            means=tuple(self._load.means),
            waves=window.waves,
            busy_s=window.busy_s,
            load_s=loading_s / num_loaded if num_loaded else 0.0,
        )


def _told(decision: Decision) -> str:
    return (
        f"{decision.num_moved} experts of layers to load, {decision.gain:.1%} less for the slowest expert worker (an "
        f"expert's weights are read as long as {decision.floor_rows:.0f} rows take)"
    )
