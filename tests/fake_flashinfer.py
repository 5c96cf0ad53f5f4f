"""A module with the signatures that flashinfer 0.7.2 has for attention over pages, and for lists of the best.

Attention works in plain float32 from the page tables alone, as the library's documentation has them. What the library
refuses is refused.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import _disable_current_modes

DTYPES = torch.float16, torch.bfloat16
num_lists = 0
topk = SimpleNamespace(can_implement_filtered_topk=lambda: True)


def top_k(input, k, sorted=False, deterministic=False, tie_break=0, dsa_graph_safe=False):
    """Values by their bits, so that 0.0 is more than -0.0, as the library's radix has them."""
    global num_lists
    num_lists += 1
    assert input.dtype is torch.float32
    assert input.is_contiguous()
    assert 1 <= k <= 2048
    assert k <= input.shape[1]
    assert not input.isnan().any()
    bits = input.view(torch.int32).to(torch.int64)
    keys = torch.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)
    at = torch.arange(input.shape[1])
    if tie_break == 1:
        chosen = keys.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    else:  # whichever of those that are like the last; here those of higher ids
        chosen = at.flip(0)[keys.flip(1).sort(dim=-1, descending=True, stable=True).indices[:, :k]]
    chosen = chosen.sort(dim=-1).values if deterministic else chosen.flip(1)
    if sorted:
        of_list = keys.gather(1, chosen).sort(dim=-1, descending=True, stable=deterministic).indices
        chosen = chosen.gather(1, of_list)
    return input.gather(1, chosen), chosen


def attend(query, keys, values, is_causal, window_left, sm_scale):
    """Of one request: [queries, heads, dim] to [tokens, kv heads, dim]; queries are the last of its tokens."""
    num_queries, num_heads, _ = query.shape
    num_tokens, num_kv, _ = keys.shape
    keys, values = (one.float().repeat_interleave(num_heads // num_kv, dim=1) for one in (keys, values))
    scores = torch.einsum("qhd,thd->hqt", query.float(), keys) * sm_scale
    at = torch.arange(num_tokens)[None] - (torch.arange(num_queries)[:, None] + num_tokens - num_queries)
    is_hidden = (at > 0) & is_causal
    if window_left >= 0:
        is_hidden |= at < -window_left
    weights = scores.masked_fill(is_hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqt,thd->qhd", weights, values)


class _Wrapper:
    def __init__(self, float_workspace_buffer, kv_layout):
        assert float_workspace_buffer.dtype is torch.uint8
        with _disable_current_modes():
            assert not float_workspace_buffer.any(), "a workspace is of zeros at first"
        assert kv_layout == "NHD"
        self.num_plans = 0

    def _keep(self, query_starts, starts, indices, last_lens, heads, page_size, window_left, dtypes):
        for numbers in (query_starts, starts, indices, last_lens):
            assert numbers.dtype is torch.int32
        assert len(starts) == len(last_lens) + 1 == len(query_starts)
        assert len(indices) == starts[-1]
        assert ((last_lens >= 1) & (last_lens <= page_size)).all()
        assert dtypes[0] in DTYPES
        self.pass_ = query_starts.tolist(), starts.tolist(), indices.clone(), last_lens.tolist()
        self.heads, self.page_size, self.window_left, self.dtypes = heads, page_size, window_left, dtypes
        self.num_plans += 1

    def _run(self, q, paged_kv_cache, is_causal):
        query_starts, starts, indices, last_lens = self.pass_
        num_heads, num_kv, head_dim = self.heads
        assert q.is_contiguous()
        assert q.shape == (query_starts[-1], num_heads, head_dim)
        assert paged_kv_cache.shape[1:] == (2, self.page_size, num_kv, head_dim)
        assert (q.dtype, paged_kv_cache.dtype) == self.dtypes
        out = torch.empty_like(q)
        for request, last in enumerate(last_lens):
            pages = paged_kv_cache[indices[starts[request] : starts[request + 1]].long()].float()
            length = (len(pages) - 1) * self.page_size + last
            keys, values = (pages[:, half].flatten(0, 1)[:length] for half in (0, 1))
            rows = slice(query_starts[request], query_starts[request + 1])
            out[rows] = attend(q[rows], keys, values, is_causal, self.window_left, 1 / math.sqrt(head_dim)).to(q.dtype)
        return out


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False,
        paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None, backend="auto",
        jit_args=None,
    ):  # fmt: skip
        super().__init__(float_workspace_buffer, kv_layout)
        self.use_tensor_cores = use_tensor_cores
        self.use_cuda_graph = use_cuda_graph
        self.buffers = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
        if use_cuda_graph:
            assert backend == "fa2"
            assert all(one.dtype is torch.int32 for one in self.buffers)
            assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer):
        assert float_workspace_buffer.dtype is int_workspace_buffer.dtype is torch.uint8

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *, window_left=-1,
        q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        assert self.use_tensor_cores or num_qo_heads // num_kv_heads in (1, 2, 4, 8)
        with _disable_current_modes():  # all this is the host's
            each = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
            heads = num_qo_heads, num_kv_heads, head_dim
            dtypes = q_data_type, kv_data_type
            self._keep(each, indptr, indices, last_page_len, heads, page_size, window_left, dtypes)
        if self.use_cuda_graph:
            starts, blocks, lens = self.buffers
            assert len(last_page_len) == len(lens), "the size of a pass is fixed"
            assert len(indices) <= len(blocks)
            for kept, new in ((starts, indptr), (blocks[: len(indices)], indices), (lens, last_page_len)):
                kept.copy_(new)
            self._plan_info = [len(lens), num_qo_heads, num_kv_heads]

    def run(self, q, paged_kv_cache, *args, out=None, window_left=None, sinks=None):
        assert sinks is None, "which its kernels for Hopper pass over"
        if self.use_cuda_graph:
            return self._run_fixed(q, paged_kv_cache)
        return self._run(q, paged_kv_cache, is_causal=False)

    def _run_fixed(self, q, paged_kv_cache):
        """By what lies in the buffers when it comes to it, and the sizes that it was made with."""
        starts, blocks, lens = self.buffers
        num_seqs, (num_heads, num_kv, head_dim) = len(lens), self.heads
        assert q.shape == (num_seqs, num_heads, head_dim)
        assert (q.dtype, paged_kv_cache.dtype) == self.dtypes
        begin, count = starts[:-1].long()[:, None], (starts[1:] - starts[:-1]).long()[:, None]
        width = len(blocks) // num_seqs
        of_pages = (begin + torch.arange(width)).clamp(max=len(blocks) - 1)
        pages = paged_kv_cache[blocks.long()[of_pages]].float()  # [n, width, 2, page, kv heads, dim]
        keys, values = (
            pages[:, :, half].flatten(1, 2).repeat_interleave(num_heads // num_kv, dim=2) for half in (0, 1)
        )
        length = (count - 1) * self.page_size + lens.long()[:, None]
        at = torch.arange(width * self.page_size)[None]
        is_seen = at < length
        if self.window_left >= 0:
            is_seen = is_seen & (at >= length - 1 - self.window_left)
        scores = torch.einsum("nhd,nthd->nht", q.float(), keys) / math.sqrt(head_dim)
        weights = torch.where(is_seen[:, None], scores, torch.tensor(float("-inf"))).softmax(dim=-1)
        values = torch.where(is_seen[:, :, None, None], values, torch.tensor(0.0))
        return torch.einsum("nht,nthd->nhd", weights, values).to(q.dtype)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
        paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None,
        mask_indptr_buf=None, backend="auto", jit_args=None, jit_kwargs=None, variant_owns_mask=False,
    ):  # fmt: skip
        super().__init__(float_workspace_buffer, kv_layout)

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        self._is_causal = causal
        self._keep(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len,
            (num_qo_heads, num_kv_heads, head_dim_qk), page_size, window_left, (q_data_type, kv_data_type),
        )  # fmt: skip

    def run(self, q, paged_kv_cache, *args, out=None, window_left=None, sinks=None):
        assert sinks is None, "which its kernels for Hopper pass over"
        return self._run(q, paged_kv_cache, self._is_causal)
