"""How far each precision may be from float32: the trained model's next tokens, and the table that says so."""

from __future__ import annotations

import re

import pytest
import torch

from msi.kernels.cpu import CpuKernels
from msi.kernels.plain import PlainKernels
from msi.settings import DEMO_MODEL
from tests.everyday import mostly_slow
from tests.test_models import PlainDevice, logits_of
from tests.test_pages import PAGES
from tools.gpu.precision import WAYS, divergence, stored, text

CPU = torch.device("cpu")


def table():
    """Bound and measured value by precision, as the page has them."""
    page = PAGES["launch/README.md"].split("## How far from float32")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\S.*?) \| ([\d.e-]+) \| ([\d.e-]+) \|$", page, re.MULTILINE)
    return {label: (float(bound), float(measured)) for label, bound, measured in rows}


@pytest.fixture(scope="module")
def exact():
    return logits_of(DEMO_MODEL, text(), torch.float32, is_everywhere=True).double()


@pytest.mark.parametrize("way", mostly_slow(WAYS, keep=4), ids=lambda way: way.label)
def test_the_trained_model_is_as_near_to_float32_as_the_page_says(way, exact, tmp_path):
    """What a GPU is held to, here of torch's products; quantised matrices by the CPU's own."""
    kernels = PlainKernels(CPU) if way.quantization == "none" else CpuKernels()
    found = logits_of(
        stored(DEMO_MODEL, way, tmp_path), text(), way.rows.computed, PlainDevice(kernels),
        quantization=way.quantization, is_everywhere=True, kv_cache=way.cache, rows=way.rows,
    )  # fmt: skip
    apart = divergence(found.double(), exact)
    assert 1e-7 < apart <= way.most
    _, measured = table()[way.label]
    assert measured / 3 <= apart <= measured * 3, "products of processors round differently, by no more than that"


def test_the_page_has_all_bounds_and_no_others():
    assert {label: bound for label, (bound, _) in table().items()} == {way.label: way.most for way in WAYS}
