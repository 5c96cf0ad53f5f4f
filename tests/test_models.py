"""Reading models: configurations, checkpoints, and that each worker opens only what is its own."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from msi import Engine, SamplingParams
from msi.attention.forward import Forward
from msi.attention.kv_cache import KvCache
from msi.attention.pass_inputs import PassInputs
from msi.control.messages import Assignment
from msi.errors import CheckpointError, ConfigError
from msi.kernels import BLOCK_TOKENS
from msi.kernels.cpu import CpuKernels
from msi.kernels.kernels import Outboxes
from msi.kernels.plain import PlainKernels
from msi.kernels.routing import PackedRows, RowDtypes, answer_row_bytes, hidden_rows, row_bytes
from msi.models.attention_weights import load_attention_weights
from msi.models.checkpoint import Checkpoint
from msi.models.expert_weights import load_expert_bank
from msi.models.families import load_config, parse_config
from msi.placement import place_evenly
from msi.precision import Precision
from msi.settings import LinkShape, SchedulerLimits, Timeouts
from msi.types import MicroBatch, Place, TokenSampling
from msi.worker.loading import ModelFiles
from tests.everyday import mostly_slow
from tests.reference import FAMILIES, VOCAB_SIZE, greedy, load_reference, references, save_tiny, tiny_config


class PlainDevice:
    """Weights as they are, nothing queued."""

    def __init__(self, kernels=None):
        self.kernels = kernels or PlainKernels(torch.device("cpu"))

    def zeros(self, shape, dtype):
        return torch.zeros(shape, dtype=dtype)

    def upload(self, tensor):
        return tensor

    def free_memory_bytes(self):
        return self.free_bytes

    free_bytes = 1 << 60


def edit(path, **changes):
    config = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key) if value is ... else config.__setitem__(key, value)
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture
def checkpoint(tmp_path):
    save_tiny(tmp_path)
    return tmp_path


# -- configurations ----------------------------------------------------------------------------------------------------


def test_transformers_4_and_5_write_the_same_model(checkpoint):
    newer, _ = load_config(checkpoint)
    values = json.loads((checkpoint / "config.json").read_text())
    older = {key: value for key, value in values.items() if key not in ("rope_parameters", "dtype")}
    older |= {"rope_theta": 1e4, "torch_dtype": "float32"}
    assert parse_config(older, "config.json") == newer
    assert (newer.rope.theta, newer.dtype, newer.head_dim, newer.eos_token_ids) == (1e4, "float32", 16, (2,))


def test_generation_config_names_the_end_of_sequence_tokens(checkpoint):
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_config(checkpoint)[0].eos_token_ids == (2, 7)
    says = {"eos_token": "<end>", "added_tokens_decoder": {"5": {"content": "<end>"}}}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(says))
    assert load_config(checkpoint)[0].eos_token_ids == (2, 7, 5), "the tokenizer's, too, as in vLLM"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            "'LlamaForCausalLM' is not supported; supported: MixtralForCausalLM, Q",
        ),
        ({"architectures": ..., "model_type": ...}, "names no architecture"),
        ({"model_type": "qwen2_moe"}, "model_type is .qwen2_moe., but MixtralForCausalLM is .mixtral."),
        ({"hidden_size": "large"}, "hidden_size is 'large'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"num_experts_per_tok": 9}, "9 of 7 experts"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic' is not supported; supported: ",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn rope: factor is None"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "both rope_parameters and rope_scaling"),
        ({"dtype": "float8"}, "dtype 'float8' is not supported"),
        ({"vocab_size": ...}, "vocab_size is None"),
        ({"attention_bias": True}, "attention_bias is True; supported: False"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused_by_name(checkpoint, changes, complaint):
    edit(checkpoint, **changes)
    with pytest.raises(ConfigError, match=complaint):
        load_config(checkpoint)


def test_directories_that_hold_no_model(tmp_path):
    with pytest.raises(ConfigError, match="not a directory"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must be a JSON object"):
        load_config(tmp_path)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def load_everything(path):
    config, _ = load_config(path)
    source = Checkpoint(path)
    attention = load_attention_weights(config, source, PlainDevice(), torch.float32)
    kernels = PlainKernels(torch.device("cpu"))
    experts = load_expert_bank(config, [tuple(range(config.num_experts))], source, kernels, torch.float32)
    return attention, experts


def rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"), r"no tensor model\.layers\.1\.self_attn\.q_proj"),
        (lambda t: t.pop("model.layers.2.block_sparse_moe.experts.6.w3.weight"), r"experts\.6\.w3.*\[48, 32\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"model\.norm\.weight is \[31\]; expected \[32\]"),
        (lambda t: t.update({"lm_head.weight": torch.ones(5, 32)}), r"lm_head\.weight is \[5, 32\]; expected \[199"),
    ],
)  # fmt: skip
def test_a_missing_or_misshapen_tensor_is_named(checkpoint, change, complaint):
    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError, match=complaint):
        load_everything(checkpoint)


def test_a_truncated_file_is_named(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load_everything(checkpoint)


def test_no_weights_at_all(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors weights; `load_format=dummy`"):
        load_everything(checkpoint)


def test_a_missing_shard_is_named(tmp_path):
    save_tiny(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name} does not exist"):
        load_everything(tmp_path)


def assignment(role, index, num_expert, **changes) -> Assignment:
    values = {
        "instance": "i", "worker_id": "w", "role": role, "place": Place(index), "incarnation": 0,
        "placement": place_evenly(7, num_expert), "num_seats": 2, "is_colocated": False, "memory_share": 1.0,
        "limits": SchedulerLimits(64, 4, 16), "link": LinkShape(1, 16), "timeouts": Timeouts(),
        "precision": Precision.of("float32"),
    }  # fmt: skip
    return Assignment(**{**values, **changes})


@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
def test_each_worker_reads_only_the_tensors_of_its_role_and_placement(tmp_path, max_shard_size):
    save_tiny(tmp_path, max_shard_size=max_shard_size)
    tensors = {}
    for file in tmp_path.glob("*.safetensors"):
        tensors |= load_file(file)
    sizes = {name: tensor.numel() * 4 for name, tensor in tensors.items()}
    expert_bytes = 3 * 3 * 48 * 32 * 4  # layers, matrices
    files = ModelFiles(tmp_path)
    for index, count in enumerate([3, 2, 2]):
        files.load(assignment("expert", index, 3), PlainDevice())
        assert files.loaded_bytes == files.total_bytes == count * expert_bytes
    files.load(assignment("attention", 0, 3), PlainDevice())
    rest = sum(size for name, size in sizes.items() if ".experts." not in name)
    assert files.loaded_bytes == files.total_bytes == rest
    files.load(assignment("attention", 0, 1, is_colocated=True), PlainDevice())
    assert files.loaded_bytes == sum(sizes.values())


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "olmoe", "dbrx", "glm4", "gpt_oss"])
def test_workers_of_every_family_read_only_what_is_theirs(tmp_path, family, is_fused):
    save_tiny(tmp_path, family=family, is_fused=is_fused, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    has_all = is_fused or family in ("dbrx", "gpt_oss")  # which know no other layout
    assert any("experts.gate_up_proj" in name or ".w1" in name for name in tensors) == has_all
    expert_bytes = sum(2 * tensor.numel() for name, tensor in tensors.items() if ".experts." in name) // 7
    rest = sum(2 * tensor.numel() for name, tensor in tensors.items() if ".experts." not in name)
    files = ModelFiles(tmp_path)
    for index, count in enumerate([3, 2, 2]):
        files.load(assignment("expert", index, 3), PlainDevice())
        assert files.loaded_bytes == files.total_bytes == count * expert_bytes
    files.load(assignment("attention", 0, 3), PlainDevice())
    assert files.loaded_bytes == files.total_bytes == rest


def test_the_fused_expert_layout_gives_the_same_weights(checkpoint, tmp_path_factory):
    fused_path = tmp_path_factory.mktemp("fused")
    shutil.copytree(checkpoint, fused_path, dirs_exist_ok=True)

    def fuse(tensors):
        for layer in range(3):
            old = f"model.layers.{layer}.block_sparse_moe"
            gate_up, down = [], []
            for expert in range(7):
                w1, w2, w3 = (tensors.pop(f"{old}.experts.{expert}.w{number}.weight") for number in (1, 2, 3))
                gate_up.append(torch.cat([w1, w3]))
                down.append(w2)
            tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
            tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(down)
            tensors[f"model.layers.{layer}.mlp.gate.weight"] = tensors.pop(f"{old}.gate.weight")

    rewrite(fused_path, fuse)
    _, classic = load_everything(checkpoint)
    _, fused = load_everything(fused_path)
    assert torch.equal(classic.gate_up, fused.gate_up)
    assert torch.equal(classic.down, fused.down)
    files = ModelFiles(fused_path)
    files.load(assignment("expert", 1, 3), PlainDevice())
    assert files.loaded_bytes == 2 * 3 * 3 * 48 * 32 * 4, "of a fused tensor only the rows of its own experts"


# -- what they compute -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    mostly_slow(
        [
            {"sliding_window": 24},
            {"tie_word_embeddings": True},
            {"num_key_value_heads": 4, "head_dim": 8},
            {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 3},
            {"max_shard_size": "40KB", "num_experts_per_tok": 1},
        ]
    ),
    ids=lambda changes: ",".join(changes),
)
async def test_variants_of_the_family_equal_transformers(tmp_path, changes):
    model = save_tiny(tmp_path, seed=3, **changes)
    expected = references(model, [1, 30, 70], 10)
    async with Engine.local(model=tmp_path, expert_workers=2, transport="inproc", slot_rows=40) as engine:
        for one in expected:
            params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
            tokens = [token async for output in engine.generate(one.prompt, params) for token in output.token_ids]
            assert tuple(tokens) == one.tokens


async def test_dummy_weights_need_nothing_but_the_configuration(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    edit(tmp_path, architectures=["MixtralForCausalLM"])
    options = {"model": tmp_path, "load_format": "dummy", "transport": "inproc", "expert_workers": 2}
    results = []
    for _ in range(2):
        async with Engine.local(**options) as engine:
            params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
            results.append([t async for output in engine.generate([3, 4, 5], params) for t in output.token_ids])
    assert len(results[0]) == 5
    assert results[0] == results[1]


def logits_of(
    path, prompt, dtype, device=None, weights=None, quantization="none", is_everywhere=False, kv_cache=None, rows=None
):
    """float32 logits at the last position of a prompt, or at all, computed in `dtype` with one expert node; weights, KV
    cache and rows on their way in their own dtypes, where one is given."""
    config, _ = load_config(path)
    source = Checkpoint(path, stored_as=config.stored_as)
    device = device or PlainDevice()
    at = device.kernels.device
    precision = Precision(quantization=quantization)
    attention = load_attention_weights(config, source, device, weights or dtype, dtype, precision)
    bank = load_expert_bank(
        config, [tuple(range(config.num_experts))], source, device.kernels, weights or dtype, quantization=quantization
    )
    num_rows = len(prompt)
    num_blocks = 2 + num_rows // BLOCK_TOKENS
    forward = Forward(
        config, attention, KvCache(config, num_blocks, device, kv_cache or dtype), place_evenly(config.num_experts, 1),
        device,
    )  # fmt: skip
    hidden_size, k, rows = config.hidden_size, config.top_k, rows or RowDtypes.of(dtype)
    memory = torch.zeros(1, 1, num_rows, row_bytes(hidden_size, k, rows.sent), dtype=torch.uint8, device=at)
    landed = PackedRows.view(memory, hidden_size, k, rows.sent, rows.computed)
    counts = torch.zeros(1, dtype=torch.int32, device=at)
    outboxes = Outboxes([PackedRows.view(memory[0, 0], hidden_size, k, rows.sent)], counts)
    answers = torch.zeros(1, num_rows, answer_row_bytes(hidden_size, rows.answered), dtype=torch.uint8, device=at)
    answers = hidden_rows(answers, hidden_size, rows.answered)
    wanted = tuple(range(num_rows)) if is_everywhere else (num_rows - 1,)
    batch = MicroBatch(
        tuple(prompt), tuple(range(num_rows)), (num_rows,), (num_rows,), (tuple(range(1, num_blocks)),),
        wanted, (TokenSampling(0, 1, 0, 0, 0),) * len(wanted),
    )  # fmt: skip
    with torch.inference_mode():
        state = forward.begin(batch, *PassInputs(device.upload).lay_out(batch))
        for turn in range(forward.num_turns):
            forward.route_and_pack(state, turn, answers, outboxes)
            assert at.type == "meta" or counts.tolist() == [num_rows]
            bank.run(turn, 0, [(0, num_rows)], landed, {0: answers})
            if forward.has_shared:
                forward.shared_experts(state, turn)
        logits = forward.logits(state, answers)
        return logits if is_everywhere else logits[0]


class MetaDevice(PlainDevice):
    """Has shapes and no values: whoever asks it for one, or mixes its tensors with those of another device, fails."""

    def __init__(self):
        super().__init__(PlainKernels(torch.device("meta")))

    def upload(self, tensor):
        return tensor.to("meta")

    def zeros(self, shape, dtype):
        return torch.zeros(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_waits_for_a_value_or_makes_a_tensor_somewhere_else(tmp_path, family):
    save_tiny(tmp_path, family=family)
    logits = logits_of(tmp_path, range(3, 40), torch.float32, MetaDevice())
    assert (logits.device.type, logits.shape) == ("meta", (VOCAB_SIZE,))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cpus_own_kernels_compute_what_the_plain_ones_do(tmp_path, family):
    save_tiny(tmp_path, family=family)
    plain, own = (
        logits_of(tmp_path, range(3, 40), torch.float32, PlainDevice(kernels))
        for kernels in (PlainKernels(torch.device("cpu")), CpuKernels())
    )
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", mostly_slow(FAMILIES))
def test_bfloat16_weights_that_are_widened_give_the_logits_of_transformers_in_float32(tmp_path, family):
    kernels = CpuKernels(has_bf16_units=False)
    if not kernels.can_widen:
        pytest.skip("the native products cannot be compiled here")
    exact_model = save_tiny(tmp_path, family=family, dtype=torch.bfloat16)
    prompt = torch.arange(3, 40)
    with torch.inference_mode():
        exact = exact_model(prompt[None]).logits[0, -1]
    widened = logits_of(tmp_path, prompt.tolist(), torch.float32, PlainDevice(kernels), torch.bfloat16)
    torch.testing.assert_close(widened, exact, rtol=1e-4, atol=1e-4)


def test_bf16_logits_are_as_close_to_float32_as_transformers_bf16(tmp_path):
    exact_model = save_tiny(tmp_path, seed=1, dtype=torch.bfloat16)
    rounded_model = load_reference(tmp_path, torch.bfloat16)
    torch.manual_seed(0)
    ours = theirs = 0.0
    for _ in range(6):
        prompt = torch.randint(3, VOCAB_SIZE, (40,))
        with torch.inference_mode():
            exact = exact_model(prompt[None]).logits[0, -1]
            rounded = rounded_model(prompt[None]).logits[0, -1].float()
        assert (logits_of(tmp_path, prompt.tolist(), torch.float32) - exact).abs().max() < 1e-3
        ours += float((logits_of(tmp_path, prompt.tolist(), torch.bfloat16) - exact).abs().mean())
        theirs += float((rounded - exact).abs().mean())
    assert ours <= 2 * theirs


async def test_an_explicit_dtype_is_served(tmp_path):
    model = save_tiny(tmp_path, dtype=torch.bfloat16)
    reference = greedy(model, (5, 6, 7, 8), 4)
    async with Engine.local(model=tmp_path, transport="inproc", dtype="bfloat16") as engine:
        params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        tokens = [token async for output in engine.generate(reference.prompt, params) for token in output.token_ids]
    assert len(tokens) == 4
