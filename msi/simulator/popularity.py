"""Which experts the rows of a simulated micro-batch go to: as expected on average, or drawn by popularity.

A draw is stood for by a *mark*, a number that travels with the rows as their expert ids do in the product, so that an
expert node can tell how many of its experts a batch uses.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from msi.errors import ConfigError
from msi.types import Placement

POOL_TOKENS = 1 << 16
Draw = tuple[int, int]  # mark and tokens of one micro-batch


class Routing(Protocol):
    """Choices of experts, the same for all layers; pure but for the randomness that is handed in."""

    def draw(self, num_tokens: int, chance: random.Random) -> tuple[int, tuple[int, ...]]:
        """The mark of a draw for so many tokens, and the rows that each node gets: a token goes to a node once."""

    def load(self, node: int, draws: Iterable[Draw]) -> tuple[float, int]:
        """(token, expert) pairs of these draws on a node, and its experts that have at least one."""


class ExpectedRouting:
    """Every expert as popular as the next, and every draw the mean of all: the rows of symmetric peers are equal."""

    def __init__(self, placement: Placement, top_k: int) -> None:
        self._num_experts = placement.num_experts
        self._local = [len(placement.experts[node]) for node in range(placement.num_nodes)]
        self._top_k = top_k
        self._rows: dict[int, tuple[int, ...]] = {}
        self._loads: dict[tuple[int, int], tuple[float, int]] = {}

    def draw(self, num_tokens: int, chance: random.Random) -> tuple[int, tuple[int, ...]]:
        rows = self._rows.get(num_tokens)
        if rows is None:
            rows = self._rows[num_tokens] = tuple(
                max(1, round(num_tokens * self._hit_share(local))) for local in self._local
            )
        return 0, rows

    def load(self, node: int, draws: Iterable[Draw]) -> tuple[float, int]:
        num_tokens = sum(tokens for _, tokens in draws)
        load = self._loads.get((node, num_tokens))
        if load is None:
            local, share = self._local[node], self._top_k / self._num_experts
            active = local * (1 - (1 - share) ** num_tokens)
            load = self._loads[node, num_tokens] = (num_tokens * local * share, max(1, round(active)))
        return load

    def _hit_share(self, num_local: int) -> float:
        """Share of tokens with at least one of their k experts among a node's."""
        others = self._num_experts - num_local
        return 1 - math.comb(others, self._top_k) / math.comb(self._num_experts, self._top_k)


class DrawnRouting:
    """Tokens choose k different experts one after another, by weight. Whoever draws takes a run of a pool of tokens.

    Args:
        weights: [num_experts], above 0 for at least `top_k` experts.
        most_tokens: of one draw.
    """

    def __init__(
        self, placement: Placement, top_k: int, weights: Sequence[float], *, most_tokens: int, seed: int
    ) -> None:
        generator = np.random.default_rng(seed)
        with np.errstate(divide="ignore"):
            logits = np.log(np.asarray(weights, dtype=np.float64))
        # the k largest of log weight + Gumbel noise are k successive choices without replacement
        noisy = logits + generator.gumbel(size=(POOL_TOKENS + most_tokens, len(weights)))
        chosen = np.argpartition(-noisy, top_k - 1, axis=1)[:, :top_k]
        has = np.zeros(noisy.shape, dtype=np.int32)
        np.put_along_axis(has, chosen, 1, axis=1)
        nodes = range(placement.num_nodes)
        on_node = [has[:, list(placement.experts[node])] for node in nodes]
        hits = np.stack([counts.any(axis=1) for counts in on_node], axis=1).astype(np.int32)
        self._rows_before = _before(hits)  # [tokens + 1, num_nodes]
        self._pairs_before = [_before(counts) for counts in on_node]  # by node: [tokens + 1, its experts]

    def draw(self, num_tokens: int, chance: random.Random) -> tuple[int, tuple[int, ...]]:
        mark = int(chance.random() * POOL_TOKENS)
        before = self._rows_before
        return mark, tuple((before[mark + num_tokens] - before[mark]).tolist())

    def load(self, node: int, draws: Iterable[Draw]) -> tuple[float, int]:
        before = self._pairs_before[node]
        pairs = before[0]
        for mark, tokens in draws:
            pairs = pairs + (before[mark + tokens] - before[mark])
        by_expert = pairs.tolist()
        return float(sum(by_expert)), sum(map(bool, by_expert))


def _before(counts: np.ndarray) -> np.ndarray:
    """Row i: the sum of all rows before i."""
    return np.concatenate([np.zeros((1, counts.shape[1]), np.int32), np.cumsum(counts, axis=0, dtype=np.int32)])


def build_routing(
    popularity: str | Sequence[float], placement: Placement, top_k: int, *, most_tokens: int, seed: int
) -> Routing:
    """By name or by measured weights.

    Args:
        popularity: "uniform" (each draw the mean), "uniform-drawn", "zipf" or "zipf:EXPONENT" (expert i weighs
            (i + 1) ** -EXPONENT, by default 1), or a weight or count per expert.

    Raises:
        ConfigError: says what is allowed.
    """
    num_experts = placement.num_experts
    assert not placement.has_replicas, "which of its nodes an expert's rows go to is not simulated yet"
    if popularity == "uniform":
        return ExpectedRouting(placement, top_k)
    weights = _weights(popularity, num_experts)
    positive = sum(weight > 0 for weight in weights)
    if len(weights) != num_experts or positive < top_k or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ConfigError(
            f"expert popularity has {len(weights)} weights, {positive} of them above 0; give {num_experts} numbers of "
            f"at least 0, one for each expert, at least {top_k} of them above 0"
        )
    return DrawnRouting(placement, top_k, weights, most_tokens=most_tokens, seed=seed)


def read_popularity(text: str) -> str | list[float]:
    """A name as it is, or the weights in a JSON file. Raises ConfigError: the file holds no list of numbers."""
    path = Path(text)
    if path.suffix != ".json":
        return text
    try:
        weights = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read expert popularity from {path}: {error}") from error
    if not isinstance(weights, list) or not all(isinstance(one, int | float) for one in weights):
        raise ConfigError(f"{path} holds no list of numbers; give a weight or count for each expert")
    return [float(weight) for weight in weights]


def _weights(popularity: str | Sequence[float], num_experts: int) -> list[float]:
    if not isinstance(popularity, str):
        return [float(weight) for weight in popularity]
    name, _, exponent = popularity.partition(":")
    if popularity == "uniform-drawn":
        return [1.0] * num_experts
    if name == "zipf":
        try:
            power = float(exponent or 1)
        except ValueError:
            power = math.nan
        if math.isfinite(power) and power >= 0:
            return [(rank + 1) ** -power for rank in range(num_experts)]
    raise ConfigError(
        f"expert popularity {popularity!r} is not one; give uniform, uniform-drawn, zipf, zipf:EXPONENT (at least 0), "
        f"or a weight for each expert"
    )
