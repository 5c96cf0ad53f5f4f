"""What an expert node's device runs at a time."""

from __future__ import annotations

from dataclasses import dataclass

Rows = tuple[int, int, int]  # the unanswered rows of one seat in one lane: seat, sequence number, how many


@dataclass(frozen=True, slots=True)
class WaveBatch:
    """What the device runs next: the rows of some seats, all of one lane and one layer."""

    lane: int
    layer: int
    rows: tuple[Rows, ...]
    is_alone: bool = False
