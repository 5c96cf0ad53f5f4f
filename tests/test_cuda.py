"""The CUDA device: the same tokens as everywhere. Skipped, with the reason, where there is no GPU."""

from __future__ import annotations

import asyncio

import pytest
import torch

from msi import ConfigError, Engine, SamplingParams
from msi.device.cuda import why_unavailable
from msi.device.cuda_driver import CudaDriver
from tests.reference import load_reference, references, save_tiny
from tests.test_float8_checkpoints import save_in_float8, tokens_of

needs_gpu = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


@needs_gpu
@pytest.mark.parametrize("family", ["mixtral", "qwen2", "qwen3", "olmoe", "dbrx", "glm4", "gpt_oss"])
@pytest.mark.parametrize("queues", ["threads", "streams"])
@pytest.mark.parametrize("transport", ["inproc", "shm"])
async def test_tokens_equal_transformers_on_a_gpu(tmp_path, family, transport, queues):
    expected = references(save_tiny(tmp_path, family=family), [1, 17, 64, 129], 12)
    async with Engine.local(
        model=tmp_path, device="cuda", transport=transport, attention_workers=2, expert_workers=2, micro_batches=2,
        gpu_memory_utilization=0.1, slot_rows=48, cuda_queues=queues,
    ) as engine:  # fmt: skip

        async def tokens_of(prompt):
            params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
            return tuple([token async for output in engine.generate(prompt, params) for token in output.token_ids])

        results = await asyncio.gather(*(tokens_of(one.prompt) for one in expected))
        assert results == [one.tokens for one in expected]


@needs_gpu
async def test_tokens_equal_transformers_with_rows_in_a_gpus_own_memory(tmp_path):
    expected = references(save_tiny(tmp_path), [1, 17, 64, 129], 12)
    async with Engine.local(
        model=tmp_path, device="cuda", transport="shm", attention_workers=1, expert_workers=2, micro_batches=2,
        gpu_memory_utilization=0.1, slot_rows=48, cuda_rows="device",
    ) as engine:  # fmt: skip
        for one in expected:
            params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
            outputs = engine.generate(one.prompt, params)
            assert tuple([token async for output in outputs for token in output.token_ids]) == one.tokens


@needs_gpu
@pytest.mark.parametrize("family", ["mixtral", "qwen3", "glm4", "gpt_oss"])
@pytest.mark.parametrize("enforce_eager", [True, False])
async def test_no_layer_waits_for_the_device(tmp_path, monkeypatch, family, enforce_eager):
    """torch raises where one of its operators would; what reads values, and what runs for the first time, may."""
    expected = references(save_tiny(tmp_path, family=family), [17, 40], 8)
    launch, is_strict = CudaDriver.launch, False

    def watched(self, stream, work, reads=False):
        if reads or not is_strict:
            launch(self, stream, work, reads)
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            launch(self, stream, work, reads)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(CudaDriver, "launch", watched)
    async with Engine.local(
        model=tmp_path, device="cuda", transport="inproc", micro_batches=1, gpu_memory_utilization=0.1, slot_rows=48,
        cuda_queues="streams", enforce_eager=enforce_eager, max_num_seqs=4, max_model_len=128,
    ) as engine:  # fmt: skip
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        for _ in range(2):
            for one in expected:
                tokens = [token async for output in engine.generate(one.prompt, params) for token in output.token_ids]
                assert tuple(tokens) == one.tokens
            is_strict = True


@needs_gpu
@pytest.mark.parametrize("how", ["blocks", "rows"])
async def test_a_checkpoint_in_float8_gives_the_tokens_of_its_matrices_on_a_gpu(tmp_path, how):
    expected = references(load_reference(save_in_float8(tmp_path, how, family="glm4")), [3, 17], 6)
    wanted = [one.tokens for one in expected]
    assert (
        await tokens_of(tmp_path, [one.prompt for one in expected], device="cuda", gpu_memory_utilization=0.1) == wanted
    )


@pytest.mark.skipif(why_unavailable() is None, reason="there is a GPU")
@pytest.mark.parametrize("transport", ["inproc", "shm"])
async def test_without_a_gpu_it_is_said_before_anything_starts(tiny_model, transport):
    with pytest.raises(ConfigError, match=r"`device` cuda cannot work: .*; without one, use `device=cpu`"):
        async with Engine.local(model=tiny_model, device="cuda", transport=transport):
            pass
