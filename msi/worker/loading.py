"""Getting a worker's part of the model into memory: which tensors, how many bytes, how much room is left for cache."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from msi.attention.kv_cache import KvCache
from msi.attention.pass_memory import PassBytes
from msi.control.messages import Assignment
from msi.device.device import Device
from msi.errors import ConfigError
from msi.kernels import BLOCK_TOKENS, fp8
from msi.kernels.kernels import ExpertBank
from msi.kernels.mxfp4 import BYTES as MXFP4_BYTES
from msi.kernels.routing import RowDtypes
from msi.models.attention_weights import AttentionWeights, load_attention_weights
from msi.models.checkpoint import Checkpoint, DummyCheckpoint
from msi.models.config import ModelConfig, config_digest
from msi.models.expert_weights import load_expert_bank
from msi.models.families import load_config
from msi.models.files import read_json
from msi.models.required import check_tensors
from msi.models.texts import read_texts
from msi.placement import HOLE
from msi.placement_change import num_to_load
from msi.precision import FP8, NONE, Precision
from msi.text.grammars import Grammars
from msi.text.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

DTYPES = {  # names of msi.precision
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, FP8: fp8.E4M3,
}  # fmt: skip


@contextlib.contextmanager
def fitting(worker_id: str, what: str) -> Iterator[None]:
    """Raises ConfigError where a device has not the memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{what} of {worker_id} do not fit: {error}; give its role more workers, on more GPUs, or lower "
            "`gpu_memory_utilization` of those that share this one"
        ) from error


def row_dtypes(precision: Precision) -> RowDtypes:
    return RowDtypes(DTYPES[precision.compute], DTYPES[precision.rows], DTYPES[precision.answers])


@dataclass(frozen=True)
class LoadedPart:
    """The weights of one role and placement, on a device."""

    precision: Precision
    attention: AttentionWeights | None = None
    experts: ExpertBank | None = None
    expert_ids: tuple[tuple[int, ...], ...] = ()  # by local id, of all layers or of each

    def kept_for(self, assignment: Assignment) -> LoadedPart:
        """What of it an assignment has a use for; the rest may go."""
        if self.precision != assignment.precision:
            return LoadedPart(assignment.precision)
        attention = self.attention if assignment.has_attention else None
        if not _experts_in(self.expert_ids) & _experts_in(assignment.experts):
            return LoadedPart(self.precision, attention)
        return LoadedPart(self.precision, attention, self.experts, self.expert_ids)

    def fits(self, assignment: Assignment) -> bool:
        """Whether it is the very weights that an assignment needs."""
        has_attention = self.attention is not None
        return (self.precision, has_attention, self.expert_ids) == (
            assignment.precision, assignment.has_attention, assignment.experts,
        )  # fmt: skip


def _experts_in(held: Iterable[tuple[int, ...]]) -> set[int]:
    return set().union(*held) - {HOLE}


@dataclass
class ModelFiles:
    """A model directory, opened as far as its configuration.

    Raises:
        ConfigError: no such directory, or a configuration that is not supported.
    """

    model_dir: Path
    load_format: str = "auto"  # or "dummy": random weights from config.json alone
    config: ModelConfig = field(init=False)
    loaded_bytes: int = 0
    total_bytes: int = 0
    grammars: Grammars = field(init=False)
    _digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.load_format not in ("auto", "dummy"):
            raise ConfigError(f"load format {self.load_format!r} is not supported; supported: auto, dummy")
        self.config, values = load_config(self.model_dir)
        self._digest = config_digest(values)
        self.grammars = Grammars(self.tokenizer_text, self.config.vocab_size, self.config.eos_token_ids)

    def open(self, report: Callable[[int], None] = lambda num_bytes: None) -> Checkpoint | DummyCheckpoint:
        """Raises CheckpointError."""
        if self.load_format == "dummy":
            return DummyCheckpoint(report, DTYPES[self.config.dtype], self.config.stored_as)
        source = Checkpoint(self.model_dir, report, self.config.stored_as, self.config.has_mxfp4_experts)
        check_tensors(self.config, source.index)
        return source

    def tokenizer_text(self) -> str:
        """tokenizer.json, in which those tokens are special that the model names so; "" where there is none.

        Raises:
            ConfigError: it cannot be read.
        """
        texts = read_texts(self.model_dir, read_json(self.model_dir / "config.json"), "vllm")
        if not texts.tokenizer:
            return ""
        return str(load_tokenizer(texts.tokenizer, texts.special_tokens.values()).to_str())

    def fingerprint(self) -> str:
        """sha256 of the canonical config.json and of the names, shapes and dtypes of all tensors."""
        return f"{self._digest}/{self.open().fingerprint()}"

    def load(self, assignment: Assignment, device: Device, had: LoadedPart | None = None) -> LoadedPart:
        """Reads this role's tensors, and no others, into the device's layout. Slow: call it in a thread of its own.

        Args:
            had: what is on the device already (see `LoadedPart.kept_for`); none of it is read again.

        Raises:
            CheckpointError: a tensor is missing, truncated or misshapen.
            ConfigError: the memory that is free cannot hold them.
        """
        precision = assignment.precision
        had = had or LoadedPart(precision)
        num_attention, num_expert = self._values_to_read(assignment, had)
        dtype, num_bytes = DTYPES[precision.weights], self._bytes_of(precision, num_attention, num_expert)
        free_bytes = device.free_memory_bytes()
        if num_bytes > free_bytes:
            raise ConfigError(
                f"the weights of {assignment.worker_id} take {num_bytes / 1e9:.1f} GB as "
                f"{precision.held_as}, and {free_bytes / 1e9:.1f} GB of memory are free; give experts more workers, on "
                f"more machines, or free some memory"
            )
        self.loaded_bytes, self.total_bytes = 0, round(self._stored_bytes(num_attention, num_expert))
        started = time.monotonic()
        source = self.open(self._count)
        attention, experts = had.attention, had.experts
        if assignment.experts:
            kept = None if experts is None else (experts, had.expert_ids)
            experts = load_expert_bank(
                self.config, assignment.experts, source, device.kernels, dtype, kept, row_dtypes=row_dtypes(precision),
                quantization=precision.quantization,
            )  # fmt: skip
        if assignment.has_attention and attention is None:
            compute_dtype = DTYPES[precision.compute]
            attention = load_attention_weights(self.config, source, device, dtype, compute_dtype, precision)
        log.info(
            "%s: %.1f MB of weights read in %.1f s, held as %s",
            assignment.worker_id, source.bytes_read / 1e6, time.monotonic() - started, precision.held_as,
        )  # fmt: skip
        return LoadedPart(precision, attention, experts, assignment.experts)

    def num_kv_blocks(
        self, assignment: Assignment, device: Device, memory_utilization: float, passes: PassBytes | None = None
    ) -> int:
        """As many as the share of free memory allows but no more than could ever be used, and the padding block.

        Args:
            passes: what they take of that share.

        Raises:
            ConfigError: not even one fits.
        """
        limits, pass_bytes = assignment.limits, 0 if passes is None else passes.total
        if limits.num_gpu_blocks_override:
            return 1 + limits.num_gpu_blocks_override
        block_bytes = KvCache.block_bytes(self.config, DTYPES[assignment.precision.kv_cache])
        free_bytes = device.free_memory_bytes()
        budget = max(0.0, free_bytes * memory_utilization * assignment.memory_share - pass_bytes)
        useful = limits.max_num_seqs * -(-limits.max_model_len // BLOCK_TOKENS)
        affordable = int(budget // block_bytes) - 1
        if affordable < 1:
            raise ConfigError(
                f"{budget / 1e6:.0f} MB for KV cache do not hold one block of {block_bytes / 1e6:.2f} MB"
                + (
                    f", of {free_bytes / 1e6:.0f} MB free and {pass_bytes / 1e6:.0f} MB for passes ({passes})"
                    if pass_bytes
                    else ""
                )
                + "; free some memory or raise `gpu_memory_utilization`"
                + (", or give a smaller `max_num_batched_tokens`" if pass_bytes else "")
            )
        if pass_bytes:
            log.info(
                "%s: %.0f MB free beside the weights, %.0f MB of them for passes (%s), %.0f MB for KV cache",
                assignment.worker_id, free_bytes / 1e6, pass_bytes / 1e6, passes,
                min(useful, affordable) * block_bytes / 1e6,
            )  # fmt: skip
        return 1 + min(useful, affordable)

    def _bytes_of(self, precision: Precision, num_attention: int, num_expert: int) -> float:
        """Of so many elements of the attention side, or none, and of experts."""
        num_bytes = num_expert * precision.matrix_bytes
        if num_attention:
            table = self.config.vocab_size * self.config.hidden_size
            is_apart = precision.head_format != NONE or not self.config.tie_word_embeddings
            num_matrices = num_attention - table * (1 if self.config.tie_word_embeddings else 2)
            num_bytes += num_matrices * precision.matrix_bytes + table * precision.weight_bytes
            num_bytes += table * precision.head_bytes * is_apart
        return num_bytes

    def _stored_bytes(self, num_attention: int, num_expert: int) -> float:
        """The same, of the checkpoint."""
        config = self.config
        stored = replace(Precision.of(config.dtype), quantization=config.stored_as)
        num_bytes = self._bytes_of(stored, num_attention, num_expert)
        if config.has_mxfp4_experts:
            num_packed = num_expert * config.expert_values / (config.expert_values + config.expert_bias_values)
            num_bytes -= num_packed * (stored.weight_bytes - MXFP4_BYTES)
        return num_bytes

    def _values_to_read(self, assignment: Assignment, had: LoadedPart) -> tuple[int, int]:
        """Elements of what `load` will read: of the attention side, and of experts."""
        config = self.config
        num_new = num_to_load(assignment.experts, had.expert_ids, config.num_sparse_layers)
        has_attention = assignment.has_attention and had.attention is None
        num_values = config.expert_values + config.expert_bias_values
        return config.attention_values * has_attention, num_new * num_values

    def _count(self, num_bytes: int) -> None:
        self.loaded_bytes += num_bytes


def resident_memory_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
