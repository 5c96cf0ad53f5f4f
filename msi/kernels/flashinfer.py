"""Attention and drawn tokens by flashinfer, a library that users may have installed; all else by Triton's kernels.

It reads the paged cache where it lies: [blocks, 2, BLOCK_TOKENS, num_kv_heads, head_dim] is its layout "NHD". Triton's
kernels attend where it has no kernels: in float32, and with attention sinks.

A captured graph has launched its kernels on memory of the wrapper that its pass was planned in. So each size of pass
has a wrapper of its own, in the library's mode for graphs, whose memory never moves; every pass is planned in it on
the host, outside the graph, and the same kernels then find other numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msi.kernels import BLOCK_TOKENS, fp8
from msi.kernels.choosing import choose, device_seconds
from msi.kernels.flashinfer_draw import ListedDraw
from msi.kernels.norm import HeadNorm
from msi.kernels.paged_attention import AttentionShape
from msi.kernels.pass_tensors import PassTensors
from msi.kernels.triton import rope
from msi.kernels.triton.attention_plan import PagedPlan
from msi.kernels.triton.kernels import TritonKernels
from msi.kernels.triton.rounded import Library

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
WORKSPACE_BYTES = 128 << 20  # what the library recommends
NUMBERS_BYTES = 8 << 20  # that each wrapper takes for what it plans
PLAN_BYTES = 1 << 20  # in graphs, of a pass of single tokens: some ten numbers for each program that runs at once
FEWEST_SHARING = 3  # query heads of a KV head, from which tensor cores pay; without them it has no kernels for most
MOST_APART = 2e-2  # of two results in 16 bits


def why_unavailable() -> str | None:
    """A sentence where it is not installed, else None."""
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed; `pip install flashinfer-python` brings it"
    return None


@dataclass(frozen=True, slots=True)
class Trial:
    """Passes that ways to attend are compared on."""

    num_seqs: int = 32
    context_len: int = 1024
    query_len: int = 256  # of a prompt's piece
    num_prompts: int = 2


@dataclass(frozen=True, slots=True)
class Pages:
    """What the library wants to know of a pass, in host memory but for `indices`; int32.

    Attributes:
        query_starts: [num_seqs + 1], sums of the numbers of queries.
        starts: [num_seqs + 1], sums of the numbers of blocks.
        indices: [starts[-1]], blocks of all sequences, behind one another.
        last_lens: [num_seqs], tokens in each sequence's last block.
    """

    query_starts: Tensor
    starts: Tensor
    indices: Tensor
    last_lens: Tensor

    @property
    def is_decoding(self) -> bool:
        """One query each."""
        return int(self.query_starts.numpy()[-1]) == len(self.last_lens)


@dataclass(slots=True)
class FlashinferPlan:
    """What every layer's attention reads of a pass.

    Attributes:
        slots: int32 [num_tokens], where their keys and values go.
        new_own: makes Triton's plan of the pass.
        planned: by dtype of the cache, what is ready to run.
    """

    slots: Tensor
    pages: Pages
    shape: AttentionShape
    dtype: torch.dtype
    new_own: Callable[[], PagedPlan]
    planned: dict[torch.dtype, Any] = field(default_factory=dict)
    own: PagedPlan | None = None


@dataclass(frozen=True, slots=True)
class FixedPlan:
    """The same of a pass that graphs are captured of; the wrapper knows the pass.

    Attributes:
        launched: numbers that its kernels are launched with, and graphs have captured: where two plans of one wrapper
            differ in them, they are captured anew.
    """

    slots: Tensor
    wrapper: Any
    launched: tuple[int, ...]


Wrappers = dict[tuple[object, ...], Any]  # by lane, and what they are for
AnyPlan = PagedPlan | FlashinferPlan | FixedPlan


class FlashinferKernels(TritonKernels):
    """Implements `msi.kernels.kernels.Kernels`.

    Args:
        is_measured: flashinfer attends, and draws, where it gives what Triton's kernels give, and is faster, which is
            found out where a shape of heads, or a vocabulary, is met first; else wherever it can.
        trial: what that is measured on.
        seconds: that something takes on the device.
        library: for products, as `TritonKernels` has it.
    """

    def __init__(
        self,
        device: torch.device,
        is_measured: bool = False,
        trial: Trial | None = None,
        seconds: Callable[[Callable[[], object]], float] | None = None,
        library: Library | None = None,
    ) -> None:
        super().__init__(device, library)
        self._library: Any = importlib.import_module("flashinfer")
        self._is_measured = is_measured
        self._trial = trial or Trial()
        self._seconds = seconds or partial(device_seconds, device)
        self._wrappers: Wrappers = {}
        self._wrappers_of_graphs: Wrappers = {}
        self._workspaces: dict[object, Tensor] = {}
        self._plans: dict[tuple[object, ...], Tensor] = {}
        self._met: dict[tuple[AttentionShape, torch.dtype], tuple[torch.dtype, bool]] = {}
        self._is_taken: dict[object, dict[bool, bool]] = {}  # in passes that decode, and in others
        self._draw = ListedDraw(self._library, super().draw, is_measured, self._seconds)

    def plan_attention(
        self,
        inputs: PassTensors,
        host: PassTensors,
        shape: AttentionShape,
        dtype: torch.dtype,
        is_fixed: bool = False,
    ) -> Any:
        new_own = partial(super().plan_attention, inputs, host, shape, dtype, is_fixed)
        if dtype not in DTYPES or shape.head_dim not in HEAD_DIMS:
            return new_own()
        plan = FlashinferPlan(inputs.slot_mapping, self._pages(host), shape, dtype, new_own)
        return self._fixed(plan, *host.block_tables.shape) if is_fixed else plan

    def rope_and_write(
        self,
        heads: Tensor,
        num_q: int,
        rope_table: tuple[Tensor, Tensor],
        layer_cache: Tensor,
        plan: AnyPlan,
        norm: HeadNorm | None = None,
    ) -> None:
        rope.rope_and_write(heads, num_q, rope_table, layer_cache, plan.slots, norm)

    def paged_attention(self, query: Tensor, layer_cache: Tensor, plan: AnyPlan, sinks: Tensor | None = None) -> Tensor:
        if isinstance(plan, PagedPlan):
            return super().paged_attention(query, layer_cache, plan, sinks)
        if isinstance(plan, FixedPlan):
            attended: Tensor = plan.wrapper.run(query.contiguous(), layer_cache)
            return attended
        self._met[plan.shape, plan.dtype] = (layer_cache.dtype, sinks is not None)
        if sinks is not None or not self._takes(plan, layer_cache.dtype):
            plan.own = plan.own or plan.new_own()
            return super().paged_attention(query, layer_cache, plan.own, sinks)
        return self._attend(query, layer_cache, plan, self._wrappers)

    def draw(self, logits: Tensor, numbers: Tensor) -> Tensor:
        return self._draw(logits, numbers)

    def kept_bytes(self, num_lanes: int) -> int:
        """Of whom asks, which is no lane, there are a workspace and wrappers already."""
        asks = self.lane()

        def missing(held: Iterable[object]) -> int:
            return max(0, num_lanes - len({lane for lane in held if lane != asks}))

        num_wrappers = num_plans = 0
        for (shape, dtype), (cache_dtype, has_sinks) in self._met.items():
            way = (shape, dtype, cache_dtype)
            is_taken = {} if has_sinks else self._is_taken.get(way, {})
            for is_decoding in (kind for kind, wanted in is_taken.items() if wanted):
                num_wrappers += missing(key[0] for key in self._wrappers if key[1:] == (is_decoding, *way))
                num_plans += is_decoding * missing(key[0] for key in self._plans if key[1:] == way)
        if not num_wrappers and not num_plans:
            return 0
        return missing(self._workspaces) * WORKSPACE_BYTES + num_wrappers * NUMBERS_BYTES + num_plans * PLAN_BYTES

    # ------------------------------------------------------------------------------------------------------------------

    def _attend(self, query: Tensor, layer_cache: Tensor, plan: FlashinferPlan, wrappers: Wrappers) -> Tensor:
        ready = plan.planned.get(layer_cache.dtype)
        if ready is None:
            ready = plan.planned[layer_cache.dtype] = self._planned(plan, layer_cache.dtype, wrappers)
        attended: Tensor = ready.run(query.contiguous(), layer_cache)
        return attended

    def _planned(self, plan: FlashinferPlan, cache_dtype: torch.dtype, wrappers: Wrappers) -> Any:
        """A wrapper that knows the pass. Each lane, by its stream, has its own of each kind: what one plans lies in its
        buffers until the last layer has run.
        """
        pages, shape = plan.pages, plan.shape
        key = (self.lane(), pages.is_decoding, shape, plan.dtype, cache_dtype)
        wrapper = wrappers.get(key)
        if wrapper is None:
            if pages.is_decoding:
                wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace(), "NHD", use_tensor_cores=_has_cores(shape)
                )
            else:
                wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace(), "NHD")
            wrappers[key] = wrapper
        self._plan(wrapper, plan, cache_dtype)
        return wrapper

    def _fixed(self, plan: FlashinferPlan, num_seqs: int, width: int) -> FixedPlan | PagedPlan:
        """Planned in the wrapper of such passes of this lane; Triton's where its kernels attend, or where what the
        cache is in is not known, as no pass was launched piece by piece.
        """
        cache_dtype, has_sinks = self._met.get((plan.shape, plan.dtype), (None, False))
        if cache_dtype is None or has_sinks or not self._takes(plan, cache_dtype):
            return plan.new_own()
        key = (self.lane(), num_seqs, width, plan.shape, plan.dtype, cache_dtype)
        wrapper = self._wrappers_of_graphs.get(key)
        if wrapper is None:
            numbers = partial(torch.zeros, dtype=torch.int32, device=self.device)
            wrapper = self._wrappers_of_graphs[key] = self._library.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace(), "NHD", use_cuda_graph=True, use_tensor_cores=_has_cores(plan.shape),
                paged_kv_indptr_buffer=numbers(num_seqs + 1), paged_kv_indices_buffer=numbers(num_seqs * width),
                paged_kv_last_page_len_buffer=numbers(num_seqs), backend="fa2",  # whose launches are by the size alone
            )  # fmt: skip
            # in place of 8 MiB for each size of pass: one pass of a lane is planned when the one before it is over
            plans = self._plans.get((self.lane(), *key[3:]))
            if plans is None:
                plans = torch.zeros(PLAN_BYTES, dtype=torch.uint8, device=self.device)
                self._plans[self.lane(), *key[3:]] = plans
            wrapper.reset_workspace_buffer(self._workspace(), plans)
        self._plan(wrapper, plan, cache_dtype)
        return FixedPlan(plan.slots, wrapper, tuple(map(int, wrapper._plan_info)))

    def _plan(self, wrapper: Any, plan: FlashinferPlan, cache_dtype: torch.dtype) -> None:
        pages, shape = plan.pages, plan.shape
        told = {
            "window_left": -1 if shape.sliding_window is None else shape.sliding_window - 1,  # beside the query's own
            "q_data_type": plan.dtype,
            "kv_data_type": cache_dtype,
        }
        of_heads = shape.num_heads, shape.num_kv_heads, shape.head_dim, BLOCK_TOKENS
        of_pages = pages.starts, pages.indices, pages.last_lens
        if pages.is_decoding:
            wrapper.plan(*of_pages, *of_heads, **told)
        else:
            wrapper.plan(pages.query_starts, *of_pages, *of_heads, causal=True, **told)

    def lane(self) -> object:
        """Whose work is launched now."""
        return 0 if self.device.type == "cpu" else torch.cuda.current_stream(self.device).cuda_stream

    def _workspace(self) -> Tensor:
        """A lane's: of what it attends to, one thing follows another."""
        lane = self.lane()
        found = self._workspaces.get(lane)
        if found is None:
            num_bytes = 1 << 10 if self.device.type == "cpu" else WORKSPACE_BYTES
            found = self._workspaces[lane] = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        return found

    def _pages(self, host: PassTensors) -> Pages:
        contexts, queries, tables = (one.numpy() for one in (host.context_lens, host.query_lens, host.block_tables))
        num_blocks = -(-contexts // BLOCK_TOKENS)
        used = tables[np.arange(tables.shape[1]) < num_blocks[:, None]]
        starts = np.zeros((2, len(contexts) + 1), np.int32)
        np.cumsum(queries, out=starts[0, 1:])
        np.cumsum(num_blocks, out=starts[1, 1:])
        last = contexts - (num_blocks - 1) * BLOCK_TOKENS
        query_starts, block_starts, last_lens = (self._pinned(one) for one in (*starts, last.astype(np.int32)))
        return Pages(query_starts, block_starts, self._upload(used.astype(np.int32)), last_lens)

    def _pinned(self, numbers: Any) -> Tensor:
        tensor = torch.from_numpy(numbers)
        return tensor if self.device.type == "cpu" else tensor.pin_memory()

    # -- the choice ----------------------------------------------------------------------------------------------------

    def _takes(self, plan: FlashinferPlan, cache_dtype: torch.dtype) -> bool:
        """Whether flashinfer attends in such a pass."""
        key = (plan.shape, plan.dtype, cache_dtype)
        found = self._is_taken.get(key)
        if found is None:  # in the pass before the first: whatever it compiles for either is there by then
            found = self._is_taken[key] = {
                is_decoding: self._is_better(plan.shape, plan.dtype, cache_dtype, is_decoding)
                for is_decoding in (True, False)
            }
        return found[plan.pages.is_decoding]

    def _is_better(
        self, shape: AttentionShape, dtype: torch.dtype, cache_dtype: torch.dtype, is_decoding: bool
    ) -> bool:
        trial = self._trial
        num_seqs, query_len = (trial.num_seqs, 1) if is_decoding else (trial.num_prompts, trial.query_len)
        host = alike(num_seqs, query_len, trial.context_len)
        on_device = replace(host, block_tables=host.block_tables.to(self.device))
        generator = torch.Generator(self.device).manual_seed(0)

        def numbers(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=self.device).to(dtype)

        cache = numbers(1 + host.block_tables.numel(), 2, BLOCK_TOKENS, shape.num_kv_heads, shape.head_dim)
        cache = fp8.to_e4m3(cache) if cache_dtype is fp8.E4M3 else cache
        query = numbers(num_seqs * query_len, shape.num_heads, shape.head_dim)
        own = super().plan_attention(on_device, host, shape, dtype)
        theirs = FlashinferPlan(own.slots, self._pages(host), shape, dtype, lambda: own)
        ways = {
            "Triton": partial(super().paged_attention, query, cache, own),
            "flashinfer": partial(self._attend, query, cache, theirs, {}),  # whose memory goes with the trial
        }
        if not self._is_measured:
            ways["flashinfer"]()
            return True
        what = "sequences that decode" if is_decoding else "prompts"
        return choose(f"attention of {what}, {shape}", ways, self._seconds, MOST_APART) == "flashinfer"


def _has_cores(shape: AttentionShape) -> bool:
    return shape.num_heads // shape.num_kv_heads >= FEWEST_SHARING


def alike(num_seqs: int, query_len: int, context_len: int) -> PassTensors:
    """A pass of sequences that are, with blocks in no order; in host memory."""
    width = -(-context_len // BLOCK_TOKENS)
    blocks = torch.randperm(num_seqs * width, generator=torch.Generator().manual_seed(0)).to(torch.int32) + 1
    tables = blocks.view(num_seqs, width)
    at = torch.arange(context_len - query_len, context_len, dtype=torch.int32)
    nothing = torch.zeros(0, dtype=torch.int32)
    return PassTensors(
        token_ids=torch.zeros(num_seqs * query_len, dtype=torch.int32),
        positions=at.repeat(num_seqs),
        query_lens=torch.full((num_seqs,), query_len, dtype=torch.int32),
        context_lens=torch.full((num_seqs,), context_len, dtype=torch.int32),
        logit_rows=nothing,
        slot_mapping=(tables[:, at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS).flatten(),
        sequence_of=torch.arange(num_seqs, dtype=torch.int32).repeat_interleave(query_len),
        begun_blocks=nothing,
        block_tables=tables,
    )
