"""What lies between products in a layer, a call of `rows.cpp` for each; nothing where shapes or dtypes are not its."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msi.kernels import fp8
from msi.kernels.native.compiled import WIDTH, native_library
from msi.kernels.norm import HeadNorm, Norm, rms_norm
from msi.kernels.paged_attention import AttentionShape, kv_rows
from msi.kernels.pass_tensors import PassTensors
from msi.kernels.routing import PackedRows

_P, _N = ctypes.c_void_p, ctypes.c_int64
SIGNATURES = {
    "msi_norm": (_N, _N, _N, _P, _P, _N, _P, ctypes.c_float, _P),
    "msi_rope_and_write": (*[_N] * 7, *[_P] * 6, ctypes.c_float),
    "msi_topk_softmax": (*[_N] * 6, _P, _P, _P),
    "msi_pack_rows": (_N, _N, _N, _P, _N, *[_P] * 6, _N),
    "msi_round": (_N, _N, _N, _P, _P, _N),
}
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def native_rows() -> ctypes.PyDLL | None:
    """These calls take microseconds: they keep the interpreter, which giving away and asking back costs more."""
    library = native_library()
    if library is None:
        return None
    rows = ctypes.PyDLL(library._name)
    for name, arguments in SIGNATURES.items():
        function = getattr(rows, name)
        function.restype, function.argtypes = None, arguments
    return rows


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Of a pass with one token of each sequence.

    Attributes:
        kv_rows: as `AttentionPlan` says.
        tables, contexts: int32 [num_seqs, max_blocks] and [num_seqs], as the pass is laid out.
        window: tokens that a query sees, 0 for all.
    """

    kv_rows: Tensor
    tables: Tensor
    contexts: Tensor
    window: int


def decode_plan(host: PassTensors, shape: AttentionShape, dtype: torch.dtype) -> DecodePlan | None:
    """None where a sequence has more than one token, or heads are not what `decode` takes."""
    if dtype not in DTYPES or shape.head_dim % WIDTH or len(host.query_lens) != len(host.slot_mapping):
        return None
    return DecodePlan(kv_rows(host.slot_mapping), host.block_tables, host.context_lens, shape.sliding_window or 0)


def norm(rows: ctypes.PyDLL, hidden: Tensor, norm: Norm, added: Tensor | None = None) -> Tensor | None:
    """The norm of hidden [n, h], to which `added` is added in place before; None where it is another's."""
    weight = norm.weight
    if norm.apply is not rms_norm or hidden.dtype not in DTYPES or hidden.dtype is not weight.dtype:
        return None
    num_rows, width = hidden.shape
    is_ours = width % WIDTH == 0 and hidden.is_contiguous() and weight.is_contiguous()
    if not is_ours or (added is not None and (added.dtype is not hidden.dtype or added.stride(1) != 1)):
        return None
    normed = torch.empty_like(hidden)
    rows.msi_norm(
        hidden.dtype is torch.bfloat16, num_rows, width, hidden.data_ptr(),
        None if added is None else added.data_ptr(), 0 if added is None else added.stride(0), weight.data_ptr(),
        norm.eps, normed.data_ptr(),
    )  # fmt: skip
    return normed


def rope_and_write(
    rows: ctypes.PyDLL,
    heads: Tensor,
    num_q: int,
    rope: tuple[Tensor, Tensor],
    layer_cache: Tensor,
    kv_rows: Tensor,
    norm: HeadNorm | None = None,
) -> bool:
    """As `msi.kernels.kernels.Kernels` says; False, and nothing done, where it is another's."""
    cos, sin = rope
    dtype, rotated, is_e4m3 = heads.dtype, cos.shape[-1], layer_cache.dtype is fp8.E4M3
    if dtype not in DTYPES or rotated % (2 * WIDTH) or not heads.is_contiguous():
        return False
    num_rows, num_heads, head_dim = heads.shape
    is_taken = head_dim % WIDTH == 0 if is_e4m3 else layer_cache.dtype is dtype
    if not is_taken or not dtype == cos.dtype == sin.dtype:
        return False
    if norm is not None and (head_dim % WIDTH or norm.weights.dtype is not dtype):
        return False
    rows.msi_rope_and_write(
        dtype is torch.bfloat16, is_e4m3, num_rows, num_q, (num_heads - num_q) // 2, head_dim, rotated,
        heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), layer_cache.data_ptr(), kv_rows.data_ptr(),
        None if norm is None else norm.weights.data_ptr(), 0.0 if norm is None else norm.eps,
    )  # fmt: skip
    return True


def decode(query: Tensor, layer_cache: Tensor, plan: DecodePlan, sinks: Tensor | None = None) -> Tensor:
    """Attention of query [num_seqs, num_heads, head_dim]; same shape. `sinks`: float32 [num_heads]."""
    library = native_library()
    assert library is not None, "no plan is made so without it"
    num_seqs, num_heads, head_dim = query.shape
    is_e4m3 = layer_cache.dtype is fp8.E4M3
    assert is_e4m3 or query.dtype is layer_cache.dtype, (query.dtype, layer_cache.dtype)
    assert query.stride()[1:] == (head_dim, 1), query.stride()
    attended = torch.empty(num_seqs, num_heads, head_dim, dtype=query.dtype)
    library.msi_decode(
        query.dtype is torch.bfloat16, is_e4m3, num_seqs, num_heads, layer_cache.shape[3], head_dim, query.data_ptr(),
        query.stride(0), layer_cache.data_ptr(), plan.tables.data_ptr(), plan.tables.stride(0),
        plan.contexts.data_ptr(), plan.window, None if sinks is None else sinks.data_ptr(), attended.data_ptr(),
    )  # fmt: skip
    return attended


def topk_softmax(rows: ctypes.PyDLL, logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor] | None:
    """As `msi.kernels.routing.topk_softmax` says; None where it is another's."""
    if logits.dtype not in DTYPES or logits.stride(1) != 1:
        return None
    num_rows, num_experts = logits.shape
    weights = torch.empty(num_rows, k, dtype=torch.float32)
    ids = torch.empty(num_rows, k, dtype=torch.int64)
    rows.msi_topk_softmax(
        logits.dtype is torch.bfloat16, num_rows, num_experts, logits.stride(0), k, renormalise, logits.data_ptr(),
        weights.data_ptr(), ids.data_ptr(),
    )  # fmt: skip
    return weights, ids


def pack(
    rows: ctypes.PyDLL, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, local_ids: Tensor, into: PackedRows
) -> bool:
    """All rows, to the start of those of one expert node; False, and nothing done, where it is another's.

    Args:
        local_ids: int32 [num_experts].
    """
    num_rows, width = hidden.shape
    out, k = into.hidden, topk_ids.shape[1]
    is_ours = hidden.dtype is out.dtype and hidden.stride(1) == out.stride(1) == 1 and num_rows <= len(out)
    if not is_ours or not topk_weights.is_contiguous() or not topk_ids.is_contiguous():
        return False
    size = hidden.element_size()
    rows.msi_pack_rows(
        num_rows, width * size, k, hidden.data_ptr(), hidden.stride(0) * size, topk_weights.data_ptr(),
        topk_ids.data_ptr(), local_ids.data_ptr(), out.data_ptr(), into.topk_weights.data_ptr(),
        into.topk_ids.data_ptr(), out.stride(0) * size,
    )  # fmt: skip
    return True


def scatter(
    rows: ctypes.PyDLL, combined: Tensor, lane: int, seats: Sequence[tuple[int, int]], answers: Mapping[int, Tensor]
) -> bool:
    """As `msi.kernels.plain.scatter_answers`, of float32 [n, h]; False, and nothing done, where it is another's."""
    width = combined.shape[1]
    if not seats or (dtype := answers[seats[0][0]].dtype) not in DTYPES or width % WIDTH:
        return False
    start, row_bytes = combined.data_ptr(), 4 * width
    for seat, num_rows in seats:
        to = answers[seat][lane]
        rows.msi_round(dtype is torch.bfloat16, num_rows, width, start, to.data_ptr(), to.stride(0))
        start += num_rows * row_bytes
    return True
