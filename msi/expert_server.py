"""The expert half's loop: take a closed wave for a layer, run its experts, write back.

Knows seats, waves and answers; knows no requests, weights or sockets.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from msi.net.alarm import Alarm
from msi.net.combine_link import CombineLink, Joined, Landed
from msi.waves import WaveBatch, Waves

log = logging.getLogger(__name__)


class ExpertCompute(Protocol):
    """The experts of one node on a device."""

    def attach(self, seat: int, outbox: memoryview) -> None:
        """Answers to this seat go into `outbox` from now on."""

    def run(self, batch: WaveBatch) -> Awaitable[float]:
        """Enqueues one layer's experts over the batch's rows; once awaited, the answers lie in the outboxes.

        Returns:
            The seconds that the device computed, T_e.
        """


class ExpertServer:
    """Serves the seats of one expert node.

    Args:
        clock: seconds; the one that `waves` and `link` were given.
    """

    def __init__(
        self, link: CombineLink, waves: Waves, compute: ExpertCompute, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._link = link
        self._waves = waves
        self._compute = compute
        self._clock = clock
        self._alarm = Alarm()

    async def run(self) -> None:
        """For ever. Cancel it to stop."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen(), name="waves")
            tasks.create_task(self._serve(), name="experts")

    async def _listen(self) -> None:
        link, waves, clock = self._link, self._waves, self._clock
        while True:
            is_news = False
            for event in await link.events():
                if isinstance(event, Landed):
                    is_news |= waves.landed(event.seat, event.lane, event.seq, event.num_rows, event.more, clock())
                elif isinstance(event, Joined):
                    self._compute.attach(event.seat, event.outbox)
                    waves.connect(event.seat, event.node)
                else:
                    waves.disconnect(event.seat, clock())
                    is_news = True
            if is_news:
                self._alarm.ring()

    async def _serve(self) -> None:
        waves, clock = self._waves, self._clock
        finished: WaveBatch | None = None
        compute_s = 0.0
        while True:
            self._alarm.silence()
            batch = waves.take(clock())
            done = None if batch is None else self._compute.run(batch)
            if finished is not None:  # the device works on meanwhile
                for rows in finished.rows:
                    self._link.answer(rows.seat, finished.lane, rows.seq, rows.num_rows, compute_s)
                finished = None
            if batch is None or done is None:
                await self._alarm.wait(waves.deadline() - clock())
                continue
            try:
                compute_s = await done
            except Exception as error:
                log.exception("layer %d of lane %d failed", batch.layer, batch.lane)
                for rows in batch.rows:
                    self._link.refuse(rows.seat, batch.lane, rows.seq, f"its experts failed: {error}")
            else:
                finished = batch
