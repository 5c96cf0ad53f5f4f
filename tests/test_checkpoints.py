"""Layouts of model directories: each loads what transformers loads, or is refused in a sentence at once."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from msi.errors import CheckpointError, ConfigError
from msi.instance.instance import check_files
from msi.models.attention_weights import load_attention_weights
from msi.models.checkpoint import Checkpoint
from msi.models.expert_weights import load_expert_bank
from msi.models.families import load_config
from msi.models.required import check_weights, required_tensors
from msi.models.tensor_index import TensorIndex
from msi.options import InstanceOptions
from tests.reference import FAMILIES, load_reference, save_tiny
from tests.test_models import PlainDevice, edit, logits_of

PROMPT = (5, 17, 101, 33, 2, 64, 9)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A checkpoint in one file, and the same in shards."""
    whole, sharded = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("sharded")
    save_tiny(whole)
    save_tiny(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    return whole, sharded


@pytest.fixture
def whole(tiny, tmp_path):
    return shutil.copytree(tiny[0], tmp_path / "model")


@pytest.fixture
def sharded(tiny, tmp_path):
    return shutil.copytree(tiny[1], tmp_path / "model")


def rewrite(path, change, metadata=None):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def scaled(factor, *names):
    def change(tensors):
        for name in names or tensors:
            tensors[name] = tensors[name] * factor

    return change


def edit_index(path, change):
    values = json.loads((path / INDEX).read_text())
    change(values)
    (path / INDEX).write_text(json.dumps(values))


def shards(path):
    return sorted(path.glob("model-*.safetensors"))


def assert_equals_transformers(path):
    check_files(InstanceOptions.of(model=path))
    with torch.inference_mode():
        expected = load_reference(path)(torch.tensor([PROMPT])).logits[0, -1]
    torch.testing.assert_close(logits_of(path, PROMPT, torch.float32), expected, rtol=1e-4, atol=1e-4)


def refusal_of(path):
    """What the launcher says; the workers say the same."""
    with pytest.raises(ConfigError) as refusal:
        check_files(InstanceOptions.of(model=path))
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert len(sentence) < 300 + 2 * len(str(path))
    return sentence.replace(f"{path}/", "")


# -- loaded as transformers does ---------------------------------------------------------------------------------------


def add_an_extra_file(path):
    save_file(
        {name: -tensor for name, tensor in load_file(path / "model.safetensors").items()}, path / "zzz.safetensors"
    )


def put_a_new_whole_file_beside_shards(path):
    tensors = {name: tensor for shard in shards(path) for name, tensor in load_file(shard).items()}
    save_file({name: tensor * 1.25 for name, tensor in tensors.items()}, path / "model.safetensors", {"format": "pt"})


def store_another_head(path):
    edit(path, tie_word_embeddings=True)  # both tables stay in the file, and differ


def store_the_same_head_twice(path):
    edit(path, tie_word_embeddings=True)
    rewrite(path / "model.safetensors", lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()}))


def store_the_head_only(path):
    edit(path, tie_word_embeddings=True)
    rewrite(path / "model.safetensors", lambda tensors: tensors.pop(EMBED))


def store_the_embedding_only(path):
    edit(path, tie_word_embeddings=True)
    rewrite(path / "model.safetensors", lambda tensors: tensors.pop(HEAD))


def store_unneeded_tensors(path):
    rewrite(
        path / "model.safetensors",
        lambda tensors: tensors.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
                "model.layers.9.self_attn.q_proj.weight": torch.ones(3),
                "step": torch.tensor(7),
                "nothing": torch.zeros(0, 5),
                "mask": torch.ones(4, dtype=torch.bool),
            }
        ),
    )


def store_some_as(dtype):
    def change(path):
        rewrite(
            path / "model.safetensors",
            lambda tensors: tensors.update(
                {name: tensor.to(dtype) for name, tensor in tensors.items() if "layers.1" in name or name == EMBED}
            ),
        )

    return change


def link_as_the_hub_cache_does(path):
    blobs = path.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path.iterdir())):
        file.rename(blobs / f"{number:064x}")
        file.symlink_to(f"../blobs/{number:064x}")


def name_a_tensor_that_its_file_lacks(path):
    edit_index(path, lambda index: index["weight_map"].update({"gone": shards(path)[0].name}))


def name_the_wrong_file(path):
    edit_index(path, lambda index: index["weight_map"].update({EMBED: shards(path)[-1].name}))


def leave_a_tensor_out_of_the_index(path):
    edit_index(path, lambda index: index["weight_map"].pop(EMBED))


def put_shards_into_a_folder(path):
    (path / "weights").mkdir()
    for shard in shards(path):
        shard.rename(path / "weights" / shard.name)
    edit_index(path, lambda index: index.update(weight_map={k: f"weights/{v}" for k, v in index["weight_map"].items()}))


def add_a_stale_shard(path):
    shutil.copy(shards(path)[0], path / "model-00099-of-00099.safetensors")


def add_other_formats(path):
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04 a pickle")
    (path / "model.gguf").write_bytes(b"GGUF")
    (path / "consolidated.safetensors").write_bytes(b"no")
    (path / "model.fp16.safetensors").write_bytes(b"no")
    (path / "original").mkdir()
    (path / "original" / "params.json").write_text("{}")


def repeat_a_key_of_the_index(path):
    text = (path / INDEX).read_text()
    entry = f'"weight_map": {{ "{EMBED}": "{shards(path)[0].name}", '
    (path / INDEX).write_text(text.replace('"weight_map": {', entry))


@pytest.mark.parametrize(
    "change",
    [
        add_an_extra_file, store_another_head, store_the_same_head_twice, store_the_head_only,
        store_the_embedding_only, store_unneeded_tensors, store_some_as(torch.bfloat16), store_some_as(torch.float16),
        store_some_as(torch.float64), link_as_the_hub_cache_does, add_other_formats,
    ],
    ids=lambda change: change.__qualname__.split(".")[0],
)  # fmt: skip
def test_a_checkpoint_in_one_file_is_what_transformers_loads(whole, change):
    change(whole)
    assert_equals_transformers(whole)


@pytest.mark.parametrize(
    "change",
    [
        put_a_new_whole_file_beside_shards, link_as_the_hub_cache_does, name_a_tensor_that_its_file_lacks,
        name_the_wrong_file, leave_a_tensor_out_of_the_index, put_shards_into_a_folder, add_a_stale_shard,
        add_other_formats, repeat_a_key_of_the_index,
    ],
    ids=lambda change: change.__qualname__,
)  # fmt: skip
def test_a_checkpoint_in_shards_is_what_transformers_loads(sharded, change):
    change(sharded)
    assert_equals_transformers(sharded)


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_what_is_checked_beforehand_is_what_the_loaders_read(tmp_path, family, is_fused, tie_word_embeddings):
    changes = {} if family == "dbrx" else {"tie_word_embeddings": tie_word_embeddings}
    if family in ("qwen3", "olmoe"):
        changes["attention_bias"] = True
    save_tiny(tmp_path, family=family, is_fused=is_fused, **changes)
    config, _ = load_config(tmp_path)
    source, read = Checkpoint(tmp_path), {}
    original = source.read
    source.read = lambda name, shape, rows=None: (read.update({name: shape}), original(name, shape, rows))[1]
    load_attention_weights(config, source, PlainDevice(), torch.float32)
    load_expert_bank(config, [tuple(range(config.num_experts))], source, PlainDevice().kernels, torch.float32)
    assert dict(required_tensors(config, TensorIndex(tmp_path))) == read
    assert set(read) == set(source.index.tensors), "and all there is"


# -- refused by name ---------------------------------------------------------------------------------------------------


def only(path, name, content=b"x"):
    """Nothing but a config.json and this file."""
    for file in path.iterdir():
        if file.name != "config.json":
            file.unlink()
    if name:
        (path / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "holds no safetensors weights; `load_format=dummy` invents some"),
        ("pytorch_model.bin", "pytorch_model.bin is pickled, which may run anything when it is opened, so it never is"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin.index.json is pickled"),
        ("weights.pt", "weights.pt is pickled"),
        ("adapter_model.safetensors", "is an adapter to another model, which is not supported; merge it first"),
        ("model.Q4_K_M.gguf", "model.Q4_K_M.gguf: GGUF is not supported; give the directory of the safetensors"),
        ("consolidated.00.pth", "consolidated.00.pth is in its maker's own format, which is not supported"),
        ("consolidated.safetensors", "consolidated.safetensors is in its maker's own format"),
        ("model-00001-of-00002.safetensors", "no model.safetensors.index.json; download that too"),
        ("model.fp16.safetensors", "model.fp16.safetensors is not looked for, as in transformers; name it model.safet"),
        ("model.safetensors.index.fp16.json", "holds no safetensors weights"),
        ("other.safetensors.index.json", "other.safetensors.index.json is not looked for"),
        ("tf_model.h5", "holds no safetensors weights"),
    ],
)  # fmt: skip
def test_directories_without_weights_that_are_served_say_what_to_do(whole, name, complaint):
    only(whole, name)
    assert complaint in refusal_of(whole)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ([], "holds no config.json; give a Hugging Face model directory"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter_config.json is an adapter to another model"),
        (["mixtral.Q8_0.gguf"], "mixtral.Q8_0.gguf: GGUF is not supported"),
        (["params.json", "consolidated.00.pth", "tokenizer.model"], "is in its maker's own format"),
        (["snapshots/0123abcd/config.json", "refs/main"], "did you mean "),
    ],
)
def test_directories_that_hold_something_else_than_a_model_say_what(tmp_path, names, complaint):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert complaint in refusal_of(tmp_path)


def test_what_is_no_directory_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    for name, complaint in {
        "mistralai/Mixtral-8x7B-v0.1": "hf download mistralai/Mixtral-8x7B-v0.1 --local-dir DIR",
        "nowhere": "nowhere is not a directory; give a Hugging Face model directory",
        "nowhere/at/all": "is not a directory",
        "model.gguf": "GGUF is not supported",
        "weights.safetensors": "is a file, not a directory; give a Hugging Face model directory",
        "fifo": "is a file, not a directory",
        "dangling": "is a link to what does not exist",
        "loop": "is a link to what does not exist",
    }.items():
        with pytest.raises(ConfigError) as refusal:
            check_files(InstanceOptions.of(model=type(tmp_path)(name)))
        assert complaint in str(refusal.value)
    with pytest.raises(ConfigError, match="is not a directory"):
        load_config(type(tmp_path)("nul\0byte"))


def quantise(**tensors):
    return lambda path: rewrite(path / "model.safetensors", lambda known: known.update(tensors))


def store_as(name, tensor):
    return quantise(**{name: tensor})


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (store_as(Q_PROJ, torch.zeros(64, 32, dtype=torch.float8_e4m3fn)), f"{Q_PROJ} is stored as F8_E4M3, which is"),
        (store_as(Q_PROJ, torch.zeros(64, 32, dtype=torch.float8_e5m2)), "is stored as F8_E5M2"),
        (store_as(Q_PROJ, torch.zeros(64, 32, dtype=torch.int8)), "is stored as I8"),
        (store_as(Q_PROJ, torch.zeros(64, 32, dtype=torch.uint8)), "is stored as U8"),
        (store_as(Q_PROJ, torch.zeros(64, 32, dtype=torch.bool)), "is stored as BOOL"),
        (store_as(Q_PROJ, torch.zeros(64, 32, dtype=torch.int64)), "is stored as I64"),
        (store_as(Q_PROJ, torch.zeros(64, 32, dtype=torch.complex64)), "is stored as C64"),
        (store_as(Q_PROJ, torch.zeros(64, 16, dtype=torch.uint8)), f"{Q_PROJ} is [64, 16]; expected [64, 32]"),
        (store_as(Q_PROJ + "_scale_inv", torch.ones(1, 1)), "q_proj.weight_scale_inv': these weights are quantised"),
        (store_as("model.layers.0.self_attn.q_proj.qweight", torch.ones(4, 4, dtype=torch.int32)), "are quantised"),
        (store_as("model.layers.0.self_attn.q_proj.weight_packed", torch.ones(4, 4)), "are quantised"),
        (store_as("model.layers.0.mlp.experts.gate_up_proj_scales", torch.ones(4, 4)), "are quantised"),
        (store_as("model.layers.0.self_attn.q_proj.SCB", torch.ones(4)), "are quantised"),
        (lambda path: edit(path, quantization_config={"quant_method": "gptq"}), "quantization_config is set ('gptq')"),
        (
            lambda path: edit(path, quantization_config={}),
            "quantization_config is set; of quantised checkpoints those in fp8",
        ),
        (
            lambda path: edit(path, quantization_config=[[]]),
            "quantization_config is set; of quantised checkpoints those in fp8",
        ),
        (lambda path: edit(path, compression_config={"format": "x"}), "compression_config is set"),
        (lambda path: edit(path, transformers_weights="a.safetensors"), "transformers_weights is 'a.safetensors'"),
        (lambda path: (path / "adapter_config.json").write_text("{}"), "adapter_config.json is an adapter"),
        (
            store_as("model.layers.0.mlp.experts.gate_up_proj", torch.ones(7, 96, 32)),
            "holds both model.layers.0.mlp.experts.gate_up_proj and model.layers.0.block_sparse_moe.experts.0.w1.weig",
        ),
        (store_as("model.layers.0.mlp.gate.weight", torch.ones(7, 32)), "holds both model.layers.0.block_sparse_moe.g"),
        (lambda path: edit(path, num_local_experts=6), "model.layers.0.block_sparse_moe.gate.weight is [7, 32]; expe"),
        (
            store_as("model.layers.2.block_sparse_moe.experts.7.w1.weight", torch.ones(48, 32)),
            "holds model.layers.2.block_sparse_moe.experts.7.w1.weight, but config.json names 7 experts",
        ),
    ],
)
def test_what_would_be_guessed_is_refused_by_name(whole, change, complaint):
    change(whole)
    assert complaint in refusal_of(whole)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda index, path: index["weight_map"].update(a="../x.safetensors"), "'../x.safetensors', outside the mode"),
        (lambda index, path: index["weight_map"].update(a="b/../x.safetensors"), "outside the model's directory"),
        (lambda index, path: index["weight_map"].update(a="/etc/x.safetensors"), "outside the model's directory"),
        (lambda index, path: index["weight_map"].update(a="nul\0.safetensors"), "outside the model's directory"),
        (lambda index, path: index["weight_map"].update(a="x.safetensors"), "x.safetensors does not exist"),
        (lambda index, path: index["weight_map"].update(a="x.bin"), "'a' is in 'x.bin'; it must be a safetensors fil"),
        (lambda index, path: index["weight_map"].update(a=7), "'a' is in 7; it must be a safetensors file"),
        (lambda index, path: index["weight_map"].update(a=["x"]), "'a' is in ['x']; it must be a safetensors file"),
        (lambda index, path: index["weight_map"].update(a=None), "'a' is in None"),
        (lambda index, path: index["weight_map"].update(a=""), "'a' is in ''"),
        (lambda index, path: index.update(weight_map={}), "has no weight_map, or an empty one"),
        (lambda index, path: index.update(weight_map=[]), "has no weight_map"),
        (lambda index, path: index.pop("weight_map"), "has no weight_map"),
        (lambda index, path: shards(path)[1].unlink(), "does not exist"),
        (
            lambda index, path: rewrite(shards(path)[0], lambda known: known.update(load_file(shards(path)[1]))),
            "is in two files, model-0000",
        ),
        (lambda index, path: (shards(path)[0].unlink(), os.mkfifo(path / index["weight_map"][EMBED])), "is a FIFO"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused_by_name(sharded, change, complaint):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][EMBED] = shards(sharded)[0].name
    change(index, sharded)
    (sharded / INDEX).write_text(json.dumps(index))
    assert complaint in refusal_of(sharded)


# -- headers that lie --------------------------------------------------------------------------------------------------


def header_of(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path, header, body, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda entry: entry.update(data_offsets=[0, 1 << 62]), "but takes 4611686018427387904 bytes"),
        (lambda entry: entry.update(data_offsets=[-4, 0]), "has data_offsets [-4, 0]; they must be where it begins"),
        (lambda entry: entry.update(data_offsets=[128, 0]), "has data_offsets [128, 0]"),
        (lambda entry: entry.update(data_offsets=[0.0, 128.0]), "has data_offsets [0.0, 128.0]"),
        (lambda entry: entry.update(data_offsets=[0, 1, 2]), "has data_offsets [0, 1, 2]"),
        (lambda entry: entry.update(data_offsets="all"), "has data_offsets 'all'"),
        (lambda entry: entry.pop("data_offsets"), "has data_offsets None"),
        (lambda entry: entry.update(data_offsets=[at - 4 for at in entry["data_offsets"]]), "begins at byte "),
        (lambda entry: entry.update(data_offsets=[0, 128]), "begins at byte "),
        (lambda entry: entry.update(shape=[1 << 60, 1 << 60]), "is F32 of shape [1152921504606846976, 115292150460"),
        (lambda entry: entry.update(shape=[-32]), "has shape [-32]; it must be a list of sizes"),
        (lambda entry: entry.update(shape=[True] * 32), "has shape [True, "),
        (lambda entry: entry.update(shape=[10**400]), "has shape [1000"),
        (lambda entry: entry.update(shape=None), "has shape None"),
        (lambda entry: entry.update(shape=[31]), "is F32 of shape [31], but takes 128 bytes"),
        (lambda entry: entry.update(shape=[0]), "is F32 of shape [0], but takes 128 bytes"),
        (lambda entry: entry.update(shape=[4, 8]), "model.norm.weight is [4, 8]; expected [32]"),
        (lambda entry: entry.update(dtype="F31"), "has dtype 'F31', which safetensors does not know"),
        (lambda entry: entry.update(dtype=["F32"]), "has dtype ['F32']"),
        (lambda entry: entry.update(dtype="I32"), "model.norm.weight is stored as I32"),
        (lambda entry: entry.update(dtype="BF16", shape=[64]), "model.norm.weight is [64]; expected [32]"),
    ],
)
def test_a_header_that_lies_about_a_tensor_is_refused_by_name(whole, change, complaint):
    path = whole / "model.safetensors"
    header, body = header_of(path)
    change(header["model.norm.weight"])
    write_header(path, header, body)
    sentence = refusal_of(whole)
    assert complaint in sentence
    assert "model.safetensors" in sentence


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        (lambda path, header, body: path.write_bytes(b""), "is truncated or not safetensors: 0 bytes"),
        (lambda path, header, body: path.write_bytes(b"\x80\x04"), "is truncated or not safetensors"),
        (lambda path, header, body: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "is truncated"),
        (lambda path, header, body: path.write_bytes(path.read_bytes()[:-1]), "is truncated: 'model.norm.weight' en"),
        (lambda path, header, body: path.write_bytes(path.read_bytes() + b"x"), "has 1 bytes after its last tensor"),
        (lambda path, header, body: write_header(path, header, body, 1 << 63), "a header of 9223372036854775808"),
        (lambda path, header, body: write_header(path, header, body, 9), "its header is not valid JSON"),
        (lambda path, header, body: write_header(path, b"[]", body), "its header is not a JSON object"),
        (lambda path, header, body: write_header(path, b'{"a":' * 9999, body), "is nested deeper than"),
        (lambda path, header, body: write_header(path, {**header, "a": 7}, body), "'a' is 7 in the header; it must b"),
        (lambda path, header, body: write_header(path, {**header, "__metadata__": 7}, body), "__metadata__ is"),
        (lambda path, header, body: write_header(path, {"__metadata__": {"a": 1}}, body), "__metadata__ is {'a': 1}"),
        (lambda path, header, body: write_header(path, {}, b""), "has no tensor model.embed_tokens.weight"),
        (lambda path, header, body: (path.unlink(), os.mkfifo(path)), "is a FIFO; it must be a regular file"),
        (lambda path, header, body: (path.unlink(), path.mkdir()), "is a directory; it must be a regular file"),
        (lambda path, header, body: (path.unlink(), path.symlink_to("/dev/zero")), "is a device; it must be a regul"),
        (lambda path, header, body: (path.unlink(), path.symlink_to(path.name)), "Too many levels of symbolic links"),
        (lambda path, header, body: (path.unlink(), path.symlink_to("gone")), "is a link to gone, which does not exi"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_safetensors_is_refused_by_name(whole, write, complaint):
    path = whole / "model.safetensors"
    write(path, *header_of(path))
    sentence = refusal_of(whole)
    assert complaint in sentence
    assert "model.safetensors" in sentence or path.name not in os.listdir(whole) or complaint.startswith("has no")


def test_an_empty_tensor_is_no_weight(whole):
    rewrite(whole / "model.safetensors", lambda tensors: tensors.update({"model.norm.weight": torch.ones(0)}))
    assert "model.norm.weight is [0]; expected [32]" in refusal_of(whole)


def test_workers_refuse_what_the_launcher_would(whole):
    """As on hosts of a cluster, where each has a directory of its own."""
    from msi.worker.loading import ModelFiles

    store_as(Q_PROJ, torch.zeros(64, 32, dtype=torch.float8_e4m3fn))(whole)
    config, _ = load_config(whole)
    for refuse in (ModelFiles(whole).fingerprint, lambda: check_weights(whole, config)):
        with pytest.raises(CheckpointError, match="is stored as F8_E4M3"):
            refuse()
