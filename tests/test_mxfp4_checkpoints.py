"""gpt-oss as it is shipped, its experts in MXFP4: the same tokens as transformers on the unpacked matrices."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from msi.errors import CheckpointError, ConfigError
from msi.kernels.mxfp4 import unpacked
from msi.models.families import load_config, parse_config
from msi.models.required import check_weights
from msi.worker.loading import ModelFiles
from tests.installed import transformers
from tests.reference import load_reference, references, save_tiny
from tests.test_families import tokens_of, values_of
from tests.test_models import PlainDevice, assignment, edit

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
WEIGHTS = "model.safetensors"
BLOCKS, SCALES = "model.layers.1.mlp.experts.down_proj_blocks", "model.layers.1.mlp.experts.down_proj_scales"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A checkpoint in MXFP4, and the model that transformers' own unpacking makes of it, in float32."""
    packed, plain = tmp_path_factory.mktemp("packed"), tmp_path_factory.mktemp("plain")
    save_tiny(plain, family="gpt_oss", intermediate_size=64)
    shutil.copytree(plain, packed, dirs_exist_ok=True)
    unpack = transformers("transformers.integrations.mxfp4").convert_moe_packed_tensors
    tensors, generator = load_file(plain / WEIGHTS), torch.Generator().manual_seed(0)
    of_packed = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            of_packed[name] = tensor
            continue
        num_experts, depth, rows = tensor.shape
        shape = (num_experts, rows, depth // 32)
        of_packed[name + "_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        of_packed[name + "_scales"] = torch.randint(123, 127, shape, generator=generator).to(torch.uint8)
        matrices = unpack(of_packed[name + "_blocks"], of_packed[name + "_scales"], dtype=torch.float32)
        assert matrices.shape == tensor.shape
        tensors[name] = matrices.contiguous()
        ours = torch.stack(
            [unpacked(*one) for one in zip(of_packed[name + "_blocks"], of_packed[name + "_scales"], strict=True)]
        )
        assert torch.equal(ours.transpose(1, 2), matrices)
    save_file(tensors, plain / WEIGHTS, metadata={"format": "pt"})
    save_file(of_packed, packed / WEIGHTS, metadata={"format": "pt"})
    edit(packed, quantization_config=MXFP4)
    return packed, references(load_reference(plain), [1, 17, 40], 10)


def test_a_number_is_what_the_format_says():
    blocks = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, dtype=torch.uint8).view(1, 1, 16)
    half = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    once = [*half, *(-value for value in half)]
    for scale, factor in ((127, 1.0), (128, 2.0), (0, 2.0**-127), (120, 2.0**-7)):
        found = unpacked(blocks, torch.tensor([[scale]], dtype=torch.uint8))
        assert found.tolist() == [[value * factor for value in once * 2]]
        assert torch.equal(found.to(torch.bfloat16).float(), found), "nothing is lost in bfloat16"


async def test_tokens_equal_transformers_on_what_is_unpacked(shipped):
    path, expected = shipped
    assert await tokens_of(path, [one.prompt for one in expected]) == [one.tokens for one in expected]


def test_workers_read_the_packed_bytes_of_their_own_experts_alone(shipped):
    files = ModelFiles(shipped[0])
    packed = {name: tensor.nbytes for name, tensor in load_file(shipped[0] / WEIGHTS).items() if ".experts." in name}
    files.load(assignment("expert", 1, 3), PlainDevice())
    assert files.loaded_bytes == files.total_bytes == sum(packed.values()) * 2 // 7


def test_it_is_said_and_bfloat16_where_no_dtype_is_named(shipped, tmp_path):
    path = shutil.copytree(shipped[0], tmp_path / "model")
    config, _ = load_config(path)
    assert (config.stored_as, config.has_mxfp4_experts, config.dtype) == ("none", True, "float32")
    (remark,) = config.remarks
    assert remark.endswith("experts in mxfp4 are unpacked to `dtype` as they are loaded, and take the room of that")
    edit(path, dtype=None)
    assert load_config(path)[0].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("family", "changes", "complaint"),
    [
        (
            "qwen3",
            {},
            "quant_method is 'mxfp4', which is supported for GptOssForCausalLM alone; give Qwen3MoeForCausal",
        ),
        ("gpt_oss", {}, "intermediate_size is 24; of experts in mxfp4 it must be a multiple of 32"),
        ("gpt_oss", {"hidden_size": 48}, "hidden_size is 48; of experts in mxfp4 it must be a multiple of 32"),
    ],
)
def test_what_is_not_packed_so_is_refused_by_name(family, changes, complaint):
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        parse_config({**values_of(family), **changes, "quantization_config": MXFP4}, "config.json")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop(SCALES), f"no tensor {SCALES}; expected one of shape [7, 32, 2]"),
        (lambda t: t.update({BLOCKS: t[BLOCKS].flatten(2)}), f"{BLOCKS} is [7, 32, 32]; expected [7, 32, 2, 16]"),
        (lambda t: t.update({BLOCKS: t[BLOCKS].float()}), f"{BLOCKS} is stored as F32, which is not supported; suppor"),
    ],
)
def test_packed_tensors_that_are_missing_or_misshapen_are_named(shipped, tmp_path, change, complaint):
    path = shutil.copytree(shipped[0], tmp_path / "model")
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)
    with pytest.raises(CheckpointError, match=re.escape(complaint)):
        check_weights(path, load_config(path)[0])


def test_a_scale_that_is_no_number_is_refused_and_packed_tensors_without_a_word_too(shipped, tmp_path):
    path = shutil.copytree(shipped[0], tmp_path / "model")
    tensors = load_file(path / WEIGHTS)
    tensors[SCALES][3, 0, 0] = 255
    save_file(tensors, path / WEIGHTS)
    with pytest.raises(CheckpointError, match=re.escape(f"{SCALES} holds what is no number; download it again")):
        ModelFiles(path).load(assignment("expert", 1, 3), PlainDevice())
    edit(path, quantization_config=None)
    with pytest.raises(CheckpointError, match="these weights are quantised, which is not supported"):
        check_weights(path, load_config(path)[0])
