"""Measuring the stages of a pipeline on all attention workers, to choose the number of micro-batches.

Steps one after the other, each on all workers at once. A step that is cut short (a worker was lost, an answer does not
come) is asked again, with a note of why: it costs the time that was lost and never decides anything. Decides; does not
act. Knows no sockets or clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from msi.control.messages import Calibrate, Calibrated, CalibrationCutShort
from msi.planner.pipeline import (
    Stages,
    calibration_steps,
    choose_micro_batches,
    steady_pass_s,
    together_or_apart,
)
from msi.types import StageTimes

BATCH = 32
PASSES = 3
ANSWER_TIMEOUT_S = 30.0  # then a step is asked again
AGAIN_AFTER_S = 0.25
LEAST_GAIN = 1.05  # that another number of micro-batches is changed to for, while requests run

Life = tuple[str, int]  # worker id and incarnation


@dataclass
class _Step:
    """Orders that are out, by number, and what came back."""

    asked_at: float
    lives: frozenset[Life]
    orders: dict[int, Life]
    times: list[StageTimes] = field(default_factory=list)


class Calibration:
    """One per instance.

    Attributes:
        note: why the last step was cut short, "" where it was not.
    """

    def __init__(self, most_seqs: int, num_layers: int) -> None:
        self.note = ""
        self._batch_size = min(BATCH, most_seqs)
        self._num_layers = num_layers
        self._steps = calibration_steps(self._batch_size)
        self._measured: dict[int, Stages] = {}
        self._step: _Step | None = None
        self._num_orders = 0
        self._not_before = 0.0

    def ask(self, lives: Mapping[str, int], now: float) -> list[tuple[str, Calibrate]]:
        """What is to be asked of whom, now that these attention workers are there (incarnations by id) and linked."""
        wanted = frozenset(lives.items())
        if self._step is not None and self._step.lives != wanted:
            self.interrupt("a worker was lost", now)
        if self._step is not None and now - self._step.asked_at > ANSWER_TIMEOUT_S:
            self.interrupt(f"no answer for {ANSWER_TIMEOUT_S:g} s", now)
        if self._step is not None or self.is_done or now < self._not_before or not wanted:
            return []
        step = self._steps[len(self._measured)]
        asked = {}
        for life in sorted(wanted):
            self._num_orders += 1
            asked[self._num_orders] = life
        self._step = _Step(now, wanted, asked)
        return [(life[0], Calibrate(order, step.num_lanes, step.num_seqs, PASSES)) for order, life in asked.items()]

    def answered(self, answer: Calibrated) -> None:
        """Counts where it was asked of this life of the worker, and is still wanted."""
        step = self._step
        if step is None or step.orders.get(answer.order) != (answer.worker_id, answer.incarnation):
            return
        del step.orders[answer.order]
        step.times.append(answer.times)
        if step.orders:
            return
        num_lanes = self._steps[len(self._measured)].num_lanes
        self._measured[num_lanes] = Stages(
            sum(one.attention_s for one in step.times) / len(step.times),
            sum(one.expert_s for one in step.times) / len(step.times),
            sum(one.comm_s for one in step.times) / len(step.times),
        )
        self._step, self.note = None, ""

    def cut_short(self, answer: CalibrationCutShort, now: float) -> None:
        """As `answered`, where there are no times."""
        step = self._step
        if step is not None and step.orders.get(answer.order) == (answer.worker_id, answer.incarnation):
            self.interrupt(f"{answer.worker_id}: {answer.reason}", now)

    def interrupt(self, reason: str, now: float) -> None:
        """The step that is out comes to nothing; it is asked again."""
        if self._step is not None:
            self._step, self.note = None, reason
            self._not_before = now + AGAIN_AFTER_S

    @property
    def is_done(self) -> bool:
        return len(self._measured) == len(self._steps)

    def choice_now(self, running: int, now: Stages) -> tuple[int, str] | None:
        """The choice once stages take what they take now with so many micro-batches; None where nothing was measured.

        What another number takes has changed by the same factor, stage by stage.
        """
        then = self._measured.get(running)
        if not self.is_done or then is None or not (now.attention_s and now.expert_s):
            return None
        factors = [
            after / before if before > 0 and after > 0 else 1.0
            for before, after in (
                (then.attention_s, now.attention_s), (then.expert_s, now.expert_s), (then.comm_s, now.comm_s),
            )
        ]  # fmt: skip
        scaled = {
            m: Stages(*(one * factor for one, factor in zip(
                (stages.attention_s, stages.expert_s, stages.comm_s), factors, strict=True
            )))
            for m, stages in self._measured.items()
        }  # fmt: skip
        gain = steady_pass_s(scaled[running], running, self._num_layers)
        chosen, why = choose_micro_batches(scaled, self._batch_size, self._num_layers)
        if gain <= LEAST_GAIN * steady_pass_s(scaled[chosen], chosen, self._num_layers):
            return running, f"{running} micro-batches stay: another number would gain less than 5 %"
        return chosen, why

    def choice(self) -> tuple[int, str]:
        """The number of micro-batches and why, once it is done."""
        return choose_micro_batches(self._measured, self._batch_size, self._num_layers)

    def together_or_apart(self, chosen: int) -> str:
        """Of one worker of each role on one host, once it is done: whether they should be one process, and why."""
        return together_or_apart(self._measured, chosen, self._batch_size, self._num_layers)
