"""msi-launch run-batch: a file of requests in, a file of answers out, by the code that answers HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import orjson

from msi.engine import Engine
from msi.errors import EngineError, RequestFailed, Unavailable
from msi.offline.places import Places
from msi.server.calls import Calls, error_of, status_of
from msi.server.metrics import Metrics
from msi.server.prepare import CHAT, COMPLETION, NotUnderstood, Prepared, Understood
from msi.server.replies import reply_of
from msi.server.request_log import RequestLog

from .batch_arguments import BatchArguments, parse
from .batch_file import Answers, Line, NotARequestError, answered, answers_in, lines_of, not_answered, parse_line
from .command import EXIT_INTERRUPTED, requests_to_end, run_command
from .display import StatusLine
from .gateway import template_of
from .logs import has_live_terminal, set_up_log

log = logging.getLogger(__name__)

ENDPOINTS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}
TRIES = 3  # of a request whose worker is lost
AGAIN_WITHIN_S = 60.0  # an instance that lost a worker is waited for
TOLD_EVERY_S, SHOWN_EVERY_S = 10.0, 0.5


def run(argv: list[str]) -> int:
    """Runs msi-launch run-batch; the exit status."""
    return run_command("msi-launch run-batch", lambda: _run(parse(argv)))


def _run(arguments: BatchArguments) -> int:
    from .main import run_on_uvloop

    set_up_log("run-batch", arguments.log_level, is_json=arguments.log_json)
    with answers_in(arguments.output_file) as answers:
        status: int = run_on_uvloop(_interruptible(arguments, answers))
    return status


@dataclass(slots=True)
class Counts:
    """Of one run; `known` had answers before it."""

    total: int
    known: int = 0
    answered: int = 0
    refused: int = 0
    tokens: int = 0
    started_at: float = 0.0

    @property
    def left(self) -> int:
        return self.total - self.known - self.answered - self.refused

    def sentence(self, now: float) -> str:
        elapsed_s = max(now - self.started_at, 1e-9)
        done = self.answered + self.refused
        parts = [f"{self.known + done} of {self.total} lines"]
        if self.known:
            parts.append(f"{self.known} were answered before")
        if self.refused:
            parts.append(f"{self.refused} with an error")
        parts.append(f"{self.tokens / elapsed_s:.0f} tokens/s")
        if self.left and done:
            parts.append(f"{duration(self.left * elapsed_s / done)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


async def _interruptible(arguments: BatchArguments, answers: Answers) -> int:
    """Until it is through, or is asked to end."""
    line = StatusLine()
    running = asyncio.ensure_future(_answer_file(arguments, answers, line))
    for number in (signal.SIGINT, *requests_to_end()):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    try:
        with line.shown():
            await running
    except asyncio.CancelledError:
        line.say(f"interrupted; {arguments.output_file} has what was answered, and the same command goes on from there")
        return EXIT_INTERRUPTED
    return 0


async def _answer_file(arguments: BatchArguments, answers: Answers, line: StatusLine) -> None:
    counts = Counts(total=sum(1 for _ in lines_of(arguments.input_file)))
    flags = {"coordinator_flags": (*arguments.log_flags, "--no-gateway"), "worker_flags": arguments.log_flags}
    if arguments.options is None:
        engine = Engine(address=arguments.coordinator, secret=arguments.secret)
    else:
        engine = Engine(options=arguments.options, report=line.update, process_flags=flags)
    async with engine:
        await engine.wait_ready(AGAIN_WITHIN_S)
        calls = Calls(engine, Metrics(), template_of(arguments.chat_template), RequestLog(is_told=False))
        counts.started_at = time.monotonic()
        telling = asyncio.ensure_future(_tell(counts, line))
        try:
            await Batch(engine, calls, answers, counts, arguments.at_once).answer(lines_of(arguments.input_file))
        finally:
            telling.cancel()
            await calls.close()
        line.say(f"{arguments.output_file}: {counts.sentence(time.monotonic())}")


async def _tell(counts: Counts, line: StatusLine) -> None:
    while True:
        await asyncio.sleep(SHOWN_EVERY_S if has_live_terminal() else TOLD_EVERY_S)
        sentence = counts.sentence(time.monotonic())
        if has_live_terminal():
            line.update(sentence, is_usual=True)
        else:
            line.say(sentence)


class Batch:
    """Answers lines, many at a time.

    Args:
        at_once: lines that are held, and choices that the instance has.
    """

    def __init__(self, engine: Engine, calls: Calls, answers: Answers, counts: Counts, at_once: int) -> None:
        self._engine = engine
        self._calls = calls
        self._answers = answers
        self._counts = counts
        self._at_once = at_once
        self._seen: set[str] = set()
        self._places = Places(at_once, lambda: engine.status[0])

    async def answer(self, lines: Iterator[Line]) -> None:
        """Raises EngineError: nothing more can be answered."""
        places = asyncio.Semaphore(self._at_once)

        async def one(line: Line) -> None:
            try:
                await self._line(line)
            finally:
                places.release()

        try:
            async with asyncio.TaskGroup() as tasks:
                for line in lines:
                    await places.acquire()
                    tasks.create_task(one(line))
        except* EngineError as group:
            raise group.exceptions[0] from None

    async def _line(self, line: Line) -> None:
        try:
            request = parse_line(line.text, tuple(ENDPOINTS))
            if request.custom_id in self._seen:
                raise NotARequestError(f"custom_id {request.custom_id[:64]} is on a line before; give each its own")
            self._seen.add(request.custom_id)
        except NotARequestError as error:
            answers = self._answers
            if error.custom_id in answers.ids or (not error.custom_id and line.answer_id in answers.lines):
                self._counts.known += 1
            else:
                self._counts.refused += 1
                sentence = f"line {line.number}: {error}"
                self._answers.add(not_answered(line, error.custom_id, "invalid_request", sentence))
            return
        if request.custom_id in self._answers.ids:
            self._counts.known += 1
            return
        endpoint = ENDPOINTS[request.url]
        asked = await self._calls.understand(endpoint, request.body, client=line)
        request_id = uuid.uuid4().hex
        if isinstance(asked, Understood) and asked.request is not None:
            status, body = await self._tried(asked.request, request_id)
        else:
            assert isinstance(asked, NotUnderstood), asked
            status, body = _error(asked.failure.error())
        self._counts.answered += status == 200
        self._counts.refused += status != 200
        self._answers.add(answered(line, request.custom_id, status, request_id, body))

    async def _tried(self, request: Prepared, request_id: str) -> tuple[int, bytes]:
        """HTTP's status, and the body. Raises EngineError: the instance cannot go on."""
        for tries_left in reversed(range(TRIES)):
            try:
                work = partial(self._computed, request, request_id)
                return 200, await self._places.run(request.params.n * len(request.prompts), work)
            except (Unavailable, RequestFailed) as error:
                if self._engine.failure:
                    raise
                if not tries_left:
                    return _error(error)
                log.warning("a request is tried again: %s", error)
                await self._engine.wait_ready(AGAIN_WITHIN_S)
            except EngineError as error:
                return _error(error)
        raise AssertionError("unreachable")

    async def _computed(self, request: Prepared, request_id: str) -> bytes:
        call = self._calls.call(request, request_id)
        reply = reply_of(call)
        async with contextlib.aclosing(call.outputs):
            async for output in call.outputs:
                reply.add(output)
                self._counts.tokens += len(output.token_ids)
        return b"".join(reply.parts())


def _error(error: EngineError) -> tuple[int, bytes]:
    return status_of(error), orjson.dumps({"error": error_of(error)})
