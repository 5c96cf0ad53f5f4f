"""How far a trained model's next tokens part from those in float32, in each precision that a GPU computes in.

The mean over a text's positions, in nats, by the kernels alone: one worker's halves, called one after the other.
"""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from msi.kernels import NONE, fp8
from msi.kernels.kernels import Kernels
from msi.kernels.plain import PlainKernels
from msi.kernels.routing import RowDtypes
from msi.settings import DEMO_MODEL
from tools.gpu.kernels import kernels_here, open_kernels
from tools.gpu.report import Add, Row
from tools.gpu.runner import NotHere, Place

NUM_TOKENS, DRY_NUM_TOKENS = 100, 5
DRY_MOST = 0.3  # nats


@dataclass(frozen=True, slots=True)
class Way:
    """A precision.

    Attributes:
        most: nats that are allowed.
        stored: what matrices are in on disk: as `HOW` of tests/test_float8_checkpoints.py has them; None as they are.
    """

    label: str
    most: float
    rows: RowDtypes
    quantization: str = NONE
    cache: torch.dtype | None = None
    stored: str | None = None


BFLOAT16 = RowDtypes.of(torch.bfloat16)
EIGHT = fp8.E4M3
WAYS = (  # some three times what plain torch comes to on a CPU
    Way("bfloat16", 3e-4, BFLOAT16),
    Way("float16", 1e-5, RowDtypes.of(torch.float16)),
    Way("bfloat16, weights in float8", 2e-3, BFLOAT16, quantization="fp8"),
    Way("bfloat16, weights in float8 by channel", 2e-3, BFLOAT16, quantization="fp8", stored="rows"),
    Way("bfloat16, weights in float8 by matrix", 2e-3, BFLOAT16, quantization="fp8", stored="whole"),
    Way("bfloat16, rows in float8", 1.5e-3, replace(BFLOAT16, sent=EIGHT)),
    Way("bfloat16, rows and answers in float8", 1.5e-3, replace(BFLOAT16, sent=EIGHT, answered=EIGHT)),
    Way("bfloat16, keys and values in float8", 2e-3, BFLOAT16, cache=EIGHT),
    Way("bfloat16, all in float8", 5e-3, RowDtypes(torch.bfloat16, EIGHT, EIGHT), "fp8", EIGHT),
)


class _Device:
    """Weights where the kernels are, nothing queued."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.kernels.device)

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.kernels.device)


def run(place: Place, add: Add) -> None:
    """Of the bundled model; in a dry run of a random one with few tokens, whose logits are further apart."""
    try:
        models: Any = importlib.import_module("tests.test_models")
    except ImportError as error:
        raise NotHere(f"transformers and pytest are needed: {error}") from error
    with tempfile.TemporaryDirectory(prefix="msi-gpu-") as folder:
        if place.is_dry:
            importlib.import_module("tests.reference").save_tiny(Path(folder))
            path, prompt = Path(folder), list(range(3, 3 + DRY_NUM_TOKENS))
        else:
            path, prompt = DEMO_MODEL, text()

        def said(kernels: Kernels, way: Way) -> Tensor:
            found: Tensor = models.logits_of(
                stored(path, way, Path(folder)), prompt, way.rows.computed, _Device(kernels),
                quantization=way.quantization, is_everywhere=True, kv_cache=way.cache, rows=way.rows,
            )  # fmt: skip
            return found.to("cpu", torch.float64)

        exact = said(PlainKernels(torch.device("cpu")), Way("float32", 0.0, RowDtypes.of(torch.float32)))
        for name in kernels_here():
            if name == "DeepGEMM":
                continue  # the bundled model's matrices have no sides that it takes
            for way in WAYS[::4] if place.is_dry else WAYS:  # the last has everything
                kernels = open_kernels(name, torch.device(place.device))
                row = f"{name}: the trained model in {way.label}, nats from float32"
                if way.quantization not in (NONE, *kernels.quantisations):
                    continue  # nobody is served so
                try:
                    apart = divergence(said(kernels, way), exact)
                except Exception as error:
                    add(Row(row, "failed", note=f"{type(error).__name__}: {str(error)[:160]}"))
                    continue
                most = DRY_MOST if place.is_dry else way.most
                add(Row(row, apart, note="" if apart <= most else f"more than {most}: WRONG"))


def stored(path: Path, way: Way, folder: Path) -> Path:
    """The model as the way wants it on disk, made in a folder where it is another."""
    if way.stored is None:
        return path
    made = folder / way.stored
    if not made.exists():
        made.mkdir()
        importlib.import_module("tests.test_float8_checkpoints").store_in_float8(path, made, way.stored)
    return made


def text() -> list[int]:
    from tokenizers import Tokenizer

    words: str = importlib.import_module("tests.kernels.test_quantized").TEXT
    return list(Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")).encode(words).ids[:NUM_TOKENS])


def divergence(found: Tensor, exact: Tensor) -> float:
    one, other = (logits.log_softmax(dim=-1) for logits in (found, exact))
    return float(functional.kl_div(one, other, reduction="none", log_target=True).sum(dim=-1).mean())
