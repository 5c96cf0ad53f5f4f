"""What a model family is: how its config.json is read, and what its tensors are called and how they lie on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from msi.models.config import ConfigReader, ModelConfig


@dataclass(frozen=True, slots=True)
class MlpNames:
    """The matrices of one gated MLP: gate and up are [h', h], down is [h, h']."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Experts with matrices of their own or, where `fused_gate_up` exists, as rows of tensors that hold all experts.

    Fused, gate and up are [num_experts, 2 h', h] (gate first) and down is [num_experts, h, h'].
    """

    each: MlpNames  # with {expert}
    fused_gate_up: str
    fused_down: str


@dataclass(frozen=True, slots=True)
class StackedExpertNames:
    """All experts below each other: gate, up and down, which is transposed, are each [num_experts * h', h]."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class InterleavedExpertNames:
    """All experts in each tensor, transposed, gate and up taking turns: gate_up [num_experts, h, 2 h'] with bias
    [num_experts, 2 h'], and down [num_experts, h', h] with bias [num_experts, h].

    In MXFP4 matrices are not transposed, and lie in two tensors: name_blocks [num_experts, rows, groups, 16] and
    name_scales [num_experts, rows, groups], bytes.
    """

    gate_up: str
    gate_up_bias: str
    down: str
    down_bias: str


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Names of one family's tensors; layer and expert numbers are filled in with str.format.

    A projection's bias is named as its weight with ".bias" for ".weight".
    """

    embed: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    attention_norm: str = "model.layers.{layer}.input_layernorm.weight"
    # queries, keys and values: one tensor each, or a single one with them below each other
    qkv: tuple[str, ...] = (
        "model.layers.{layer}.self_attn.q_proj.weight",
        "model.layers.{layer}.self_attn.k_proj.weight",
        "model.layers.{layer}.self_attn.v_proj.weight",
    )
    query_norm: str = "model.layers.{layer}.self_attn.q_norm.weight"
    key_norm: str = "model.layers.{layer}.self_attn.k_norm.weight"
    output: str = "model.layers.{layer}.self_attn.o_proj.weight"
    mlp_norm: str = "model.layers.{layer}.post_attention_layernorm.weight"
    router: tuple[str, ...] = ("model.layers.{layer}.mlp.gate.weight",)  # the first that exists
    router_bias: str = ""  # where the router has one
    sinks: str = "model.layers.{layer}.self_attn.sinks"
    experts: ExpertNames | StackedExpertNames | InterleavedExpertNames = ExpertNames(
        each=MlpNames(
            gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
            up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
            down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
        ),
        fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
        fused_down="model.layers.{layer}.mlp.experts.down_proj",
    )
    dense_mlp: MlpNames = MlpNames(
        gate="model.layers.{layer}.mlp.gate_proj.weight",
        up="model.layers.{layer}.mlp.up_proj.weight",
        down="model.layers.{layer}.mlp.down_proj.weight",
    )
    shared_mlp: MlpNames = MlpNames(
        gate="model.layers.{layer}.mlp.shared_expert.gate_proj.weight",
        up="model.layers.{layer}.mlp.shared_expert.up_proj.weight",
        down="model.layers.{layer}.mlp.shared_expert.down_proj.weight",
    )
    shared_gate: str = "model.layers.{layer}.mlp.shared_expert_gate.weight"


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture, and what transformers calls its kind of model.

    `parse` raises ConfigError for what this family's models can say and we cannot do.
    """

    architecture: str
    model_type: str
    parse: Callable[[ConfigReader], ModelConfig]
    names: TensorNames = TensorNames()


def bias_of(weight: str) -> str:
    """The name of a projection's bias."""
    return weight.removesuffix(".weight") + ".bias"
