"""All layers in one call of the CPU: the numbers are those of the layers' parts, to the last bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from msi.attention.pass_inputs import PassInputs
from msi.kernels import NONE, SWIGLU, Activation, fp8
from msi.kernels.cpu import CpuKernels
from msi.kernels.native.bank import NativeExpertBank
from msi.kernels.native.compiled import native_library, row_dtype
from msi.kernels.native.layers import MOST_ROWS, LayerParts, NativeLayers
from msi.kernels.native.rows import DecodePlan
from msi.kernels.norm import HeadNorm, Norm, layer_norm, rms_norm
from msi.kernels.paged_attention import AttentionShape
from msi.kernels.quantized import quantize
from msi.kernels.rope import rope_frequencies
from msi.kernels.routing import PackedRows
from msi.types import MicroBatch

pytestmark = pytest.mark.skipif(native_library() is None, reason="nothing can be compiled here")
DTYPES = {torch.float32}  # of rows
if (library := native_library()) is not None:
    DTYPES.add(row_dtype(library, torch.empty(0, dtype=torch.bfloat16)))
NUM_LAYERS, NUM_BLOCKS = 3, 64


@dataclass(frozen=True)
class Kind:
    """What a model's layers may have."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 48
    inner: int = 80
    num_experts: int = 5
    top_k: int = 2
    renormalise: bool = True
    rotated: int = 32
    windows: tuple[int | None, ...] = (None,)
    has_head_norm: bool = False
    has_bias: bool = False
    has_sinks: bool = False
    activation: Activation = SWIGLU
    quantization: str = NONE
    is_e4m3: bool = False


KINDS = {
    "plain": Kind(),
    "as Qwen3": Kind(num_heads=6, num_kv_heads=1, head_dim=64, hidden=176, num_experts=21, top_k=8, has_head_norm=True),
    "as gpt-oss": Kind(
        num_heads=8, num_kv_heads=1, has_bias=True, has_sinks=True, windows=(24, None),
        activation=Activation(1.702, 7.0, 1.0),
    ),
    "int8": Kind(hidden=272, inner=144, quantization="int8"),
    "int4": Kind(hidden=272, quantization="int4", renormalise=False),
    "fp8": Kind(quantization="fp8", is_e4m3=True, head_dim=48, rotated=32),
    "large": Kind(hidden=512, inner=1024, num_experts=8),
}  # fmt: skip


class Layers:
    """Of a kind, with weights drawn by chance."""

    def __init__(self, kind: Kind, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.kind, self.dtype = kind, dtype
        self.kernels = kernels = CpuKernels()
        self.shapes = [
            AttentionShape(kind.num_heads, kind.num_kv_heads, kind.head_dim, window) for window in kind.windows
        ]
        heads, hidden, inner = kind.num_heads + 2 * kind.num_kv_heads, kind.hidden, kind.inner
        self.bank = kernels.expert_bank(
            num_layers=NUM_LAYERS, num_experts=kind.num_experts, hidden_size=hidden, inner_size=inner,
            dtype=torch.bfloat16, quantization=kind.quantization, activation=kind.activation, has_bias=kind.has_bias,
        )  # fmt: skip
        assert isinstance(self.bank, NativeExpertBank)
        self.parts = []
        for layer in range(NUM_LAYERS):
            for expert in range(kind.num_experts):
                biases = (torch.randn(2 * inner), torch.randn(hidden)) if kind.has_bias else None
                self.bank.put(layer, expert, self.matrix(2 * inner, hidden), self.matrix(hidden, inner), biases)
            cache_dtype = fp8.E4M3 if kind.is_e4m3 else dtype
            cache = torch.randn(NUM_BLOCKS, 2, 16, kind.num_kv_heads, kind.head_dim).to(cache_dtype)
            head_norm = torch.rand(kind.num_heads + kind.num_kv_heads, kind.head_dim).to(dtype)
            self.parts.append(
                LayerParts(
                    attention_norm=self.norm(),
                    qkv=self.linear(heads * kind.head_dim, hidden),
                    output=self.linear(hidden, kind.num_heads * kind.head_dim),
                    mlp_norm=self.norm(),
                    router=self.linear(kind.num_experts, hidden, is_held=True),
                    cache=cache,
                    head_norm=HeadNorm(head_norm, 1e-5) if kind.has_head_norm else None,
                    sinks=torch.randn(kind.num_heads) if kind.has_sinks else None,
                    view=layer % len(kind.windows),
                )
            )

    def matrix(self, outputs, depth, is_held=False):
        weight = (torch.randn(outputs, depth) / depth**0.5).to(torch.bfloat16)
        return weight if is_held or self.kind.quantization == NONE else quantize(weight, self.kind.quantization)

    def linear(self, outputs, depth, is_held=False):
        bias = torch.randn(outputs).to(self.dtype) if self.kind.has_bias else None
        return self.kernels.linear(self.matrix(outputs, depth, is_held), bias)

    def norm(self):
        return Norm(rms_norm, torch.rand(self.kind.hidden).to(self.dtype), 1e-5)

    def at_once(self, parts=None):
        return NativeLayers.of(
            self.parts if parts is None else parts, self.shapes[0], rotated=self.kind.rotated, top_k=self.kind.top_k,
            renormalise=self.kind.renormalise,
        )  # fmt: skip

    def plans(self, contexts):
        """Of sequences with so many tokens, their blocks scattered over the cache."""
        needed = [-(-context // 16) for context in contexts]
        blocks = iter((1 + np.random.default_rng(0).permutation(NUM_BLOCKS - 1)).tolist())
        tables = tuple(tuple(next(blocks) for _ in range(count)) for count in needed)
        ones, each = tuple(1 for _ in contexts), tuple(range(len(contexts)))
        batch = MicroBatch(
            token_ids=ones, positions=tuple(context - 1 for context in contexts), query_lens=ones,
            context_lens=tuple(contexts), block_tables=tables, logit_rows=each, sampling=(),
        )  # fmt: skip
        device, host = PassInputs(lambda tensor: tensor).lay_out(batch)
        rope = self.kernels.rope_table(device.positions, rope_frequencies(self.kind.rotated, 1e4), self.dtype, 1.0)
        return [(rope, self.kernels.plan_attention(device, host, shape, self.dtype)) for shape in self.shapes]

    def one_by_one(self, hidden, plans, local_ids, answers):
        """What `NativeLayers.run` does, by calls of its parts."""
        kind, kernels, num = self.kind, self.kernels, len(hidden)
        for layer, of in enumerate(self.parts):
            rope, plan = plans[of.view]
            if layer:
                normed = kernels.add_norm(hidden, answers[0, :num], of.attention_norm)
            else:
                normed = kernels.norm(hidden, of.attention_norm)
            heads = of.qkv(normed).view(num, -1, kind.head_dim)
            kernels.rope_and_write(heads, kind.num_heads, rope, of.cache, plan, of.head_norm)
            attended = kernels.paged_attention(heads[:, : kind.num_heads], of.cache, plan, of.sinks)
            normed = kernels.add_norm(hidden, of.output(attended.reshape(num, -1)), of.mlp_norm)
            topk_weights, topk_ids = kernels.topk_softmax(of.router(normed), kind.top_k, kind.renormalise)
            packed = PackedRows(normed[None, None], topk_weights[None, None], local_ids[topk_ids][None, None])
            self.bank.run(layer, 0, ((0, num),), packed, {0: answers})


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_numbers_are_those_of_the_parts_to_the_last_bit(name, dtype, num_threads, monkeypatch):
    kind = KINDS[name]
    monkeypatch.setattr("msi.kernels.native.layers.ALONE_BYTES", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.inference_mode():
            layers = Layers(kind, dtype)
            at_once = layers.at_once()
            local_ids = torch.randperm(kind.num_experts).to(torch.int32)
            for contexts in [(1,), (37, 16), (5, 1, 33), (17,) * 7, tuple(range(1, MOST_ROWS + 1))]:
                plans = layers.plans(contexts)
                assert all(isinstance(plan, DecodePlan) for _, plan in plans)
                given = torch.randn(len(contexts), kind.hidden).to(dtype)
                caches = [part.cache.clone() for part in layers.parts]
                wanted, found = given.clone(), given.clone()
                wanted_answers, answers = torch.zeros(2, 1, 40, kind.hidden, dtype=dtype)
                layers.bank.num_rows.zero_()
                layers.bank.weight_bytes_read = 0
                layers.one_by_one(wanted, plans, local_ids, wanted_answers)
                counted = layers.bank.num_rows.clone(), layers.bank.weight_bytes_read
                layers.bank.num_rows.zero_()
                layers.bank.weight_bytes_read = 0
                written = [part.cache.clone() for part in layers.parts]
                for part, cache in zip(layers.parts, caches, strict=True):
                    part.cache.copy_(cache)
                attention_s, experts_s = at_once.run(found, plans, local_ids, layers.bank, answers[0])
                assert torch.equal(found, wanted)
                assert torch.equal(answers, wanted_answers)
                assert torch.equal(layers.bank.num_rows, counted[0])
                assert layers.bank.weight_bytes_read == counted[1]
                for part, cache in zip(layers.parts, written, strict=True):
                    assert torch.equal(part.cache.view(torch.uint8), cache.view(torch.uint8))
                assert attention_s > 0
                assert experts_s > 0
    finally:
        torch.set_num_threads(threads)


def test_experts_that_moved_are_read_where_they_are_now():
    with torch.inference_mode():
        layers = Layers(Kind(), torch.float32)
        at_once, plans = layers.at_once(), layers.plans((5, 9))
        given = torch.randn(2, 48)
        local_ids, answers = torch.arange(5, dtype=torch.int32), torch.zeros(2, 2, 48)
        at_once.run(given.clone(), plans, local_ids, layers.bank, answers[0])
        moved = layers.bank.arranged([[4, None, 2, 0, 1, 3]] * len(layers.bank.num_rows))
        at_once.run(given.clone(), plans, torch.tensor([3, 4, 2, 5, 0], dtype=torch.int32), moved, answers[1])
    assert torch.equal(*answers)


def test_an_expert_without_weights_is_said_and_nothing_is_left_waiting():
    with torch.inference_mode():
        layers = Layers(Kind(), torch.float32)
        bank, hidden = layers.bank.arranged([[None] * 5] * len(layers.bank.num_rows)), torch.randn(1, 48)
        with pytest.raises(AssertionError, match="no weights"):
            layers.at_once().run(hidden, layers.plans((3,)), torch.arange(5).int(), bank, torch.zeros(1, 48))


def test_layers_of_other_kinds_are_left_to_their_parts():
    with torch.inference_mode():
        layers = Layers(Kind(), torch.float32)
        first, *rest = layers.parts
        others = [
            replace(first, qkv=lambda rows: rows),
            replace(first, mlp_norm=replace(first.mlp_norm, apply=layer_norm)),
            replace(first, attention_norm=replace(first.attention_norm, weight=torch.rand(48, dtype=torch.float64))),
            replace(first, cache=first.cache.to(torch.float16)),
            replace(first, router=layers.kernels.linear(torch.randn(5, 48))),
        ]
        assert all(layers.at_once([*rest, other]) is None for other in others)
        assert layers.at_once([*rest, first]) is not None
