"""Products in float8 by DeepGEMM, as a module of the same signatures computes them in the layouts that it documents."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
from dataclasses import replace
from operator import itemgetter
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from msi import ConfigError
from msi.device.choice import gpu_kernels
from msi.kernels import SWIGLU, Activation, deepgemm, fp8, plain
from msi.kernels.deepgemm import DeepGemm, DeepGemmLinear, block_scales
from msi.kernels.experts import activate
from msi.kernels.plain import PlainKernels
from msi.kernels.quantized import in_float8, joined, quantize
from msi.kernels.routing import RowDtypes
from msi.settings import DEMO_MODEL
from tests import fake_deepgemm
from tests.kernels.test_eight_bits import divergence, prompt_of
from tests.kernels.test_quantized import TEXT
from tests.test_models import PlainDevice, logits_of

pytest.importorskip("triton", reason="Triton is not installed here")

from msi.kernels.flashinfer import FlashinferKernels
from msi.kernels.triton import expert_bank, rounded
from msi.kernels.triton.kernels import TritonKernels
from msi.kernels.triton.linear import Float8Linear
from msi.kernels.triton.tiles import Product, Tiles
from tests.kernels.compiled import Request, assert_fits, compile_all
from tests.kernels.test_triton_experts import Place

CPU = torch.device("cpu")
MOST_NATS = 5e-3
BFLOAT16 = RowDtypes.of(torch.bfloat16)
CUT = Product(32, 32, 4, 2)
TILES = (Tiles(2, 16, CUT, CUT), Tiles(1 << 30, 16, CUT, CUT))


@pytest.fixture
def library(monkeypatch):
    """In small tiles, so that several are begun, and tried on few rows."""
    monkeypatch.setitem(sys.modules, "deep_gemm", fake_deepgemm)
    monkeypatch.setattr(fake_deepgemm, "ALIGNMENT", 8)
    monkeypatch.setattr(expert_bank, "TRIED_ROWS", 3)
    monkeypatch.setattr(deepgemm, "SIZES", (4, 8, 32))


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def as_rounded(rows):
    """What e4m3 with a scale for each 128 makes of rows, plainly."""
    shape = rows.shape
    rows = rows.reshape(-1, shape[-1])
    return fp8.unpack(fp8.pack(rows), shape[-1], rows.dtype).view(shape)


# -- the products ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("num_rows", [1, 2, 7, 32])
def test_a_matrix_by_itself_multiplies_rounded_rows(num_rows):
    matrix, bias = quantize(values(192, 256), "fp8"), values(192, seed=2).to(torch.bfloat16)
    kernels = TritonKernels(CPU, DeepGemm(CPU))
    for one in (None, bias):
        linear = kernels.linear(matrix, one)
        assert isinstance(linear, DeepGemmLinear)
        memory = torch.full((num_rows + 1, 256 + 8), float("nan"), dtype=torch.bfloat16)
        rows = memory[:num_rows, :256]
        rows.copy_(values(num_rows, 256, seed=3))
        wanted = as_rounded(rows.float()).double() @ matrix.dequantized(torch.float64).T
        wanted = wanted if one is None else wanted + one.double()
        assert error(linear(rows), wanted) < 5e-3, "but for a result in bfloat16"
        assert linear(rows).shape == (num_rows, 192)


@pytest.mark.usefixtures("library")
def test_what_it_cannot_multiply_tritons_kernels_do():
    library = DeepGemm(CPU)
    kernels = TritonKernels(CPU, library)
    of_rows = in_float8(values(128, 128).to(torch.float8_e4m3fn), values(128, seed=1).abs())
    blocks_begin_anew = joined([quantize(values(64, 128), "fp8"), quantize(3 * values(128, 128, seed=1), "fp8")])
    for matrix in (quantize(values(128, 136), "fp8"), quantize(values(40, 128), "fp8"), of_rows, blocks_begin_anew):
        assert block_scales(matrix) is None
        assert isinstance(kernels.linear(matrix), Float8Linear)
    linear = kernels.linear(quantize(values(128, 128), "fp8"))
    for rows in (values(2, 128), values(2, 128).to(torch.float16), values(33, 128).to(torch.bfloat16)):
        wanted = rows.double() @ quantize(values(128, 128), "fp8").dequantized(torch.float64).T
        assert error(linear(rows), wanted) < 5e-3, "and nothing is rounded"
    assert not library._is_taken
    assert linear(values(0, 128).to(torch.bfloat16)).shape == (0, 128)


def banks(num_experts=5, hidden=128, inner=256, layers=2, activation=SWIGLU, **library):
    """Of the same numbers: by DeepGEMM, and by plain torch in float64."""
    shape = {
        "num_layers": layers, "num_experts": num_experts, "hidden_size": hidden, "inner_size": inner,
        "activation": activation,
    }  # fmt: skip
    ours = TritonKernels(CPU, DeepGemm(CPU, **library)).expert_bank(dtype=torch.bfloat16, quantization="fp8", **shape)
    ours.tiles = TILES
    plain = PlainKernels(CPU).expert_bank(dtype=torch.float64, **shape)
    for layer in range(layers):
        for expert in range(num_experts):
            gate_up = values(2 * inner, hidden, seed=10 * layer + expert) * hidden**-0.5
            down = values(hidden, inner, seed=100 + 10 * layer + expert) * inner**-0.5
            quantized = [quantize(half, "fp8") for half in gate_up.chunk(2)], quantize(down, "fp8")
            ours.put(layer, expert, joined(quantized[0]), quantized[1])
            plain.put(
                layer, expert, torch.cat([one.dequantized(torch.float64) for one in quantized[0]]),
                quantized[1].dequantized(torch.float64),
            )  # fmt: skip
    return ours, plain


WAVES = {"empty": [], "one row": [(1, 1)], "ragged": [(0, 3), (2, 9)], "none of one": [(0, 0), (1, 4)], "full": [
    (0, 12), (1, 12), (2, 12)]}  # fmt: skip


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("sent", [torch.bfloat16, fp8.E4M3], ids=["as computed", "in eight bits"])
def test_waves_are_right_within_what_rounding_costs_and_write_nothing_but_their_rows(sent):
    ours, plain = banks()
    ours.warm(7, 2, replace(BFLOAT16, sent=sent))
    assert ours._by_library == TILES
    place, lane = Place(3, 2, 12, 2, 128, torch.bfloat16, sent=sent), 1
    generator = torch.Generator().manual_seed(0)
    for number, seats in enumerate(WAVES.values()):
        for seat, num_rows in filter(itemgetter(1), seats):
            place.put(seat, lane, num_rows, 5, generator)
        for one in place.memory:
            one.fill_(0xFF)
        ours.run(number % 2, lane, seats, place.landed, place.answers)
        assert place.untouched([(seat, lane, num_rows) for seat, num_rows in seats])
        for seat, num_rows in seats:
            rows = place.landed.gather(lane, [(seat, num_rows)])
            wanted = torch.zeros(1, num_rows, 128, dtype=torch.float64)
            exact = replace(
                place.landed, hidden=rows.hidden.double()[None, None], topk_ids=rows.topk_ids[None, None],
                topk_weights=rows.topk_weights[None, None], unpacked=None,
            )  # fmt: skip
            plain.run(number % 2, 0, [(0, num_rows)], exact, {0: wanted})
            if num_rows:
                assert error(place.answers[seat][lane, :num_rows], wanted[0]) < 6e-2
    assert ours.num_rows.sum() == plain.num_rows.sum()


@pytest.mark.usefixtures("library")
def test_a_wave_is_exactly_what_rounding_its_rows_and_activations_makes():
    """Nothing but that is lost: beside plain products that round where it does."""
    clamped = Activation(alpha=1.7, limit=0.6, up_offset=1.0)
    ours, _ = banks(activation=clamped)
    ours.warm(5, 2, BFLOAT16)
    place = Place(1, 1, 30, 2, 128, torch.bfloat16)
    place.put(0, 0, 30, 5, torch.Generator().manual_seed(3), share_here=1.0)
    ours.run(1, 0, [(0, 30)], place.landed, place.answers)
    hidden = as_rounded(place.landed.hidden[0, 0].float()).double()
    wanted = torch.zeros(30, 128, dtype=torch.float64)
    ids, weights = place.landed.topk_ids[0, 0], place.landed.topk_weights[0, 0]
    for expert in range(5):
        w13, w2 = (dequantized(ours, 1, expert, which) for which in (0, 1))
        middle = activate((hidden @ w13.T).to(torch.bfloat16).float(), clamped)
        down = (as_rounded(middle).double() @ w2.T).to(torch.bfloat16).double()
        wanted += down * torch.where(ids == expert, weights.double(), 0.0).sum(-1)[:, None]
    assert error(place.answers[0][0], wanted) < 8e-3


def dequantized(bank, layer, expert, which):
    weights, scales = ((bank.weights.w13, bank.weights.scale13), (bank.weights.w2, bank.weights.scale2))[which]
    wide = scales[layer, expert].repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    return weights[layer, expert].double() * wide.double()


# -- the choice --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("library")
def test_measured_the_faster_multiplies_by_numbers_of_rows(caplog):
    """Triton is timed before DeepGEMM, few rows of an expert before many."""
    caplog.set_level(logging.INFO)
    times = iter((1.0, 2.0, 2.0, 1.0))
    ours, _ = banks(layers=1, is_measured=True, seconds=lambda work: next(times))
    ours.warm(5, 2, BFLOAT16)
    assert ours._by_library == TILES[1:]
    assert "5 experts in float8, 128 x 256, of up to 2 rows each by Triton: " in caplog.text
    place = Place(1, 1, 12, 2, 128, torch.bfloat16)
    strides = place.answers[0].stride(0) * 2, place.answers[0].stride(1) * 2
    ours.prepare(place.landed, strides, torch.bfloat16)
    assert ours._launches.way(TILES[0], 4) is TILES[0]
    assert ours._launches.rounded.sizes == (8, 16, 32, 56), "up to 24 pairs, in tiles of eight of five experts"
    assert ours._launches.way(TILES[1], 4) == 56, "where each expert may begin a tile"
    assert ours._launches.way(TILES[1], 1) == 16


@pytest.mark.usefixtures("library")
def test_measured_what_gives_something_else_or_fails_never_multiplies(monkeypatch, caplog):
    right = fake_deepgemm.product
    monkeypatch.setattr(fake_deepgemm, "product", lambda *factors: 1.2 * right(*factors))
    ours, _ = banks(layers=1, is_measured=True, seconds=lambda work: 1.0)
    ours.warm(5, 2, BFLOAT16)
    assert ours._by_library == ()
    assert "DeepGEMM is left out, as it is" in caplog.text

    def fails(*_):
        raise RuntimeError("nvcc is not here")

    monkeypatch.setattr(fake_deepgemm, "product", fails)
    linear = TritonKernels(CPU, DeepGemm(CPU, True, lambda work: 1.0)).linear(quantize(values(128, 128), "fp8"))
    rows = values(3, 128).to(torch.bfloat16)
    wanted = rows.double() @ quantize(values(128, 128), "fp8").dequantized(torch.float64).T
    assert error(linear(rows), wanted) < 5e-3
    assert "DeepGEMM is left out: RuntimeError: nvcc is not here" in caplog.text


@pytest.mark.usefixtures("library")
def test_experts_that_it_cannot_multiply_are_tritons(caplog):
    caplog.set_level(logging.INFO)
    for shape, dtypes, reason in (
        ({"inner": 136}, BFLOAT16, "their sides, 128 and 136, are no multiples of 128"),
        ({}, RowDtypes.of(torch.float16), "rows are computed in float16"),
    ):
        ours, _ = banks(layers=1, num_experts=2, **shape)
        ours.warm(2, 2, dtypes)
        assert ours._by_library == ()
        assert f"experts are multiplied by Triton's kernels alone: {reason}" in caplog.text


@pytest.mark.usefixtures("library")
def test_a_shape_is_measured_once_for_all_layers():
    asked = []
    library = DeepGemm(CPU, True, lambda work: asked.append(work) or 1.0)
    for layer in range(3):
        linear = TritonKernels(CPU, library).linear(quantize(values(128, 128, seed=layer), "fp8"))
        linear(values(3, 128).to(torch.bfloat16))
    assert len(asked) == 2 * len(deepgemm.SIZES)


@pytest.mark.usefixtures("library")
def test_who_asks_gets_it_and_who_asks_for_all_gets_it_measured(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "deep_gemm" or found(name))
    kernels = gpu_kernels("deepgemm")(CPU)
    assert type(kernels) is TritonKernels
    assert not kernels.library.is_measured
    assert gpu_kernels("auto")(CPU).library.is_measured
    assert gpu_kernels("auto", has_gates=True) is TritonKernels
    assert gpu_kernels("triton") is TritonKernels
    with pytest.raises(ConfigError, match=r"`cuda_kernels` deepgemm cannot work: with `cuda_queues` gates .*=triton"):
        gpu_kernels("deepgemm", has_gates=True)
    monkeypatch.setattr(deepgemm, "why_not_on", lambda device: "its kernels are for other GPUs")
    assert gpu_kernels("auto")(CPU).library is None
    with pytest.raises(ConfigError, match=r"`cuda_kernels` deepgemm cannot work: its kernels are for other GPUs; "):
        gpu_kernels("deepgemm")(CPU)
    assert FlashinferKernels.__mro__[1] is TritonKernels, "which has both libraries where both are taken"


@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is not None, reason="it is installed")
def test_where_it_is_missing_one_sentence_says_so_and_nobody_needs_it(caplog):
    with pytest.raises(ConfigError, match=r"DeepGEMM is not installed; `pip install sgl-deep-gemm` brings it; "):
        gpu_kernels("deepgemm")
    caplog.set_level(logging.INFO)
    gpu_kernels("auto")
    assert "products in float8 are by Triton's kernels alone: DeepGEMM is not installed; " in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is None, reason="it is not installed")
@pytest.mark.parametrize("name", ["fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous"])
def test_the_module_that_stands_for_it_has_its_signatures(name):
    library = importlib.import_module("deep_gemm")
    ours, theirs = (inspect.signature(getattr(one, name)) for one in (fake_deepgemm, library))
    assert ours == theirs


# -- the precision -----------------------------------------------------------------------------------------------------


def linear_of_rounded(rows, matrix, bias=None):
    return functional.linear(as_rounded(rows.float()), matrix.float(), bias).to(rows.dtype)


class QuantizedKernels(PlainKernels):
    """Plain torch, with matrices in float8 multiplied by rows as they are, or rounded as DeepGEMM wants them."""

    def __init__(self, multiply):
        super().__init__(CPU)
        self._multiply = multiply

    def linear(self, weight, bias=None):
        if isinstance(weight, torch.Tensor):
            return lambda rows: functional.linear(rows, weight, bias)
        matrix = weight.dequantized(torch.float32)
        return lambda rows: self._multiply(rows, matrix, bias)


@pytest.mark.slow
def test_the_trained_model_says_nearly_the_same_with_rows_rounded_before_every_product(monkeypatch):
    """4.8e-4 nats from float32 with matrices in float8 alone, 2.2e-3 with rows rounded besides."""
    prompt = prompt_of(TEXT)[:100]
    exact = logits_of(DEMO_MODEL, prompt, torch.float32, is_everywhere=True)
    apart = []
    for multiply in (
        lambda rows, matrix, bias: functional.linear(rows, matrix.to(rows.dtype), bias),
        linear_of_rounded,
    ):
        monkeypatch.setattr(plain, "functional", SimpleNamespace(linear=multiply_or(multiply)))
        device = PlainDevice(QuantizedKernels(multiply))
        found = logits_of(DEMO_MODEL, prompt, torch.float32, device, is_everywhere=True, quantization="fp8")
        apart.append(divergence(found, exact))
    assert apart[0] < 2e-3
    assert apart[0] < apart[1] < MOST_NATS


def multiply_or(multiply):
    return lambda rows, matrix, bias=None: multiply(rows, matrix, bias)


# -- compiled for GPUs that are not here -------------------------------------------------------------------------------


def requests(architecture):
    """Of Mixtral-8x7B's shape."""
    int32, int64 = ("wave", "tile_expert", "tile_begin", "tile_end", "matrix_of", "pair_place"), ("pair_source",)
    common = {"values": "*fp8e4nv", "scales": "*fp32", "num_places": "i32"}
    gather = dict.fromkeys(int32, "*i32") | dict.fromkeys(int64, "*i64") | common | {"hidden": "*bf16"}
    sizes = {"HIDDEN": 4096, "NUM_EXPERTS": 8, "TILE": 128, "ALIGN": 8, "BLOCK": rounded.block_of(4096)}
    activate = common | dict.fromkeys(("matrix_of", "wave", "row_pair", "pair_place", "row_place"), "*i32")
    activate |= {"gate_up": "*bf16"}
    clamped = {"INNER": 14336, "K": 2, "ALPHA": 1.7, "LIMIT": 7.0, "UP_OFFSET": 1.0, "BLOCK": rounded.block_of(14336)}
    rows = common | {"rows": "*bf16", "row_stride": "i32"}
    module = "msi.kernels.triton.rounded"
    return [
        Request(f"{module}:gather_rounded", gather, sizes, architecture),
        Request(f"{module}:activate_rounded", activate, clamped, architecture),
        Request(f"{module}:round_rows", rows, {"DEPTH": 4096, "BLOCK": 1024}, architecture),
    ]


def test_they_fit_and_load_wide():
    found = compile_all(requests(90))
    for request, compiled in zip(requests(90), found, strict=True):
        assert_fits(request, compiled)
        assert compiled.count(r"LDG\.E.*(64|128)"), compiled.instructions
