"""Requests for a simulation: when they arrive, how long they are; drawn, or read from a trace."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from msi.errors import ConfigError

MEDIAN_INPUT_LEN, MEDIAN_OUTPUT_LEN = 571, 159  # of the paper's production trace
LENGTH_SIGMA = 0.6  # of the logarithm of lengths; the paper states medians alone
KEYS = ("arrival_s", "input_len", "output_len")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request; `flow`, `priority` and `timeout_s` are those of `msi.types.Request`.

    Raises ConfigError: a negative time, or a length below 1.
    """

    arrival_s: float
    input_len: int
    output_len: int
    flow: str = ""
    priority: int = 0
    timeout_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.arrival_s < math.inf:
            raise ConfigError(f"arrival_s is {self.arrival_s!r}; give seconds of at least 0")
        for name, value in (("input_len", self.input_len), ("output_len", self.output_len)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; give a whole number of at least 1")


Lengths = Callable[[random.Random], tuple[int, int]]  # of prompt and answer


def fixed_lengths(input_len: int, output_len: int) -> Lengths:
    return lambda chance: (input_len, output_len)


def lognormal_lengths(
    median_input_len: int = MEDIAN_INPUT_LEN,
    median_output_len: int = MEDIAN_OUTPUT_LEN,
    *,
    sigma: float = LENGTH_SIGMA,
    most: int = 16_384,
) -> Lengths:
    """Log-normal around these medians, cut to [1, most]."""

    def draw(chance: random.Random, median: int) -> int:
        return min(most, max(1, round(median * math.exp(chance.gauss(0.0, sigma)))))

    return lambda chance: (draw(chance, median_input_len), draw(chance, median_output_len))


def poisson(num_requests: int, per_s: float, lengths: Lengths, seed: int = 0) -> list[Arrival]:
    """Requests that arrive independently of each other. Raises ConfigError."""
    _require_some(num_requests)
    if not 0 < per_s < math.inf:
        raise ConfigError(f"{per_s!r} requests per second; give a number above 0")
    chance, at_s = random.Random(seed), 0.0
    arrivals = []
    for _ in range(num_requests):
        at_s += chance.expovariate(per_s)
        arrivals.append(Arrival(at_s, *lengths(chance)))
    return arrivals


def bursts(num_requests: int, size: int, every_s: float, lengths: Lengths, seed: int = 0) -> list[Arrival]:
    """`size` requests at once, every so many seconds. Raises ConfigError."""
    _require_some(num_requests)
    if size < 1 or not 0 <= every_s < math.inf:
        raise ConfigError(f"bursts of {size!r} requests every {every_s!r} s; give at least 1, and at least 0 s")
    chance = random.Random(seed)
    return [Arrival(index // size * every_s, *lengths(chance)) for index in range(num_requests)]


def read_trace(path: Path) -> list[Arrival]:
    """One JSON object per line, {"arrival_s": ..., "input_len": ..., "output_len": ...}; empty lines are skipped.

    Raises:
        ConfigError: names the file, the line and what is wrong with it.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    arrivals = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                arrivals.append(_arrival(line))
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
    if not arrivals:
        raise ConfigError(f"the trace {path} has no requests")
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def _arrival(line: str) -> Arrival:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not valid JSON ({error.msg} at column {error.colno}); is the file cut off?") from error
    if not isinstance(values, dict) or any(key not in values for key in KEYS):
        raise ConfigError(f"give an object with {', '.join(KEYS)}")
    at_s = values["arrival_s"]
    if not isinstance(at_s, int | float) or isinstance(at_s, bool):
        raise ConfigError(f"arrival_s is {at_s!r}; give seconds of at least 0")
    return Arrival(float(at_s), values["input_len"], values["output_len"])


def _require_some(num_requests: int) -> None:
    if num_requests < 1:
        raise ConfigError(f"{num_requests!r} requests; give at least 1")


def check_arrivals(arrivals: Sequence[Arrival]) -> None:
    """Raises ConfigError: there are none."""
    if not arrivals:
        raise ConfigError("there are no requests; give at least one")
