"""How many rows the CPU's products have."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from msi.kernels.cpu import EXACT_ROWS, PACKED_BYTES, CpuKernels, rows_computed


def test_few_sizes_serve_all_numbers_of_rows():
    sizes = {number: rows_computed(number) for number in range(1, 4097)}
    assert all(number <= size <= number * 9 / 8 for number, size in sizes.items())
    assert all(sizes[number] == number for number in range(1, EXACT_ROWS + 1))
    assert all(rows_computed(size) == size for size in sizes.values())
    assert len({size for number, size in sizes.items() if number <= 512}) == 64
    assert len(set(sizes.values())) == 88


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_small", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_those_of_the_rows_alone(dtype, is_small, with_bias):
    torch.manual_seed(0)
    width = 64 if is_small else PACKED_BYTES // 512 // 2
    weight = torch.randn(512, width).to(dtype) / width**0.5
    bias = torch.randn(512).to(dtype) if with_bias else None
    linear = CpuKernels().linear(weight, bias)
    with torch.inference_mode():
        for num_rows in (0, 1, 31, 33, 65, 100):
            rows = torch.randn(num_rows, width).to(dtype)
            product = linear(rows)
            assert product.shape == (num_rows, 512)
            expected = functional.linear(rows.double(), weight.double(), None if bias is None else bias.double())
            torch.testing.assert_close(product.double(), expected, rtol=2e-2, atol=4e-2)
