"""Keys, values and rows in e4m3: what a trained model says with them, how much fits, who is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional

from msi import Engine, SamplingParams
from msi.control.messages import Assignment
from msi.device.choice import precision_on
from msi.errors import ConfigError
from msi.kernels import BLOCK_TOKENS, fp8
from msi.kernels.cpu import CpuKernels
from msi.kernels.plain import PlainKernels
from msi.kernels.routing import RowDtypes, answer_row_bytes, row_bytes
from msi.options import InstanceOptions
from msi.placement import place_evenly
from msi.planner.hardware import read_catalogue
from msi.precision import Precision
from msi.settings import DEMO_MODEL, LinkShape, SchedulerLimits, Timeouts
from msi.worker.loading import ModelFiles
from tests.kernels.test_quantized import TEXT
from tests.test_models import PlainDevice, logits_of
from tests.test_precision import Device

CPU = torch.device("cpu")


def prompt_of(text):
    return Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")).encode(text).ids


def divergence(found, exact):
    """Mean over a prompt's positions, in nats."""
    one, other = (logits.log_softmax(dim=-1) for logits in (found, exact))
    return float(functional.kl_div(one, other, reduction="none", log_target=True).sum(dim=-1).mean())


def test_numbers_end_at_448_and_what_is_none_stays_none():
    numbers = torch.tensor([449.0, -1e9, torch.inf, -torch.inf, 1.0625, 1.1875, 2**-10, 1.5 * 2**-9, 0.0])
    assert fp8.to_e4m3(numbers).float().tolist() == [448.0, -448.0, 448.0, -448.0, 1.0, 1.25, 0.0, 2**-8, 0.0]
    assert fp8.to_e4m3(torch.tensor(torch.nan)).float().isnan()
    everything = torch.arange(256, dtype=torch.uint8).view(fp8.E4M3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = fp8.from_e4m3(everything.view(2, 128), dtype)
        assert found.dtype is dtype
        assert torch.equal(found.nan_to_num(), everything.to(dtype).nan_to_num().view(2, 128))


@pytest.mark.parametrize("kernels", [CpuKernels(), PlainKernels(CPU)], ids=["own", "plain"])
def test_the_trained_model_says_nearly_the_same_with_a_cache_in_eight_bits(kernels):
    """5.8e-4; with a scale for each token and head 5.4e-4, which is not worth the bytes: a float has its own scale."""
    prompt = prompt_of(TEXT)[:100]
    exact = logits_of(DEMO_MODEL, prompt, torch.float32, is_everywhere=True)
    device = PlainDevice(kernels)
    found = logits_of(DEMO_MODEL, prompt, torch.float32, device, is_everywhere=True, kv_cache=fp8.E4M3)
    assert 1e-5 < divergence(found, exact) <= 1.5e-3


def test_a_rows_values_are_a_sixteenth_away_at_most_and_what_is_no_number_stays_none():
    rows = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    rows[1, :128] *= 1e4
    rows[2] = 0.0
    rows[3, 5], rows[3, 200] = torch.nan, torch.inf
    packed = fp8.pack(rows)
    assert packed.shape == (5, fp8.packed_bytes(300)) == (5, 300 + 12)
    found = fp8.unpack(packed, 300, torch.float32)
    for row in (0, 1, 2, 4):
        assert (found[row] - rows[row]).abs().max() <= rows[row].abs().max() / 16
        assert ((found[row] - rows[row]).abs() <= rows[row].abs() / 16 + rows[row, :128].abs().max() * 2**-18).all()
    assert found[3, :128].isnan().any(), "a group with a NaN has one"
    assert found[3, 128:256].isnan().any(), "and so has one with an infinity"
    assert found[3, 256:].isfinite().all()
    assert row_bytes(300, 2, fp8.E4M3) == 384
    assert answer_row_bytes(6144, fp8.E4M3) == 6144 + 4 * 48 + 64


ROWS = RowDtypes(torch.float32, fp8.E4M3, torch.float32)


@pytest.mark.parametrize("kernels", [CpuKernels(), PlainKernels(CPU)], ids=["own", "plain"])
@pytest.mark.parametrize(
    ("rows", "most"), [(ROWS, 1e-3), (replace(ROWS, answered=fp8.E4M3), 1e-3)], ids=["sent", "both"]
)
def test_the_trained_model_says_nearly_the_same_with_rows_in_eight_bits(kernels, rows, most):
    """2.9e-4, and 2.3e-4 with answers in eight bits too."""
    prompt = prompt_of(TEXT)[:100]
    exact = logits_of(DEMO_MODEL, prompt, torch.float32, is_everywhere=True)
    found = logits_of(DEMO_MODEL, prompt, torch.float32, PlainDevice(kernels), is_everywhere=True, rows=rows)
    assert 1e-5 < divergence(found, exact) <= most


async def tokens_with(text=TEXT, num_tokens=12, **options):
    """Greedy tokens of two prompts, the second of which begins with the first, one after the other."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    said = []
    async with Engine.local(model=DEMO_MODEL, dtype="float32", **options) as engine:
        for prompt in (text[:150], text[:200], text[:150]):
            said.append([token async for one in engine.generate(prompt, params) for token in one.token_ids])
    return said


APART = {"attention_workers": 1, "expert_workers": 2, "micro_batches": 2, "transport": "inproc"}


async def test_workers_apart_say_what_one_says_and_kept_prompts_change_nothing():
    together = await tokens_with(kv_cache_dtype="fp8", colocated=True)
    assert together[0] == together[2], "the third prompt's blocks are those of the first"
    assert await tokens_with(kv_cache_dtype="fp8", **APART) == together
    assert await tokens_with(kv_cache_dtype="fp8", enable_prefix_caching=False, colocated=True) == together


async def test_rows_in_eight_bits_give_the_same_tokens_however_they_travel():
    told = {"rows_dtype": "fp8", "num_tokens": 8}
    together = await tokens_with(**told, colocated=True)
    for transport in ("shm", "tcp"):
        assert await tokens_with(**told, **{**APART, "transport": transport}) == together


async def test_everything_in_eight_bits_at_once():
    told = {"rows_dtype": "fp8", "answers_dtype": "fp8", "kv_cache_dtype": "fp8", "quantization": "int8"}
    one_expert_worker = {**APART, "expert_workers": 1}  # answers of several are rounded each by itself
    assert await tokens_with(**told, **one_expert_worker) == await tokens_with(**told, colocated=True)


def test_twice_as_many_blocks_as_of_bfloat16_fit():
    files = ModelFiles(DEMO_MODEL)
    assignment = Assignment(
        "i", "attention-0", "attention", 0, 0, place_evenly(files.config.num_experts, 1), 4, False, 1.0,
        SchedulerLimits(1024, 64, 512), LinkShape(), Timeouts(), Precision.of("bfloat16"),
    )  # fmt: skip
    room = Device(100 * files.config.kv_values_per_token * BLOCK_TOKENS * 2)
    assert files.num_kv_blocks(assignment, room, 1.0) == 100
    in_eight = replace(assignment, precision=replace(assignment.precision, kv_cache="fp8"))
    assert files.num_kv_blocks(in_eight, room, 1.0) == 200


def test_the_planner_counts_the_bytes():
    model = read_catalogue(None).model("mixtral-8x22b")
    sent = replace(model, precision=replace(model.precision, rows="fp8"))
    assert (sent.sent_row_bytes, sent.answer_row_bytes, sent.row_bytes) == (6336, 12288, 9312)
    both = replace(sent, precision=replace(sent.precision, answers="fp8"))
    assert both.row_bytes == 6336
    shape = replace(model, precision=replace(model.precision, kv_cache="fp8"))
    assert shape.kv_bytes_per_token * 2 == model.kv_bytes_per_token
    assert (shape.attention_bytes, shape.expert_bytes) == (model.attention_bytes, model.expert_bytes)


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"`kv_cache_dtype` 'fp8_e5m2' is not one; supported: auto, .*, fp8"):
        InstanceOptions.of(kv_cache_dtype="fp8_e5m2")
    with pytest.raises(ConfigError, match="`weights` 'fp8' is not one"):
        Precision(weights="fp8")
    options = InstanceOptions.of(kv_cache_dtype="fp8")
    assert options.flags() == ["--kv-cache-dtype=fp8"]
    assert options.precision.resolved("bfloat16") == replace(Precision.of("bfloat16"), kv_cache="fp8")

    class OldKernels(PlainKernels):
        has_e4m3 = False

    with pytest.raises(ConfigError, match=r"`kv_cache_dtype` fp8 needs a GPU .* of compute capability 8.9 or more"):
        precision_on(PlainDevice(OldKernels(CPU)), options.precision, torch.bfloat16)
