"""Checkpoints that are shipped in float8: the tokens of the matrices that they stand for, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.profile import measuring, parse
from msi import Engine, SamplingParams
from msi.control.messages import Assignment
from msi.device.choice import precision_on
from msi.device.fake.world import FakeWorld
from msi.errors import CheckpointError, ConfigError
from msi.kernels.blocks import LARGEST, to_blocks
from msi.kernels.cpu import CpuKernels
from msi.kernels.native.bank import NativeExpertBank
from msi.kernels.native.compiled import native_library
from msi.kernels.quantized import Quantized, in_float8
from msi.models.attention_weights import load_attention_weights
from msi.models.checkpoint import Checkpoint
from msi.models.families import load_config, parse_config
from msi.models.required import check_weights
from msi.models.shape import read_shape, shape_of
from msi.placement import place_evenly
from msi.precision import Precision
from msi.settings import LinkShape, SchedulerLimits, Timeouts
from msi.worker.loading import ModelFiles
from tests.everyday import mostly_slow
from tests.fake_engine import fake_engine
from tests.reference import load_reference, references, save_tiny
from tests.test_models import PlainDevice
from tests.tiny import MIXTRAL

BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
WHOLE = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
ROWS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False,
                "group_size": None, "block_structure": None, "actorder": None,
            },
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    },
}  # fmt: skip
MATRICES = ("_proj", "_proj.weight", "w1.weight", "w2.weight", "w3.weight", "Wqkv.weight", "mlp.w1", "mlp.v1", "mlp.w2")
WIDE = {  # more than one block, and the last ones short
    "mixtral": {"hidden_size": 160, "intermediate_size": 144},
    "qwen2": {"hidden_size": 160, "moe_intermediate_size": 144, "shared_expert_intermediate_size": 136},
    "qwen3": {"hidden_size": 160, "moe_intermediate_size": 144, "intermediate_size": 200},
    "olmoe": {"hidden_size": 160, "intermediate_size": 144},
    "glm4": {"hidden_size": 160, "moe_intermediate_size": 144},
    "dbrx": {"d_model": 160, "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 7, "moe_top_k": 3}},
}


def edit(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def in_rows(matrix):
    scales = matrix.abs().amax(dim=-1, keepdim=True) / LARGEST
    return (matrix / scales).to(torch.float8_e4m3fn), scales


def as_one(matrix):
    scale = matrix.abs().amax() / LARGEST
    return (matrix / scale).to(torch.float8_e4m3fn), scale


def in_powers(matrix):
    """As DeepSeek-V3.1: each scale a power of two, and nothing but its exponent stored."""
    _, scales = to_blocks(matrix)
    scales = scales.log2().ceil().exp2()
    wide = scales.repeat_interleave(128, 0)[: len(matrix)].repeat_interleave(128, 1)[:, : matrix.shape[1]]
    return (matrix / wide).to(torch.float8_e4m3fn), scales.to(torch.float8_e8m0fnu)


def in_coarse_blocks(matrix):
    """As Qwen3's: scales in bfloat16."""
    values, scales = to_blocks(matrix)
    return values, scales.bfloat16()


HOW = {  # what config.json says, what scales are called, and how matrices are made
    "blocks": (BLOCKS, "_scale_inv", to_blocks),
    "blocks with scales in bfloat16": (BLOCKS, "_scale_inv", in_coarse_blocks),
    "blocks with powers of two": ({**BLOCKS, "scale_fmt": "ue8m0"}, "_scale_inv", in_powers),
    "rows": (ROWS, "_scale", in_rows),
    "whole": (WHOLE, "_scale", as_one),
}  # fmt: skip


def save_in_float8(path: Path, how: str = "blocks", *, family: str = "mixtral", **changes) -> Path:
    """A random checkpoint whose matrices are float8; returns where the same is with the numbers that they stand for."""
    save_tiny(path / "full", family=family, **{**WIDE[family], **changes})
    plain = store_in_float8(path / "full", path, how)
    save_file(plain, path / "full" / "model.safetensors", {"format": "pt"})
    return path / "full"


def store_in_float8(full: Path, path: Path, how: str) -> dict[str, torch.Tensor]:
    """What another checkpoint has, in float8; returns the numbers that it stands for."""
    section, ending, make = HOW[how]
    stored, plain = {}, {}
    for name, tensor in load_file(full / "model.safetensors").items():
        if not name.endswith(MATRICES):
            stored[name] = plain[name] = tensor
            continue
        tensor = tensor.float()
        made = [make(one) for one in (tensor if tensor.dim() == 3 else [tensor])]
        seen = [in_float8(values, scales).dequantized(torch.float32) for values, scales in made]
        values, scales, seen = (torch.stack(ones) for ones in (*zip(*made, strict=True), seen))
        stored[name], stored[name + ending], plain[name] = (
            one if tensor.dim() == 3 else one[0] for one in (values.view(torch.int8), scales, seen)
        )
        stored[name] = stored[name].view(torch.float8_e4m3fn)
        if how == "whole":
            stored[name.removesuffix(".weight") + ".input_scale"] = torch.tensor(0.1)
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_bytes((full / "config.json").read_bytes())
    edit(path, quantization_config=section)
    return plain


async def tokens_of(path, prompts, make=Engine.local, **options):
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    if not options.get("colocated"):
        options = {"transport": "inproc", "expert_workers": 2, "micro_batches": 1, **options}
    async with make(model=path, dtype="float32", **options) as engine:
        return [
            tuple([token async for output in engine.generate(prompt, params) for token in output.token_ids])
            for prompt in prompts
        ]


CASES = [
    ("blocks", "mixtral", {}), ("rows", "qwen3", {}), ("whole", "mixtral", {}), ("blocks", "dbrx", {}),
    ("blocks", "glm4", {}), ("blocks", "qwen3", {"is_fused": True, "moe_intermediate_size": 128}),
    ("blocks with scales in bfloat16", "qwen3", {}), ("blocks with powers of two", "mixtral", {}),
    ("rows", "glm4", {}), ("whole", "dbrx", {}), ("blocks", "olmoe", {}), ("blocks", "qwen2", {}),
    ("rows", "mixtral", {"is_fused": True}),
]  # fmt: skip


@pytest.mark.parametrize(("how", "family", "changes"), mostly_slow(CASES, keep=4))
async def test_tokens_are_those_of_the_matrices_that_are_meant(tmp_path, how, family, changes):
    expected = references(load_reference(save_in_float8(tmp_path, how, family=family, **changes)), [3, 17], 6)
    prompts, wanted = [one.prompt for one in expected], [one.tokens for one in expected]
    assert await tokens_of(tmp_path, prompts) == wanted
    if how == "blocks":
        assert await tokens_of(tmp_path, prompts, quantization="none") == wanted, "unpacked as they are loaded"


async def test_a_gpus_workers_hold_it_as_it_is(tmp_path):
    """On the fake device."""
    expected = references(load_reference(save_in_float8(tmp_path)), [3, 17], 6)
    found = await tokens_of(
        tmp_path, [one.prompt for one in expected], lambda **options: fake_engine(FakeWorld(0), **options),
        colocated=True,
    )  # fmt: skip
    assert found == [one.tokens for one in expected]


def test_a_profile_is_measured_with_matrices_as_asked():
    assert measuring(parse(["model", "--quantization", "fp8"])).precision == Precision(quantization="fp8")
    assert measuring(parse(["model"])).precision == Precision()


def on_cpu():
    device = PlainDevice(CpuKernels())
    device.compute_dtype = lambda checkpoint: checkpoint
    return device


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_byte_is_held_for_each_number_and_counted(tmp_path, load_format):
    save_in_float8(tmp_path)
    files = ModelFiles(tmp_path, load_format)
    config = files.config
    device = on_cpu()
    precision = precision_on(device, Precision(), torch.float32, config.stored_as)
    assert precision == replace(Precision.of("float32"), quantization="fp8")
    assignment = Assignment(
        "i", "worker-0", "expert", 0, 0, place_evenly(config.num_experts, 1), 4, True, 1.0,
        SchedulerLimits(1024, 64, 512), LinkShape(), Timeouts(), precision,
    )  # fmt: skip
    part = files.load(assignment, device)
    assert 0.9 < files.loaded_bytes / files.total_bytes < 1.1 or load_format == "dummy"
    assert isinstance(part.experts, NativeExpertBank) == (native_library() is not None)
    shape = shape_of(config, name="", digest="", precision=Precision())
    assert shape.precision == precision
    assert shape.expert_bytes == round(config.num_layers * config.expert_values * (1 + 4 / 128))
    attention = load_attention_weights(config, files.open(), device, torch.float32, precision=precision)
    in_full = 4 * (config.vocab_size + config.num_layers * (config.num_experts + 2) + 1) * config.hidden_size
    matrices = config.num_layers * (128 * (160 + 2 * 4) + 160 * (64 + 4))  # with their scales
    assert attention.num_bytes == in_full + matrices
    assert read_shape(tmp_path).precision.quantization == "fp8"


def test_a_device_without_kernels_for_it_unpacks_and_others_refuse_what_cannot_be(tmp_path):
    plain = PlainDevice()
    plain.compute_dtype = lambda checkpoint: checkpoint
    assert precision_on(plain, Precision(), torch.bfloat16, "fp8") == Precision.of("bfloat16")
    device = on_cpu()
    for format in ("int8", "int4"):
        with pytest.raises(
            ConfigError, match=f"`quantization` {format} is not made of matrices that are in fp8 already"
        ):
            precision_on(device, Precision(quantization=format), torch.float32, "fp8")
    assert precision_on(device, Precision(quantization="none"), torch.float32, "fp8") == Precision.of("float32")


def test_what_is_not_done_is_a_remark(tmp_path):
    for section, said in (
        (BLOCKS, "has activations rounded to fp8 (activation_scheme dynamic), which is not done: they stay in `dtype`"),
        (WHOLE, "(activation_scheme static), which is not done"),
        (ROWS, "(input_activations dynamic), which is not done"),
        ({**BLOCKS, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is set; scales of the KV cache are not read"),
    ):
        assert said in " ".join(config_with(section).remarks)
    weights_alone = json.loads(json.dumps(ROWS))
    weights_alone["config_groups"]["group_0"]["input_activations"] = None
    assert config_with(weights_alone).remarks == ()
    assert config_with(weights_alone).stored_as == "fp8"


def config_with(section):
    return parse_config(
        {"architectures": ["MixtralForCausalLM"], **MIXTRAL, "quantization_config": section}, "config.json"
    )


def rows_with(**changes):
    group = json.loads(json.dumps(ROWS))
    group["config_groups"]["group_0"]["weights"] |= changes
    return group


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        (
            {**BLOCKS, "weight_block_size": [64, 128]},
            r"weight_block_size is \[64, 128\]; supported: None, \[128, 128\]",
        ),
        ({**BLOCKS, "fmt": "e5m2"}, "quantization_config: fmt is 'e5m2'"),
        ({**BLOCKS, "activation_scheme": "none"}, "activation_scheme is 'none'"),
        ({**BLOCKS, "expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format is 'pack-quantized'"),
        ({**ROWS, "config_groups": {}}, "has no config_groups"),
        ({**ROWS, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is"),
        (rows_with(num_bits=4), "weights: num_bits is 4; supported: 8"),
        (rows_with(type="int"), "type is 'int'; supported: 'float'"),
        (rows_with(strategy="group"), "strategy is 'group'; supported: 'tensor', 'channel', 'block'"),
        ({"quant_method": "awq"}, r"quantization_config is set \('awq'\); of quantised checkpoints those in fp8 are"),
        (
            {"quant_method": "fbgemm_fp8"},
            r"is set \('fbgemm_fp8'\); of quantised checkpoints those in fp8 are supported",
        ),
    ],
)
def test_another_quantisation_is_refused_by_name(section, complaint):
    with pytest.raises(ConfigError, match=complaint):
        config_with(section)


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({Q_PROJ + "_scale_inv": None}, f"{Q_PROJ} is stored as F8_E4M3, and there is no {Q_PROJ}_scale_inv"),
        (
            {Q_PROJ + "_scale_inv": torch.ones(3, 1)},
            r"F32 \[3, 1\]; expected one number, .* \[1, 2\]: one for each 128 x",
        ),
        ({Q_PROJ + "_scale_inv": torch.ones(1, 2, dtype=torch.int32)}, "q_proj.weight_scale_inv is I32"),
        ({Q_PROJ + "_scale": torch.ones(1)}, "holds both .*_scale_inv and .*_scale; remove the one not meant"),
        ({EXPERT: torch.ones(144, 160)}, f"{EXPERT} is stored as F32, and config.json says that matrices are in fp8"),
        ({EXPERT.replace("weight", "qweight"): torch.ones(1)}, "these weights are quantised"),
    ],
)
def test_matrices_without_the_scales_that_they_need_are_refused_by_name(tmp_path, changes, complaint):
    save_in_float8(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name: one for name, one in (tensors | changes).items() if one is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=complaint):
        check_weights(tmp_path, load_config(tmp_path)[0])


@pytest.mark.parametrize(
    ("how", "family", "changes"),
    [
        ("blocks", "qwen3", {"is_fused": True}),
        ("blocks", "dbrx", {"ffn_config": {"ffn_hidden_size": 144, "moe_num_experts": 7, "moe_top_k": 3}}),
        ("rows", "dbrx", {}),
    ],
)
def test_scales_of_more_than_one_matrix_are_refused(tmp_path, how, family, changes):
    save_in_float8(tmp_path, how, family=family, **changes)
    with pytest.raises(
        CheckpointError, match="has numbers that are of more than one expert's matrix, or of its columns"
    ):
        check_weights(tmp_path, load_config(tmp_path)[0])


@pytest.mark.parametrize("where", ["matrix", "scales"])
def test_what_is_no_number_is_refused(tmp_path, where):
    save_in_float8(tmp_path)
    source = Checkpoint(tmp_path, stored_as="fp8")
    assert isinstance(source.read_matrix(EXPERT, (144, 160)), Quantized)
    tensors = load_file(tmp_path / "model.safetensors")
    damaged = EXPERT if where == "matrix" else EXPERT + "_scale_inv"
    bits = tensors[damaged].view(torch.uint8)
    bits[0, :4] = 0x7F if where == "matrix" else torch.tensor([0, 0, 0xC0, 0x7F], dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="or its scales hold what is no number"):
        Checkpoint(tmp_path, stored_as="fp8").read_matrix(EXPERT, (144, 160))
