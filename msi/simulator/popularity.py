"""Which experts the rows of a simulated micro-batch go to: as expected on average, or drawn by popularity.

A draw is stood for by a *mark*, a number that travels with the rows as their expert ids do in the product, so that an
expert node can tell how many of its experts a batch uses.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from msi.errors import ConfigError
from msi.kernels.turns import TURNS, Home, homes_of, in_turns, wheel_of, whose_turn
from msi.placement import HOLE, LayerExperts, Placement, at_layer
from msi.planner.expert_counts import read_counts

Counts = NDArray[np.integer]
Floats = NDArray[np.float64]
POOL_TOKENS, LEAST_POOL_TOKENS = 1 << 16, 1 << 12  # of all layers together, and of each
Draw = tuple[int, int, int]  # mark, tokens of one micro-batch, and the view by which they were sent


class Routing(Protocol):
    """Choices of experts in each layer; pure but for the randomness that is handed in.

    A *view* is a placement as an attention worker sees it, by number: the one that all begin with is 0.
    """

    def view(self, placement: Placement, missing: Collection[int] = ()) -> int:
        """The number of this view; rows do not go to nodes that are missing where others have their experts."""

    def chosen(self) -> list[list[float]]:
        """What share of tokens chooses each expert, in all layers alike or in each."""

    def draw(
        self, num_tokens: int, chance: random.Random, view: int = 0, layer: int = 0
    ) -> tuple[int, tuple[int, ...]]:
        """The mark of a draw for so many tokens, and the rows that each node gets: a token goes to a node once."""

    def load(self, node: int, draws: Iterable[Draw], layer: int = 0) -> tuple[float, int]:
        """(token, expert) pairs of these draws on a node, and its experts that have at least one."""

    def rows(self, node: int, draws: Iterable[Draw], layer: int = 0) -> Floats:
        """[num_experts], those pairs by expert."""


def _homes(layer: LayerExperts, num_experts: int, missing: Collection[int]) -> list[list[Home]]:
    return homes_of(layer.experts, num_experts, missing, layer.shares)


def _shares(layer: LayerExperts, num_experts: int, missing: Collection[int]) -> Floats:
    """[num_nodes, num_experts], what of an expert's rows goes to a node."""
    share = np.zeros((len(layer.experts), num_experts))
    for expert, of_one in enumerate(_homes(layer, num_experts, missing)):
        for home, turns in zip(of_one, in_turns([home.share for home in of_one]), strict=True):
            share[home.node, expert] = turns / TURNS
    return share


class ExpectedRouting:
    """Every expert as popular as the next, and every draw the mean of all: the rows of symmetric peers are equal."""

    def __init__(self, placement: Placement, top_k: int) -> None:
        self._num_experts = placement.num_experts
        self._top_k = top_k
        self._views: list[tuple[Placement, Collection[int]]] = []
        self._shares: list[list[Floats]] = []  # by view, of all layers or of each
        self._rows: dict[tuple[int, int, int], tuple[int, ...]] = {}
        self._loads: dict[tuple[int, int, tuple[tuple[int, int], ...]], tuple[float, int]] = {}
        self.view(placement)

    def view(self, placement: Placement, missing: Collection[int] = ()) -> int:
        key = (placement, tuple(sorted(missing)))
        if key not in self._views:
            self._views.append(key)
            self._shares.append([_shares(layer, placement.num_experts, missing) for layer in placement.layers])
        return self._views.index(key)

    def chosen(self) -> list[list[float]]:
        return [[self._top_k / self._num_experts] * self._num_experts]

    def draw(
        self, num_tokens: int, chance: random.Random, view: int = 0, layer: int = 0
    ) -> tuple[int, tuple[int, ...]]:
        rows = self._rows.get((num_tokens, view, layer))
        if rows is None:
            local = at_layer(self._shares[view], layer).sum(axis=1).tolist()
            rows = tuple(max(1, round(num_tokens * self._hit_share(one))) if one else 0 for one in local)
            self._rows[num_tokens, view, layer] = rows
        return 0, rows

    def load(self, node: int, draws: Iterable[Draw], layer: int = 0) -> tuple[float, int]:
        tokens = Counter[int]()
        for _, num_tokens, view in draws:
            tokens[view] += num_tokens
        key = (node, layer, tuple(sorted(tokens.items())))
        load = self._loads.get(key)
        if load is None:
            chosen = self._top_k / self._num_experts
            pairs, missed = 0.0, np.ones(self._num_experts)
            for view, num_tokens in tokens.items():
                share = at_layer(self._shares[view], layer)[node] * chosen
                pairs += num_tokens * float(share.sum())
                missed *= (1 - share) ** num_tokens
            load = self._loads[key] = (pairs, max(1, round(float((1 - missed).sum()))))
        return load

    def rows(self, node: int, draws: Iterable[Draw], layer: int = 0) -> Floats:
        chosen = self._top_k / self._num_experts
        return sum(
            (tokens * chosen * at_layer(self._shares[view], layer)[node] for _, tokens, view in draws),
            np.zeros(self._num_experts),
        )

    def _hit_share(self, num_local: float) -> float:
        """Share of tokens with at least one of their k experts among a node's; of shared ones, a part each."""
        missed = 1.0
        for chosen in range(self._top_k):
            missed *= max(0.0, 1 - num_local / (self._num_experts - chosen))
        return 1 - missed


class _LayerView:
    """What a layer's pool of tokens comes to at each node under a placement, summed from its beginning."""

    def __init__(self, chosen: Counts, layer: LayerExperts, num_experts: int, missing: Collection[int]) -> None:
        homes = _homes(layer, num_experts, missing)
        wheels = np.array([wheel_of(in_turns([home.share for home in of_one])) for of_one in homes])
        nodes = np.array(
            [[of_one[replica].node for replica in wheel] for of_one, wheel in zip(homes, wheels, strict=True)]
        )
        turns = whose_turn(chosen, np.arange(len(chosen)), nodes)  # the node of each pair
        tokens = np.broadcast_to(np.arange(len(chosen))[:, None], turns.shape)
        hits = []
        self.pairs_before: list[Counts] = []  # by node: [tokens + 1, experts of the node]
        self.experts: list[Counts] = []  # by node, those of the columns
        for node, of_node in enumerate(layer.experts):
            held = np.array(sorted({*of_node} - {HOLE}), dtype=np.int64)
            has = np.zeros((len(chosen), num_experts), np.int32)
            has[tokens[turns == node], chosen[turns == node]] = 1
            hits.append((turns == node).any(axis=1))
            self.pairs_before.append(_before(has[:, held]))
            self.experts.append(held)
        self.rows_before = _before(np.stack(hits, axis=1).astype(np.int32))  # [tokens + 1, num_nodes]


class DrawnRouting:
    """Tokens choose k different experts one after another, by weight. Whoever draws takes a run of a pool of tokens.

    Args:
        weights: [num_experts] of all layers, or of each, above 0 for at least `top_k` experts.
        most_tokens: of one draw.
    """

    def __init__(
        self, placement: Placement, top_k: int, weights: Sequence[Sequence[float]], *, most_tokens: int, seed: int
    ) -> None:
        generator = np.random.default_rng(seed)
        self._pool_tokens = max(LEAST_POOL_TOKENS, POOL_TOKENS // len(weights))
        self._chosen = [_drawn(generator, one, top_k, self._pool_tokens + most_tokens) for one in weights]
        self._num_experts = len(weights[0])
        self._views: list[tuple[Placement, Collection[int]]] = []
        self._layers: list[list[_LayerView]] = []  # by view, of all layers or of each
        self._known: dict[tuple[int, LayerExperts, Collection[int]], _LayerView] = {}
        self.view(placement)

    def view(self, placement: Placement, missing: Collection[int] = ()) -> int:
        key = (placement, tuple(sorted(missing)))
        if key not in self._views:
            self._views.append(key)
            layers = range(max(len(placement.layers), len(self._chosen)))
            self._layers.append(
                [self._layer_view(layer, at_layer(placement.layers, layer), key[1]) for layer in layers]
            )
        return self._views.index(key)

    def _layer_view(self, layer: int, placed: LayerExperts, missing: Collection[int]) -> _LayerView:
        """Tens of megabytes, which all layers and views have together that are alike in it."""
        pool = layer if len(self._chosen) > 1 else 0
        key = (pool, placed, missing)
        if key not in self._known:
            self._known[key] = _LayerView(self._chosen[pool], placed, self._num_experts, missing)
        return self._known[key]

    def chosen(self) -> list[list[float]]:
        counts = [np.bincount(one.ravel(), minlength=self._num_experts) / len(one) for one in self._chosen]
        return [shares.tolist() for shares in counts]

    def draw(
        self, num_tokens: int, chance: random.Random, view: int = 0, layer: int = 0
    ) -> tuple[int, tuple[int, ...]]:
        mark = int(chance.random() * self._pool_tokens)
        before = at_layer(self._layers[view], layer).rows_before
        return mark, tuple((before[mark + num_tokens] - before[mark]).tolist())

    def load(self, node: int, draws: Iterable[Draw], layer: int = 0) -> tuple[float, int]:
        pairs = self.rows(node, draws, layer)
        return float(pairs.sum()), int(np.count_nonzero(pairs))

    def rows(self, node: int, draws: Iterable[Draw], layer: int = 0) -> Floats:
        pairs = np.zeros(self._num_experts)
        for mark, tokens, view in draws:
            of_layer = at_layer(self._layers[view], layer)
            before = of_layer.pairs_before[node]
            pairs[of_layer.experts[node]] += before[mark + tokens] - before[mark]
        return pairs


def _drawn(generator: np.random.Generator, weights: Sequence[float], top_k: int, num_tokens: int) -> Counts:
    """[num_tokens, top_k] experts."""
    with np.errstate(divide="ignore"):
        logits = np.log(np.asarray(weights, dtype=np.float64))
    # the k largest of log weight + Gumbel noise are k successive choices without replacement
    noisy = logits + generator.gumbel(size=(num_tokens, len(weights)))
    chosen: Counts = np.argpartition(-noisy, top_k - 1, axis=1)[:, :top_k]
    return chosen


def _before(counts: np.ndarray) -> np.ndarray:
    """Row i: the sum of all rows before i."""
    return np.concatenate([np.zeros((1, counts.shape[1]), np.int32), np.cumsum(counts, axis=0, dtype=np.int32)])


Popularity = str | Sequence[float] | Sequence[Sequence[float]]


def build_routing(
    popularity: Popularity, placement: Placement, top_k: int, *, most_tokens: int, seed: int, num_layers: int = 1
) -> Routing:
    """By name or by measured weights.

    Args:
        popularity: "uniform" (each draw the mean), "uniform-drawn", "zipf" or "zipf:EXPONENT" (expert i weighs
            (i + 1) ** -EXPONENT, by default 1), "layers" or "layers:EXPONENT" (so, but in each layer in an order of its
            own), or a weight or count per expert, in all layers alike or in each.

    Raises:
        ConfigError: says what is allowed.
    """
    num_experts = placement.num_experts
    if popularity == "uniform":
        return ExpectedRouting(placement, top_k)
    layers = _weights(popularity, num_experts, num_layers, seed)
    if len(layers) not in (1, num_layers):
        raise ConfigError(f"expert popularity is of {len(layers)} layers; give it for one, or for all {num_layers}")
    for weights in layers:
        positive = sum(weight > 0 for weight in weights)
        if len(weights) != num_experts or positive < top_k or not all(math.isfinite(w) and w >= 0 for w in weights):
            raise ConfigError(
                f"expert popularity has {len(weights)} weights, {positive} of them above 0; give {num_experts} numbers "
                f"of at least 0, one for each expert, at least {top_k} of them above 0"
            )
    return DrawnRouting(placement, top_k, layers, most_tokens=most_tokens, seed=seed)


def read_popularity(text: str) -> Popularity:
    """A name as it is, or the weights in a JSON file. Raises ConfigError: the file holds no list of numbers."""
    path = Path(text)
    if path.suffix != ".json":
        return text
    return read_counts(path)


def _weights(popularity: Popularity, num_experts: int, num_layers: int, seed: int) -> list[list[float]]:
    """[num_experts] of all layers, or of each."""
    if not isinstance(popularity, str):
        if any(isinstance(one, Sequence) for one in popularity):
            return [[float(weight) for weight in one] for one in popularity if isinstance(one, Sequence)]
        return [[float(weight) for weight in popularity if not isinstance(weight, Sequence)]]
    name, _, exponent = popularity.partition(":")
    if popularity == "uniform-drawn":
        return [[1.0] * num_experts]
    if name in ("zipf", "layers"):
        try:
            power = float(exponent or 1)
        except ValueError:
            power = math.nan
        if math.isfinite(power) and power >= 0:
            weights = [(rank + 1) ** -power for rank in range(num_experts)]
            chance = random.Random(seed)
            return [weights] if name == "zipf" else [chance.sample(weights, num_experts) for _ in range(num_layers)]
    raise ConfigError(
        f"expert popularity {popularity!r} is not one; give uniform, uniform-drawn, zipf, zipf:EXPONENT (at least 0), "
        f"layers, layers:EXPONENT, or a weight for each expert"
    )
