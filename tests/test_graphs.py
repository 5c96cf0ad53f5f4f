"""Decode passes as captured graphs: replayed on memory that stays, by the real links, waves and roles."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from msi import ConfigError, SamplingParams
from msi.attention import capturing, graphs
from msi.attention.forward import PassState
from msi.attention.graphs import Bucket, LaneGraphs, bucket_of, buckets_of, filled_up
from msi.device.fake.late import Late
from msi.device.fake.streams import FakeStreams
from msi.device.stream_device import StreamDevice
from msi.kernels.plain import PlainKernels
from msi.kernels.replicas import PlacementTables
from msi.settings import HostOptions
from msi.types import MicroBatch
from msi.worker.loading import ModelFiles
from msi.worker.torch_host import TorchHost
from tests.engine_in_tasks import engine_in_tasks
from tests.everyday import SOME_FAMILIES
from tests.reference import references, save_tiny
from tests.test_tokens import NUM_TOKENS, check_equal


class CountingStreams(FakeStreams):
    """Attributes: num_operators: of torch that each program launched, beside graphs."""

    def __init__(self):
        super().__init__()
        self.num_operators = []

    def launch(self, stream, work, reads=False):
        if reads:
            super().launch(stream, work, reads)
            return
        steps = []
        self._mine.stream = stream
        with Late(lambda step: (steps.append(step), stream.steps.append((False, step)))):
            work()
        self.num_operators.append(len(steps))


class GraphHost(TorchHost):
    """The host of a real worker; `drivers`: of all that were opened."""

    drivers: ClassVar[list[FakeStreams]] = []

    def open_device(self):
        self.drivers.append(CountingStreams())
        return StreamDevice(self.drivers[-1], PlainKernels(torch.device("cpu")), uses_graphs=True)


@pytest.fixture(autouse=True)
def drivers(monkeypatch):
    monkeypatch.setattr(GraphHost, "drivers", [])
    return GraphHost.drivers


@pytest.fixture(scope="module", params=SOME_FAMILIES)
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    model = save_tiny(path, family=request.param)
    return path, references(model, [1, 17, 64], NUM_TOKENS)


def graph_engine(path, layout=(1, 1), micro_batches=1, max_num_seqs=4, max_model_len=128, **options):
    return engine_in_tasks(
        GraphHost, transport="inproc", model=path, attention_workers=layout[0], expert_workers=layout[1],
        micro_batches=micro_batches, slot_rows=48, max_num_seqs=max_num_seqs, max_model_len=max_model_len, **options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "micro_batches"), [((1, 1), 1), ((2, 2), 2)], ids=str)
async def test_tokens_equal_transformers(checkpoint, drivers, layout, micro_batches):
    path, expected = checkpoint
    async with graph_engine(path, layout, micro_batches) as engine:
        await check_equal(engine, expected, 0)
    assert sum(driver.num_replayed for driver in drivers) > NUM_TOKENS, "most of what decodes is replayed"


def logged(caplog, what):
    return [record.getMessage() for record in caplog.records if what in record.getMessage()]


async def test_all_is_captured_before_an_instance_takes_requests_and_nothing_after(tmp_path, drivers, caplog):
    caplog.set_level(logging.INFO)
    expected = references(save_tiny(tmp_path, family="glm4"), [1, 17], NUM_TOKENS)  # has dense layers, shared experts
    config, counts = ModelFiles(tmp_path).config, tmp_path / "counts.json"
    by_layer = [[1 + (expert * 3 + layer) % 7 for expert in range(7)] for layer in range(config.num_sparse_layers)]
    counts.write_text(json.dumps(by_layer))
    options = {"max_num_seqs": 2, "max_model_len": 300, "expert_popularity": counts}  # layers differ in their places
    async with graph_engine(tmp_path, (1, 2), 2, **options) as engine:
        before = sum(driver.num_captured for driver in drivers)
        await check_equal(engine, expected, 0)
        assert sum(driver.num_captured for driver in drivers) == before
    num_buckets = 2 * 2  # 1 sequence, or 2; of up to 256 tokens, or of more
    assert before == 2 * num_buckets * 2 * config.num_sparse_layers
    assert sum(driver.num_replayed for driver in drivers) > before + NUM_TOKENS, "tokens came from graphs"
    assert logged(caplog, f"{before} graphs of decode passes of up to 2 sequences captured")


async def test_a_replayed_layer_launches_its_graph_and_takes_no_memory(tmp_path, drivers):
    """Only the first layer does more: what was laid out goes to where graphs read it."""
    save_tiny(tmp_path, family="glm4")
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    async with graph_engine(tmp_path) as engine:
        (attention,) = (driver for driver in drivers if driver.num_captured)
        tokens = [token async for output in engine.generate((9,), params) for token in output.token_ids]
    num_layers = 2 * ModelFiles(tmp_path).config.num_sparse_layers  # and their shared experts
    decoding = attention.num_operators[-num_layers * (len(tokens) - 1) :]
    assert len(decoding) == num_layers * (len(tokens) - 1)
    assert all(decoding[::num_layers])
    assert not any(num for index, num in enumerate(decoding) if index % num_layers)


async def test_an_instance_of_which_nothing_can_be_captured_says_so_and_serves(tmp_path, monkeypatch, caplog):
    def refuse(self, memory, work):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeStreams, "capture", refuse)
    expected = references(save_tiny(tmp_path, family="mixtral"), [17], NUM_TOKENS)
    async with graph_engine(tmp_path, (1, 1), 2) as engine:
        told = logged(caplog, "decoding is launched piece by piece: no graph of it could be captured: operation not")
        assert len(told) == 2, "once for each lane"
        await check_equal(engine, expected, 0)


async def test_long_capturing_says_how_far_it_is(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(capturing, "SAID_EACH_S", 0.0)
    lanes = [LaneGraphs(Counted(), 8), None, LaneGraphs(Counted(), 8)]
    seen = []

    async def capture(lane, bucket):
        seen.append((lane, bucket))
        if bucket.num_seqs == 1 and lane == 2:
            lanes[2].give_up(RuntimeError("no"))

    buckets = buckets_of(2, 8, 100)
    await capturing.capture_all(lanes, buckets, capture, lambda: 0)
    assert seen == [(0, Bucket(1, 16)), (2, Bucket(1, 16)), (0, Bucket(2, 16))], "no more of a lane that gave up"
    assert logged(caplog, "captured: 4 of 4 sizes and lanes")
    assert logged(caplog, "1 lanes of 3 have none")


@pytest.mark.parametrize("queues", ["threads", "gates"])
def test_graphs_are_refused_where_nothing_of_decoding_would_be_captured(queues):
    with pytest.raises(ConfigError, match=f"`enforce_eager` is off for `cuda_queues` streams alone: with {queues} no"):
        HostOptions(device="cuda", cuda_queues=queues, enforce_eager=False)
    assert HostOptions(device="cuda", cuda_queues=queues).enforce_eager


def test_buckets_are_those_that_passes_can_be_in():
    assert buckets_of(6, 512, 300) == [Bucket(size, width) for width in (16, 32) for size in (1, 2, 4, 8)]
    assert buckets_of(64, 40, 256) == [Bucket(size, 16) for size in (1, 2, 4, 8, 16, 24, 32, 40)]
    assert buckets_of(1, 512, 1) == [Bucket(1, 16)]
    assert buckets_of(10_000, 512, 16)[-1] == Bucket(256, 16)
    possible = buckets_of(48, 512, 1000)
    for num_seqs in range(1, 49):
        for length in (1, 256, 257, 1000):
            assert bucket_of(decoding(*(length,) * num_seqs), 512) in possible


def test_a_pass_of_a_size_that_was_left_out_is_launched_piece_by_piece():
    lane = LaneGraphs(Counted(), 512, [Bucket(2, 16)])
    assert lane.bucket_of(decoding(3, 4)) == Bucket(2, 16)
    assert lane.bucket_of(decoding(3, 4, 5)) is None
    assert lane.bucket_of(decoding(3, 257)) is None


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["hidden", "plans"])
async def test_an_input_that_is_not_copied_to_where_graphs_read_it_gives_other_tokens(left_out, tmp_path, monkeypatch):
    expected = references(save_tiny(tmp_path, family="mixtral"), [17], NUM_TOKENS)
    pairs = graphs._pairs
    monkeypatch.setattr(graphs, "_pairs", lambda kept, new, name: () if name == left_out else pairs(kept, new, name))
    async with graph_engine(tmp_path) as engine:
        with pytest.raises(AssertionError, match="prompt of 17 tokens"):
            await check_equal(engine, expected, 0)


def decoding(*context_lens):
    num_seqs = len(context_lens)
    return MicroBatch(
        token_ids=tuple(range(5, 5 + num_seqs)),
        positions=tuple(length - 1 for length in context_lens),
        query_lens=(1,) * num_seqs,
        context_lens=context_lens,
        block_tables=tuple((1 + number,) * 40 for number in range(num_seqs)),
    )


def test_passes_of_single_tokens_have_the_least_bucket_that_holds_them():
    assert bucket_of(decoding(3), 512) == Bucket(1, 16)
    assert bucket_of(decoding(3, 256, 5), 512) == Bucket(4, 16)
    assert bucket_of(decoding(3, 257), 512) == Bucket(2, 32)
    assert bucket_of(decoding(*(3,) * 33), 40) == Bucket(40, 16), "no more than a slot's rows"
    assert bucket_of(decoding(*(3,) * 257), 512) is None
    assert bucket_of(replace(decoding(3, 4), query_lens=(2,), context_lens=(4,)), 512) is None, "a chunk of a prompt"


def test_what_is_missing_are_tokens_in_the_block_that_is_nobodys():
    filled = filled_up(decoding(3, 4, 5), Bucket(4, 16))
    assert filled.token_ids == (5, 6, 7, 0)
    assert filled.positions == (2, 3, 4, 0)
    assert filled.context_lens == (3, 4, 5, 1)
    assert filled.block_tables[-1] == (0,)
    assert filled_up(decoding(3, 4), Bucket(2, 16)) == decoding(3, 4)


class Counted:
    """Implements `msi.device.device.Graphs`: what is captured runs once; calls are counted."""

    def __init__(self):
        self.calls = []

    def graph_memory(self):
        return None

    def capture(self, memory, work):
        self.calls.append("captured")
        work()
        return work

    def replay(self, graph):
        self.calls.append("replayed")


def state_of(num_seqs, value=0.0):
    ints = torch.zeros(num_seqs, dtype=torch.int32)
    tables = PlacementTables(torch.zeros(1, 3), torch.ones(2), 1)
    hidden = torch.full((num_seqs, 4), value)
    return PassState(decoding(*(3,) * num_seqs), None, None, tables, hidden, [(ints, 7)], is_filler=ints > 0)


def test_a_part_runs_once_is_captured_and_then_replayed_until_memory_outside_is_another():
    counted, rows = Counted(), object()
    lane = LaneGraphs(counted, 512)
    alike = lane.begin(Bucket(2, 16), state_of(2))
    for _ in range(3):
        lane.run(alike, "layer", (rows,), lambda: counted.calls.append("ran"))
    assert counted.calls == ["ran", "captured", "ran", "replayed", "replayed"]
    counted.calls.clear()
    lane.run(alike, "layer", (object(),), lambda: counted.calls.append("ran"))
    assert counted.calls == ["captured", "ran", "replayed"], "an outbox that is another is written, and not the old one"


def test_what_a_part_read_of_another_graph_is_read_of_it_only():
    counted = Counted()
    lane = LaneGraphs(counted, 512)
    alike = lane.begin(Bucket(2, 16), state_of(2))
    for _ in range(3):
        lane.run(alike, "layer", (), lambda: None)
    alike.state.sent = torch.zeros(2)  # by a part that was captured anew
    lane.run(alike, "layer", (), lambda: None)
    assert counted.calls[-2:] == ["captured", "replayed"]


def test_a_pass_goes_where_its_like_was_and_one_that_does_not_fit_has_graphs_of_its_own():
    lane = LaneGraphs(Counted(), 512)
    alike = lane.begin(Bucket(2, 16), state_of(2))
    hidden = alike.state.hidden
    assert lane.begin(Bucket(2, 16), state_of(2, 1.5)) is alike
    assert alike.state.hidden is hidden
    assert torch.equal(hidden, torch.full((2, 4), 1.5))
    larger = lane.begin(Bucket(2, 16), state_of(3))
    assert larger is not alike
    other = state_of(3)
    other.plans = [(other.plans[0][0], 8)]
    with pytest.raises(ValueError, match=r"a pass's plans\[0\]\[1\] is 8, and its graphs know 7"):
        graphs.refill(larger.state, other)


def test_a_pass_of_another_placement_does_not_change_what_others_still_run_by():
    """Each bucket and each pass that is not begun has a placement's tables for itself."""
    first = PlacementTables.of([(0, 1), (1, 0)], 2, shares=((60, 0), (60, 0)))
    second = PlacementTables.of([(0, 1), (1, 0)], 2, shares=((0, 60), (0, 60)))
    lane, waits = LaneGraphs(Counted(), 512), first.wheels.clone()
    of_two, of_one = (state_of(size) for size in (2, 1))
    of_two.tables, of_one.tables = first.with_nobody(), first.with_nobody()
    lane.begin(Bucket(2, 16), of_two)
    kept = lane.begin(Bucket(1, 16), of_one)
    later = state_of(2)
    later.tables = second.with_nobody()
    assert torch.equal(lane.begin(Bucket(2, 16), later).state.tables.wheels, second.wheels)
    assert torch.equal(kept.state.tables.wheels, waits)
    assert torch.equal(first.wheels, waits)


def test_what_cannot_be_captured_is_launched_piece_by_piece():
    class Refusing(Counted):
        def capture(self, memory, work):
            work()
            raise RuntimeError("operation not permitted when stream is capturing")

    lane = LaneGraphs(Refusing(), 512)
    alike = lane.begin(Bucket(2, 16), state_of(2))
    seen = []

    def work():
        seen.append(alike.state.turn)
        alike.state.turn += 1

    lane.run(alike, "layer", (), work)
    lane.run(alike, "layer", (), work)
    assert seen == [-1, 0, 0], "what a capture that failed has said is forgotten"
    assert lane.bucket_of(decoding(3, 4)) is None
