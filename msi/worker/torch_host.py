"""The host of a real worker: model files, a torch device, and transports between processes."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from msi.attention.half import AttentionHalf
from msi.attention.kv_cache import KvCache
from msi.attention.pass_memory import Graphed, PassBytes, bytes_of_passes, graphed
from msi.attention.warming import warm
from msi.control.counters import ProcessCounters, by_reason
from msi.control.messages import Assignment
from msi.device.choice import OpenedDevice, open_device, precision_on, prepare_device, products_of, rows_memory
from msi.device.cpu import CpuDevice
from msi.device.stream_device import StreamDevice
from msi.errors import ConfigError
from msi.experts.half import ExpertHalf
from msi.kernels.routing import answer_row_bytes, row_bytes
from msi.net import shm
from msi.net.auto import AutoTransport
from msi.net.combine_link import CombineLink
from msi.net.complaints import Complaints
from msi.net.dispatch_link import DispatchLink
from msi.net.inproc import InprocTransport
from msi.net.rdma.drivers import check_rdma, open_rdma
from msi.net.regions import Allocator
from msi.net.secret import NO_SECRET, Trust
from msi.net.shm import ShmTransport
from msi.net.tcp import TcpTransport, address_towards, split_address
from msi.net.transport import Transport
from msi.precision import NONE, Precision
from msi.settings import SHARING, HostOptions, ModelSource
from msi.text.grammars import Grammars
from msi.tracing import Spans
from msi.worker.host import ExpertPart, ServedShape
from msi.worker.loading import DTYPES, LoadedPart, ModelFiles, fitting, resident_memory_bytes, row_dtypes

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class HostSettings:
    """What a worker is told about what it runs on.

    Attributes:
        precision: "auto" is the checkpoint's, or what the device computes fastest.
        num_threads: torch's threads for one operator; 0 leaves it to torch.
        advertise_host: this host's address for peers on others; "" for the one on the way to `coordinator`.
        trust: by what peers on the network are known.
    """

    coordinator: str
    source: ModelSource
    host: HostOptions
    precision: Precision = Precision()
    advertise_host: str = ""
    num_threads: int = 0
    trust: Trust = NO_SECRET


def share_of_gpu(environment: Mapping[str, str], among_all: float) -> float:
    """Of a GPU's memory, that an attention worker may have: as its launcher has placed others there, all of it under
    torchrun, which gives each process a GPU, and else the share among all attention workers.
    """
    if sharing := environment.get(SHARING):
        return 1 / int(sharing)
    return 1.0 if "LOCAL_RANK" in environment else among_all


class TorchModel:
    """Implements `msi.worker.host.LoadedModel`.

    Args:
        memory: where rows land; by default what `device` allocates.
    """

    def __init__(
        self,
        files: ModelFiles,
        part: LoadedPart,
        assignment: Assignment,
        device: OpenedDevice,
        memory_utilization: float,
        memory: Allocator | None = None,
    ) -> None:
        config, precision = files.config, assignment.precision
        dtypes = row_dtypes(precision)
        precision.check_is_built()
        self.part = part
        self.shape = ServedShape(
            num_sparse_layers=config.num_sparse_layers,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            row_bytes=row_bytes(config.hidden_size, config.top_k, dtypes.sent),
            answer_row_bytes=answer_row_bytes(config.hidden_size, dtypes.answered),
        )
        self.memory: Allocator = memory or device
        self.grammars: Grammars | None = files.grammars
        self._files = files
        self._assignment = assignment
        self._device = device
        self._memory_utilization = memory_utilization
        self._experts: ExpertHalf | None = None  # that was made last
        self._graphed = self._captured() if assignment.has_attention else Graphed((), 0)

    @property
    def has_attention(self) -> bool:
        return self.part.attention is not None

    @property
    def has_experts(self) -> bool:
        return self.part.experts is not None

    def num_kv_blocks(self) -> int:
        given, limits = self._assignment, self._assignment.limits
        passes = PassBytes()
        if self._device.kernels.device.type == "cuda" and not limits.num_gpu_blocks_override:
            assert self.part.attention is not None
            passes = bytes_of_passes(
                self._files.config, self.part.attention, given.placement, self._device, row_dtypes(given.precision),
                DTYPES[given.precision.kv_cache], limits=limits, link=given.link,
            )  # fmt: skip
            passes = passes._replace(graphs=self._graphed.num_bytes)
            given = replace(given, memory_share=share_of_gpu(os.environ, given.memory_share))
        return self._files.num_kv_blocks(given, self._device, self._memory_utilization, passes)

    def _captured(self) -> Graphed:
        """Decode passes that are, and what they take."""
        given, device = self._assignment, self._device
        if device.graphs is None:
            return Graphed((), 0)
        share = self._memory_utilization * share_of_gpu(os.environ, given.memory_share)
        dtype = row_dtypes(given.precision).computed
        free_bytes = device.free_memory_bytes() * share
        return graphed(self._files.config, dtype, given.limits, given.link, free_bytes, given.placement)

    def attention_half(self, link: DispatchLink, num_blocks: int) -> AttentionHalf:
        assert self.part.attention is not None
        config, device, placement = self._files.config, self._device, self._assignment.placement
        precision = self._assignment.precision
        with fitting(self._assignment.worker_id, f"{num_blocks} blocks of KV cache"):
            kv_cache = KvCache(config, num_blocks, device, DTYPES[precision.kv_cache])
        half = AttentionHalf(
            config,
            self.part.attention,
            kv_cache,
            placement,
            device,
            row_dtypes(precision),
            dispatch_layout=link.layout,
            answer_layout=link.answer_layout,
            landing=link.landing.rows,
            beside=self._experts if self._goes_through_both() else None,
            buckets=self._graphed.buckets,
            block_memory=kv_cache.as_bytes() if isinstance(device, CpuDevice) else None,
        )
        if device.kernels.device.type == "cuda":
            warm(half.forward, config, kv_cache, placement.num_nodes, device, row_dtypes(precision))
        return half

    def expert_half(self, link: CombineLink, num_seats: int) -> ExpertHalf:
        assert self.part.experts is not None
        with fitting(self._assignment.worker_id, "the sums and activations of waves"):
            self._experts = ExpertHalf(
                self._files.config,
                self.part.experts,
                self._device,
                row_dtypes(self._assignment.precision),
                dispatch_layout=link.layout,
                answer_layout=link.answer_layout,
                landing=link.landing.rows,
                num_seats=num_seats,
                experts=self.part.expert_ids,
            )
        return self._experts

    def _goes_through_both(self) -> bool:
        """Whether a pass's halves follow one another on one thread, without slots between them."""
        dtypes = row_dtypes(self._assignment.precision)
        is_as_computed = dtypes.sent == dtypes.answered == dtypes.computed
        return self._assignment.is_colocated and isinstance(self._device, CpuDevice) and is_as_computed

    def lend_experts(self, half: ExpertPart) -> None:
        assert isinstance(half, ExpertHalf), half
        assert self.part.experts is not None
        half.use_bank(self.part.experts, self.part.expert_ids)


class TorchHost:
    """Implements `msi.worker.host.Host`; the device is opened by `introduce`, on the worker's event loop.

    Raises:
        ConfigError: the model directory cannot work.
    """

    def __init__(self, settings: HostSettings) -> None:
        self.clock = time.monotonic
        self.products = ""
        self._settings = settings
        self._files = ModelFiles(settings.source.model_dir, settings.source.load_format)
        self._complain = Complaints(log)
        self._device: OpenedDevice | None = None
        self._memory: Allocator | None = None  # that rows land in
        self._part: LoadedPart | None = None

    @property
    def busy_s(self) -> float:
        return 0.0 if self._device is None else self._device.busy_s

    @property
    def loaded(self) -> tuple[int, int]:
        return self._files.loaded_bytes, self._files.total_bytes

    async def prepare(self) -> None:
        config = self._files.config
        will_be = self._settings.precision.resolved(config.dtype, config.stored_as)
        if config.dtype == "bfloat16" or will_be.quantization != NONE:  # which compiled kernels multiply
            await asyncio.to_thread(prepare_device, self._settings.host.device)

    def introduce(self) -> tuple[str, Precision]:
        settings = self._settings
        if settings.host.transport in ("tcp", "auto", "rdma"):
            settings.trust.check_listening(self._advertised_host(), "a worker")
            if settings.host.encrypt_rows and not self._is_local:
                settings.trust.check_encrypting()
        if settings.host.transport == "rdma":
            check_rdma(settings.host.rdma)
        if self._device is None:
            self._device = self.open_device()
            self._memory = self.open_memory(self._device)
        config = self._files.config
        precision = precision_on(self._device, settings.precision, DTYPES[config.dtype], config.stored_as)
        self.products = products_of(self._device, precision)
        return self._files.fingerprint(), precision

    def open_device(self) -> OpenedDevice:
        """What this worker computes on. Raises ConfigError."""
        host = self._settings.host
        return open_device(
            host.device,
            self._settings.num_threads,
            host.poll_us / 1e6,
            host.cuda_queues,
            host.cuda_kernels,
            host.enforce_eager,
        )

    def open_memory(self, device: OpenedDevice) -> Allocator:
        """Where rows land. Raises ConfigError."""
        return rows_memory(device, self._settings.host.cuda_rows)

    def use_tracer(self, tracer: Spans | None) -> None:
        assert self._device is not None
        self._device.tracer = tracer

    def free_former(self) -> None:
        free_circles()

    async def load(self, assignment: Assignment) -> TorchModel:
        device = self._device
        assert device is not None
        assert self._memory is not None
        if self._part is None or not self._part.fits(assignment):
            had = None if self._part is None else self._part.kept_for(assignment)
            self._part = had  # the rest goes before what is new comes; this stays where that does not fit
            with fitting(assignment.worker_id, "the weights"):
                self._part = await asyncio.to_thread(self._files.load, assignment, device, had)
        memory = None if assignment.is_colocated else self._memory  # within a process the host copies rows
        utilization = self._settings.host.gpu_memory_utilization
        return TorchModel(self._files, self._part, assignment, device, utilization, memory)

    def new_transport(self, assignment: Assignment) -> Transport:
        return self._new_transport(assignment)

    def new_block_transport(self, assignment: Assignment) -> Transport:
        return self._new_transport(assignment, is_for_blocks=True)

    def _new_transport(self, assignment: Assignment, *, is_for_blocks: bool = False) -> Transport:
        name = "inproc" if assignment.is_colocated else self._settings.host.transport
        poller = None if self._device is None or is_for_blocks else self._device.poller
        if is_for_blocks and name == "rdma":
            name = "tcp"
        if name == "inproc":
            return InprocTransport(poller=poller)
        key, complain = self._settings.trust.link_key(assignment.instance), self._complain
        if name == "shm" or (name == "auto" and self._is_local and shm.is_available() is None):
            return ShmTransport(key=key, complain=complain, poller=poller)
        host, encrypt = self._advertised_host(), self._settings.host.encrypt_rows
        poll_s = self._settings.host.poll_us / 1e6
        if name == "rdma":
            return open_rdma(self._settings.host.rdma, host, key=key, complain=complain, poll_s=poll_s, poller=poller)
        if name == "auto" and shm.is_available() is None:
            rdma = None
            if not encrypt and not is_for_blocks:  # cards do not encrypt
                try:
                    rdma = open_rdma(
                        self._settings.host.rdma, host, key=key, complain=complain, poll_s=poll_s, poller=poller
                    )
                except ConfigError as error:
                    log.debug("no RDMA: %s", error)
            return AutoTransport(host, key=key, encrypt=encrypt, complain=complain, poller=poller, rdma=rdma)
        return TcpTransport(host, key=key, encrypt=encrypt, complain=complain)

    @property
    def _is_local(self) -> bool:
        """Whether all of the instance is on this machine."""
        return self._settings.coordinator.startswith("ipc://")

    def _advertised_host(self) -> str:
        settings = self._settings
        if settings.advertise_host or not self._is_local:
            return settings.advertise_host or address_towards(*split_address(settings.coordinator))
        return LOOPBACK

    def counters(self) -> ProcessCounters:
        if isinstance(self._device, StreamDevice) and self._device.lost is not None:
            raise self._device.lost  # which ends the worker
        return ProcessCounters(
            loop_cpu_s=time.thread_time(), rss_bytes=resident_memory_bytes(), cut_off=by_reason(self._complain.counts)
        )

    async def close(self) -> None:
        if self._device is not None:
            await self._device.close()


def free_circles() -> None:
    """What nobody has any more is freed, also of what the garbage collector was told to leave alone."""
    num_frozen = gc.get_freeze_count()
    gc.unfreeze()
    gc.collect()
    if num_frozen:  # else this process is somebody else's, and its objects are, too
        gc.freeze()
