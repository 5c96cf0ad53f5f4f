"""Families other than Mixtral: what their configurations say, and that their variants equal transformers."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import msi.models
from msi import Engine, SamplingParams
from msi.errors import CheckpointError, ConfigError
from msi.kernels import SWIGLU, Activation, SigmoidRouting
from msi.models.attention_weights import load_attention_weights
from msi.models.checkpoint import Checkpoint
from msi.models.expert_weights import load_expert_bank
from msi.models.families import load_config, parse_config
from msi.models.rotary import frequencies_of
from msi.models.shape import read_shape
from msi.placement import place_evenly
from msi.tracing import COMPUTE_ROW
from msi.worker.loading import ModelFiles
from tests.installed import transformers
from tests.reference import references, save_tiny, tiny_config
from tests.test_models import PlainDevice, assignment, edit

SCALED_MOE = Path(msi.models.__file__).parent / "configs" / "scaled_moe"


def values_of(family, **changes):
    """config.json as transformers writes it, parsed."""
    values = tiny_config(family, **changes).to_dict()
    names = {
        "qwen3": "Qwen3Moe", "qwen2": "Qwen2Moe", "olmoe": "Olmoe", "dbrx": "Dbrx", "glm4": "Glm4Moe",
        "gpt_oss": "GptOss",
    }  # fmt: skip
    return {**json.loads(json.dumps(values, default=str)), "architectures": [f"{names[family]}ForCausalLM"]}


# -- configurations ----------------------------------------------------------------------------------------------------


def test_what_differs_between_families_is_data():
    qwen3, qwen2, olmoe, dbrx, glm4, gpt_oss = (
        parse_config(values_of(family), "config.json")
        for family in ("qwen3", "qwen2", "olmoe", "dbrx", "glm4", "gpt_oss")
    )
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.renormalise_topk, qwen3.head_dim) == ("head", False, True, 16)
    assert (qwen3.sparse_layers, qwen3.dense_intermediate_size, qwen3.intermediate_size) == ((1, 2, 4), 40, 24)
    assert (qwen2.qk_norm, qwen2.qkv_bias, qwen2.output_bias, qwen2.renormalise_topk) == (None, True, False, False)
    assert (qwen2.shared_intermediate_size, qwen2.sliding_window, qwen2.num_sparse_layers) == (56, None, 3)
    assert (olmoe.qk_norm, olmoe.clip_qkv, olmoe.renormalise_topk, olmoe.norm_eps) == ("projection", 1.5, False, 1e-5)
    assert (dbrx.norm, dbrx.clip_qkv, dbrx.renormalise_topk, dbrx.num_kv_heads) == ("layer", 1.5, True, 2)
    assert (dbrx.intermediate_size, dbrx.num_experts, dbrx.top_k, dbrx.head_dim) == (24, 7, 3, 8)
    assert (glm4.sigmoid, glm4.rope.share, glm4.qk_norm) == (SigmoidRouting(1, 1, 1.5), 0.5, "head")
    assert (glm4.qkv_bias, glm4.output_bias, glm4.renormalise_topk, glm4.has_shared_gate) == (True, False, True, False)
    assert (glm4.sparse_layers, glm4.dense_intermediate_size, glm4.shared_intermediate_size) == ((1, 2), 40, 48)
    assert [gpt_oss.window_of(layer) for layer in range(3)] == [24, None, 24]
    assert (gpt_oss.has_sinks, gpt_oss.router_bias, gpt_oss.expert_bias, gpt_oss.renormalise_topk) == (True,) * 4
    assert (gpt_oss.qkv_bias, gpt_oss.output_bias, gpt_oss.head_dim, gpt_oss.intermediate_size) == (True, True, 16, 24)
    assert gpt_oss.activation == Activation(alpha=1.702, limit=0.7, up_offset=1.0)
    assert (glm4.activation, glm4.has_sinks, glm4.window_of(0)) == (SWIGLU, False, None)


def test_gpt_oss_is_what_is_published_where_its_configuration_is_silent():
    """The published config.json leaves some of it out; these are transformers' own defaults."""
    values = {"vocab_size": 201088, "hidden_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64}
    config = parse_config({**values, "architectures": ["GptOssForCausalLM"]}, "config.json")
    assert (config.num_experts, config.top_k, config.intermediate_size, config.head_dim) == (128, 4, 2880, 64)
    assert (config.num_kv_heads, config.norm_eps, config.max_position_embeddings) == (8, 1e-5, 131072)
    assert (config.sliding_window, config.full_layers) == (128, tuple(range(1, 36, 2)))
    rope = config.rope
    assert (rope.kind, rope.factor, rope.original_len, rope.truncate, rope.theta) == ("yarn", 32.0, 4096, False, 1.5e5)
    assert rope.scale == pytest.approx(1.3466, abs=1e-4)
    assert config.activation == Activation(alpha=1.702, limit=7.0, up_offset=1.0)
    total = config.attention_values + config.num_experts * 36 * (config.expert_values + config.expert_bias_values)
    assert total == pytest.approx(116.83e9, rel=1e-3), "of gpt-oss-120b, as its makers count"


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "olmoe", "dbrx", "glm4", "gpt_oss"])
def test_transformers_4_and_5_write_the_same_model(family):
    newer = values_of(family)
    older = {key: value for key, value in newer.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    if family == "qwen3":
        older["num_experts"] = older.pop("num_local_experts")
    if family == "gpt_oss":
        older["rope_theta"], older["rope_scaling"] = 1e4, newer["rope_parameters"]
    elif family != "dbrx":  # whose base is in attn_config in transformers 4
        older["rope_theta"] = 1e4
    else:
        newer["attn_config"] = {key: value for key, value in newer["attn_config"].items() if key != "rope_theta"}
    older["torch_dtype"] = "float32"
    assert parse_config(older, "config.json") == parse_config(newer, "config.json")


@pytest.mark.parametrize(
    ("family", "changes", "complaint"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True; supported: False"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 6}, "layer_types holds 'sliding_attention'"),
        ("qwen3", {"decoder_sparse_step": 9}, "none of the 6 layers has experts"),
        ("qwen3", {"mlp_only_layers": ["first"]}, "mlp_only_layers is"),
        ("qwen3", {"num_local_experts": None}, "num_experts is None"),
        ("olmoe", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("olmoe", {"clip_qkv": -1}, "clip_qkv is -1; it must be a number above 0"),
        ("olmoe", {"head_dim": 16}, "head_dim is 16; supported: None, 8"),
        ("dbrx", {"attn_config": {"rope_theta": 5e5}}, "rope_theta is 10000 in rope_parameters and 500000 in attn_co"),
        ("dbrx", {"attn_config": 7}, "attn_config is 7; it must be an object"),
        ("dbrx", {"ffn_config": {"ffn_act_fn": {"name": "gelu"}}}, "ffn_config: ffn_act_fn: name is 'gelu'"),
        ("dbrx", {"ffn_config": {"moe_normalize_expert_weights": 2.0}}, "moe_normalize_expert_weights is 2.0; suppor"),
        ("dbrx", {"ffn_config": {}}, "ffn_config: ffn_hidden_size is None"),
        ("glm4", {"n_group": 2}, "n_group is 2; 7 experts must fall into that many equal groups of at least 2"),
        ("glm4", {"n_group": 7}, "n_group is 7; 7 experts must fall into that many equal groups of at least 2"),
        ("glm4", {"topk_group": 2}, "topk_group is 2; a token chooses 3 experts of that many groups of 7, of which th"),
        ("glm4", {"first_k_dense_replace": 3}, "none of the 3 layers has experts"),
        ("glm4", {"n_shared_experts": 0}, "n_shared_experts is 0; it must be an integer from 1"),
        ("glm4", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5; it must be a"),
        ("glm4", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "0.2 of head_dim 16 is 3 values, which are not"),
        (
            "gpt_oss",
            {"layer_types": ["sliding_attention", "linear_attention"]},
            "layer_types holds 'linear_attention'; sup",
        ),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types names 1 layers, and there are 3"),
        ("gpt_oss", {"swiglu_limit": None}, "swiglu_limit is None; it must be a number above 0"),
        ("gpt_oss", {"swiglu_alpha": "x"}, "swiglu_alpha is 'x'; it must be a number above 0"),
        (
            "dbrx",
            {"quantization_config": {"bits": 4}},
            "quantization_config is set; of quantised checkpoints those in fp8",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(family, changes, complaint):
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        parse_config({**values_of(family), **changes}, "config.json")


@pytest.mark.parametrize(
    ("family", "name", "complaint"),
    [
        ("qwen3", "model.layers.2.self_attn.k_norm.weight", "[16]"),
        ("qwen3", "model.layers.3.mlp.up_proj.weight", "[40, 32]"),
        ("qwen2", "model.layers.1.self_attn.v_proj.bias", "[16]"),
        ("qwen2", "model.layers.4.mlp.shared_expert_gate.weight", "[1, 32]"),
        ("olmoe", "model.layers.0.self_attn.q_norm.weight", "[32]"),
        ("dbrx", "transformer.blocks.1.norm_attn_norm.attn.Wqkv.weight", "[64, 32]"),
        ("dbrx", "transformer.blocks.2.ffn.experts.mlp.v1", "[168, 32]"),
        ("glm4", "model.layers.2.mlp.gate.e_score_correction_bias", "[7]"),
        ("glm4", "model.layers.1.mlp.shared_experts.down_proj.weight", "[32, 48]"),
        ("gpt_oss", "model.layers.1.self_attn.sinks", "[4]"),
        ("gpt_oss", "model.layers.2.mlp.router.bias", "[7]"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias", "[7, 48]"),
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(tmp_path, family, name, complaint):
    save_tiny(tmp_path, family=family)
    config, _ = load_config(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)

    def load():
        source = Checkpoint(tmp_path)
        load_attention_weights(config, source, PlainDevice(), torch.float32)
        load_expert_bank(config, [(0, 6)], source, PlainDevice().kernels, torch.float32)

    load()
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(CheckpointError, match=re.escape(f"no tensor {name}; expected one of shape {complaint}")):
        load()
    save_file({**tensors, name: torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=re.escape(f"{name} is [3]; expected {complaint}")):
        load()


# -- what they compute -------------------------------------------------------------------------------------------------


async def tokens_of(path, prompts, **options):
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    options = {"expert_workers": 2, "micro_batches": 2, "transport": "inproc", "slot_rows": 40, **options}
    results = []
    async with Engine.local(model=path, **options) as engine:
        for prompt in prompts:
            results.append(
                tuple([token async for output in engine.generate(prompt, params) for token in output.token_ids])
            )
    return results


GLM_YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
}  # fmt: skip


def slow(family, **changes):
    return pytest.param(family, changes, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 2, "attention_bias": True}),
        slow("qwen3", mlp_only_layers=[], use_sliding_window=True, sliding_window=24),
        slow("qwen3", mlp_only_layers=[1, 2, 3, 4, 5], tie_word_embeddings=True, is_fused=True),
        slow("qwen2", mlp_only_layers=[5, 4], qkv_bias=False, norm_topk_prob=True, is_fused=True),
        slow("qwen2", mlp_only_layers=None, num_experts_per_tok=1, max_shard_size="40KB"),
        slow("olmoe", clip_qkv=None, norm_topk_prob=True, num_key_value_heads=4, is_fused=True),
        slow("olmoe", attention_bias=True, num_key_value_heads=1),
        (
            "glm4",
            {
                "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 2,
                "use_qk_norm": False, "attention_bias": False, "partial_rotary_factor": 0.25,
            },
        ),
        slow("glm4", first_k_dense_replace=0, norm_topk_prob=False, n_shared_experts=1, is_fused=True),
        slow("glm4", rope_parameters=GLM_YARN, tie_word_embeddings=True, num_key_value_heads=4),
        slow("gpt_oss", layer_types=["full_attention"] * 2 + ["sliding_attention"], swiglu_limit=7.0),
        slow("gpt_oss", attention_bias=False, num_key_value_heads=1, sliding_window=8, swiglu_alpha=1.0),
        slow("gpt_oss", num_key_value_heads=4, num_experts_per_tok=1, rope_parameters=None, max_shard_size="40KB"),
        slow(
            "dbrx",
            attn_config={"clip_qkv": 1, "kv_n_heads": 4, "rope_theta": 1e4},  # transformers itself needs a limit
            ffn_config={
                "ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2, "moe_normalize_expert_weights": None,
            },
        ),
    ],
    ids=str,
)  # fmt: skip
async def test_variants_equal_transformers(tmp_path, family, changes):
    model = save_tiny(tmp_path, seed=3, family=family, **changes)
    expected = references(model, [1, 30, 70], 10)
    assert await tokens_of(tmp_path, [one.prompt for one in expected]) == [one.tokens for one in expected]


def test_the_planner_is_told_of_dense_layers_and_shared_experts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values_of("glm4")))
    shape = read_shape(tmp_path)
    assert (shape.num_layers, shape.num_dense_layers, shape.num_experts, shape.top_k) == (3, 1, 7, 3)
    sizes = (shape.intermediate_size, shape.shared_intermediate_size, shape.dense_intermediate_size)
    assert sizes == (24, 48, 40)


def test_the_planner_is_told_which_layers_have_a_window(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values_of("gpt_oss")))
    shape = read_shape(tmp_path)
    assert (shape.num_layers, shape.sliding_window, shape.num_full_layers) == (3, 24, 1)


async def test_what_guesses_further_tokens_is_said_and_not_read(tmp_path):
    expected = references(save_tiny(tmp_path, family="glm4"), [30], 10)
    tensors = load_file(tmp_path / "model.safetensors")
    more = {
        name.replace("layers.2.", "layers.3."): tensor + 1 for name, tensor in tensors.items() if "layers.2." in name
    }
    save_file({**tensors, **more, "model.layers.3.eh_proj.weight": torch.ones(32, 64)}, tmp_path / "model.safetensors")
    edit(tmp_path, num_nextn_predict_layers=1)
    (remark,) = load_config(tmp_path)[0].remarks
    assert remark.endswith(
        "num_nextn_predict_layers is 1; what guesses further tokens (model.layers.3.* and on) is not read"
    )
    assert await tokens_of(tmp_path, [expected[0].prompt]) == [expected[0].tokens]
    edit(tmp_path, num_nextn_predict_layers=0)
    assert not load_config(tmp_path)[0].remarks


ROPES = [
    {"rope_type": "linear", "factor": 2.5},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 0.8},
]  # fmt: skip


@pytest.mark.parametrize("parameters", ROPES, ids=lambda parameters: parameters["rope_type"])
def test_stretched_rotary_frequencies_are_those_of_transformers(parameters):
    config = tiny_config("qwen3", rope_parameters={**parameters, "rope_theta": 1e4})
    theirs = transformers("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    frequencies, scale = theirs[parameters["rope_type"]](config)
    values = values_of("qwen3")
    del values["rope_parameters"]
    ours = parse_config({**values, "rope_theta": 1e4, "rope_scaling": parameters}, "config.json")
    torch.testing.assert_close(frequencies_of(ours.rope, ours.head_dim), frequencies, rtol=1e-6, atol=0)
    assert ours.rope.scale == pytest.approx(scale)


@pytest.mark.slow
@pytest.mark.parametrize("parameters", ROPES[:3], ids=lambda parameters: parameters["rope_type"])
async def test_stretched_contexts_equal_transformers(tmp_path, parameters):
    model = save_tiny(tmp_path, family="qwen3", rope_parameters={**parameters, "rope_theta": 1e4})
    expected = references(model, [30, 200], 10)
    assert await tokens_of(tmp_path, [one.prompt for one in expected]) == [one.tokens for one in expected]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "olmoe", "dbrx", "glm4", "gpt_oss"])
async def test_a_colocated_instance_equals_transformers(tmp_path, family):
    expected = references(save_tiny(tmp_path, family=family), [30], 10)
    options = {"colocated": True, "expert_workers": 1, "micro_batches": 1, "transport": "auto"}
    assert await tokens_of(tmp_path, [expected[0].prompt], **options) == [expected[0].tokens]


async def test_shared_experts_are_computed_after_their_turn_is_posted_and_before_the_next(tmp_path):
    save_tiny(tmp_path, family="qwen2")
    trace = tmp_path / "trace.json"
    await tokens_of(tmp_path, [(5, 6, 7)], trace=trace)
    courses = defaultdict(list)  # of each lane, on the attention worker
    for event in sorted(json.loads(trace.read_text())["traceEvents"], key=lambda event: event.get("ts", 0)):
        if event["ph"] == "X" and event["name"] != "experts" and event["tid"] == COMPUTE_ROW:
            courses[event["args"]["lane"]].append(event["name"])
    assert courses
    for course in courses.values():
        one_pass = ["attention", "shared experts"] * 3 + ["sample"]
        assert course == one_pass * (len(course) // len(one_pass))


# -- Scaled-MoE --------------------------------------------------------------------------------------------------------


def test_scaled_moe_has_the_papers_numbers():
    config, _ = load_config(SCALED_MOE)
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (48, 8192, 8192)
    assert (config.num_experts, config.top_k, config.dtype) == (32, 4, "bfloat16")
    total = config.attention_values + config.num_experts * config.num_sparse_layers * config.expert_values
    assert total == pytest.approx(317e9, rel=2e-3)


def test_weights_that_memory_cannot_hold_are_refused_before_any_is_read(monkeypatch):
    monkeypatch.setattr(PlainDevice, "free_bytes", 64 * 10**9)
    files = ModelFiles(SCALED_MOE, "dummy")
    complaint = re.escape("the weights of w take 309.2 GB as float32, and 64.0 GB of memory are free")
    with pytest.raises(ConfigError, match=complaint):
        files.load(assignment("expert", 1, 4, placement=place_evenly(32, 4)), PlainDevice())


async def test_scaled_moe_runs_on_dummy_weights(tmp_path):
    """Two of its layers, 64 times narrower: as many experts, choices and heads."""
    shutil.copytree(SCALED_MOE, tmp_path, dirs_exist_ok=True)
    edit(tmp_path, num_hidden_layers=2, hidden_size=128, intermediate_size=128, head_dim=2, vocab_size=500)
    (one,) = await tokens_of(tmp_path, [(3, 4, 5)], load_format="dummy", expert_workers=4)
    (other,) = await tokens_of(tmp_path, [(3, 4, 5)], load_format="dummy", expert_workers=2)
    assert len(one) == 10
    assert one == other, "the same weights, whoever holds them"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "olmoe", "dbrx", "glm4", "gpt_oss"])
async def test_every_family_runs_on_dummy_weights(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps(values_of(family)))
    (one,) = await tokens_of(tmp_path, [(3, 4, 5)], load_format="dummy")
    (other,) = await tokens_of(tmp_path, [(3, 4, 5)], load_format="dummy", expert_workers=1)
    assert len(one) == 10
    assert one == other
