"""Whole tiny models by the GPU's kernels, both sides of them, over passes that mix prompts, chunks and decoding."""

from __future__ import annotations

import pytest
import torch

from msi.attention.forward import Forward
from msi.attention.kv_cache import KvCache
from msi.attention.pass_inputs import PassInputs
from msi.attention.warming import warm
from msi.kernels import BLOCK_TOKENS, fp8
from msi.kernels.kernels import Outboxes
from msi.kernels.routing import PackedRows, RowDtypes, row_bytes
from msi.kernels.triton.kernels import TritonKernels
from msi.models.attention_weights import load_attention_weights
from msi.models.checkpoint import Checkpoint
from msi.models.expert_weights import load_expert_bank
from msi.models.families import load_config
from msi.placement import place_evenly
from msi.precision import Precision
from msi.types import MicroBatch, TokenSampling
from tests.everyday import IS_THOROUGH, mostly_slow, thorough
from tests.kernels.device import DEVICE
from tests.reference import FAMILIES, load_reference, references, save_tiny
from tests.test_float8_checkpoints import save_in_float8

NUM_NODES, NUM_BLOCKS, CHUNK = 2, 40, 20
GREEDY = TokenSampling(0, 1, 0, 0, 0)
NUM_TOKENS = 6 if IS_THOROUGH else 4


class KernelDevice:
    """Weights where kernels are, nothing queued."""

    def __init__(self):
        self.kernels = TritonKernels(DEVICE)

    def zeros(self, shape, dtype):
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    def upload(self, tensor):
        return tensor.to(DEVICE)


class Model:
    """Two expert nodes, which answer at once."""

    def __init__(self, path, dtype):
        self.device = device = KernelDevice()
        config, _ = load_config(path)
        self.config = config
        source = Checkpoint(path, stored_as=config.stored_as)
        placement = place_evenly(config.num_experts, NUM_NODES)
        self.banks = [
            load_expert_bank(config, [held], source, device.kernels, dtype, quantization=config.stored_as)
            for held in placement.experts
        ]
        precision = Precision(quantization=config.stored_as)
        weights = load_attention_weights(config, source, device, dtype, precision=precision)
        self.kv_cache = KvCache(config, NUM_BLOCKS, device, dtype)
        self.forward = Forward(config, weights, self.kv_cache, placement, device)
        shape = (NUM_NODES, 1, 1, 96, row_bytes(config.hidden_size, config.top_k, dtype))
        memory = torch.full(shape, 0xFF, dtype=torch.uint8, device=DEVICE)
        self.landed = [PackedRows.view(of_node, config.hidden_size, config.top_k, dtype) for of_node in memory]
        counts = torch.zeros(NUM_NODES, dtype=torch.int32)
        rows = [PackedRows.view(of_node[0, 0], config.hidden_size, config.top_k, dtype) for of_node in memory]
        self.outboxes = Outboxes(rows, counts if DEVICE.type == "cpu" else counts.pin_memory())
        self.answers = torch.full((NUM_NODES, 96, config.hidden_size), float("nan"), dtype=dtype, device=DEVICE)
        self.out = [{0: of_node[None]} for of_node in self.answers]
        self.inputs = PassInputs(device.upload)

    def run(self, batch):
        state = self.forward.begin(batch, *self.inputs.lay_out(batch))
        for turn in range(self.forward.num_turns):
            self.forward.route_and_pack(state, turn, self.answers, self.outboxes)
            if DEVICE.type != "cpu":
                torch.cuda.synchronize()
            for node, count in enumerate(self.outboxes.counts.tolist()):
                if count:
                    self.banks[node].run(turn, 0, [(0, count)], self.landed[node], self.out[node])
            if self.forward.has_shared:
                self.forward.shared_experts(state, turn)
        return self.forward.sample(state, self.answers).token_ids


def generate(model, prompts, num_tokens):
    """Greedy tokens of all prompts together: the first is there from the start, each other a pass later."""
    texts, done = [list(prompt) for prompt in prompts], [0] * len(prompts)
    width = NUM_BLOCKS // len(prompts)
    tables = [tuple(range(1 + width * index, width * (index + 1))) for index in range(len(prompts))]
    for step in range(200):
        fields = ([], [], [], [], [], [], [])
        wanted = []
        for index, text in enumerate(texts[: step + 1]):
            length = min(CHUNK, len(text) - done[index])
            if len(text) == len(prompts[index]) + num_tokens:
                continue
            first, done[index] = done[index], done[index] + length
            used = tables[index][: -(-done[index] // BLOCK_TOKENS)]
            values = (text[first : done[index]], range(first, done[index]), [length], [done[index]], [used])
            for field, more in zip(fields, values, strict=False):
                field.extend(more)
            if done[index] == len(text):
                fields[5].append(len(fields[0]) - 1)
                fields[6].append(GREEDY)
                wanted.append(index)
        if not fields[0]:
            return [tuple(text[len(prompt) :]) for text, prompt in zip(texts, prompts, strict=True)]
        with torch.inference_mode():
            for index, token in zip(wanted, model.run(MicroBatch(*map(tuple, fields))), strict=True):
                texts[index].append(token)
    raise AssertionError("it does not end")


FEWER_LAYERS: dict[str, dict[str, object]] = {  # of all kinds that the family has
    family: {"num_hidden_layers": 2} for family in ("mixtral", "glm4", "gpt_oss", "olmoe")
} | {
    "qwen3": {"num_hidden_layers": 3, "mlp_only_layers": [0, 2]},
    "qwen2": {"num_hidden_layers": 2, "mlp_only_layers": [0]},
    "dbrx": {"n_layers": 2},
}
INTERPRETED = [*mostly_slow(["mixtral", "glm4", "qwen3", "gpt_oss"]), *map(thorough, ["qwen2", "olmoe", "dbrx"])]


def test_no_family_is_left_out():
    assert {one if isinstance(one, str) else one.values[0] for one in INTERPRETED} == set(FAMILIES)


@pytest.mark.parametrize("family", INTERPRETED)
def test_every_familys_greedy_tokens_are_transformers(tmp_path, family):
    expected = references(save_tiny(tmp_path, family=family, **FEWER_LAYERS[family]), [1, 17, 45], NUM_TOKENS)
    assert generate(Model(tmp_path, torch.float32), [one.prompt for one in expected], NUM_TOKENS) == [
        one.tokens for one in expected
    ]


@pytest.mark.parametrize(("how", "family"), mostly_slow([("blocks", "mixtral"), ("rows", "glm4"), ("whole", "qwen2")]))
def test_a_checkpoint_in_float8_is_computed_as_it_is(tmp_path, how, family):
    layers = {"num_hidden_layers": 1} if family == "mixtral" else FEWER_LAYERS[family]  # their first has no experts
    expected = references(load_reference(save_in_float8(tmp_path, how, family=family, **layers)), [7], 2)
    model = Model(tmp_path, torch.float32)
    assert {bank.weights.w13.dtype for bank in model.banks} == {torch.float8_e4m3fn}
    assert generate(model, [one.prompt for one in expected], 2) == [one.tokens for one in expected]


def test_a_pass_before_the_first_leaves_nothing_behind(tmp_path):
    save_tiny(tmp_path, family="qwen2", **FEWER_LAYERS["qwen2"])
    model = Model(tmp_path, torch.float32)
    for dtypes in (RowDtypes.of(torch.float32), RowDtypes(torch.float32, fp8.E4M3, fp8.E4M3)):
        warm(model.forward, model.config, model.kv_cache, NUM_NODES, model.device, dtypes)
    assert not any(layer.any() for layer in model.kv_cache.layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"sliding_window": 24}, *map(thorough, [{"num_key_value_heads": 4, "head_dim": 8}, {"num_key_value_heads": 1}])],
    ids=str,
)
def test_variants_of_heads_are_transformers(tmp_path, changes):
    expected = references(save_tiny(tmp_path, seed=3, num_hidden_layers=2, **changes), [1, 30, 45], NUM_TOKENS)
    assert generate(Model(tmp_path, torch.float32), [one.prompt for one in expected], NUM_TOKENS) == [
        one.tokens for one in expected
    ]
