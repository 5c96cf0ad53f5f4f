"""Whether all layers of a model are of the kind that one call computes, on a CPU, and that call."""

from __future__ import annotations

from collections.abc import Sequence

from msi.attention.kv_cache import KvCache
from msi.kernels.native.layers import LayerParts, NativeLayers
from msi.models.attend import GroupedQueryAttention
from msi.models.attention_weights import AttentionWeights
from msi.models.config import ModelConfig
from msi.models.route import SoftmaxRoute


def layers_at_once(
    config: ModelConfig, weights: AttentionWeights, kv_cache: KvCache, view_of: Sequence[int]
) -> NativeLayers | None:
    """None where a layer has no experts or a shared one, or computes what that call does not.

    Args:
        view_of: each layer's plan, by its number among a pass's.
    """
    layers = []
    for layer, cache, view in zip(weights.layers, kv_cache.layers, view_of, strict=True):
        attend, route = layer.attend, layer.route
        if not isinstance(attend, GroupedQueryAttention) or not isinstance(route, SoftmaxRoute):
            return None
        if layer.shared is not None or layer.mlp is not None:
            return None
        norms, products = (layer.attention_norm, layer.mlp_norm), (attend.qkv, attend.output, route.router)
        layers.append(LayerParts(*norms, *products, cache, attend.norm, attend.sinks, view))
    first = weights.layers[0].attend
    assert isinstance(first, GroupedQueryAttention), first
    return NativeLayers.of(
        layers, first.view.shape, rotated=config.rope.num_rotated(config.head_dim), top_k=config.top_k,
        renormalise=config.renormalise_topk,
    )  # fmt: skip
