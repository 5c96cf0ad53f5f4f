"""Products with matrices in float8 by Triton's kernel, over memory whose other bytes are poison, against float64."""

from __future__ import annotations

import pytest
import torch

from msi.kernels.quantized import in_float8, joined, quantize
from tests.everyday import mostly_slow, thorough
from tests.kernels.device import DEVICE, TOLERANCES

pytest.importorskip("triton", reason="Triton is not installed here")

from msi.kernels.triton import linear
from msi.kernels.triton.kernels import TritonKernels
from msi.kernels.triton.linear import CUTS, EXACT_CUTS, Cut, Float8Linear
from tests.kernels.compiled import Request, assert_fits, compile_all

SHAPES = [(1, 32, 32), (5, 144, 136), (17, 40, 300), (70, 272, 128)]  # rows, outputs, depth


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "num_outputs", "depth"), mostly_slow(SHAPES, keep=2))
def test_products_are_those_of_the_matrix_that_it_stands_for(num_rows, num_outputs, depth, dtype):
    upper = num_outputs // 4 + 1  # parts as attention has them: their blocks begin anew
    matrix = joined(
        [quantize(values(upper, depth), "fp8"), quantize(values(num_outputs - upper, depth, seed=1), "fp8")]
    )
    for bias in (None, values(num_outputs, seed=2).to(dtype)):
        product = TritonKernels(DEVICE).linear(matrix, bias)
        memory = torch.full((num_rows + 1, depth + 8), float("nan"), dtype=dtype, device=DEVICE)
        rows = memory[:num_rows, :depth]
        rows.copy_(values(num_rows, depth, seed=3))
        wanted = rows.double() @ matrix.dequantized(torch.float64).to(DEVICE).T
        wanted = wanted if bias is None else wanted + bias.double().to(DEVICE)
        for found in (product(rows), product(rows)):  # the first tries every way to cut it
            assert error(found, wanted) < TOLERANCES[dtype]
    assert product(rows[:0]).shape == (0, num_outputs)


def test_nothing_but_its_rows_is_written(monkeypatch):
    """By no way to cut it: results are cut out of memory that stays poison."""
    memory = torch.full((9, 48), float("nan"), device=DEVICE)
    monkeypatch.setattr(linear.torch, "empty", lambda *shape, **options: memory.flatten()[40 : 40 + 7 * 40].view(7, 40))
    scales = values(40, 1, seed=1).abs()
    matrix = in_float8(values(40, 64).to(torch.float8_e4m3fn), scales)
    assert matrix.grain == "row"
    found = Float8Linear(matrix, None, DEVICE)(values(7, 64, seed=2).to(DEVICE))
    wanted = values(7, 64, seed=2).double() @ matrix.dequantized(torch.float64).T
    assert error(found.cpu(), wanted) < TOLERANCES[torch.float32]
    assert memory.flatten()[:40].isnan().all()
    assert memory.flatten()[40 + 7 * 40 :].isnan().all()


def request(cut: Cut, architecture: int, rows: str, num_outputs: int, depth: int) -> Request:
    types = {"rows": f"*{rows}", "weight": "*fp8e4nv", "scales": "*fp32", "out": f"*{rows}"}
    constants = {
        "bias": None, "NUM_OUTPUTS": num_outputs, "DEPTH": depth, "GROUP": 128, "HAS_BIAS": False,
        "BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k, "UPCAST": False,
    }  # fmt: skip
    types |= {"num_rows": "i32", "row_stride": "i32"}
    kernel = "msi.kernels.triton.linear:product"
    return Request(
        kernel, types, constants, architecture, cut.num_warps, cut.num_stages, unaligned=("num_rows",)
    )  # fmt: skip


@pytest.mark.parametrize("architecture", [*mostly_slow([90, 89]), thorough(100)])
def test_they_fit_and_load_wide(architecture):
    requests = [request(cut, architecture, "bf16", 6144, 4096) for cut in CUTS]
    requests += [request(EXACT_CUTS[0], architecture, "fp32", 6144, 4096)]
    found = compile_all(requests)
    for one, compiled in zip(requests, found, strict=True):
        assert_fits(one, compiled)
    for compiled in found[:-1]:
        assert compiled.count(r"LDGSTS.*128"), "rows and weights come in wide loads"
        assert compiled.count(r"(UTC)?HG?MMA"), "products are the tensor cores'"
