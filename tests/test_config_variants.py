"""config.json as it is found in the wild: what transformers loads computes the same here, or is refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from msi.errors import ConfigError
from msi.instance.instance import check_files
from msi.models.config import known_token_ids
from msi.models.families import load_config, parse_config
from msi.options import InstanceOptions
from tests.reference import load_reference, save_tiny
from tests.test_models import edit, logits_of

PROMPT = (5, 17, 101, 33, 2, 64, 9) * 6
ABSENT = ...
LINEAR = {"type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256, "rope_theta": 10000,
}  # fmt: skip
ANY_FAMILY = {
    "unknown keys": {
        "foo": {"bar": [1]},
        "transformers_version": "9",
        "_name_or_path": "x",
        "use_cache": False,
        "nan": float("nan"),
        "auto_map": {"AutoConfig": "a.B"},
        "output_router_logits": True,
        "huge": 10**400,
    },
    "several architectures": {"architectures": ["MyOwn", "@"]},
    "no architectures": {"architectures": ABSENT},
    "architectures null": {"architectures": None},
    "architectures empty": {"architectures": []},
    "dtype absent": {"dtype": ABSENT},
    "dtype null": {"dtype": None},
    "dtype as transformers 4": {"dtype": ABSENT, "torch_dtype": "float32"},
    "dtype in torch's words": {"dtype": "torch.float32"},
    "dtype float": {"dtype": "float"},
    "tie_word_embeddings absent": {"tie_word_embeddings": ABSENT},
    "end of sequence -1": {"eos_token_id": -1},
    "ends of sequence": {"eos_token_id": [2, 7, 99999]},
    "special tokens null": {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None},
    "special tokens absent": {"eos_token_id": ABSENT, "bos_token_id": ABSENT, "pad_token_id": ABSENT},
    "padding -1": {"pad_token_id": -1},
    "quantization_config null": {"quantization_config": None},
    "rope as transformers 4": {"rope_parameters": ABSENT, "rope_theta": 1e4},
    "rope_theta an integer": {"rope_parameters": ABSENT, "rope_theta": 10000},
    "rope absent": {"rope_parameters": ABSENT},
    "rope_parameters null": {"rope_parameters": None},
    "rope_parameters empty": {"rope_parameters": {}},
    "rope_scaling null": {"rope_parameters": ABSENT, "rope_scaling": None, "rope_theta": 1e4},
    "rope_scaling default": {"rope_parameters": ABSENT, "rope_scaling": {"type": "default"}, "rope_theta": 1e4},
    "rope_scaling linear": {"rope_parameters": ABSENT, "rope_scaling": LINEAR, "rope_theta": 1e4},
    "rope_scaling of both words": {"rope_parameters": ABSENT, "rope_scaling": {**LINEAR, "rope_type": "linear"}},
    "yarn": {"rope_parameters": YARN},
    "yarn with both scales": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn with one scale": {"rope_parameters": {**YARN, "mscale": 0.7}},
    "llama3": {"rope_parameters": LLAMA3},
    "whole heads rotate": {"partial_rotary_factor": 1.0},
}
MOST_FAMILIES = {
    "another base": {"rope_parameters": ABSENT, "rope_theta": 777.0},
    "base beside rope_parameters": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 555.0},
    "hidden_act swish": {"hidden_act": "swish"},
    "hidden_act absent": {"hidden_act": ABSENT},
    "rms_norm_eps absent": {"rms_norm_eps": ABSENT},
    "rms_norm_eps large": {"rms_norm_eps": 1e-3},
    "positions absent": {"max_position_embeddings": ABSENT},
    "positions few": {"max_position_embeddings": 1},
    "positions many": {"max_position_embeddings": 2**31 - 1},
    "sliding_window null": {"sliding_window": None},
    "dropout": {"attention_dropout": 0.5, "router_jitter_noise": 0.9, "router_aux_loss_coef": 3.0},
    "keys of old": {"pretraining_tp": 4, "is_decoder": True, "chunk_size_feed_forward": 3, "torchscript": False},
    "all experts": {"num_experts_per_tok": 7},
}
QWEN = {
    "layer_types": {"layer_types": ["full_attention"] * 6},
    "window not used": {"sliding_window": 8, "use_sliding_window": False},
    "window 0 not used": {"sliding_window": 0, "use_sliding_window": False},
    "use_sliding_window absent": {"sliding_window": 8, "use_sliding_window": ABSENT},
    "norm_topk_prob absent": {"norm_topk_prob": ABSENT},
    "norm_topk_prob true": {"norm_topk_prob": True},
    "norm_topk_prob false": {"norm_topk_prob": False},
    "mlp_only_layers out of range": {"mlp_only_layers": [0, 3, 5, 99, -1]},
    "decoder_sparse_step absent": {"decoder_sparse_step": ABSENT},
}
VARIANTS = {
    "mixtral": {
        **MOST_FAMILIES,
        "experts by the other name": {"num_local_experts": ABSENT, "num_experts": 7},
        "window": {"sliding_window": 8},
        "experts per token absent": {"num_experts_per_tok": ABSENT},
        "fewer layers": {"num_hidden_layers": 2},
    },
    "qwen3": {
        **MOST_FAMILIES,
        **QWEN,
        "window": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 6},
        "experts by the other name": {"num_local_experts": ABSENT, "num_experts": 7},
        "attention_bias absent": {"attention_bias": ABSENT},
        "fewer layers": {"num_hidden_layers": 3},
    },
    "qwen2": {
        **MOST_FAMILIES,
        **QWEN,
        "qkv_bias absent": {"qkv_bias": ABSENT},
        "experts per token absent": {"num_experts_per_tok": ABSENT},
        "head_dim absent": {"head_dim": ABSENT},
    },
    "olmoe": {
        **MOST_FAMILIES,
        "experts by the other name": {"num_experts": ABSENT, "num_local_experts": 7},
        "clip_qkv null": {"clip_qkv": None},
        "attention_bias absent": {"attention_bias": ABSENT},
        "norm_topk_prob true": {"norm_topk_prob": True},
        "fewer layers": {"num_hidden_layers": 2},
    },
    "glm4": {
        **MOST_FAMILIES,
        "experts by the other name": {"n_routed_experts": ABSENT, "num_local_experts": 7},
        "a quarter of each head rotates": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        "rotation as transformers 4": {"rope_parameters": ABSENT, "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        "norm_topk_prob absent": {"norm_topk_prob": ABSENT},
        "scale absent": {"routed_scaling_factor": ABSENT},
        "no guesses": {"num_nextn_predict_layers": 0},
        "fewer layers": {"num_hidden_layers": 2},
    },
    "gpt_oss": {
        **{name: changes for name, changes in MOST_FAMILIES.items() if name != "sliding_window null"},  # they fail
        "experts by the other name": {"num_local_experts": ABSENT, "num_experts": 7},
        "layer_types absent": {"layer_types": ABSENT},
        "a small window": {"sliding_window": 8},
        "window absent": {"sliding_window": ABSENT},
        "limit large": {"swiglu_limit": 7.0},
        "limit and alpha absent": {"swiglu_limit": ABSENT, "swiglu_alpha": ABSENT},
        "attention_bias absent": {"attention_bias": ABSENT},
        "fewer layers": {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    },
    "dbrx": {
        "heads by common names": {"hidden_size": 32, "num_attention_heads": 4},
        "layers by the common name": {"n_layers": ABSENT, "num_hidden_layers": 3},
        "positions absent": {"max_seq_len": ABSENT},
        "ffn_act_fn null": {"ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 7, "ffn_act_fn": None}},
        "one expert per token": {"ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 7}},
        "weights as they are": {
            "ffn_config": {
                "ffn_hidden_size": 24, "moe_num_experts": 7, "moe_top_k": 3, "moe_normalize_expert_weights": None,
            },
        },
        "training's keys": {
            "ffn_config": {
                "ffn_hidden_size": 24, "moe_num_experts": 7, "moe_top_k": 3, "moe_jitter_eps": 0.1,
                "moe_loss_weight": 0.5, "uniform_expert_assignment": False,
            },
        },
    },
}  # fmt: skip
EVERYDAY = ("mixtral",)  # the others are for the full run
CASES = [
    pytest.param(
        family, changes, id=f"{family}: {name}", marks=() if family in EVERYDAY else (pytest.mark.slow,)
    )
    for family, variants in VARIANTS.items()
    for name, changes in {**ANY_FAMILY, **variants}.items()
]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory):
    saved = {}

    def of(family):
        if family not in saved:
            saved[family] = tmp_path_factory.mktemp(family)
            save_tiny(saved[family], family=family)
        return saved[family]

    return of


@pytest.fixture
def copy_of(tiny_of, tmp_path):
    def copy(family, changes):
        path = shutil.copytree(tiny_of(family), tmp_path / "model")
        known = json.loads((path / "config.json").read_text())
        changes = {key: value for key, value in changes.items() if value is not ABSENT or key in known}
        if changes.get("architectures") == ["MyOwn", "@"]:
            changes = {**changes, "architectures": ["MyOwn", known["architectures"][0]]}
        edit(path, **changes)
        return path

    return copy


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_what_configurations_say_equals_transformers(copy_of, family, changes):
    path = copy_of(family, changes)
    check_files(InstanceOptions.of(model=path))
    with torch.inference_mode():
        expected = load_reference(path)(torch.tensor([PROMPT])).logits[0, -1]
    torch.testing.assert_close(logits_of(path, PROMPT, torch.float32), expected, rtol=1e-3, atol=1e-3)


# -- absurd values -----------------------------------------------------------------------------------------------------

SIZES = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "num_local_experts", "num_experts_per_tok", "max_position_embeddings", "sliding_window",
]  # fmt: skip
ABSURD_SIZES = [10**400, -(10**400), 10**18, 2**31, -1, 0, 4.0, 1e400, float("nan"), True, "4", [4], {"a": 4}]
ABSURD_NUMBERS = [10**400, -1, 0, -0.0, 1e-300, 1e300, 1e400, -1e400, float("nan"), False, "1e4", [1e4], {}, None]


@pytest.mark.parametrize("value", ABSURD_SIZES, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("key", SIZES)
def test_sizes_that_make_no_sense_are_refused_by_name(copy_of, key, value):
    path = copy_of("mixtral", {key: value})
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    sentence = str(refusal.value)
    assert sentence.startswith(f"{path / 'config.json'}: {key} is ")
    assert len(sentence) < len(str(path)) + 200


@pytest.mark.parametrize("value", ABSURD_NUMBERS, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "factor", "low_freq_factor"])
def test_numbers_that_make_no_sense_are_refused_by_name(copy_of, key, value):
    section = {"rope_parameters": {**LLAMA3, key: value}} if key in LLAMA3 else {key: value}
    path = copy_of("mixtral", section)
    with pytest.raises(ConfigError, match=f"{key} is "):
        load_config(path)


@pytest.mark.parametrize("value", [2**31 - 1, 10**6, 65536], ids=str)
@pytest.mark.parametrize("key", SIZES[:8])
def test_sizes_that_the_weights_do_not_have_are_refused_before_anything_is_allocated(copy_of, key, value):
    path = copy_of("mixtral", {key: value})
    with pytest.raises(ConfigError) as refusal:
        check_files(InstanceOptions.of(model=path))
    assert len(str(refusal.value)) < 2 * len(str(path)) + 200


@pytest.mark.parametrize("value", [7, "x", [], [[]], {"a": 1}, True, None, 1.5], ids=str)
@pytest.mark.parametrize(
    "key",
    ["architectures", "rope_parameters", "rope_scaling", "hidden_act", "tie_word_embeddings", "dtype", "model_type"],
)
def test_values_of_any_other_type_are_refused_by_name_or_mean_nothing(copy_of, key, value):
    path = copy_of("mixtral", {key: value})
    said = ""
    try:
        load_config(path)
    except ConfigError as error:
        said = str(error)
    if said:
        assert key in said or "architecture" in said


@pytest.mark.parametrize(
    ("family", "changes", "complaint"),
    [
        ("qwen3", {"num_experts": 8}, "num_experts is 8 and num_local_experts is 7, which mean the same; remove the o"),
        ("qwen3", {"mlp_only_layers": "none"}, "mlp_only_layers is 'none'"),
        ("qwen3", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen2", {"layer_types": 7}, "layer_types is 7; it must be a list of texts"),
        ("qwen2", {"layer_types": [7]}, "layer_types is [7]; it must be a list of texts"),
        ("olmoe", {"sliding_window": 8}, "sliding_window is 8; supported: None"),
        ("dbrx", {"attn_config": [1]}, "attn_config is [1]; it must be an object"),
        ("dbrx", {"ffn_config": {"ffn_act_fn": 7, "ffn_hidden_size": 24}}, "ffn_act_fn is 7; it must be an object"),
        ("dbrx", {"n_layers": 10**9}, "n_layers is 1000000000; it must be an integer from 1 to 4096"),
        ("dbrx", {"ffn_config": {"moe_num_experts": 10**9}}, "ffn_hidden_size is None"),
        ("mixtral", {"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type ['yarn'] is not supported"),
        ("mixtral", {"rope_parameters": {**YARN, "rope_theta": 1.0}}, "rope_theta is 1.0; it must be a number"),
        ("mixtral", {"rope_parameters": {**YARN, "truncate": "no"}}, "truncate is 'no'; it must be true or false"),
        ("mixtral", {"rope_parameters": {**LLAMA3, "high_freq_factor": 1}}, "low_freq_factor 1 must be below"),
        ("mixtral", {"architectures": ["X" * 5000]}, "is not supported; supported: Mixtral"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(copy_of, family, changes, complaint):
    with pytest.raises(ConfigError) as refusal:
        load_config(copy_of(family, changes))
    assert complaint in str(refusal.value)
    assert len(str(refusal.value)) < 500


# -- tokens that the model does not have -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "known", "others"),
    [
        (None, (), ()),
        (2, (2,), ()),
        ([2, 7, 2], (2, 7), ()),
        ([], (), ()),
        (-1, (), (-1,)),
        ([2, -1], (2,), (-1,)),
        (198, (198,), ()),
        (199, (), (199,)),
        ([199, 0, 10**400], (0,), (199, 10**400)),
        ("2", (), ("2",)),
        (2.0, (), (2.0,)),
        (True, (), (True,)),
        ([None, [2], {}], (), (None, [2], {})),
        ({"id": 2}, (), ({"id": 2},)),
    ],
)
def test_only_tokens_that_the_model_has_end_a_sequence(value, known, others):
    assert known_token_ids(value, 199) == (known, others)


@pytest.mark.parametrize(
    "value", [-1, 199, 10**400, [5, 199], "two", {"a": 1}, [None]], ids=lambda value: str(value)[:9]
)
def test_tokens_that_the_model_does_not_have_are_left_out_and_said(copy_of, value):
    path = copy_of("mixtral", {"eos_token_id": value})
    (path / "generation_config.json").unlink()
    config, _ = load_config(path)
    assert config.eos_token_ids == ((5,) if value == [5, 199] else ())
    (remark,) = config.remarks
    assert remark.startswith(f"{path / 'config.json'}: eos_token_id is ")
    assert remark.endswith("the model's tokens are 0 to 198, others do not count")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, -1]}))
    config, _ = load_config(path)
    assert config.eos_token_ids == (3,)
    assert len(config.remarks) == 2
    values = json.loads((path / "config.json").read_text())
    assert parse_config(values, "config.json").remarks
