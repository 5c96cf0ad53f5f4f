"""A placement as tensors, and which of an expert's nodes a row goes to, where experts have several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msi.kernels.turns import in_turns, wheel_of, whose_turn


@dataclass(frozen=True, slots=True)
class PlacementTables:
    """Experts and their replicas are numbered together: replica r of expert e is e * `most_replicas` + r.

    So where every expert has one node, a replica's number is its expert's.

    Attributes:
        local_ids: int32 [num_used_nodes, num_experts * most_replicas], -1 where a node lacks the replica. Nodes behind
            the last that holds any have no row, and get none. Where layers differ, one behind the other: [num_layers,
            num_used_nodes, ...], as wide in each, so that graphs know one piece of memory for all.
        wheels: uint8 [num_experts, TURNS], the replica that has each turn; so, too.
    """

    local_ids: Tensor
    wheels: Tensor
    most_replicas: int

    @staticmethod
    def of(
        experts: Sequence[Sequence[int]],
        num_experts: int,
        upload: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        missing: Collection[int] = (),
        shares: Sequence[Sequence[int]] = (),
    ) -> PlacementTables:
        """Of the experts of each node, in the order of their local ids; -1 where one stands for none.

        Args:
            upload: moves a tensor to the device.
            missing: nodes whose experts are left to others, but for those that no other has.
            shares: [num_experts] of an expert's rows on each of its nodes; () for even ones. Those of missing nodes go
                to the others by theirs, evenly where they have none.
        """
        return PlacementTables.of_layers([(experts, shares)], num_experts, upload, missing)

    @staticmethod
    def of_layers(
        layers: Sequence[tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]],
        num_experts: int,
        upload: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        missing: Collection[int] = (),
    ) -> PlacementTables:
        """Of experts and shares, as in `of`, of all layers or of each."""
        homes = _Homes.of(layers, num_experts)
        num_used, most = 1 + int(homes.node.max()), 1 + int(homes.replica.max())
        there = homes.without(missing)
        shape = (len(layers), num_used, _width(num_experts * most, len(layers)))
        local_ids = np.full(shape, -1, np.int32)
        local_ids[there.layer, there.node, there.expert * most + there.replica] = there.local_id
        dealt = np.zeros((len(layers) * num_experts, most), np.int64)
        dealt[there.layer * num_experts + there.expert, there.replica] = there.share
        count = np.bincount(there.layer * num_experts + there.expert)
        dealt[count == 1, 0] = 1  # whatever its share was
        kinds, kind_of = np.unique(np.column_stack((count, dealt)), axis=0, return_inverse=True)
        wheels = np.array([_wheel(*shares[:count]) for count, *shares in kinds.tolist()], np.uint8)
        tables = PlacementTables(
            upload(torch.from_numpy(local_ids)),
            upload(torch.from_numpy(wheels[kind_of.reshape(len(layers), num_experts)])),
            most,
        )
        return tables.of_layer(0) if len(layers) == 1 else tables

    def of_layer(self, layer: int) -> PlacementTables:
        """Which every layer has, where all are alike."""
        if self.local_ids.dim() == 2:
            return self
        return PlacementTables(self.local_ids[layer], self.wheels[layer], self.most_replicas)

    def with_nobody(self) -> PlacementTables:
        """With one replica more, the last, that no node has."""
        *shape, _ = self.local_ids.shape
        num_layers = shape[0] if len(shape) > 1 else 1
        num_replicas = self.wheels.shape[-2] * self.most_replicas
        nobody = self.local_ids.new_full((*shape, _width(num_replicas + 1, num_layers) - num_replicas), -1)
        local_ids = torch.cat((self.local_ids[..., :num_replicas], nobody), dim=-1)
        return PlacementTables(local_ids, self.wheels.clone(), self.most_replicas)


@dataclass(frozen=True, slots=True)
class _Homes:
    """Every replica of every expert of every layer, one behind the other: arrays of [num_replicas].

    Attributes:
        replica: its number among the expert's, by node.
    """

    layer: NDArray[np.int64]
    node: NDArray[np.int64]
    expert: NDArray[np.int64]
    local_id: NDArray[np.int64]
    share: NDArray[np.int64]
    replica: NDArray[np.int64]

    @staticmethod
    def of(layers: Sequence[tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]], num_experts: int) -> _Homes:
        held = [of_node for experts, _ in layers for of_node in experts]
        lengths = np.array([len(of_node) for of_node in held])
        expert = np.fromiter(chain.from_iterable(held), np.int64, lengths.sum())
        which = np.repeat(np.arange(len(held)), lengths)
        local_id = np.arange(len(expert)) - np.repeat(lengths.cumsum() - lengths, lengths)
        num_nodes = len(layers[0][0])
        order = np.lexsort((which, expert, which // num_nodes))  # by layer, expert and node
        order = order[expert[order] >= 0]
        layer, node, expert, local_id = (
            which[order] // num_nodes,
            which[order] % num_nodes,
            expert[order],
            local_id[order],
        )
        share = np.ones(len(order), np.int64)
        for index, (_, shares) in enumerate(layers):
            if shares:
                share[layer == index] = np.fromiter(chain.from_iterable(shares), np.int64)
        return _Homes(layer, node, expert, local_id, share, _numbers(layer * num_experts + expert))

    def without(self, missing: Collection[int]) -> _Homes:
        """Without those on missing nodes, but for experts that no other has."""
        of_expert = self.layer * (1 + self.expert.max()) + self.expert
        is_there = ~np.isin(self.node, list(missing))
        stays = is_there | (np.bincount(of_expert, is_there)[of_expert] == 0)
        return _Homes(
            self.layer[stays], self.node[stays], self.expert[stays], self.local_id[stays], self.share[stays],
            _numbers(of_expert[stays]),
        )  # fmt: skip


def _numbers(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of the members of each group, which lie side by side: 0, 1, ..."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))


@lru_cache(maxsize=1 << 14)
def _wheel(*shares: int) -> list[int]:
    return wheel_of(in_turns(shares))


def _width(num_ids: int, num_layers: int) -> int:
    """Of a layer's table among several: each begins at a multiple of 16 bytes, and is as wide as a multiple of 16, or
    as none, as it would be alone. Else a GPU's kernels would be compiled anew for it, while requests run.
    """
    if num_layers == 1:
        return num_ids
    width = -(-num_ids // 4) * 4
    return width + 4 if width % 16 == 0 and num_ids % 16 else width


def choose_replicas(topk_ids: Tensor, tables: PlacementTables) -> Tensor:
    """The replica of each expert of each row: int64 [num_tokens, k] of topk_ids int64 [num_tokens, k]."""
    rows = torch.arange(topk_ids.shape[0], device=topk_ids.device)
    replicas: Tensor = topk_ids * tables.most_replicas + whose_turn(topk_ids, rows, tables.wheels)
    return replicas
