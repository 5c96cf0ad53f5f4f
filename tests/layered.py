"""Placements whose layers differ."""

from __future__ import annotations

from msi.placement_change import ByLayer, changed


def rotated(placement, num_layers):
    """In each layer the nodes hold what their neighbours do in the one before."""
    held = [set(of_node) for of_node in placement.experts]
    layers = tuple([held[node - layer] for node in range(len(held))] for layer in range(num_layers))
    return changed(placement, ByLayer(layers))


def homes_in(placement, expert):
    """The nodes that hold an expert in any layer, in ascending order."""
    return tuple(
        node for node in range(placement.num_nodes) if any(expert in one.experts[node] for one in placement.layers)
    )
