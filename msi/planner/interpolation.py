"""Between and beyond measured points: a line of least squares, and surfaces that are linear between points.

Pure arithmetic over numbers or numpy arrays, which broadcast; a number in gives a float out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import overload

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Size = float | Array  # of a micro-batch, a context, a message: one, or many at a time


def fit_line(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(slope, intercept) of the least squares line through (x, y), with neither below 0.

    Times neither fall with size nor start below nothing; where the free line says so it is noise, and the best line on
    the border is taken. One point, or one x: a slope of 0.
    """
    x, y = np.array(list(points), dtype=np.float64).reshape(-1, 2).T
    assert len(x), "a line needs a point"
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread) if spread else 0.0
    if slope <= 0:
        return 0.0, float(y.mean())
    intercept = float(y.mean() - slope * x.mean())
    if intercept < 0:
        return float((x * y).sum() / (x * x).sum()), 0.0
    return slope, intercept


class Curve:
    """y over x: linear between points, the first y before them, the last slope (if it rises) after them."""

    def __init__(self, points: Mapping[float, float]) -> None:
        self._x = np.array(sorted(points), dtype=np.float64)
        self._y = np.array([points[x] for x in sorted(points)], dtype=np.float64)
        rise = 0.0 if len(points) == 1 else float((self._y[-1] - self._y[-2]) / (self._x[-1] - self._x[-2]))
        self._last_slope = max(0.0, rise)

    @overload
    def at(self, x: float) -> float: ...
    @overload
    def at(self, x: Array) -> Array: ...
    def at(self, x: Size) -> Size:
        beyond = np.maximum(0.0, np.asarray(x, dtype=np.float64) - self._x[-1])
        return like(np.interp(x, self._x, self._y) + self._last_slope * beyond)


class Surface:
    """A curve over `inner` for each measured `outer`; linear between curves, and beyond them along the nearest two.

    Never below 0.
    """

    def __init__(self, points: Mapping[tuple[float, float], float]) -> None:
        outers = sorted({outer for outer, _ in points})
        self._outers = np.array(outers, dtype=np.float64)
        self._curves = [
            Curve({inner: y for (outer, inner), y in points.items() if outer == one}) for one in outers
        ]  # fmt: skip

    @overload
    def at(self, outer: float, inner: float) -> float: ...
    @overload
    def at(self, outer: Size, inner: Size) -> Size: ...
    def at(self, outer: Size, inner: Size) -> Size:
        wanted, along = np.broadcast_arrays(np.asarray(outer, dtype=np.float64), np.asarray(inner, dtype=np.float64))
        heights = np.stack([np.asarray(curve.at(along)) for curve in self._curves])  # [outers, ...]
        if len(self._curves) == 1:
            return like(heights[0])
        left = np.clip(np.searchsorted(self._outers, wanted, side="right") - 1, 0, len(self._outers) - 2)
        share = (wanted - self._outers[left]) / (self._outers[left + 1] - self._outers[left])
        low = np.take_along_axis(heights, left[None], axis=0)[0]
        high = np.take_along_axis(heights, left[None] + 1, axis=0)[0]
        return like(np.maximum(0.0, low + share * (high - low)))


def like(values: npt.ArrayLike) -> Size:
    """An array of no dimensions as a float, others as they are."""
    array = np.asarray(values, dtype=np.float64)
    return float(array) if array.ndim == 0 else array
