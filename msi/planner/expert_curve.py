"""What a node's experts take, from the batches that it timed: T = batch + row * rows + read * experts hit. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from msi.planner.stage_costs import BatchMean

MOST_FLOOR = 4096.0  # rows: reading is all that counts


@dataclass(frozen=True, slots=True)
class ExpertCurve:
    """In seconds; none is below 0."""

    batch_s: float
    row_s: float
    read_s: float

    @property
    def floor_rows(self) -> float:
        """Rows that take as long as an expert's weights take to be read."""
        return min(MOST_FLOOR, self.read_s / self.row_s) if self.row_s > 0 else MOST_FLOOR


def fit_curve(means: Sequence[BatchMean]) -> ExpertCurve | None:
    """The curve that comes nearest to what was measured, relative to it; None where rows and experts hit cannot be told
    apart: there are too few sizes of batches, or all have the same number of rows for each expert.
    """
    sound = [one for one in means if one.seconds > 0 and one.num_batches > 0 and one.rows > 0]
    if len(sound) < 3:
        return None
    seconds = np.array([one.seconds for one in sound])
    weight = np.sqrt([one.num_batches for one in sound]) / seconds
    columns = np.array([[1.0, one.rows, one.experts] for one in sound]) * weight[:, None]
    scale = np.sqrt((columns**2).sum(axis=0))
    if np.linalg.cond(columns / scale) > 1e3:
        return None
    used = [0, 1, 2]
    found = np.zeros(3)
    while used:
        part = np.linalg.lstsq(columns[:, used] / scale[used], weight * seconds, rcond=None)[0] / scale[used]
        if (part >= 0).all():
            found[used] = part
            break
        used = [column for column, value in zip(used, part, strict=True) if value > 0]
    if found[1] == found[2] == 0:
        return None
    return ExpertCurve(*found.tolist())
