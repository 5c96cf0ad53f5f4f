"""A placement as tensors, and which of an expert's nodes a row goes to, where experts have several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PlacementTables:
    """Experts and their replicas are numbered together: replica r of expert e is e * `most_replicas` + r.

    So where every expert has one node, a replica's number is its expert's.

    Attributes:
        local_ids: int32 [num_used_nodes, num_experts * most_replicas], -1 where a node lacks the replica. Nodes behind
            the last that holds any have no row, and get none.
        num_replicas: int64 [num_experts].
    """

    local_ids: Tensor
    num_replicas: Tensor
    most_replicas: int

    @staticmethod
    def of(
        experts: Sequence[Sequence[int]],
        num_experts: int,
        upload: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        missing: Collection[int] = (),
    ) -> PlacementTables:
        """Of the experts of each node, in the order of their local ids; -1 where one stands for none.

        Args:
            upload: moves a tensor to the device.
            missing: nodes whose experts are left to others, but for those that no other has.
        """
        homes: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]  # (node, local id), nodes ascending
        for node, held in enumerate(experts):
            for local, expert in enumerate(held):
                if expert >= 0:
                    homes[expert].append((node, local))
        num_used = 1 + max(node for of_expert in homes for node, _ in of_expert)
        most = max(map(len, homes))
        homes = [[home for home in of_expert if home[0] not in missing] or of_expert for of_expert in homes]
        local_ids = torch.full((num_used, num_experts * most), -1, dtype=torch.int32)
        for expert, its_homes in enumerate(homes):
            for replica, (node, local) in enumerate(its_homes):
                local_ids[node, expert * most + replica] = local
        return PlacementTables(upload(local_ids), upload(torch.tensor([len(one) for one in homes])), most)


def choose_replicas(topk_ids: Tensor, tables: PlacementTables) -> Tensor:
    """The replica of each expert of each row: int64 [num_tokens, k] of topk_ids int64 [num_tokens, k].

    A row takes the same turn at all its experts, so those that share their nodes send it to one of them, once. Turns
    differ between neighbouring rows and between choices of experts: whichever is many, the rows spread over the nodes.
    """
    rows = torch.arange(topk_ids.shape[0], device=topk_ids.device)
    turns = (rows + topk_ids.sum(dim=-1))[:, None]
    return topk_ids * tables.most_replicas + turns % tables.num_replicas[topk_ids]
