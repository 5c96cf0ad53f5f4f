"""Which experts the rows of a simulated micro-batch go to: as expected on average, or drawn by popularity.

A draw is stood for by a *mark*, a number that travels with the rows as their expert ids do in the product, so that an
expert node can tell how many of its experts a batch uses.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from msi.errors import ConfigError
from msi.kernels.turns import TURNS, Home, homes_of, in_turns, wheel_of, whose_turn
from msi.planner.expert_counts import read_counts
from msi.types import Placement

Counts = NDArray[np.integer]
Floats = NDArray[np.float64]
POOL_TOKENS = 1 << 16
Draw = tuple[int, int, int]  # mark, tokens of one micro-batch, and the view by which they were sent


class Routing(Protocol):
    """Choices of experts, the same for all layers; pure but for the randomness that is handed in.

    A *view* is a placement as an attention worker sees it, by number: the one that all begin with is 0.
    """

    def view(self, placement: Placement, missing: Collection[int] = ()) -> int:
        """The number of this view; rows do not go to nodes that are missing where others have their experts."""

    def chosen(self) -> list[float]:
        """What share of tokens chooses each expert."""

    def draw(self, num_tokens: int, chance: random.Random, view: int = 0) -> tuple[int, tuple[int, ...]]:
        """The mark of a draw for so many tokens, and the rows that each node gets: a token goes to a node once."""

    def load(self, node: int, draws: Iterable[Draw]) -> tuple[float, int]:
        """(token, expert) pairs of these draws on a node, and its experts that have at least one."""

    def rows(self, node: int, draws: Iterable[Draw]) -> Floats:
        """[num_experts], those pairs by expert."""


@dataclass(frozen=True, slots=True)
class _Homes:
    """Of each expert by node, what share of its rows goes there."""

    share: Floats  # [num_nodes, num_experts]
    homes: list[list[Home]]

    @staticmethod
    def of(placement: Placement, missing: Collection[int] = ()) -> _Homes:
        homes = homes_of(placement.experts, placement.num_experts, missing, placement.shares)
        share = np.zeros((placement.num_nodes, placement.num_experts))
        for expert, of_one in enumerate(homes):
            for home, turns in zip(of_one, in_turns([home.share for home in of_one]), strict=True):
                share[home.node, expert] = turns / TURNS
        return _Homes(share, homes)


class ExpectedRouting:
    """Every expert as popular as the next, and every draw the mean of all: the rows of symmetric peers are equal."""

    def __init__(self, placement: Placement, top_k: int) -> None:
        self._num_experts = placement.num_experts
        self._top_k = top_k
        self._views: list[tuple[Placement, Collection[int]]] = []
        self._shares: list[Floats] = []
        self._rows: dict[tuple[int, int], tuple[int, ...]] = {}
        self._loads: dict[tuple[int, tuple[tuple[int, int], ...]], tuple[float, int]] = {}
        self.view(placement)

    def view(self, placement: Placement, missing: Collection[int] = ()) -> int:
        key = (placement, tuple(sorted(missing)))
        if key not in self._views:
            self._views.append(key)
            self._shares.append(_Homes.of(placement, missing).share)
        return self._views.index(key)

    def chosen(self) -> list[float]:
        return [self._top_k / self._num_experts] * self._num_experts

    def draw(self, num_tokens: int, chance: random.Random, view: int = 0) -> tuple[int, tuple[int, ...]]:
        rows = self._rows.get((num_tokens, view))
        if rows is None:
            local = self._shares[view].sum(axis=1).tolist()
            rows = tuple(max(1, round(num_tokens * self._hit_share(one))) if one else 0 for one in local)
            self._rows[num_tokens, view] = rows
        return 0, rows

    def load(self, node: int, draws: Iterable[Draw]) -> tuple[float, int]:
        tokens = Counter[int]()
        for _, num_tokens, view in draws:
            tokens[view] += num_tokens
        key = (node, tuple(sorted(tokens.items())))
        load = self._loads.get(key)
        if load is None:
            chosen = self._top_k / self._num_experts
            pairs, missed = 0.0, np.ones(self._num_experts)
            for view, num_tokens in tokens.items():
                share = self._shares[view][node] * chosen
                pairs += num_tokens * float(share.sum())
                missed *= (1 - share) ** num_tokens
            load = self._loads[key] = (pairs, max(1, round(float((1 - missed).sum()))))
        return load

    def rows(self, node: int, draws: Iterable[Draw]) -> Floats:
        chosen = self._top_k / self._num_experts
        return sum(
            (tokens * chosen * self._shares[view][node] for _, tokens, view in draws), np.zeros(self._num_experts)
        )

    def _hit_share(self, num_local: float) -> float:
        """Share of tokens with at least one of their k experts among a node's; of shared ones, a part each."""
        missed = 1.0
        for chosen in range(self._top_k):
            missed *= max(0.0, 1 - num_local / (self._num_experts - chosen))
        return 1 - missed


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
        self._chosen = np.argpartition(-noisy, top_k - 1, axis=1)[:, :top_k]
        self._views: list[tuple[Placement, Collection[int]]] = []
        self._rows_before: list[Counts] = []  # by view: [tokens + 1, num_nodes]
        self._pairs_before: list[list[Counts]] = []  # by view and node: [tokens + 1, num_experts or those of the node]
        self._experts: list[list[Counts]] = []  # by view and node, those of the columns
        self._num_experts = len(weights)
        self.view(placement)

    def view(self, placement: Placement, missing: Collection[int] = ()) -> int:
        key = (placement, tuple(sorted(missing)))
        if key not in self._views:
            self._views.append(key)
            self._add(placement, missing)
        return self._views.index(key)

    def _add(self, placement: Placement, missing: Collection[int]) -> None:
        homes = _Homes.of(placement, missing).homes
        wheels = np.array([wheel_of(in_turns([home.share for home in of_one])) for of_one in homes])
        nodes = np.array(
            [[of_one[replica].node for replica in wheel] for of_one, wheel in zip(homes, wheels, strict=True)]
        )
        turns = whose_turn(self._chosen, np.arange(len(self._chosen)), nodes)  # the node of each pair
        tokens = np.arange(len(self._chosen))[:, None]
        hits, pairs_before = [], []
        experts: list[Counts] = []
        for node in range(placement.num_nodes):
            held = np.array(sorted(placement.held_by(node)), dtype=np.int64)
            has = np.zeros((len(self._chosen), self._num_experts), np.int32)
            has[np.broadcast_to(tokens, turns.shape)[turns == node], self._chosen[turns == node]] = 1
            hits.append((turns == node).any(axis=1))
            pairs_before.append(_before(has[:, held]))
            experts.append(held)
        self._rows_before.append(_before(np.stack(hits, axis=1).astype(np.int32)))
        self._pairs_before.append(pairs_before)
        self._experts.append(experts)

    def chosen(self) -> list[float]:
        counts = np.bincount(self._chosen.ravel(), minlength=self._num_experts)
        shares: list[float] = (counts / len(self._chosen)).tolist()
        return shares

    def draw(self, num_tokens: int, chance: random.Random, view: int = 0) -> tuple[int, tuple[int, ...]]:
        mark = int(chance.random() * POOL_TOKENS)
        before = self._rows_before[view]
        return mark, tuple((before[mark + num_tokens] - before[mark]).tolist())

    def load(self, node: int, draws: Iterable[Draw]) -> tuple[float, int]:
        pairs = self.rows(node, draws)
        return float(pairs.sum()), int(np.count_nonzero(pairs))

    def rows(self, node: int, draws: Iterable[Draw]) -> Floats:
        pairs = np.zeros(self._num_experts)
        for mark, tokens, view in draws:
            before = self._pairs_before[view][node]
            pairs[self._experts[view][node]] += before[mark + tokens] - before[mark]
        return pairs


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
    return read_counts(path)


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
