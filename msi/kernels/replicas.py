"""A placement as tensors, and which of an expert's nodes a row goes to, where experts have several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msi.kernels.turns import homes_of, in_turns, wheel_of, whose_turn


@dataclass(frozen=True, slots=True)
class PlacementTables:
    """Experts and their replicas are numbered together: replica r of expert e is e * `most_replicas` + r.

    So where every expert has one node, a replica's number is its expert's.

    Attributes:
        local_ids: int32 [num_used_nodes, num_experts * most_replicas], -1 where a node lacks the replica. Nodes behind
            the last that holds any have no row, and get none. Where layers differ, one behind the other: [num_layers,
            num_used_nodes, ...], as wide in each, so that graphs know one piece of memory for all.
        wheels: int64 [num_experts, TURNS], the replica that has each turn; so, too.
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
        every = [its_homes for experts, _ in layers for its_homes in homes_of(experts, num_experts)]
        num_used = 1 + max(its_homes[-1].node for its_homes in every)
        most = max(map(len, every))
        local_ids = torch.full((len(layers), num_used, _width(num_experts * most, len(layers))), -1, dtype=torch.int32)
        held: list[tuple[int, int, int, int]] = []  # layer, node, replica's number, local id
        dealt: list[tuple[int, ...]] = []  # shares of each expert of each layer
        for layer, (experts, shares) in enumerate(layers):
            for expert, its_homes in enumerate(homes_of(experts, num_experts, missing, shares)):
                first = expert * most
                held += [(layer, home.node, first + replica, home.local_id) for replica, home in enumerate(its_homes)]
                dealt.append(tuple([home.share for home in its_homes]))
        *places, ids = torch.tensor(held).T
        local_ids[tuple(places)] = ids.to(torch.int32)
        kinds = {shares: number for number, shares in enumerate(dict.fromkeys(dealt))}  # few: all at once takes long
        wheels = torch.tensor([wheel_of(in_turns(shares)) for shares in kinds])[[kinds[shares] for shares in dealt]]
        tables = PlacementTables(upload(local_ids), upload(wheels.view(len(layers), num_experts, -1)), most)
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
        return PlacementTables(local_ids, self.wheels, self.most_replicas)


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
