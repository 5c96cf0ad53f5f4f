"""What an attention worker measures: the stages of synthetic passes before it serves, and of the real ones after."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from msi.attention.lanes import run_pass
from msi.complaints import Complaints
from msi.control.messages import Assignment
from msi.errors import TransportError, one_line
from msi.kernels import BLOCK_TOKENS
from msi.net.dispatch_link import DispatchLink
from msi.types import MicroBatch, StageTimes, TokenSampling
from msi.worker.host import AttentionPart, ServedShape

log = logging.getLogger(__name__)

CALIBRATION_CONTEXT = 128


class Measuring:
    """Of one life.

    Args:
        num_blocks: KV blocks, the padding block included.
    """

    def __init__(
        self, assignment: Assignment, shape: ServedShape, num_blocks: int, half: AttentionPart, link: DispatchLink
    ) -> None:
        self._worker_id = assignment.worker_id
        self._context = min(CALIBRATION_CONTEXT, assignment.limits.max_model_len, (num_blocks - 1) * BLOCK_TOKENS)
        self._vocab_size = shape.vocab_size
        self._half = half
        self._link = link
        self._complaints = Complaints(log)

    async def calibrate(self, num_lanes: int, num_seqs: int, num_passes: int) -> StageTimes:
        """Runs synthetic decode passes of `num_seqs` sequences on each of `num_lanes` lanes; the stages' medians.

        Not while lanes serve.

        Raises:
            TransportError: an expert worker was lost on the way, or a pass failed here.
        """
        for meter in (self._half.meter, self._half.shared_meter):
            meter.clear_recent()
        self._link.turns.times.clear()
        micro_batch = self._synthetic(num_seqs)

        async def run(lane: int) -> None:
            for left in reversed(range(num_passes)):
                try:
                    await run_pass(lane, micro_batch, self._half, self._link, partial(_has_left, left))
                except Exception as error:
                    if isinstance(error, TransportError):
                        raise
                    self._complaints.say(error, "a pass of the calibration failed")
                    raise TransportError(self._worker_id, one_line(error)) from error

        ended = await asyncio.gather(*(run(lane) for lane in range(num_lanes)), return_exceptions=True)
        for error in ended:
            if error is not None:  # all lanes are through: whoever asks again finds none of them in use
                raise error
        return self.times()

    def _synthetic(self, num_seqs: int) -> MicroBatch:
        context = self._context
        table = tuple(range(1, 1 + -(-context // BLOCK_TOKENS)))
        spread = range(1, num_seqs + 1)
        return MicroBatch(
            token_ids=tuple(7919 * number % self._vocab_size for number in spread),
            positions=(context - 1,) * num_seqs,
            query_lens=(1,) * num_seqs,
            context_lens=(context,) * num_seqs,
            block_tables=(table,) * num_seqs,
            logit_rows=tuple(range(num_seqs)),
            sampling=(TokenSampling(0.0, 1.0, 0, 0, 0),) * num_seqs,
        )

    def times(self) -> StageTimes:
        """T_a (what a turn takes of the device), T_e and T_c as measured; busy and bubble are the device's to say."""
        return StageTimes(
            attention_s=self._half.meter.median_s + self._half.shared_meter.median_s,
            expert_s=self._link.turns.times.compute_s or self._half.beside_s,
            comm_s=self._link.turns.times.comm_s,
        )


def _has_left(num_left: int, lane: int) -> bool:
    return num_left > 0
