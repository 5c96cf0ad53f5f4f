"""The model's files, and whether the workers that run here have memory for it, by the planner's own numbers."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from msi.errors import ConfigError
from msi.instance.instance import build_plan
from msi.models.config import ModelConfig
from msi.models.files import read_json
from msi.models.required import check_weights
from msi.models.shape import shape_of
from msi.models.texts import read_texts
from msi.net.slots import SlotLayout, aligned_row_bytes
from msi.options import InstanceOptions
from msi.planner.assumptions import DEFAULTS
from msi.planner.model_shape import ModelShape
from msi.planner.performance import attention_node_bytes, expert_node_bytes
from msi.planner.pipeline import MAX_MICRO_BATCHES
from msi.precision import NONE

from .findings import Finding, failed, ok, refused, warning

RUNTIME_BYTES = 0.4e9  # of a worker's process on a CPU: interpreter and torch
INDEX_BYTES = 8  # about, of each chosen expert, that travel with a row
FILES_ADVICE = (
    "give a directory with config.json, safetensors and tokenizer.json, as `hf download --local-dir` makes it"
)


def check_config(options: InstanceOptions) -> tuple[list[Finding], ModelConfig | None]:
    """config.json: a family that is known, and options that suit it."""
    try:
        _, config = build_plan(options)
    except ConfigError as error:
        return [refused("model", error, FILES_ADVICE)], None
    family = config.architecture.removesuffix("ForCausalLM")
    found = [
        ok("model", f"{family}, {config.num_layers} layers, {config.num_experts} experts of which {config.top_k} are "
           f"chosen, {config.dtype}{'' if config.stored_as == NONE else f', matrices {config.stored_as}'}")
    ]  # fmt: skip
    return [*found, *(warning("model", remark) for remark in config.remarks)], config


def check_files(options: InstanceOptions, config: ModelConfig) -> Finding:
    """Weights: every tensor that the model needs, of its shape, in files that can be read."""
    if options.source.load_format == "dummy":
        return ok("weights", "are not read: load format dummy")
    try:
        check_weights(options.source.model_dir, config)
    except ConfigError as error:
        return refused("weights", error, "download the checkpoint again, whole")
    return ok("weights", "are complete and readable")


def check_texts(options: InstanceOptions) -> Finding:
    """Tokenizer, chat template and defaults."""
    source = options.source
    log = logging.getLogger(read_texts.__module__)
    was_disabled, log.disabled = log.disabled, True  # what it would say is said here
    try:
        texts = read_texts(source.model_dir, read_json(source.model_dir / "config.json"), source.generation_config)
    except ConfigError as error:
        return refused("tokenizer", error, FILES_ADVICE)
    finally:
        log.disabled = was_disabled
    if not texts.tokenizer:
        return warning("tokenizer", "there is no tokenizer.json", "prompts can be given as token ids alone")
    if not texts.chat_templates:
        return warning("tokenizer", "is there, and no chat template: /v1/chat/completions refuses", "serve with "
                       "`chat_template`, or use /v1/completions")  # fmt: skip
    return ok("tokenizer", "and chat template are there")


@dataclass(frozen=True, slots=True)
class Need:
    """Memory of one worker, in bytes.

    Attributes:
        least: with room for a single sequence of the greatest length.
        full: with room for as many as may run.
    """

    weights: float
    least: float
    full: float


def need_of_attention(options: InstanceOptions, shape: ModelShape, max_model_len: int) -> Need:
    limits, rows, lanes = options.limits, options.link.slot_rows, lanes_of(options)
    blocks = limits.num_gpu_blocks_override * 16

    def total(num_tokens: float) -> float:
        given = replace(DEFAULTS, reserved_bytes=RUNTIME_BYTES if options.host.device == "cpu" else 2e9)
        return float(
            attention_node_bytes(
                shape, 1, given, micro_batch=float(rows), num_micro_batches=float(lanes),
                mean_len=num_tokens / (rows * lanes), num_expert_nodes=float(options.expert_workers),
            )
        )  # fmt: skip

    return Need(
        shape.attention_bytes, total(blocks or max_model_len), total(blocks or max_model_len * limits.max_num_seqs)
    )


def need_of_experts(options: InstanceOptions, shape: ModelShape) -> Need:
    per_node = -(-shape.num_experts // (1 if options.colocated else options.expert_workers))
    given = replace(DEFAULTS, reserved_bytes=0.0 if options.colocated else RUNTIME_BYTES)
    total = float(
        expert_node_bytes(
            shape, 1, given, micro_batch=float(options.link.slot_rows), num_micro_batches=float(lanes_of(options)),
            num_attention_nodes=float(options.attention_workers), experts_per_node=float(per_node),
        )
    )  # fmt: skip
    return Need(per_node * shape.expert_bytes, total, total)


def lanes_of(options: InstanceOptions) -> int:
    """Micro-batches that slots are made for."""
    return 1 if options.colocated and not options.micro_batches else options.micro_batches or MAX_MICRO_BATCHES


def seat_bytes(options: InstanceOptions, shape: ModelShape) -> int:
    """Of the slots that two workers have for each other, one way."""
    row = aligned_row_bytes(shape.row_bytes + INDEX_BYTES * shape.top_k)
    return SlotLayout(lanes_of(options), options.link.slot_rows, row).rows_bytes


def shape_here(options: InstanceOptions, config: ModelConfig) -> ModelShape:
    """As it would be held: where the dtype is open, the checkpoint's, if the device multiplies it."""
    precision, dtype = options.precision, config.dtype
    if options.host.device == "cpu" and precision.is_open and dtype != "float32":
        from msi.device.cpu import has_bf16_units  # torch, which takes a second
        from msi.kernels.cpu import CpuKernels

        if dtype == "bfloat16" and CpuKernels(has_bf16_units=has_bf16_units()).can_widen:
            precision = replace(precision, weights=dtype)
        dtype = dtype if dtype == "bfloat16" and has_bf16_units() else "float32"
    return shape_of(config, name="", digest="", precision=precision.resolved(dtype, config.stored_as))


def check_memory(
    options: InstanceOptions, shape: ModelShape, max_model_len: int, counts: tuple[int, int], free_bytes: float
) -> list[Finding]:
    """A line for each role that runs here, and one for all.

    Args:
        counts: attention and expert workers that run here.
        free_bytes: of the memory that they share; below 0 where nobody knows.
    """
    found, least, full = [], 0.0, 0.0
    for role, count, need in (
        ("attention", counts[0], need_of_attention(options, shape, max_model_len)),
        ("expert", counts[1], need_of_experts(options, shape)),
    ):
        if not count:
            continue
        cache = f", {_gb(need.full)} with KV cache for all that may run" if need.full > need.least else ""
        found.append(
            ok(f"memory of {role} workers", f"each of {count} takes {_gb(need.least)} at least, of which "
               f"{_gb(need.weights)} are weights{cache}")
        )  # fmt: skip
        least, full = least + count * need.least, full + count * need.full
    if not found:
        return []
    if free_bytes < 0:
        return [*found, warning("memory", f"{_gb(least)} are needed here, and how much is free is not known")]
    have = f"{_gb(least)} are needed here, {_gb(free_bytes)} are free"
    if least > free_bytes:
        return [
            *found,
            failed("memory", have, "give experts more workers on more hosts, a smaller `dtype`, a smaller "
                   "`max_model_len`, or free some memory"),
        ]  # fmt: skip
    room = options.limits.num_gpu_blocks_override == 0 and full > free_bytes * options.host.gpu_memory_utilization
    if room:
        return [
            *found,
            warning("memory", f"{have}; {_gb(full)} would hold the KV cache of all that may run",
                    "where it is full, sequences wait or are computed again; fewer `max_num_seqs` wait instead"),
        ]  # fmt: skip
    return [*found, ok("memory", have)]


def free_device_bytes(device: str, free_host_bytes: int) -> float:
    """Of the memory that workers here share: a GPU's own, else the host's."""
    if device == "cpu":
        return free_host_bytes
    import torch  # only where there is a GPU

    index = re.sub(r"\D", "", device)
    asked: Callable[..., tuple[int, int]] = torch.cuda.mem_get_info
    return float(asked(int(index or 0))[0])


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes < 1e10 else f"{num_bytes / 1e9:.0f} GB"
