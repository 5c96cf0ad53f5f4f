"""The batches that are decoded, the same for everybody who is compared."""

from __future__ import annotations

import random

from tools.gpu.runner import Place
from tools.gpu.shapes import Shape

BATCHES, INPUT_LEN, OUTPUT_LEN = (32, 128, 256), 128, 96
DRY_BATCHES, DRY_INPUT_LEN, DRY_OUTPUT_LEN = (2,), 4, 12
WARM_TOKENS = 6


def sizes(place: Place) -> tuple[tuple[int, ...], int, int]:
    """How many sequences, their prompts' tokens, and their answers'."""
    if place.is_dry:
        return DRY_BATCHES, DRY_INPUT_LEN, DRY_OUTPUT_LEN
    return BATCHES, INPUT_LEN, OUTPUT_LEN


def prompts_of(shape: Shape, batch: int, input_len: int) -> list[tuple[int, ...]]:
    chance = random.Random(0)
    return [tuple(chance.randrange(3, shape.vocab_size) for _ in range(input_len)) for _ in range(batch)]
