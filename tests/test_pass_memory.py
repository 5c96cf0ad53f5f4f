"""Room that a GPU's KV cache leaves to passes: measured on the largest, and counted for what graphs keep."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from msi.attention.graphs import Bucket
from msi.attention.pass_memory import (
    GRAPH_BYTES,
    PassBytes,
    bytes_of_passes,
    graph_bytes,
    graphed,
    largest_batch,
    placement_bytes,
)
from msi.control.messages import Assignment
from msi.errors import ConfigError
from msi.kernels import BLOCK_TOKENS
from msi.kernels.plain import PlainKernels
from msi.kernels.routing import RowDtypes
from msi.models.attention_weights import load_attention_weights
from msi.models.checkpoint import Checkpoint
from msi.placement import place_evenly
from msi.precision import Precision
from msi.settings import DEMO_MODEL, LinkShape, SchedulerLimits, Timeouts
from msi.worker import torch_host
from msi.worker.loading import ModelFiles
from tests.test_models import PlainDevice

DTYPE = torch.float32
PLACEMENT = place_evenly(8, 2)


class Device(PlainDevice):
    """Attributes: free_bytes: that are free."""

    graphs = None

    def __init__(self, free_bytes=1 << 60):
        super().__init__(PlainKernels(torch.device("cpu")))
        self.free_bytes = free_bytes


def taken(device, peak_bytes, **limits):
    files = ModelFiles(DEMO_MODEL)
    source = Checkpoint(DEMO_MODEL, stored_as=files.config.stored_as)
    weights = load_attention_weights(files.config, source, device, DTYPE, DTYPE, Precision(quantization="none"))
    return files.config, bytes_of_passes(
        files.config, weights, place_evenly(files.config.num_experts, 2), device, RowDtypes.of(DTYPE), DTYPE,
        limits=SchedulerLimits(**limits), link=LinkShape(3, 48), peak_bytes=peak_bytes,
    )  # fmt: skip


def test_the_largest_micro_batch_is_of_as_many_prompts_as_can_be_and_all_are_sampled():
    batch = largest_batch(37, 2)
    assert (batch.num_tokens, batch.query_lens, batch.context_lens) == (37, (19, 18), (19, 18))
    assert batch.positions == (*range(19), *range(18))
    assert batch.block_tables == ((1, 2), (3, 4))
    assert batch.logit_rows == (18, 36)
    assert len(batch.sampling) == 2
    assert largest_batch(3, 64).query_lens == (1, 1, 1)


def test_every_lane_has_what_the_largest_pass_took_at_the_most_the_second_time():
    ran = []

    def peak_bytes(device, work):
        ran.append(device.type)
        work()
        return 1000

    device = Device()
    device.kernels.kept_bytes = lambda num_lanes: num_lanes * 70 + len(ran)  # asked once a pass has run
    assert taken(device, peak_bytes, max_num_seqs=4)[1] == PassBytes(running=3 * 1000, kept=3 * 70 + 1)
    assert ran == ["cpu"]


def test_what_graphs_keep_is_counted_for_each_lane_and_size():
    config, limits = ModelFiles(DEMO_MODEL).config, SchedulerLimits(500, max_num_seqs=4)
    found = graphed(config, DTYPE, limits, LinkShape(3, 48), 1e12, PLACEMENT)
    assert found.buckets == tuple(Bucket(size, width) for width in (16, 32) for size in (1, 2, 4))
    rows = 2 * 2 * (1 + 2 + 4) * config.hidden_size * DTYPE.itemsize
    tables = 3 * 4 * (1 + 2 + 4) * (16 + 32)
    experts = 6 * config.num_sparse_layers * 8 * (4 * 2 + 60)
    assert found.num_bytes == 3 * (config.num_layers * (rows + 6 * GRAPH_BYTES) + tables + experts)


def test_graphs_that_would_leave_too_little_for_the_cache_are_left_out_with_a_sentence(caplog):
    config, limits = ModelFiles(DEMO_MODEL).config, SchedulerLimits(500, max_num_seqs=4)
    one = 3 * (graph_bytes(config, DTYPE, Bucket(1, 16)) + placement_bytes(PLACEMENT, config.num_sparse_layers))
    found = graphed(config, DTYPE, limits, LinkShape(3, 48), 8.5 * one, PLACEMENT)
    assert found == ((Bucket(1, 16),), one)
    assert "of 6 sizes of decode passes 1 are captured" in caplog.text
    assert graphed(config, DTYPE, limits, LinkShape(3, 48), 0.0, PLACEMENT) == ((), 0)


def test_a_pass_that_does_not_fit_is_said_with_what_to_give():
    def too_much(*_):
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(
        ConfigError, match=r"a pass of 48 tokens does not fit .*out of memory.*`max_num_batched_tokens`"
    ):
        taken(Device(), too_much)


def test_what_a_gpu_has_no_memory_for_is_said_per_worker(monkeypatch):
    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch_host, "ExpertHalf", too_much)
    given = SimpleNamespace(worker_id="expert-1", precision=Precision.of("bfloat16"))
    part = SimpleNamespace(experts=object(), expert_ids=((0,),))
    model = SimpleNamespace(_assignment=given, part=part, _files=ModelFiles(DEMO_MODEL), _device=None)
    link = SimpleNamespace(layout=None, answer_layout=None, landing=SimpleNamespace(rows=None))
    with pytest.raises(ConfigError, match=r"activations of waves of expert-1 do not fit: CUDA out .* 2\.00 GiB; give"):
        torch_host.TorchModel.expert_half(model, link, 1)


def test_the_cache_has_what_passes_leave_and_says_so_where_that_is_nothing():
    files = ModelFiles(DEMO_MODEL)
    assignment = Assignment(
        "i", "attention-0", "attention", 0, 0, place_evenly(files.config.num_experts, 1), 4, False, 1.0,
        SchedulerLimits(1024, 64, 512), LinkShape(), Timeouts(), Precision.of("bfloat16"),
    )  # fmt: skip
    block_bytes = files.config.kv_values_per_token * BLOCK_TOKENS * 2
    room = Device(100 * block_bytes)
    passes = PassBytes(20 * block_bytes, 15 * block_bytes, 5 * block_bytes)
    assert files.num_kv_blocks(assignment, room, 1.0, passes) == 60
    assert files.num_kv_blocks(replace(assignment, memory_share=0.5), room, 1.0, passes) == 10
    each = r"2000 MB while they run, 384 MB that kernels keep for lanes, 16 MB in graphs"
    with pytest.raises(
        ConfigError, match=rf"0 MB for KV cache do not hold .* MB free and 2400 MB for passes \({each}\); .*batched"
    ):
        files.num_kv_blocks(assignment, room, 1.0, PassBytes(2_000_000_000, 384_000_000, 16_000_000))
