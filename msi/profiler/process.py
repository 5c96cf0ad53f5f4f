"""A process that hosts one side of a model and times it on request: what `msi.profiler.measure` sends out.

Weights are loaded with `ModelFiles`; a side alone is `msi.profiler.sides`; for what lies between the sides the two
roles run over a real link, as in a worker. Knows nothing of profiles.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop

from msi.attention.kv_cache import KvCache
from msi.attention.role import AttentionRole
from msi.attention.scheduler import Scheduler
from msi.control.messages import FROM_WORKER, Assignment, ExpertAddress, Linked, PassDone, Topology
from msi.device.choice import OpenedDevice, open_device, precision_on, prepare_device
from msi.device.cpu import CpuDevice
from msi.errors import ConfigError, EngineError
from msi.experts.role import ExpertRole
from msi.kernels import BLOCK_TOKENS
from msi.kernels.routing import answer_row_bytes, row_bytes
from msi.net.codec import Codec
from msi.net.inproc import InprocTransport
from msi.net.shm import ShmTransport
from msi.net.slots import HEADER_BYTES
from msi.net.tcp import TcpTransport
from msi.net.transport import Transport
from msi.placement import place_evenly
from msi.precision import Precision
from msi.profiler.sides import SLOT_ROWS, AttentionSide, ExpertSide, Timed
from msi.settings import LinkShape, SchedulerLimits, Timeouts
from msi.types import Place, Request, SamplingParams
from msi.worker.loading import DTYPES, LoadedPart, ModelFiles, row_dtypes
from msi.worker.torch_host import TorchModel

LINK_TIMEOUT_S = 60.0
ROUTING_CONTEXT = 64  # random tokens, then
ROUTING_TOKENS = 24  # those that the model goes on with


@dataclass(frozen=True, slots=True)
class Hosting:
    """What a process hosts.

    Attributes:
        role: "attention", "expert", or "colocated" for both.
        max_seqs, max_context: the largest micro-batch of decoding sequences that will be asked for.
        link_key: what the two sides of one profile know, and no other process: see `msi.net.link_proof`.
    """

    model_dir: Path
    role: str
    device: str
    precision: Precision
    load_format: str
    max_seqs: int
    max_context: int
    link_key: bytes = field(repr=False)


class StageProcess:
    """The parent's end: a child process and the calls that it answers, one at a time. A context manager.

    Calls raise ConfigError with the child's sentence.
    """

    def __init__(self, hosting: Hosting) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, hosting), daemon=True)
        self._process.start()
        self.pid = self._process.pid or 0
        theirs.close()

    def __enter__(self) -> StageProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def start(self, name: str, *arguments: object) -> None:
        """Calls a method of `StageHost`; fetch its result with `result` before the next call."""
        self._connection.send((name, arguments))

    def result(self) -> Any:
        try:
            ok, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ConfigError("a measuring process died; is there enough memory?") from error
        if not ok:
            raise ConfigError(value)
        return value

    def call(self, name: str, *arguments: object) -> Any:
        self.start(name, *arguments)
        return self.result()


def _main(connection: Connection, hosting: Hosting) -> None:
    uvloop.run(_serve(connection, hosting))


async def _serve(connection: Connection, hosting: Hosting) -> None:
    """Answers calls until the parent closes the connection, or is gone."""
    host = StageHost(hosting)
    while True:
        try:
            name, arguments = await asyncio.to_thread(connection.recv)
        except (EOFError, OSError):
            os._exit(0)  # threads of devices may be in the middle of something, and nobody wants it
        try:
            answer: tuple[bool, object] = (True, await getattr(host, name)(*arguments))
        except EngineError as error:
            answer = (False, str(error))
        connection.send(answer)


class StageHost:
    """What the parent may call; each method is one call."""

    def __init__(self, hosting: Hosting) -> None:
        self._hosting = hosting
        self._files = ModelFiles(hosting.model_dir, hosting.load_format)
        self._config = self._files.config
        self._placement = place_evenly(self._config.num_experts, 1)
        self._device: OpenedDevice | None = None
        self._loaded: LoadedPart | None = None
        self._precision = Precision()
        self._kv_cache: KvCache | None = None
        self._side: AttentionSide | ExpertSide | None = None
        self._background: asyncio.Task[None] | None = None
        self._decoding: tuple[int, list[tuple[float, float]]] = (0, [])  # sequences; bytes and batches after each pass
        self._attention_role: AttentionRole | None = None
        self._expert_role: ExpertRole | None = None
        self._stack = contextlib.AsyncExitStack()

    async def load(self) -> Precision:
        """Reads the weights; what everything is held and computed in."""
        hosting = self._hosting
        await asyncio.to_thread(prepare_device, hosting.device)
        device = self._device = open_device(hosting.device, 0)
        config = self._config
        self._precision = precision_on(device, hosting.precision, DTYPES[config.dtype], config.stored_as)
        self._loaded = await asyncio.to_thread(self._files.load, self._assignment(), device)
        return self._precision

    async def use_threads(self, num_threads: int) -> None:
        """From now on measures on a device with so many threads (a GPU has no such choice)."""
        assert self._device is not None
        assert self._loaded is not None
        if isinstance(self._device, CpuDevice):
            await self._device.close()
            self._device = open_device(self._hosting.device, num_threads)
        config, hosting, dtypes = self._config, self._hosting, row_dtypes(self._precision)
        if hosting.role == "attention":
            num_blocks = -(-hosting.max_context // BLOCK_TOKENS)  # of each sequence
            if self._kv_cache is None:
                dtype = DTYPES[self._precision.kv_cache]
                self._kv_cache = KvCache(config, 1 + hosting.max_seqs * num_blocks, self._device, dtype)
                self._kv_cache.fill(0.01)  # pages that nothing was written to are all one page, which a cache holds
            self._side = AttentionSide(
                config, self._loaded, self._kv_cache, num_blocks, self._device, self._placement, dtypes
            )  # fmt: skip
        elif hosting.role == "expert":
            self._side = ExpertSide(config, self._loaded, self._device, dtypes)

    # -- one side ----------------------------------------------------------------------------------------------------

    async def measure(self, size: Any, num_passes: int) -> list[Timed]:
        assert self._side is not None
        return [await self._side.one_pass(size) for _ in range(num_passes)]

    async def begin_background(self, size: Any) -> None:
        """Computes passes of a size until `end_background`."""
        side = self._side
        assert side is not None

        async def compute() -> None:
            while True:
                await side.one_pass(size)

        self._background = asyncio.ensure_future(compute())
        await asyncio.sleep(0.1)

    async def end_background(self) -> None:
        assert self._background is not None
        self._background.cancel()
        await asyncio.gather(self._background, return_exceptions=True)
        await asyncio.sleep(0.05)  # the layer in progress

    # -- both sides and a link between them --------------------------------------------------------------------------

    async def listen(self, transport: str) -> str:
        """Starts the expert role; where it listens."""
        role = self._expert_role = ExpertRole(
            self._assignment(), self._model(), self._open(transport), clock=time.monotonic
        )
        self._stack.callback(role.close)
        return await role.listen()

    async def link(self, transport: str, address: str) -> None:
        """Starts the attention role and connects it."""
        linked = asyncio.Event()

        def report(message: object) -> None:
            if isinstance(message, Linked) and message.is_complete:
                linked.set()
            elif isinstance(message, PassDone):
                self._pass_done(len(message.progress))

        longest = ROUTING_CONTEXT + self._routing_tokens(self._hosting.max_seqs)
        num_blocks = 1 + self._hosting.max_seqs * -(-longest // BLOCK_TOKENS)
        role = self._attention_role = AttentionRole(
            self._assignment(), self._model(), self._open(transport), num_blocks, report, clock=time.monotonic
        )
        await self._stack.enter_async_context(_running(role))
        role.links.use_topology(Topology((ExpertAddress(Place(0), "expert-0", 0, address),), {}))
        async with asyncio.timeout(LINK_TIMEOUT_S):
            await linked.wait()

    async def linked_passes(self, num_seqs: int, num_passes: int) -> tuple[float, float]:
        """Seconds that passes of one micro-batch over the link take, and T_c as the link itself sees it."""
        assert self._attention_role is not None
        started = time.monotonic()
        times = await self._attention_role.measuring.calibrate(1, num_seqs, num_passes)
        return time.monotonic() - started, times.comm_s

    async def routing(self, batches: tuple[int, ...]) -> list[float]:
        """Mean active experts of a layer while so many sequences decode. For a process that hosts both roles; ends
        with them serving, so nothing else can be measured over this link.
        """
        role = self._attention_role
        assert role is not None
        assert self._expert_role is not None
        role.use_lanes(1)
        chance, found = random.Random(1), []
        for num_seqs in batches:
            params = SamplingParams(max_tokens=self._routing_tokens(num_seqs), temperature=0, ignore_eos=True, seed=0)
            self._decoding = (num_seqs, [])
            for index in range(num_seqs):
                prompt = tuple(chance.randrange(self._config.vocab_size) for _ in range(ROUTING_CONTEXT))
                role.requests.submit(Request(f"{num_seqs}-{index}", prompt, params))
            await role.requests.wait_idle()
            if len(self._decoding[1]) < 2:
                raise ConfigError(
                    f"{num_seqs} sequences do not decode all at once within the {self._config.max_position_embeddings} "
                    "positions of this model; give smaller `batches`"
                )
            (first_bytes, first_batches), *_, (last_bytes, last_batches) = self._decoding[1]
            expert_bytes = self._config.expert_values * self._precision.matrix_bytes
            found.append((last_bytes - first_bytes) / expert_bytes / (last_batches - first_batches))
        return found

    def _routing_tokens(self, num_seqs: int) -> int:
        """So many that the first sequences still decode when the last prompts are through."""
        tokens = ROUTING_TOKENS + passes_of_prompts(num_seqs, ROUTING_CONTEXT, SLOT_ROWS)
        return min(tokens, self._config.max_position_embeddings - ROUTING_CONTEXT)

    def _pass_done(self, num_tokens: int) -> None:
        """Notes what the experts have read so far, whenever all sequences got a token."""
        num_seqs, seen = self._decoding
        if self._expert_role is not None and num_tokens == num_seqs:
            counters = self._expert_role.counters()
            seen.append((counters.weight_bytes_read, counters.batches))

    async def computed_s(self) -> float:
        """Seconds that the roles hosted here have spent on layers, heads and sampling since they started."""
        computed_s = 0.0
        if self._attention_role is not None:
            counters = self._attention_role.counters()
            computed_s += counters.attention_s + counters.shared_experts_s + counters.sample_s
        if self._expert_role is not None:
            computed_s += self._expert_role.counters().expert_batches_s
        return computed_s

    async def unlink(self) -> None:
        """Ends the roles."""
        await self._stack.aclose()
        self._attention_role = self._expert_role = None

    async def message_bytes(self, num_seqs: int) -> int:
        """Of a dispatch of so many rows and what comes back, in the mean."""
        config, dtypes = self._config, row_dtypes(self._precision)
        sent = row_bytes(config.hidden_size, config.top_k, dtypes.sent)
        return HEADER_BYTES + num_seqs * (sent + answer_row_bytes(config.hidden_size, dtypes.answered)) // 2

    def _model(self) -> TorchModel:
        assert self._loaded is not None
        assert self._device is not None
        return TorchModel(self._files, self._loaded, self._assignment(), self._device, memory_utilization=0.9)

    def _open(self, name: str) -> Transport:
        assert self._device is not None
        transport: Transport
        if name == "inproc":
            transport = InprocTransport(poller=self._device.poller)
        elif name == "shm":
            transport = ShmTransport(key=self._hosting.link_key, poller=self._device.poller)
        else:
            transport = TcpTransport("127.0.0.1", key=self._hosting.link_key)
        self._stack.push_async_callback(transport.close)
        return transport

    # -- the scheduler -----------------------------------------------------------------------------------------------

    async def scheduling(self, num_seqs: int, context_len: int, num_passes: int) -> list[float]:
        """Seconds per pass of sequences that decode: from its end to the next one's plan, the report included."""
        return await asyncio.to_thread(time_scheduling, self._assignment().limits, num_seqs, context_len, num_passes)

    def _assignment(self) -> Assignment:
        hosting = self._hosting
        return Assignment(
            instance="profile", worker_id=f"{hosting.role}-0",
            role="expert" if hosting.role == "expert" else "attention",
            place=Place(0), incarnation=0, placement=self._placement, num_seats=1,
            is_colocated=hosting.role == "colocated", memory_share=1.0,
            limits=SchedulerLimits(
                self._config.max_position_embeddings, hosting.max_seqs, SLOT_ROWS, prefill_delay_ms=0
            ),
            link=LinkShape(num_lanes=1, slot_rows=SLOT_ROWS),
            timeouts=Timeouts(peer_timeout_s=LINK_TIMEOUT_S, lost_after_s=LINK_TIMEOUT_S),
            precision=self._precision,
        )  # fmt: skip


@contextlib.asynccontextmanager
async def _running(role: AttentionRole) -> AsyncIterator[None]:
    task = asyncio.ensure_future(role.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# -- scheduling ------------------------------------------------------------------------------------------------------


def passes_of_prompts(num_seqs: int, context_len: int, num_rows: int) -> int:
    """After how many passes of so many rows all decode whose prompts come at once; each that does has a row."""
    num_passes = num_tokens = 0
    while num_tokens < num_seqs * context_len:
        num_tokens += max(1, num_rows - num_tokens // context_len)
        num_passes += 1
    return num_passes


def time_scheduling(limits: SchedulerLimits, num_seqs: int, context_len: int, num_passes: int) -> list[float]:
    """See `StageHost.scheduling`."""
    scheduler = Scheduler(
        # all prompts in one pass, as the first sequences would end before the last were through theirs
        replace(limits, max_num_seqs=num_seqs, max_num_batched_tokens=num_seqs * context_len),
        num_lanes=1,
        num_blocks=1 + num_seqs * (2 + -(-(context_len + num_passes) // BLOCK_TOKENS)),
        block_tokens=BLOCK_TOKENS,
        eos_token_ids=(),
    )
    codec = Codec(FROM_WORKER)
    params = SamplingParams(max_tokens=num_passes + 2, temperature=0, ignore_eos=True, seed=0)
    for index in range(num_seqs):
        prompt = tuple((index * context_len + position) % 1000 for position in range(context_len))
        scheduler.add(Request(f"req-{index:032x}", prompt, params))
    times = []
    micro_batch = scheduler.plan(0)
    while micro_batch is not None:
        is_decoding = len(micro_batch.logit_rows) == micro_batch.num_tokens == num_seqs
        started = time.perf_counter()
        progress = scheduler.update(0, [1] * len(micro_batch.logit_rows))
        codec.encode(PassDone("attention-0", 0, 0, tuple(progress)))
        micro_batch = scheduler.plan(0)
        if is_decoding:
            times.append(time.perf_counter() - started)
    return times
