"""Decode passes that are replayed with attention by flashinfer, by the real links, waves and roles, on late streams."""

from __future__ import annotations

import sys

import pytest
import torch

from msi.device.fake.streams import FakeStreams
from msi.device.stream_device import StreamDevice
from msi.kernels import BLOCK_TOKENS, flashinfer
from msi.kernels.flashinfer import FixedPlan, FlashinferKernels
from msi.kernels.paged_attention import write_kv
from msi.kernels.plain import PlainKernels, apply_rope
from msi.worker.torch_host import TorchHost
from tests import fake_flashinfer
from tests.engine_in_tasks import engine_in_tasks
from tests.everyday import thorough
from tests.reference import references, save_tiny
from tests.test_tokens import NUM_TOKENS, check_equal

CPU = torch.device("cpu")


class Replayed(PlainKernels):
    """In passes that graphs are captured of the library attends, and in the others plain torch."""

    num_planned = 0

    def __init__(self, driver):
        super().__init__(CPU)
        self._library = FlashinferKernels(CPU)
        self._library.lane = lambda: id(driver._mine.stream)

    def plan_attention(self, inputs, host, shape, dtype, is_fixed=False):
        if not is_fixed:
            return super().plan_attention(inputs, host, shape, dtype)
        self._library._met[shape, dtype] = (dtype, False)
        self._library._is_taken[shape, dtype, dtype] = {True: True}
        plan = self._library.plan_attention(inputs, host, shape, dtype, is_fixed=True)
        assert isinstance(plan, FixedPlan)
        type(self).num_planned += 1
        return plan

    def rope_and_write(self, heads, num_q, rope, layer_cache, plan, norm=None):
        if not isinstance(plan, FixedPlan):
            super().rope_and_write(heads, num_q, rope, layer_cache, plan, norm)
            return
        num_tokens, num_heads, head_dim = heads.shape
        num_kv = (num_heads - num_q) // 2
        keys_at = 2 * plan.slots.long() - plan.slots.long() % BLOCK_TOKENS
        rows = torch.stack((keys_at, keys_at + BLOCK_TOKENS), dim=1)
        apply_rope(heads[:, : num_q + num_kv], *rope)
        write_kv(layer_cache, heads[:, num_q:].view(num_tokens, 2, num_kv, head_dim), rows)

    def paged_attention(self, query, layer_cache, plan, sinks=None):
        if not isinstance(plan, FixedPlan):
            return super().paged_attention(query, layer_cache, plan, sinks)
        return self._library.paged_attention(query, layer_cache, plan)


class Host(TorchHost):
    drivers: list[FakeStreams]

    def open_device(self):
        driver = FakeStreams()
        self.drivers.append(driver)
        return StreamDevice(driver, Replayed(driver), uses_graphs=True)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """Whose numbers are as exact as those of `transformers` that tokens are compared with."""
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    monkeypatch.setattr(fake_flashinfer, "DTYPES", (torch.float32,))
    monkeypatch.setattr(flashinfer, "DTYPES", (torch.float32,))
    monkeypatch.setattr(flashinfer, "HEAD_DIMS", (8, 16, 32))
    monkeypatch.setattr(Host, "drivers", [], raising=False)
    monkeypatch.setattr(Replayed, "num_planned", 0)


def engine_of(path, layout=(1, 1), micro_batches=1):
    return engine_in_tasks(
        Host, transport="inproc", model=path, attention_workers=layout[0], expert_workers=layout[1],
        micro_batches=micro_batches, slot_rows=48, max_num_seqs=4, max_model_len=128,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "micro_batches"), [((1, 1), 1), thorough((2, 2), 2)], ids=str)
async def test_tokens_equal_transformers(layout, micro_batches, tmp_path):
    expected = references(save_tiny(tmp_path, family="mixtral"), [1, 17, 64], NUM_TOKENS)
    async with engine_of(tmp_path, layout, micro_batches) as engine:
        await check_equal(engine, expected, 0)
    assert sum(driver.num_replayed for driver in Host.drivers) > NUM_TOKENS, "most of what decodes is replayed"
    assert Replayed.num_planned > NUM_TOKENS // 2, "each pass once, of several sequences together"


@pytest.mark.slow
async def test_a_pass_whose_wrapper_is_not_planned_gives_other_tokens(tmp_path, monkeypatch):
    expected = references(save_tiny(tmp_path, family="mixtral"), [17], NUM_TOKENS)
    planned = fake_flashinfer.BatchDecodeWithPagedKVCacheWrapper.plan

    def once(self, *pages, **told):
        if not self.num_plans:
            planned(self, *pages, **told)

    monkeypatch.setattr(fake_flashinfer.BatchDecodeWithPagedKVCacheWrapper, "plan", once)
    async with engine_of(tmp_path) as engine:
        with pytest.raises(AssertionError, match="prompt of 17 tokens"):
            await check_equal(engine, expected, 0)
