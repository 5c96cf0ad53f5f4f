"""What an attention worker hosts: scheduler, KV cache, lanes, and the link to the expert workers.

Requests come in, progress goes out through `report`; both are values, the control plane is somebody else's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from msi.attention.lanes import run_lane, run_pass
from msi.attention.scheduler import Scheduler
from msi.complaints import Complaints
from msi.control.messages import Assignment, ExpertAddress, Linked, PassDone, PeerLost, RequestsFailed, Topology
from msi.errors import BatchRefused, EngineError, Failure, RequestFailed, TransportError, one_line
from msi.experts.role import link_hello
from msi.kernels import BLOCK_TOKENS
from msi.net.alarm import Alarm
from msi.net.dispatch_link import DispatchLink
from msi.net.transport import Transport
from msi.types import MicroBatch, Request, Sampled, StageTimes, TokenSampling
from msi.worker.host import LoadedModel

log = logging.getLogger(__name__)

CONNECT_AGAIN_S = 0.25
CALIBRATION_CONTEXT = 128


class AttentionRole:
    """One life (incarnation) of an attention worker; weights and device outlive it.

    Implements `msi.attention.lanes.MicroBatches`.

    Args:
        num_blocks: KV blocks, the padding block included.
        report: takes the messages for the coordinator.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        assignment: Assignment,
        model: LoadedModel,
        transport: Transport,
        num_blocks: int,
        report: Callable[[Any], None],
        *,
        clock: Callable[[], float],
    ) -> None:
        self._assignment = assignment
        self._shape = model.shape
        self._num_blocks = num_blocks
        self._report = report
        self._link = DispatchLink(
            transport,
            hello=link_hello(assignment, model.shape),
            num_nodes=assignment.placement.num_nodes,
            report_loss=self._lost_peer,
            timeout_s=assignment.timeouts.peer_timeout_s,
            clock=clock,
        )
        self._half = model.attention_half(self._link, num_blocks)
        self._scheduler = self._new_scheduler(num_lanes=1)
        self._idle = [Alarm() for _ in range(assignment.link.num_lanes)]
        self._ended = Alarm()
        self._lanes: list[asyncio.Task[None]] = []
        self._tasks: asyncio.TaskGroup | None = None
        self._wanted: dict[int, ExpertAddress] = {}
        self._connected: dict[int, ExpertAddress] = {}
        self._topology_changed = Alarm()
        self._num_reports = 0
        self._complaints = Complaints(log)
        self._num_passes = self._batch_tokens = self._batch_contexts = 0

    def _new_scheduler(self, num_lanes: int) -> Scheduler:
        return Scheduler(
            self._assignment.limits,
            num_lanes=num_lanes,
            num_blocks=self._num_blocks,
            block_tokens=BLOCK_TOKENS,
            vocab_size=self._shape.vocab_size,
            eos_token_ids=self._shape.eos_token_ids,
        )

    async def run(self) -> None:
        """Links and lanes, for ever. Cancel it to stop."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            tasks.create_task(self._keep_connected(), name="connector")

    # -- expert workers ----------------------------------------------------------------------------------------------

    def use_topology(self, topology: Topology) -> None:
        """These expert workers are there now. Others are dropped, new ones connected."""
        self._wanted = {expert.node: expert for expert in topology.experts}
        for node, connected in list(self._connected.items()):
            if self._wanted.get(node) != connected:
                self._link.drop(node, topology.lost.get(connected.worker_id, "replaced"))
        self._topology_changed.ring()

    async def _keep_connected(self) -> None:
        while True:
            failed = False
            for node, expert in sorted(self._wanted.items()):
                if node in self._connected:
                    continue
                try:
                    self._half.attach(node, await self._link.connect(node, expert.address))
                except TransportError as error:
                    log.warning("%s: %s", expert.worker_id, error.reason)
                    failed = True
                    continue
                except Exception as error:
                    self._complaints.say(error, f"{expert.worker_id} could not be connected")
                    self._link.drop(node, one_line(error))
                    failed = True
                    continue
                if self._wanted.get(node) != expert:  # changed while connecting
                    self._link.drop(node, "replaced")
                    failed = True
                    continue
                self._connected[node] = expert
                if not self._link.missing_nodes:
                    self._say_linked(True)
            await self._topology_changed.wait(CONNECT_AGAIN_S if failed else float("inf"))

    def _lost_peer(self, node: int, worker_id: str, reason: str) -> None:
        expert = self._connected.pop(node, None)
        if expert is None:
            return
        was_complete = len(self._connected) + 1 == self._assignment.placement.num_nodes
        if self._wanted.get(node) == expert:  # we noticed first; it comes back under a new incarnation
            del self._wanted[node]
            ours = self._assignment
            self._report(PeerLost(ours.worker_id, ours.incarnation, expert.worker_id, expert.incarnation, reason))
        if was_complete:
            self._say_linked(False)

    def _say_linked(self, is_complete: bool) -> None:
        self._report(Linked(self._assignment.worker_id, self._assignment.incarnation, is_complete))

    # -- requests ----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Takes a request, or reports why it cannot."""
        try:
            self._scheduler.add(request)
        except EngineError as error:
            self._fail([request.request_id], error)
        except Exception as error:
            self._complaints.say(error, "a request could not be taken")
            self._scheduler.cancel(request.request_id)
            self._fail([request.request_id], self._failed(one_line(error)))
        self._wake()

    def cancel(self, request_id: str) -> None:
        self._scheduler.cancel(request_id)
        self._wake()

    @property
    def is_idle(self) -> bool:
        return self._scheduler.is_idle

    async def wait_idle(self) -> None:
        """Until no request is left."""
        while not self._scheduler.is_idle:
            await self._ended.wait()

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()

    def _fail(self, request_ids: list[str], error: EngineError) -> None:
        if not request_ids:
            return
        if isinstance(error, RequestFailed):
            log.warning("%s ended: %s", ", ".join(request_ids), error)
        ours = self._assignment
        self._report(RequestsFailed(ours.worker_id, ours.incarnation, tuple(request_ids), Failure.of(error)))

    def _wake(self) -> None:
        for lane in range(self._scheduler.num_lanes):
            if self._scheduler.has_work(lane):
                self._idle[lane].ring()
        if self._scheduler.is_idle:
            self._ended.ring()

    # -- lanes -------------------------------------------------------------------------------------------------------

    def use_lanes(self, num_lanes: int) -> None:
        """Serves with this many micro-batches in flight, until this life ends; a second time is the same."""
        if self._lanes:
            return
        assert self._tasks is not None
        came_early = self._scheduler.requests  # whoever told how many lanes was heard late
        self._scheduler = self._new_scheduler(num_lanes)
        for request in came_early:
            self.submit(request)
        for lane in range(num_lanes):
            task = self._tasks.create_task(run_lane(lane, self, self._half, self._link), name=f"lane {lane}")
            self._lanes.append(task)

    async def next(self, lane: int) -> MicroBatch:
        while True:
            seen = self._scheduler.num_admissions
            try:
                micro_batch = self._scheduler.plan(lane)
            except Exception as error:
                self._end_lane(lane, error)
                continue
            if self._scheduler.num_admissions > seen:
                self._wake()  # onto other lanes
            if micro_batch is not None:
                return micro_batch
            await self._idle[lane].wait()

    def may_continue(self, lane: int) -> bool:
        return self._scheduler.may_continue(lane)

    def finish(self, lane: int, micro_batch: MicroBatch, sampled: Sampled) -> None:
        self._num_passes += 1
        self._batch_tokens += micro_batch.num_tokens
        self._batch_contexts += sum(micro_batch.context_lens)
        try:
            for index, reason in sampled.failures.items():
                self._fail(self._scheduler.fail(lane, (index,)), self._failed(reason))
            progress = self._scheduler.update(lane, sampled.token_ids, sampled.logprobs)
        except Exception as error:
            self._end_lane(lane, error)
            return
        if progress:
            ours = self._assignment
            self._report(PassDone(ours.worker_id, ours.incarnation, self._num_reports, tuple(progress)))
            self._num_reports += 1
        self._wake()

    def fail(self, lane: int, micro_batch: MicroBatch, error: Exception) -> None:
        scheduler = self._scheduler
        if isinstance(error, TransportError) and not isinstance(error, BatchRefused):
            scheduler.give_up(lane)
            lost = RequestFailed(f"expert worker {error.peer} was lost: {error.reason}")
            self._fail(scheduler.fail_running(), lost)
        elif isinstance(error, TimeoutError):
            self._complaints.say(error, "a pass was given up")
            failed = scheduler.fail(lane, range(len(micro_batch.query_lens)))
            scheduler.give_up(lane)
            self._fail(failed, self._failed(one_line(error)))
        else:
            self._complaints.say(error, "a pass failed; each of its sequences is tried alone")
            if isinstance(error, BatchRefused):
                cause = RequestFailed(f"expert worker {error.peer} {error.reason}")
            else:
                cause = self._failed(f"could not compute it: {one_line(error)}")
            self._fail(scheduler.suspect(lane), cause)
        self._wake()

    def _end_lane(self, lane: int, error: Exception) -> None:
        """The scheduler itself went wrong with this lane. If that goes beyond the lane, the worker ends."""
        self._complaints.say(error, "the scheduler failed; the requests of a lane end")
        self._fail(self._scheduler.fail_lane(lane), self._failed(one_line(error)))
        self._scheduler.check_integrity()
        self._wake()

    def _failed(self, reason: str) -> RequestFailed:
        return RequestFailed(f"{self._assignment.worker_id}: {reason}")

    # -- measuring ---------------------------------------------------------------------------------------------------

    async def calibrate(self, num_lanes: int, num_seqs: int, num_passes: int) -> StageTimes:
        """Runs synthetic decode passes of `num_seqs` sequences on each of `num_lanes` lanes; the stages' medians.

        Raises:
            TransportError: an expert worker was lost on the way, or a pass failed here.
        """
        assert not self._lanes, "calibration comes before serving"
        for meter in (self._half.meter, self._half.shared_meter, self._link.comm_meter, self._link.compute_meter):
            meter.clear_recent()
        micro_batch = self._synthetic(num_seqs)

        async def run(lane: int) -> None:
            for left in reversed(range(num_passes)):
                try:
                    await run_pass(lane, micro_batch, self._half, self._link, partial(_has_left, left))
                except Exception as error:
                    self._link.skip_to(lane, self._half.num_layers)
                    if isinstance(error, TransportError):
                        raise
                    self._complaints.say(error, "a pass of the calibration failed")
                    raise TransportError(self._assignment.worker_id, one_line(error)) from error

        ended = await asyncio.gather(*(run(lane) for lane in range(num_lanes)), return_exceptions=True)
        for error in ended:
            if error is not None:  # all lanes are through: whoever asks again finds none of them in use
                raise error
        return self.times()

    def _synthetic(self, num_seqs: int) -> MicroBatch:
        context = min(CALIBRATION_CONTEXT, self._assignment.limits.max_model_len, (self._num_blocks - 1) * BLOCK_TOKENS)
        table = tuple(range(1, 1 + -(-context // BLOCK_TOKENS)))
        spread = range(1, num_seqs + 1)
        return MicroBatch(
            token_ids=tuple(7919 * number % self._shape.vocab_size for number in spread),
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
            expert_s=self._link.compute_meter.median_s,
            comm_s=self._link.comm_meter.median_s,
        )

    @property
    def is_linked(self) -> bool:
        """Whether every expert worker is connected."""
        return len(self._connected) == self._assignment.placement.num_nodes

    @property
    def num_lanes(self) -> int:
        """Lanes that run; 0 before they do."""
        return len(self._lanes)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of all requests that are here."""
        return self._scheduler.request_ids

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_free_blocks(self) -> int:
        return self._scheduler.num_free_blocks

    def counters(self) -> dict[str, float]:
        link = self._link.counters
        counters: dict[str, float] = {
            "passes": self._num_passes,
            "batch_tokens": self._batch_tokens,
            "batch_contexts": self._batch_contexts,
            "blocks": self._num_blocks - 1,
            "posts": link.posts,
            "rows_sent": link.rows,
            "answers": link.answers,
            "attention_s": self._half.meter.total_s,
            "shared_experts_s": self._half.shared_meter.total_s,
            "sample_s": self._half.pass_meter.total_s,
            "weight_bytes_read": self._half.weight_bytes_read,
            "kv_blocks": self._scheduler.num_blocks,
            "kv_blocks_lost": 0 if self.num_running else self._scheduler.num_blocks - self.num_free_blocks,
            **self._scheduler.counters,
        }
        counters |= {f"dropped_{reason.replace(' ', '_')}": count for reason, count in link.dropped.items()}
        return counters


def _has_left(num_left: int, lane: int) -> bool:
    return num_left > 0
