"""The requests of an attention worker: from the coordinator into the scheduler, from there onto lanes and back.

Answers that are held to a grammar wait until it is compiled, on another thread and in order of arrival, before the
scheduler hears of them. What is new of requests, and why they ended, goes out through `report`: tokens once the pass
after them is launched, so that the device need not wait for words, and before anything else that is said or heard.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from msi.attention.journal import Journal, RequestAccount, digest_of
from msi.attention.prompt_share import PromptShare
from msi.attention.scheduler import Scheduler
from msi.attention.sequence import Sequence
from msi.complaints import Complaints
from msi.control.messages import Assignment, PassDone, RequestsFailed
from msi.control.move_messages import Release, Released
from msi.errors import (
    BatchRefused,
    DeadlineExceeded,
    EngineError,
    Failure,
    InvalidRequest,
    RequestFailed,
    TransportError,
    Unavailable,
    one_line,
)
from msi.kernels import BLOCK_TOKENS
from msi.net.alarm import Alarm
from msi.request_spans import OpenSpans
from msi.text.grammars import Grammars
from msi.types import GrammarState, MicroBatch, Progress, Request, Sampled
from msi.worker.host import ServedShape

log = logging.getLogger(__name__)


class Requests:
    """Of one life. Implements `msi.attention.lanes.MicroBatches`.

    Args:
        num_blocks: KV blocks, the padding block included.
        report: takes the messages for the coordinator.
        clock: seconds, monotonic.
        grammars: of the model's tokens; None where nothing is held to one.
        spans: of requests that are traced; None where none is.
    """

    def __init__(
        self,
        assignment: Assignment,
        shape: ServedShape,
        num_blocks: int,
        report: Callable[[Any], None],
        clock: Callable[[], float] = time.monotonic,
        grammars: Grammars | None = None,
        spans: OpenSpans | None = None,
    ) -> None:
        self.num_passes = self.batch_tokens = self.batch_contexts = 0
        self._assignment = assignment
        self._shape = shape
        self._num_blocks = num_blocks
        self._report = report
        self._clock = clock
        self._began = [0.0] * assignment.link.num_lanes  # when the pass of each lane did
        self._came_at: dict[str, float] = {}  # of those that were never admitted
        self._queued_s: dict[str, float] = {}  # of those that have no token yet
        self._spans = spans
        self.scheduler = self._new_scheduler(num_lanes=1)
        self.journal = Journal()
        self._idle = [Alarm() for _ in range(assignment.link.num_lanes)]
        self._ended = Alarm()
        self._untold: list[tuple[tuple[Progress, ...], list[Sequence]]] = []  # of passes, with whom they ended
        self._has_untold = Alarm()
        self._num_reports = 0
        self._grammars = grammars
        self._to_compile: dict[str, Request] = {}  # by id, in order of arrival
        self._has_to_compile = Alarm()
        self._deadlines: list[tuple[float, str]] = []  # a heap; also of requests that have ended
        self._complaints = Complaints(log)

    def _new_scheduler(self, num_lanes: int) -> Scheduler:
        limits = self._assignment.limits
        most, delay_s = limits.max_num_batched_tokens, limits.prefill_delay_ms / 1e3
        return Scheduler(
            limits,
            num_lanes=num_lanes,
            num_blocks=self._num_blocks,
            block_tokens=BLOCK_TOKENS,
            vocab_size=self._shape.vocab_size,
            eos_token_ids=self._shape.eos_token_ids,
            prompt_share=PromptShare(most, delay_s) if delay_s else None,
        )

    def spread_over(self, num_lanes: int) -> None:
        """Before lanes run: so many there will be."""
        came_early = self.scheduler.requests  # whoever told how many was heard late
        self.scheduler = self._new_scheduler(num_lanes)
        for request in came_early:
            self.submit(request)

    def use_lanes(self, num_lanes: int) -> None:
        """While lanes run: see `Scheduler.use_lanes`."""
        self.scheduler.use_lanes(num_lanes)
        self._wake()

    # -- the coordinator's side --------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Takes a request, or reports why it cannot."""
        self._tell()  # of one before it that was called so
        if request.timeout_s:
            heappush(self._deadlines, (self._clock() + request.timeout_s, request.request_id))
        self.journal.begins(request.request_id)
        if not request.output_token_ids:
            self._came_at.setdefault(request.request_id, self._clock())
        if self._spans is not None and request.trace:
            self._spans.begin(request.request_id, "attention worker", request.trace)
        if request.params.structured_outputs is None:
            self._add(request)
        elif not request.num_resumptions and self.num_waiting >= self._assignment.limits.max_num_waiting:
            self._fail([request.request_id], Unavailable("too many requests wait here already; try again later"))
        else:
            self._to_compile[request.request_id] = request
            self._has_to_compile.ring()

    async def compile_grammars(self) -> None:
        """Takes the requests that wait for it as their grammars are compiled, for ever."""
        while True:
            await self._has_to_compile.wait()
            while self._to_compile:
                request = next(iter(self._to_compile.values()))
                try:
                    grammar: GrammarState | EngineError = await asyncio.to_thread(self._begin_grammar, request)
                except EngineError as error:
                    grammar = error
                except Exception as error:
                    self._complaints.say(error, "a grammar could not be compiled")
                    grammar = self._failed(one_line(error))
                if self._to_compile.get(request.request_id) is not request:
                    continue  # it was cancelled meanwhile
                del self._to_compile[request.request_id]
                if isinstance(grammar, EngineError):
                    self._fail([request.request_id], grammar)
                    self._wake()
                else:
                    self._add(request, grammar)

    def _begin_grammar(self, request: Request) -> GrammarState:
        asked = request.params.structured_outputs
        assert asked is not None, request.request_id
        if self._grammars is None:
            raise InvalidRequest("this instance holds no answers to a grammar", param="structured_outputs")
        return self._grammars.begin(asked)

    def _add(self, request: Request, grammar: GrammarState | None = None) -> None:
        try:
            self.scheduler.add(request, grammar)
        except EngineError as error:
            self._fail([request.request_id], error)
        except Exception as error:
            self._complaints.say(error, "a request could not be taken")
            self.scheduler.cancel(request.request_id)
            self._fail([request.request_id], self._failed(one_line(error)))
        self._wake()

    def cancel(self, request_id: str, why: str = "cancelled") -> None:
        self._tell()
        if self._to_compile.pop(request_id, None) is None:
            self.scheduler.cancel(request_id)
        self._forget(request_id, why)
        self._wake()

    def release(self, wanted: Release) -> None:
        """Lets a request go on elsewhere, and says so: what the pass that it is in computes for it is not told."""
        self._tell()
        request_id = wanted.request_id
        if (request := self._to_compile.get(request_id)) is not None:
            told = len(request.output_token_ids), request.num_scored
        elif (sequence := self.scheduler.find(request_id)) is not None:
            told = len(sequence.tokens) - len(sequence.request.prompt_token_ids), sequence.num_scored
        else:
            return
        self.cancel(request_id, "it goes on elsewhere")
        ours = self._assignment
        self._report(Released(ours.worker_id, ours.incarnation, request_id, wanted.number, *told))

    def _end_late_ones(self) -> None:
        """Those whose own time is over are not computed any more; the coordinator ends them, too."""
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heappop(self._deadlines)
            if self._to_compile.pop(request_id, None) is not None or self.scheduler.cancel(request_id):
                self._fail([request_id], DeadlineExceeded("the time that this request gave itself is over"))

    @property
    def num_waiting(self) -> int:
        """Requests that do not run yet, be it that their grammars are being compiled."""
        return self.scheduler.num_waiting + len(self._to_compile)

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle and not self._to_compile and not self._untold

    async def wait_idle(self) -> None:
        """Until no request is left, and all is told."""
        while not self.is_idle:
            await self._ended.wait()

    def check_integrity(self) -> None:
        self.scheduler.check_integrity()

    @property
    def ids(self) -> tuple[str, ...]:
        """Of all that are here."""
        ended = (one.request.request_id for _, with_it in self._untold for one in with_it)
        return (*self.scheduler.request_ids, *self._to_compile, *ended)

    @property
    def num_reports(self) -> int:
        """PassDones so far."""
        return self._num_reports

    def accounts(self) -> list[RequestAccount]:
        """Of all that are here, and of those that ended not long ago, for a coordinator that is new."""
        self._tell()
        waiting = [
            RequestAccount(one.request_id, digest_of(one), len(one.output_token_ids), one.num_scored)
            for one in self._to_compile.values()
        ]
        return self.journal.accounts(self.scheduler.sequences) + waiting

    def _fail(self, request_ids: list[str], error: EngineError) -> None:
        if not request_ids:
            return
        self._tell()
        for request_id in request_ids:
            self._forget(request_id, str(error))
        if isinstance(error, RequestFailed):
            log.warning("%s ended: %s", ", ".join(request_ids), error)
        ours = self._assignment
        self._report(RequestsFailed(ours.worker_id, ours.incarnation, tuple(request_ids), Failure.of(error)))

    def _forget(self, request_id: str, why: str) -> None:
        self._came_at.pop(request_id, None)
        self._queued_s.pop(request_id, None)
        self.journal.forget(request_id)
        if self._spans is not None:
            self._spans.end(request_id, why)

    def _failed(self, reason: str) -> RequestFailed:
        return RequestFailed(f"{self._assignment.worker_id}: {reason}")

    def _wake(self) -> None:
        for request_id in self.scheduler.take_admitted():
            if (came_at := self._came_at.pop(request_id, None)) is not None:
                self._queued_s[request_id] = max(0.0, self._clock() - came_at)
                if self._spans is not None:
                    self._spans.event(request_id, "admitted")
        for lane in range(self.scheduler.num_lanes):
            if self.scheduler.has_work(lane):
                self._idle[lane].ring()
        if self.is_idle:
            self._ended.ring()

    # -- the lanes' side ---------------------------------------------------------------------------------------------

    async def next(self, lane: int) -> MicroBatch:
        while True:
            seen = self.scheduler.num_admissions
            if self._deadlines:
                self._end_late_ones()
            try:
                micro_batch = self.scheduler.plan(lane)
            except Exception as error:
                self._end_lane(lane, error)
                continue
            if self.scheduler.num_admissions > seen:
                self._wake()  # onto other lanes
            if micro_batch is not None:
                self._began[lane] = self._clock()
                return micro_batch
            await self._idle[lane].wait()

    def may_continue(self, lane: int) -> bool:
        return self.scheduler.may_continue(lane)

    def finish(self, lane: int, micro_batch: MicroBatch, sampled: Sampled) -> None:
        self.num_passes += 1
        self.batch_tokens += micro_batch.num_tokens
        self.batch_contexts += sum(micro_batch.context_lens)
        try:
            self.scheduler.took(lane, self._clock() - self._began[lane])
            for index, reason in sampled.failures.items():
                error = reason if isinstance(reason, InvalidRequest) else self._failed(reason)
                self._fail(self.scheduler.fail(lane, (index,)), error)
            progress = self.scheduler.update(
                lane, sampled.token_ids, sampled.logprobs, sampled.ended, sampled.prompt_logprobs
            )
        except Exception as error:
            self._end_lane(lane, error)
            return
        if progress:
            self._untold.append((tuple(progress), self.scheduler.take_ended()))
            self._has_untold.ring()
        self._wake()

    async def tell_progress(self) -> None:
        """Tells what passes have brought, for ever: whenever their lanes have gone on, and wait."""
        while True:
            await self._has_untold.wait()
            self._tell()

    def _tell(self) -> None:
        """What passes have brought and nobody was told."""
        if not self._untold:
            return
        untold, self._untold = self._untold, []
        ours = self._assignment
        for told, ended in untold:
            if self._queued_s:
                told = tuple(self._with_queue_time(one) for one in told)
            if self._spans is not None:
                self._end_spans(told)
            self._report(PassDone(ours.worker_id, ours.incarnation, self._num_reports, told))
            self._num_reports += 1
            self.journal.told(told, ended, self._clock())
        if self.is_idle:
            self._ended.ring()

    def _with_queue_time(self, one: Progress) -> Progress:
        queued_s = self._queued_s.pop(one.request_id, None)
        if queued_s is not None and self._spans is not None:
            self._spans.event(one.request_id, "first token")
        return one if queued_s is None else one._replace(queued_s=queued_s)

    def _end_spans(self, progress: tuple[Progress, ...]) -> None:
        assert self._spans is not None
        for one in progress:
            if one.finish_reason is not None:
                self._spans.end(one.request_id, gen_ai__response__finish_reason=one.finish_reason)

    def fail(self, lane: int, micro_batch: MicroBatch, error: Exception) -> None:
        scheduler = self.scheduler
        if isinstance(error, TransportError) and not isinstance(error, BatchRefused):
            scheduler.give_up(lane)
            self.hold_is_over(error)
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

    def hold_is_over(self, error: TransportError) -> None:
        """Ends every request that was admitted."""
        lost = RequestFailed(f"expert worker {error.peer} was lost: {error.reason}")
        self._fail(self.scheduler.fail_running(), lost)
        self._wake()

    def _end_lane(self, lane: int, error: Exception) -> None:
        """The scheduler itself went wrong with this lane. If that goes beyond the lane, the worker ends."""
        self._complaints.say(error, "the scheduler failed; the requests of a lane end")
        self._fail(self.scheduler.fail_lane(lane), self._failed(one_line(error)))
        self.scheduler.check_integrity()
        self._wake()
