"""What experts will have to do, from what they had to: a load to plan by, and how far one may rise above it. Pure.

Popularities stand, drift or burst, and no one average suits all three: a mean of many windows forgets noise, the last
window follows what has changed for good, a median leaves out what came once. Which of them is believed is seen from the
windows themselves: the one that would have foretold the last few best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WINDOWS = 10  # that are looked at
LEAST_WINDOWS = 3  # with fewer nobody knows which forecast is good
KEPT = 0.7  # of older windows, from one to the next, as long as that is so


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of the next window.

    Attributes:
        load: [num_experts] rows of a wave that choose each.
        surge: rows by which the one that rises most was above its forecast, in the mean of the windows.
    """

    load: tuple[float, ...]
    surge: float


def forecast(windows: Sequence[Sequence[float] | Floats]) -> Forecast:
    """From rows of a wave by expert, window by window, the last one at the end."""
    assert len(windows), "nothing was counted"
    seen = np.asarray(windows[-WINDOWS:], np.float64)
    if len(seen) < LEAST_WINDOWS:
        return Forecast(tuple(_fading(KEPT)(seen).tolist()), 0.0)
    after = range(1, len(seen))
    misses = [[seen[window] - guess(seen[:window]) for window in after] for guess in GUESSES]
    best = int(np.argmin([np.abs(missed).sum() for missed in misses]))
    surge = np.mean([max(0.0, float(missed.max())) for missed in misses[best]])
    return Forecast(tuple(GUESSES[best](seen).tolist()), float(surge))


def _fading(kept: float) -> Callable[[Floats], Floats]:
    """A mean to which older windows matter the less."""

    def guess(seen: Floats) -> Floats:
        load: Floats = seen[0]
        for window in seen[1:]:
            load = kept * load + (1 - kept) * window
        return load

    return guess


def _mean(seen: Floats) -> Floats:
    found: Floats = seen.mean(axis=0)
    return found


def _median_of(num_windows: int) -> Callable[[Floats], Floats]:
    def guess(seen: Floats) -> Floats:
        found: Floats = np.median(seen[-num_windows:], axis=0)
        return found

    return guess


GUESSES = (_fading(KEPT), _fading(0.3), _fading(0.0), _median_of(3), _median_of(5), _mean)
