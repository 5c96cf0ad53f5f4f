"""A process that hosts one side of a model and times it on request: what `tools/profile_stages.py` sends out.

It loads, holds and computes with the runtime's own code: `ModelFiles`, the device and its queue, `AttentionHalf` under
`run_pass`, `ExpertHalf` on wave batches, and for what lies between the sides the two roles over a real link. Here is
only what makes up their input and adds up their meters. Knows nothing of profiles.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
import uvloop

from msi.attention_role import AttentionRole
from msi.device.choice import open_device
from msi.device.cpu import CpuDevice
from msi.device.cuda import CudaDevice
from msi.errors import ConfigError, EngineError
from msi.expert_role import ExpertRole
from msi.kernels.paged_attention import BLOCK_TOKENS
from msi.kernels.routing import PackedRows, row_bytes
from msi.lanes import run_pass
from msi.loading import DTYPES, LoadedPart, ModelFiles
from msi.messages import MESSAGES, Assignment, ExpertAddress, Linked, PassDone, Topology
from msi.meter import StageMeter
from msi.models.attention_half import AttentionHalf, kv_cache_shape, slot_rows_view
from msi.models.config import ModelConfig
from msi.models.expert_half import ExpertHalf
from msi.net.codec import Codec
from msi.net.dispatch_link import DispatchLink
from msi.net.inproc import InprocTransport
from msi.net.shm import ShmTransport
from msi.net.slots import HEADER_BYTES, SlotLayout
from msi.net.tcp import TcpTransport
from msi.net.transport import Transport
from msi.placement import place_evenly
from msi.scheduler import Request, Scheduler
from msi.torch_host import TorchModel
from msi.types import MicroBatch, Placement, SamplingParams, TokenSampling
from msi.waves import Rows, WaveBatch

SLOT_ROWS = 512
LINK_TIMEOUT_S = 60.0
ROUTING_CONTEXT = 64  # random tokens, then
ROUTING_TOKENS = 24  # those that the model goes on with
GREEDY = TokenSampling(0.0, 1.0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Hosting:
    """What a process hosts.

    Attributes:
        role: "attention", "expert", or "colocated" for both.
        max_seqs, max_context: the largest micro-batch of decoding sequences that will be asked for.
    """

    model_dir: Path
    role: str
    device: str
    dtype: str
    load_format: str
    max_seqs: int
    max_context: int


@dataclass(frozen=True, slots=True)
class AttentionSize:
    num_tokens: int
    context_len: int


@dataclass(frozen=True, slots=True)
class ExpertSize:
    num_active_experts: int
    num_expert_rows: int


@dataclass(frozen=True, slots=True)
class Timed:
    """One pass: the mean time of a layer, and what comes once (embedding, head and sampling; 0 for experts)."""

    layer_s: float
    once_s: float = 0.0


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
        """Calls a method of `_Host`; fetch its result with `result` before the next call."""
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
    host = _Host(hosting)
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


class _Host:
    """What the parent may call; each method is one call."""

    def __init__(self, hosting: Hosting) -> None:
        self._hosting = hosting
        self._files = ModelFiles(hosting.model_dir, hosting.load_format)
        self._config = self._files.config
        self._placement = place_evenly(self._config.num_experts, 1)
        self._device: CpuDevice | CudaDevice | None = None
        self._loaded: LoadedPart | None = None
        self._dtype = torch.float32
        self._kv_cache: torch.Tensor | None = None
        self._side: AttentionSide | ExpertSide | None = None
        self._background: asyncio.Task[None] | None = None
        self._decoding: tuple[int, list[tuple[float, float]]] = (0, [])  # sequences; bytes and batches after each pass
        self._attention_role: AttentionRole | None = None
        self._expert_role: ExpertRole | None = None
        self._stack = contextlib.AsyncExitStack()

    async def load(self) -> str:
        """Reads the weights; the dtype that they are held in."""
        hosting = self._hosting
        device = self._device = open_device(hosting.device, 0)
        if hosting.dtype == "auto":
            self._dtype = device.compute_dtype(DTYPES[self._config.dtype])
        else:
            self._dtype = DTYPES[hosting.dtype]
        self._loaded = await asyncio.to_thread(self._files.load, self._assignment(), device)
        return str(self._dtype).removeprefix("torch.")

    async def use_threads(self, num_threads: int) -> None:
        """From now on measures on a device with so many threads (a GPU has no such choice)."""
        assert self._device is not None
        assert self._loaded is not None
        if isinstance(self._device, CpuDevice):
            await self._device.close()
            self._device = open_device(self._hosting.device, num_threads)
        config, hosting = self._config, self._hosting
        if hosting.role == "attention":
            num_blocks = -(-hosting.max_context // BLOCK_TOKENS)  # of each sequence
            if self._kv_cache is None:
                shape = kv_cache_shape(config, 1 + hosting.max_seqs * num_blocks)
                self._kv_cache = self._device.zeros(shape, self._dtype)
                self._kv_cache.fill_(0.01)  # pages that nothing was written to are all one page, which a cache holds
            self._side = AttentionSide(
                config, self._loaded, self._kv_cache, num_blocks, self._device, self._placement
            )  # fmt: skip
        elif hosting.role == "expert":
            self._side = ExpertSide(config, self._loaded, self._device, self._dtype)

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

        num_blocks = 1 + self._hosting.max_seqs * -(-(ROUTING_CONTEXT + ROUTING_TOKENS) // BLOCK_TOKENS)
        role = self._attention_role = AttentionRole(
            self._assignment(), self._model(), self._open(transport), num_blocks, report, clock=time.monotonic
        )
        await self._stack.enter_async_context(_running(role))
        role.use_topology(Topology((ExpertAddress(0, "expert-0", 0, address),), {}))
        async with asyncio.timeout(LINK_TIMEOUT_S):
            await linked.wait()

    async def linked_passes(self, num_seqs: int, num_passes: int) -> float:
        """Seconds that passes of one micro-batch over the link take."""
        assert self._attention_role is not None
        started = time.monotonic()
        await self._attention_role.calibrate(1, num_seqs, num_passes)
        return time.monotonic() - started

    async def routing(self, batches: tuple[int, ...]) -> list[float]:
        """Mean active experts of a layer while so many sequences decode. For a process that hosts both roles; ends
        with them serving, so nothing else can be measured over this link.
        """
        role = self._attention_role
        assert role is not None
        assert self._expert_role is not None
        role.use_lanes(1)
        chance, found = random.Random(1), []
        params = SamplingParams(max_tokens=ROUTING_TOKENS, temperature=0, ignore_eos=True, seed=0)
        for num_seqs in batches:
            self._decoding = (num_seqs, [])
            for index in range(num_seqs):
                prompt = tuple(chance.randrange(self._config.vocab_size) for _ in range(ROUTING_CONTEXT))
                role.submit(Request(f"{num_seqs}-{index}", prompt, params))
            await role.wait_idle()
            (first_bytes, first_batches), *_, (last_bytes, last_batches) = self._decoding[1]
            expert_bytes = self._config.expert_values * self._dtype.itemsize
            found.append((last_bytes - first_bytes) / expert_bytes / (last_batches - first_batches))
        return found

    def _pass_done(self, num_tokens: int) -> None:
        """Notes what the experts have read so far, whenever all sequences got a token."""
        num_seqs, seen = self._decoding
        if self._expert_role is not None and num_tokens == num_seqs:
            counters = self._expert_role.counters()
            seen.append((counters["weight_bytes_read"], counters["batches"]))

    async def computed_s(self) -> float:
        """Seconds that the roles hosted here have spent on layers, heads and sampling since they started."""
        counters: dict[str, float] = {}
        for role in (self._attention_role, self._expert_role):
            counters |= {} if role is None else role.counters()
        names = ("attention_s", "shared_experts_s", "sample_s", "expert_batches_s")
        return sum(counters.get(name, 0.0) for name in names)

    async def unlink(self) -> None:
        """Ends the roles."""
        await self._stack.aclose()
        self._attention_role = self._expert_role = None

    async def message_bytes(self, num_seqs: int) -> int:
        """Of one dispatch of so many rows; what comes back has the size of hidden rows, which differs by few bytes."""
        return HEADER_BYTES + num_seqs * row_bytes(self._config.hidden_size, self._config.top_k, self._dtype)

    def _model(self) -> TorchModel:
        assert self._loaded is not None
        assert self._device is not None
        return TorchModel(self._files, self._loaded, self._assignment(), self._device, memory_utilization=0.9)

    def _open(self, name: str) -> Transport:
        transport: Transport
        if name == "inproc":
            transport = InprocTransport()
        elif name == "shm":
            transport = ShmTransport()
        else:
            transport = TcpTransport("127.0.0.1")
        self._stack.push_async_callback(transport.close)
        return transport

    # -- the scheduler -----------------------------------------------------------------------------------------------

    async def scheduling(self, num_seqs: int, context_len: int, num_passes: int) -> list[float]:
        """Seconds per pass of sequences that decode: from its end to the next one's plan, the report included."""
        return await asyncio.to_thread(_schedule, self._assignment(), num_seqs, context_len, num_passes)

    def _assignment(self) -> Assignment:
        hosting = self._hosting
        return Assignment(
            instance="profile", worker_id=f"{hosting.role}-0",
            role="expert" if hosting.role == "expert" else "attention",
            index=0, incarnation=0, placement=self._placement, num_lanes=1, slot_rows=SLOT_ROWS, num_seats=1,
            dtype=str(self._dtype).removeprefix("torch."), max_model_len=self._config.max_position_embeddings,
            max_num_seqs=hosting.max_seqs, max_num_batched_tokens=SLOT_ROWS,
            is_colocated=hosting.role == "colocated", memory_share=1.0, peer_timeout_s=LINK_TIMEOUT_S,
            heartbeat_s=1.0, lost_after_s=LINK_TIMEOUT_S,
        )  # fmt: skip


@contextlib.asynccontextmanager
async def _running(role: AttentionRole) -> AsyncIterator[None]:
    task = asyncio.ensure_future(role.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _drained(device: CpuDevice | CudaDevice) -> None:
    """Until all work is through and metered: results are there a moment earlier."""
    await device.submit(lambda: None, StageMeter(), "drained", 0)


# -- attention -------------------------------------------------------------------------------------------------------


class AttentionSide:
    """The attention half of a model without experts to talk to: every turn is answered at once, with zeros.

    Args:
        num_blocks: KV blocks of each sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        loaded: LoadedPart,
        kv_cache: torch.Tensor,
        num_blocks: int,
        device: CpuDevice | CudaDevice,
        placement: Placement,
    ) -> None:
        assert loaded.attention is not None
        dtype = kv_cache.dtype
        layout = SlotLayout(1, SLOT_ROWS, row_bytes(config.hidden_size, config.top_k, dtype))
        answers = SlotLayout(1, SLOT_ROWS, config.hidden_size * dtype.itemsize)
        self._config = config
        self._num_blocks = num_blocks
        self._device = device
        self._link = _NoExperts()
        self._half = AttentionHalf(
            config,
            loaded.attention,
            kv_cache,
            placement,
            device,
            dispatch_layout=layout,
            answer_layout=answers,
            landing=memoryview(bytearray(answers.region_bytes)),
            landing_stride=answers.region_bytes,
        )
        self._half.attach(0, memoryview(bytearray(layout.region_bytes)))

    async def one_pass(self, size: AttentionSize) -> Timed:
        half, num_layers = self._half, self._half.num_layers
        shared_s, once_s = half.shared_meter.total_s, half.pass_meter.total_s
        half.meter.clear_recent()
        await run_pass(0, self._micro_batch(size), half, cast(DispatchLink, self._link), lambda lane: True)
        await _drained(self._device)
        first, *others = half.meter.recent  # the first layer's work looks up embeddings and lays out the pass as well
        layer_s = sum(others) / len(others) if others else first
        return Timed(
            layer_s=layer_s + (half.shared_meter.total_s - shared_s) / num_layers,
            once_s=half.pass_meter.total_s - once_s + max(0.0, first - layer_s),
        )

    def _micro_batch(self, size: AttentionSize) -> MicroBatch:
        """Decoding sequences, each with KV blocks of its own."""
        count, used = size.num_tokens, -(-size.context_len // BLOCK_TOKENS)
        firsts = [1 + self._num_blocks * sequence for sequence in range(count)]
        return MicroBatch(
            token_ids=tuple(7919 * sequence % self._config.vocab_size for sequence in range(1, count + 1)),
            positions=(size.context_len - 1,) * count,
            query_lens=(1,) * count,
            context_lens=(size.context_len,) * count,
            block_tables=tuple(tuple(range(first, first + used)) for first in firsts),
            logit_rows=tuple(range(count)),
            sampling=(GREEDY,) * count,
        )


class _NoExperts:
    """What `run_pass` needs of a link, with nobody at the other end."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def open(self, lane: int, more: bool) -> _Turn:
        return _Turn(self._loop)

    async def landed(self, turn: _Turn) -> None:
        await turn.done

    def check(self, turn: _Turn) -> None:
        """Nobody is ever lost."""


class _Turn:
    """A turn that is over once it is posted."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.done: asyncio.Future[None] = loop.create_future()

    def post(self, num_rows: object) -> None:
        self._loop.call_soon_threadsafe(_resolve, self.done, None)

    def fail(self, error: Exception) -> None:
        self._loop.call_soon_threadsafe(_resolve, self.done, error)


def _resolve(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


# -- experts ---------------------------------------------------------------------------------------------------------


class ExpertSide:
    """The expert half of a model with all experts on one node, and rows made up to hit as many as are asked for."""

    def __init__(
        self, config: ModelConfig, loaded: LoadedPart, device: CpuDevice | CudaDevice, dtype: torch.dtype
    ) -> None:
        assert loaded.experts is not None
        layout = SlotLayout(1, SLOT_ROWS, row_bytes(config.hidden_size, config.top_k, dtype))
        answers = SlotLayout(1, SLOT_ROWS, config.hidden_size * dtype.itemsize)
        landing = memoryview(bytearray(layout.region_bytes))
        rows = PackedRows.view(
            slot_rows_view(landing, 1, layout.region_bytes, layout), config.hidden_size, config.top_k, dtype
        )
        self._rows = PackedRows(rows.hidden[0, 0], rows.topk_weights[0, 0], rows.topk_ids[0, 0])
        self._rows.hidden.normal_(generator=torch.Generator().manual_seed(0))
        self._rows.topk_weights.fill_(1 / config.top_k)
        self._config = config
        self._device = device
        self._num_layers = config.num_sparse_layers
        self._half = ExpertHalf(
            config,
            loaded.experts,
            device,
            dtype,
            dispatch_layout=layout,
            answer_layout=answers,
            landing=landing,
            landing_stride=layout.region_bytes,
            num_seats=1,
        )
        self._half.attach(0, memoryview(bytearray(answers.region_bytes)))

    async def one_pass(self, size: ExpertSize) -> Timed:
        loop = asyncio.get_running_loop()
        num_rows = self._route(size)
        before_s = self._half.meter.total_s
        for layer in range(self._num_layers):
            done: asyncio.Future[None] = loop.create_future()
            self._half.run(WaveBatch(0, layer, (Rows(0, layer, num_rows),)), _finishing(loop, done))
            await done
        await _drained(self._device)
        return Timed((self._half.meter.total_s - before_s) / self._num_layers)

    def _route(self, size: ExpertSize) -> int:
        """Deals the pairs out to tokens, each active expert in turn; how many tokens that makes."""
        active, k = size.num_active_experts, self._config.top_k
        each = min(active, k)  # a token meets an expert once
        num_rows = -(-size.num_expert_rows // each)
        if num_rows > SLOT_ROWS:
            raise ConfigError(f"{size.num_expert_rows} rows of {active} experts do not fit a slot of {SLOT_ROWS} rows")
        ids = torch.full((num_rows, k), -1, dtype=torch.int32)
        pairs = torch.arange(num_rows * each)
        dealt = torch.where(pairs < size.num_expert_rows, pairs % active, -1)
        ids[:, :each] = dealt.view(num_rows, each).to(torch.int32)
        self._rows.topk_ids[:num_rows] = ids
        return num_rows


def _finishing(
    loop: asyncio.AbstractEventLoop, done: asyncio.Future[None]
) -> Callable[[WaveBatch, float, Exception | None], None]:
    def finished(batch: WaveBatch, compute_s: float, error: Exception | None) -> None:
        loop.call_soon_threadsafe(_resolve, done, error)

    return finished


# -- scheduling ------------------------------------------------------------------------------------------------------


def _schedule(assignment: Assignment, num_seqs: int, context_len: int, num_passes: int) -> list[float]:
    """See `_Host.scheduling`."""
    scheduler = Scheduler(
        num_lanes=1,
        num_blocks=1 + num_seqs * (2 + -(-(context_len + num_passes) // BLOCK_TOKENS)),
        block_tokens=BLOCK_TOKENS,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=SLOT_ROWS,
        max_model_len=assignment.max_model_len,
        eos_token_ids=(),
    )
    codec = Codec(*MESSAGES)
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
        codec.encode(PassDone(assignment.worker_id, 0, tuple(progress)))
        micro_batch = scheduler.plan(0)
        if is_decoding:
            times.append(time.perf_counter() - started)
    return times
