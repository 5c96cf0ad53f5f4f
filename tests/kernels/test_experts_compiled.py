"""The experts' kernels compiled for GPUs: nothing spilt, shared memory that is there, wide instructions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from msi.kernels.triton.launches import answer_warps, counted_rows, plan_rows
from msi.kernels.triton.tiles import TUNED, Product, Tiles, default_tiles, file_name, from_json
from tests.everyday import mostly_slow, mostly_thorough, thorough
from tests.kernels.compiled import (
    ARCHITECTURES,
    SHARED_BYTES,
    Compiled,
    Request,
    assert_fits,
    assert_uses_tensor_cores,
    compile_all,
)  # fmt: skip

MIXTRAL = {"HIDDEN": 4096, "INNER": 14336, "NUM_EXPERTS": 8}
GPT_OSS = {"HIDDEN": 2880, "INNER": 2880, "NUM_EXPERTS": 32}
H100 = "NVIDIA H100 80GB HBM3"
CLAMPED = {"ALPHA": 1.702, "LIMIT": 7.0, "UP_OFFSET": 1.0}
WAVE = ("wave", "tile_expert", "tile_begin", "tile_end")


def gate_up(tiles: Tiles, architecture: int, weights: str = "bf16", **shape: int) -> Request:
    product = tiles.gate_up
    w13 = f"tensordesc<bf16[{product.block_n}, {product.block_k}]>" if product.is_tma else f"*{weights}"
    types = dict.fromkeys(WAVE, "*i32") | {"hidden": "*bf16", "w13": w13, "act": "*bf16", "pair_source": "*i64"}
    scaled = {"scale13": None} if weights == "bf16" else {}
    types |= {} if scaled else {"scale13": "*fp32"}
    constants = MIXTRAL | shape | scaled | {
        "bias13": None, "ALIGN": 8, "ALPHA": 1.0, "LIMIT": 0.0, "UP_OFFSET": 0.0, **_common(tiles, product, weights)
    }  # fmt: skip
    return _request("gate_up", types, constants, architecture, product)


def down(tiles: Tiles, architecture: int, weights: str = "bf16", **shape: int) -> Request:
    product = tiles.down
    w2 = f"tensordesc<bf16[{product.block_n}, {product.block_k}]>" if product.is_tma else f"*{weights}"
    types = dict.fromkeys(WAVE, "*i32") | {"act": "*bf16", "w2": w2, "partial": "*fp32", "num_pairs": "i32"}
    scaled = {"scale2": None} if weights == "bf16" else {}
    types |= {} if scaled else {"scale2": "*fp32"}
    constants = MIXTRAL | shape | scaled | {
        "bias2": None, "SPLITS": product.splits, **_common(tiles, product, weights)
    }  # fmt: skip
    return _request("down", types, constants, architecture, product)


def _common(tiles: Tiles, product: Product, weights: str) -> dict[str, object]:
    return {
        "BLOCK_M": tiles.block_m, "BLOCK_N": product.block_n, "BLOCK_K": product.block_k, "IS_TMA": product.is_tma,
        "IS_SWAPPED": product.is_swapped, "IS_FLAT": product.is_flat,
        "SCALE_BLOCK": 0 if weights == "bf16" else 128, "HAS_BIAS": False,
        "UPCAST": False,
    }  # fmt: skip


def _request(name: str, types, constants, architecture: int, product: Product) -> Request:
    kernel = f"msi.kernels.triton.experts:{name}"
    return Request(kernel, types, constants, architecture, product.num_warps, product.num_stages)


def plan(architecture: int, num_experts: int, k: int, seats: int = 64) -> Request:
    int32 = ("topk_ids", "wave", "offsets", "tile_expert", "tile_begin", "tile_end", "row_pair")
    int64 = (
        "ring", "ticket", "pair_source", "row_answer", "row_source", "total_rows", "num_rows_seen", "total_read",
        "num_read_seen",
    )  # fmt: skip
    strides = [f"{of}_{by}" for of in ("weights", "ids", "hidden") for by in ("seat", "lane", "row")]
    types = dict.fromkeys(int32, "*i32") | dict.fromkeys(int64, "*i64")
    types |= dict.fromkeys((*strides, "answer_lane", "answer_row", "source_row"), "i32")
    types |= {"topk_weights": "*fp32", "row_weight": "*fp32"}
    constants = {
        "NUM_EXPERTS": num_experts, "EXPERTS": num_experts, "K": k, "KS": k, "SEATS": seats,
        "ROWS": plan_rows(k, num_experts), "COUNTED": counted_rows(k, seats),
        "BLOCK_M": 16, "RING": 32, "IS_STAGED": False,
    }  # fmt: skip
    return Request("msi.kernels.triton.wave:plan_wave", types, constants, architecture, num_warps=8)


def answer(architecture: int, scales_at: int = 0) -> Request:
    types = {"partial": "*fp32", "wave": "*i32", "ticket": "*i64", "row_pair": "*i32", "row_weight": "*fp32"}
    types |= {"row_answer": "*i64", "num_pairs": "i32"}
    constants = {"HIDDEN": 4096, "K": 2, "SPLITS": 4, "BLOCK": 1024, "DTYPE": "tl.bfloat16", "SCALES_AT": scales_at}
    return Request(
        "msi.kernels.triton.wave:answer_rows", types, constants, architecture, num_warps=answer_warps(scales_at)
    )


def stage(architecture: int, scales_at: int = 0) -> Request:
    types = {"hidden": "*u8" if scales_at else "*bf16", "row_source": "*i64", "wave": "*i32", "staged": "*bf16"}
    constants = {"HIDDEN": 4096, "BLOCK": 1024, "SCALES_AT": scales_at}
    return Request("msi.kernels.triton.wave:stage_rows", types, constants, architecture)


@pytest.mark.parametrize("architecture", [*mostly_slow([90, 80]), *map(thorough, [89, 100])])
def test_a_waves_plan_and_answers_fit_and_store_wide(architecture):
    requests = [
        plan(architecture, 8, 2),
        plan(architecture, 128, 8),
        plan(architecture, 256, 8),
        plan(architecture, 8, 2, seats=8),
        answer(architecture),
        stage(architecture),
        *([answer(architecture, 4096), stage(architecture, 4096)] if architecture >= 89 else []),
    ]
    results = compile_all(requests)
    for request, compiled in zip(requests, results, strict=True):
        assert_fits(request, compiled)
    for request, compiled in zip(requests[4:], results[4:], strict=True):
        is_packed_answer = request.constants["SCALES_AT"] and "DTYPE" in request.constants
        assert compiled.count(r"STG\.E$" if is_packed_answer else r"STG\.E.*128"), compiled.instructions


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("architecture", mostly_thorough([90, *(one for one in ARCHITECTURES if one != 90)]))
def test_the_products_of_clamped_experts_with_biases_fit(architecture):
    """Of a shape that few tiles divide."""
    requests = []
    for tiles in default_tiles(torch.bfloat16, SHARED_BYTES[architecture]):
        for request, bias in (
            (gate_up(tiles, architecture, **GPT_OSS), "bias13"),
            (down(tiles, architecture, **GPT_OSS), "bias2"),
        ):
            constants = {name: value for name, value in request.constants.items() if name != bias} | {"HAS_BIAS": True}
            constants |= CLAMPED if bias == "bias13" else {}
            requests.append(replace(request, types=request.types | {bias: "*fp32"}, constants=constants))
    for request, compiled in zip(requests, compile_all(requests), strict=True):
        _assert_is_wide(request, compiled)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("architecture", "weights"),
    [
        (89, "bf16"),
        (90, "bf16"),
        (100, "bf16"),
        (89, "fp8e4nv"),
        (90, "fp8e4nv"),
        thorough(80, "bf16"),
        thorough(100, "fp8e4nv"),
    ],
)
def test_the_products_fit(architecture, weights):
    """With the tiles of a device that nobody has measured."""
    tiles = default_tiles(torch.bfloat16 if weights == "bf16" else torch.float8_e4m3fn, SHARED_BYTES[architecture])
    requests = [make(one, architecture, weights) for one in tiles for make in (gate_up, down)]
    if weights != "bf16":  # and with scales of rows
        requests += [replace(one, constants=one.constants | {"SCALE_BLOCK": 1}) for one in requests]
    for request, compiled in zip(requests, compile_all(requests), strict=True):
        _assert_is_wide(request, compiled)


def measured(name: str) -> list[Request]:
    """What was found best on an H100, each way to cut a product once; those come first that defaults do not have."""
    entries = json.loads((TUNED / f"{file_name(H100)}.json").read_text())["shapes"]
    ways = {}
    for entry in entries:
        shape = {"HIDDEN": entry["hidden"], "INNER": entry["inner"]}
        for tiles in map(from_json, entry["tiles"]):
            product = getattr(tiles, name)
            way = replace(product, per_sm=1, splits=min(product.splits, 2)), tiles.block_m
            ways.setdefault(way, (tiles, shape))
    ordered = sorted(ways.items(), key=lambda one: (not one[0][0].is_swapped, not one[0][0].is_tma, one[0][1]))
    return [{"gate_up": gate_up, "down": down}[name](tiles, 90, **shape) for _, (tiles, shape) in ordered]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("name", "count"), [("gate_up", 1), ("down", 1), thorough("gate_up", 99), thorough("down", 99)]
)
def test_the_products_as_an_h100_likes_them_fit(name, count):
    """Weights by descriptors and as the tall operand among them."""
    requests = measured(name)[:count]
    assert any(one.constants["IS_TMA"] for one in requests)
    for request, compiled in zip(requests, compile_all(requests), strict=True):
        _assert_is_wide(request, compiled)
        assert compiled.count("UTMALDG") or not request.constants["IS_TMA"], "by the unit that copies tiles"


def _assert_is_wide(request: Request, compiled: Compiled) -> None:
    assert_fits(request, compiled)
    assert compiled.count(r"LDGSTS.*128|UTMALDG"), "rows and weights come in wide loads"
    assert compiled.count(r"STG\.E\.128") == compiled.count("STG"), "and results leave in wide stores"
    if request.constants["BLOCK_M"] >= 64:
        assert_uses_tensor_cores(request, compiled)
