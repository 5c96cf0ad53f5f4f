"""What the compiler makes of the attention side's kernels for GPUs that are not here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from msi.kernels.paged_attention import AttentionShape
from msi.kernels.triton import penalties, sampling
from msi.kernels.triton.attention_plan import ITEM, chunk_tiles, split_tiles, warps_and_stages
from tests.everyday import IS_THOROUGH, thorough
from tests.kernels.compiled import Request, assert_fits, assert_uses_tensor_cores, compile_all

BF16, F32, I32, I64, E4M3 = "*bf16", "*fp32", "*i32", "*i64", "*fp8e4nv"
NAMES = "query", "cache", "block_tables", "items", "item_starts", "output", "partial", "partial_lse"
GPT_OSS = AttentionShape(64, 8, 64)


def attention(shape, dtype, is_split, architecture, cached=None):
    has_sinks = shape == GPT_OSS
    itemsize = 4 if dtype == F32 else 2
    tiles = split_tiles(shape, itemsize) if is_split else chunk_tiles(shape, itemsize, architecture)
    return Request(
        "msi.kernels.triton.attention:paged_attention_kernel",
        dict(zip(NAMES, (dtype, cached or dtype, I32, I32, I32, dtype, F32, F32), strict=True))
        | {"query_stride": "i32", "table_stride": "i32", "scale": "fp32", "window": "i32"}
        | ({"sinks": F32} if has_sinks else {}),
        {
            "GROUP": shape.num_heads // shape.num_kv_heads, "num_kv": shape.num_kv_heads, "head_dim": shape.head_dim,
            "BLOCK_TOKENS": 16, "BLOCK_M": tiles.rows, "BLOCK_N": tiles.keys,
            "D": 1 << (max(16, shape.head_dim) - 1).bit_length(), "IS_SPLIT": is_split, "UPCAST": False, "ITEM": ITEM,
            "HAS_SINKS": has_sinks, **({} if has_sinks else {"sinks": None}),
        },
        architecture, *warps_and_stages(tiles, cached is not None),
        unaligned=("block_tables", "item_starts", "table_stride", "window", "scale"),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [90, 89, 100, thorough(80)])
def test_attention_of_served_shapes_fits_and_loads_whole_lines(architecture):
    shapes = [
        AttentionShape(48, 8, 128), GPT_OSS, AttentionShape(32, 8, 128), AttentionShape(32, 4, 128),
        AttentionShape(96, 8, 128), AttentionShape(16, 16, 128),
    ]  # fmt: skip
    shapes = shapes if architecture == 90 or IS_THOROUGH else shapes[:2]
    requests = [attention(shape, BF16, is_split, architecture) for shape in shapes for is_split in (True, False)]
    for request, compiled in zip(requests, compile_all(requests), strict=True):
        assert_fits(request, compiled)
        assert compiled.count(r"LDGSTS\.E.*128") >= 4, "keys and values are copied in lines of 16 bytes, ahead"
        if request.constants["BLOCK_M"] >= 64:  # chunks of prompts
            assert_uses_tensor_cores(request, compiled)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [89, 90, thorough(100)])
def test_attention_to_a_cache_in_eight_bits_fits(architecture):
    shapes = [AttentionShape(48, 8, 128), AttentionShape(32, 4, 128), AttentionShape(16, 16, 128)]
    requests = [attention(shape, BF16, is_split, architecture, E4M3) for shape in shapes for is_split in (True, False)]
    for request, compiled in zip(requests, compile_all(requests), strict=True):
        assert_fits(request, compiled)
        assert compiled.count(r"F2FP\..*E4M3.*UNPACK"), "by the GPU's own instruction"


@pytest.mark.slow
def test_attention_of_other_shapes_fits():
    shapes = [AttentionShape(16, 2, 80), AttentionShape(8, 8, 96), AttentionShape(8, 4, 64), AttentionShape(8, 2, 256)]
    kinds = [(BF16, True), (BF16, False), (F32, True), (F32, False)]
    requests = [attention(shape, dtype, is_split, 90) for shape in shapes for dtype, is_split in kinds]
    for request, compiled in zip(requests, compile_all(requests), strict=True):
        if request.types["query"] == BF16 or request.constants["IS_SPLIT"]:  # chunks in float32 are for tests alone
            assert_fits(request, compiled)


def small_kernels(architecture, dtype=BF16):
    """Each with how many stores of 16 bytes it has at least."""
    at = "msi.kernels.triton."
    route = {"logits": dtype, "topk_weights": F32, "topk_ids": I64, "num_tokens": "i32", "row_stride": "i32"}
    normed = {"weight": dtype, "out": dtype, "eps": "fp32"}
    hidden = {"hidden": 6144, "is_layer_norm": False, "BLOCK": 8192}
    return [
        (Request(at + "routing:route_softmax_kernel", route,
                 {"num_experts": 128, "k": 8, "renormalise": True, "EXPERTS": 128, "K": 8, "BLOCK_T": 1},
                 architecture, 1, unaligned=("num_tokens",)), 0),
        (Request(at + "routing:route_sigmoid_kernel", {**route, "logits": F32, "bias": F32, "scale": "fp32"},
                 {"num_experts": 256, "k": 8, "renormalise": True, "num_groups": 8, "num_chosen_groups": 4,
                  "EXPERTS": 256, "GROUPS": 8, "K": 8, "BLOCK_T": 1}, architecture, 1,
                 unaligned=("num_tokens", "scale")), 0),
        (Request(at + "routing:count_kernel",
                 {"topk_ids": I64, "local_ids": I32, "positions": I32, "counts": I32, "num_tokens": "i32",
                  "num_ids": "i32"},
                 {"k": 2, "K": 2, "BLOCK_T": 128}, architecture, 4, unaligned=("num_tokens", "num_ids", "counts")), 0),
        (Request(at + "routing:pack_kernel",
                 {"normed": dtype, "topk_weights": F32, "topk_ids": I64, "local_ids": I32, "positions": I32,
                  "outboxes": I64, "num_tokens": "i32", "num_ids": "i32", "out_row_stride": "i32"},
                 {"hidden": 6144, "num_nodes": 8, "NODES": 4, "k": 2, "K": 2, "BLOCK": 2048, "META_AT": 12288,
                  "SCALES_AT": 0}, architecture, 4, unaligned=("num_tokens", "num_ids")), 2),
        (Request(at + "rows:norm_kernel", {"rows": dtype, **normed, "row_stride": "i32"}, hidden, architecture, 16,
                 unaligned=("eps",)), 1),
        (Request(at + "rows:add_norm_kernel", {"residual": dtype, "added": dtype, **normed, "added_stride": "i32"},
                 hidden, architecture, 16, unaligned=("eps",)), 2),
        (Request(at + "rows:combine_norm_kernel",
                 {"residual": dtype, "answers": dtype, "positions": I32, **normed, "num_tokens": "i32",
                  "num_nodes": "i32", "node_stride": "i32", "row_stride": "i32"},
                 {**hidden, "SCALES_AT": 0}, architecture, 16, unaligned=("eps", "num_tokens", "num_nodes")), 2),
        (Request(at + "rows:silu_mul_kernel", {"gate_up": dtype, "out": dtype}, {"inner": 2048, "BLOCK": 1024},
                 architecture), 1),
        (rope_kernel(architecture, dtype, 48, 8, 64, has_norm=False), 4),
        (rope_kernel(architecture, dtype, 32, 4, 64, has_norm=True), 4),
        (rope_kernel(architecture, dtype, 96, 8, 32, has_norm=True), 2),  # half of each head rotates: lines of 8 bytes
        *([] if architecture < 89 else [
            (Request(at + "routing:pack_kernel",
                     {"normed": dtype, "topk_weights": F32, "topk_ids": I64, "local_ids": I32, "positions": I32,
                      "outboxes": I64, "num_tokens": "i32", "num_ids": "i32", "out_row_stride": "i32"},
                     {"hidden": 6144, "num_nodes": 8, "NODES": 4, "k": 2, "K": 2, "BLOCK": 2048, "META_AT": 6336,
                      "SCALES_AT": 6144}, architecture, 4, unaligned=("num_tokens", "num_ids")), 0),
            (Request(at + "rows:combine_norm_kernel",
                     {"residual": dtype, "answers": "*u8", "positions": I32, **normed, "num_tokens": "i32",
                      "num_nodes": "i32", "node_stride": "i32", "row_stride": "i32"},
                     {**hidden, "SCALES_AT": 6144}, architecture, 16,
                     unaligned=("eps", "num_tokens", "num_nodes")), 2),
            (rope_kernel(architecture, dtype, 32, 4, 64, has_norm=True, cached=E4M3), 2),
        ]),
        (Request(at + "attention:merge_kernel",
                 {"items": I32, "part_starts": I32, "partial": F32, "partial_lse": F32, "output": dtype, "sinks": F32},
                 {"HAS_SINKS": True, "GROUP": 6, "num_kv": 8, "head_dim": 128, "BLOCK_M": 16, "D": 128, "ITEM": ITEM},
                 architecture, unaligned=("part_starts",)), 1),
        *((request, 0) for request in sampling_kernels(architecture)),
        *zip(penalty_kernels(architecture), (1, 0, 0, 0, 0), strict=True),
    ]  # fmt: skip


def rope_kernel(architecture, dtype, num_q, num_kv, half, has_norm, cached=None):
    types = {"heads": dtype, "cache": cached or dtype, "cosines": F32, "sines": F32, "slots": I32}
    types |= {"token_stride": "i32", "eps": "fp32"} | ({"weights": dtype} if has_norm else {})
    constants = {
        "num_q": num_q, "num_kv": num_kv, "head_dim": 128, "half": half, "HEADS": 8, "HALF": half,
        "REST": max(1, 128 - 2 * half), "BLOCK_TOKENS": 16, "HAS_NORM": has_norm,
    }  # fmt: skip
    constants |= {} if has_norm else {"weights": None}
    return Request(
        "msi.kernels.triton.rope:rope_write_kernel", types, constants, architecture, 2, unaligned=("slots", "eps")
    )


def sampling_kernels(architecture):
    """Those of rows of some 150,000 tokens."""
    types = {
        "logits": F32, "best_values": F32, "numbers": "*fp64", "counts": I32, "masses": I64, "ends": I64,
        "lengths": I32, "ids": I32, "values": F32, "keys": I64, "tokens": I64, "best_tokens": I64,
        "vocab_size": "i32", "row_stride": "i32", "num_rows": "i32", "num_parts": "i32",
    }  # fmt: skip

    def request(name, constants, num_warps):
        names = [name for name in getattr(sampling, name).arg_names if name not in constants]
        return Request(
            f"msi.kernels.triton.sampling:{name}", {name: types[name] for name in names}, constants, architecture,
            num_warps, unaligned=tuple(name for name in ("num_rows", "num_parts", "lengths") if name in names),
        )  # fmt: skip

    sizes = {"BINS": sampling.BINS, "BLOCK": sampling.MAX_BLOCK}
    return [
        request("best_kernel", {"BLOCK": sampling.MAX_BLOCK}, 4),
        request("merge_best_kernel", {"PARTS": 256}, 1),
        *(request(name, sizes, 4) for name in ("histogram_kernel", "gather_kernel", "draw_kernel")),
    ]


def penalty_kernels(architecture):
    """Masks first, whose rows are whole lines."""
    types = {
        "logits": F32, "rows": I64, "bits": I32, "at": I64, "bias": F32, "counts": I32, "seen": I64, "numbers": F32,
        "vocab_size": "i32", "row_stride": "i32", "num_words": "i32", "num": "i32", "num_rows": "i32",
    }  # fmt: skip

    def request(name, block):
        names = [name for name in getattr(penalties, name).arg_names if name != "BLOCK"]
        return Request(
            f"msi.kernels.triton.penalties:{name}", {name: types[name] for name in names}, {"BLOCK": block},
            architecture, unaligned=tuple(name for name in ("num", "num_rows", "num_words") if name in names),
        )  # fmt: skip

    names = ("add_bias_kernel", "clear_kernel", "count_kernel", "penalise_kernel")
    return [request("allow_kernel", penalties.MAX_BLOCK), *(request(name, penalties.ENTRIES) for name in names)]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, *map(thorough, [89, 100])])
def test_small_kernels_fit_and_store_whole_lines(architecture):
    asked, stores = zip(*small_kernels(architecture), strict=True)
    requests = [replace(one, is_read=least > 0) for one, least in zip(asked, stores, strict=True)]
    for request, compiled, least in zip(requests, compile_all(requests), stores, strict=True):
        assert_fits(request, compiled)
        assert compiled.count(r"STG\.E.*128") >= least, request.kernel
