"""Matrices in int8, int4 and fp8: what they stand for, the kernels that unpack them, what a trained model says then."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional

from msi import Engine, SamplingParams
from msi.device.choice import precision_on
from msi.errors import ConfigError
from msi.kernels import SWIGLU, Activation
from msi.kernels.cpu import CpuKernels
from msi.kernels.native.bank import NativeExpertBank
from msi.kernels.native.compiled import linear, native_library, pack
from msi.kernels.plain import PlainExpertBank, PlainKernels
from msi.kernels.quantized import in_float8, joined, quantize
from msi.kernels.routing import PackedRows
from msi.planner.hardware import read_catalogue
from msi.precision import QUANTISED_BYTES, Precision
from msi.settings import DEMO_MODEL
from tests.test_models import PlainDevice, logits_of

FORMATS = ["int8", "int4", "fp8"]
with_kernels = pytest.mark.skipif(native_library() is None, reason="the native products cannot be compiled here")


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("format", "step"), [("int8", 1 / 127), ("int4", 1 / 8)])
def test_a_number_is_at_most_half_a_step_of_its_group_away(format, step):
    weight = values(6, 300)
    weight[2, 128:256] = 0.0
    found = quantize(weight, format)
    error = (found.dequantized(torch.float32) - weight).abs()
    largest = torch.stack([part.abs().amax(dim=1) for part in weight.split(128, dim=1)], dim=1)
    bound = largest.repeat_interleave(128, dim=1)[:, :300] * step
    opposite = 1.0 if format == "int8" else 2.0  # int4 has no eighth step on the side that is not the largest's
    assert (error <= bound * 0.5 * opposite + 1e-6).all()
    assert found.scales.shape == (6, 3)
    assert found.num_bytes == {"int8": 1800, "int4": 900}[format] + 6 * 3 * 4
    assert quantize(values(6, 256), format).num_bytes == 6 * 256 * QUANTISED_BYTES[format]


def test_float8_is_a_sixteenth_away_at_most_and_its_scales_are_of_blocks():
    weight = values(200, 300)
    weight[:128, 128:256] = 0.0
    found = quantize(weight, "fp8")
    error = (found.dequantized(torch.float32) - weight).abs()
    assert (error <= weight.abs() / 16 + 2e-5).all(), "three bits of mantissa; smaller ones than 2^-6 have fewer"
    assert (found.scales[:128] == found.scales[0]).all()
    assert (found.scales[128:] == found.scales[128]).all()
    assert found.grain == "block"
    assert found.num_bytes == 200 * 300 + 200 * 3 * 4
    turned = found.transposed()
    assert torch.equal(turned.dequantized(torch.float32), found.dequantized(torch.float32).T)


@with_kernels
def test_every_number_of_float8_is_unpacked_as_it_is():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers[~numbers.float().isnan()].repeat(16, 1)
    packed = pack(native_library(), in_float8(numbers, torch.tensor(3.0)))
    for num_rows in (1, 5):  # in registers, and by blocks
        found = [linear(native_library(), part, packed) for part in torch.eye(numbers.shape[1]).split(num_rows)]
        assert torch.equal(torch.cat(found), 3 * numbers.float().T)


def test_parts_below_each_other_are_quantised_as_they_were():
    upper, lower = quantize(values(130, 60), "fp8"), quantize(values(100, 60, seed=1), "fp8")
    both = joined([upper, lower])
    assert both.grain == "block"
    assert torch.equal(both.dequantized(torch.float32)[130:], lower.dequantized(torch.float32))
    mixed = joined([upper, values(3, 60).bfloat16()])
    assert mixed.dtype is torch.bfloat16
    assert mixed.shape == (133, 60)


@with_kernels
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("num_outputs", "depth"), [(16, 2), (80, 258)])
def test_products_are_those_of_the_matrix_that_it_stands_for(format, num_outputs, depth):
    library, matrix = native_library(), quantize(values(num_outputs, depth), format)
    rows = values(100, depth, seed=1)
    packed, wanted = pack(library, matrix), functional.linear(rows, matrix.dequantized(torch.float32))
    for dtype, tolerance in ((torch.float32, 4e-6), (torch.bfloat16, 1e-2)):
        everything = linear(library, rows.to(dtype), packed)
        assert (everything.float() - wanted).abs().max() <= tolerance * wanted.abs().max()
        for num_rows in (1, 2, 3, 4, 6, 7, 13):
            assert torch.equal(linear(library, rows[:num_rows].to(dtype), packed), everything[:num_rows])


@with_kernels
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", [(SWIGLU, False), (Activation(alpha=1.7, limit=1.5, up_offset=1.0), True)], ids=str)
def test_a_bank_of_quantised_experts_computes_what_the_plain_one_does(format, kind):
    hidden, inner, num_rows = 64, 144, 9
    activation, has_bias = kind
    native = NativeExpertBank(native_library(), 1, 2, hidden, inner, format, activation, has_bias)
    of_plain = (torch.empty(1, 2, 2 * inner), torch.empty(1, 2, hidden)) if has_bias else None
    plain = PlainExpertBank(
        torch.empty(1, 2, 2 * inner, hidden), torch.empty(1, 2, hidden, inner), of_plain, activation
    )
    for expert in range(2):
        gate_up, down = values(2 * inner, hidden, seed=expert), values(hidden, inner, seed=7 + expert)
        biases = (values(2 * inner, seed=20 + expert), values(hidden, seed=30 + expert)) if has_bias else None
        for bank in (native, plain):
            bank.put(0, expert, quantize(gate_up, format), quantize(down, format), biases)
    ids = (torch.arange(num_rows)[:, None] % 2).to(torch.int32).view(1, 1, num_rows, 1)
    landed = PackedRows(values(1, 1, num_rows, hidden, seed=9), torch.full((1, 1, num_rows, 1), 0.7), ids)
    found, wanted = (torch.zeros(1, num_rows, hidden) for _ in range(2))
    native.run(0, 0, [(0, num_rows)], landed, {0: found})
    plain.run(0, 0, [(0, num_rows)], landed, {0: wanted})
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    num_values = 2 * 3 * inner * hidden
    assert native.weight_bytes_read >= num_values * QUANTISED_BYTES[format]


TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered the rightful property of "
    "some one or other of their daughters."
)


@pytest.mark.parametrize(("format", "most"), [("int8", 2e-4), ("int4", 2e-2), ("fp8", 2e-3)])
def test_the_trained_model_says_nearly_what_it_says_in_full(format, most):
    prompt = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")).encode(TEXT).ids[:100]
    exact = logits_of(DEMO_MODEL, prompt, torch.float32, is_everywhere=True).log_softmax(dim=-1)
    found = {
        name: logits_of(
            DEMO_MODEL, prompt, torch.float32, PlainDevice(kernels), quantization=format, is_everywhere=True
        ).log_softmax(dim=-1)
        for name, kernels in (("own", CpuKernels()), ("plain", PlainKernels(torch.device("cpu"))))
    }
    divergence = functional.kl_div(found["own"], exact, reduction="none", log_target=True).sum(dim=-1)
    assert divergence.mean() <= most
    torch.testing.assert_close(found["own"], found["plain"], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
async def test_workers_apart_say_what_one_says(format):
    params, answers = SamplingParams(max_tokens=24, temperature=0), []  # in bfloat16 each worker's sum is rounded
    for layout in ({"colocated": True}, {"attention_workers": 1, "expert_workers": 2, "micro_batches": 2}):
        async with Engine.local(
            model=DEMO_MODEL, transport="inproc", dtype="float32", quantization=format, **layout
        ) as engine:
            said = [[output async for output in engine.generate(text, params)] for text in (TEXT[:60], TEXT[:90])]
        answers.append([[token for output in outputs for token in output.token_ids] for outputs in said])
    assert answers[0] == answers[1]


def test_planner_and_precision_count_the_bytes():
    model = read_catalogue(None).model("mixtral-8x22b")
    full = model.num_sparse_layers * model.expert_values
    for format, of_value in QUANTISED_BYTES.items():
        shape = replace(model, precision=replace(model.precision, quantization=format))
        assert shape.expert_bytes == round(full * of_value)
        assert shape.attention_bytes < model.attention_bytes
        assert str(shape.precision) == f"bfloat16, matrices {format}"
    assert shape.total_values == model.total_values


def test_what_is_no_quantisation_or_has_no_kernels_is_refused_by_name():
    with pytest.raises(ConfigError, match="`quantization` 'int3' is not one; supported: auto, none, int8, int4, fp8"):
        Precision(quantization="int3")
    with pytest.raises(ConfigError, match="`quantization` int8 needs `device` cpu; use quantization=none"):
        precision_on(PlainDevice(), Precision(quantization="int8"), torch.bfloat16)
    with pytest.raises(ConfigError, match=r"`quantization` fp8 needs Triton's kernels on a GPU of .* 8\.9 or later"):
        precision_on(PlainDevice(), Precision(quantization="fp8"), torch.bfloat16)
