"""An instance whose expert worker computes with Triton's kernels, interpreted: the same tokens as everywhere."""

from __future__ import annotations

import asyncio

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from msi import Engine, SamplingParams
from msi.kernels import NONE
from msi.kernels.cpu import CpuKernels
from msi.kernels.triton.expert_bank import TritonExpertBank, new_expert_bank
from tests.everyday import SOME_FAMILIES
from tests.reference import references, save_tiny


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU that is here")
@pytest.mark.parametrize("family", SOME_FAMILIES)
async def test_tokens_equal_transformers_with_experts_in_triton(tmp_path, monkeypatch, family):
    banks: list[TritonExpertBank] = []

    def in_triton(self: CpuKernels, quantization: str, **shape: object) -> TritonExpertBank:
        assert quantization == NONE
        banks.append(new_expert_bank(**shape, device=torch.device("cpu")))
        return banks[-1]

    monkeypatch.setattr(CpuKernels, "expert_bank", in_triton)
    expected = references(save_tiny(tmp_path, family=family), [3, 17], 4)
    async with Engine.local(
        model=tmp_path, transport="inproc", attention_workers=1, expert_workers=1, micro_batches=2, slot_rows=32,
        num_gpu_blocks_override=64, peer_timeout_s=60,
    ) as engine:  # fmt: skip

        async def tokens_of(prompt):
            params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
            return tuple([token async for output in engine.generate(prompt, params) for token in output.token_ids])

        assert await asyncio.gather(*(tokens_of(one.prompt) for one in expected)) == [one.tokens for one in expected]
    (bank,) = banks
    assert bank.num_rows.sum() > 0
