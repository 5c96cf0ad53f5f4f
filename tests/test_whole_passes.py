"""Colocated passes, which go through both halves on one thread: what fails in one, and who is served after it."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest

from msi import Engine
from msi.attention.forward import Forward
from msi.attention.whole import WholeQueues
from msi.device.compute_thread import Program
from msi.device.cpu import CpuDevice, has_bf16_units
from msi.experts.half import ExpertHalf
from msi.kernels.native.compiled import native_library
from msi.kernels.native.layers import NativeLayers
from msi.meter import StageMeter
from tests.test_tokens import tokens_of
from tests.tiny import save_tiny

OPTIONS = {"colocated": True, "transport": "inproc", "threads_per_worker": 1, "micro_batches": 2, "slot_rows": 48}
PROMPTS = [tuple(range(3, 3 + length)) for length in (5, 17, 40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    return path


async def answers(engine):
    return await asyncio.gather(*(tokens_of(engine, prompt, max_tokens=6) for prompt in PROMPTS))


def raises_now_and_then(monkeypatch, of, name):
    """One call in five of a method, after it has begun to serve."""
    real, calls = getattr(of, name), iter(range(1, 10**6))

    def call(*given):
        if next(calls) % 5 == 3:
            raise RuntimeError("out of luck")
        return real(*given)

    monkeypatch.setattr(of, name, call)


async def test_both_halves_compute_and_are_measured_and_no_rows_travel(model):
    async with Engine.local(model=model, **OPTIONS) as engine:
        (worker,) = engine._instance.workers
        role, experts = worker.life.attention, worker.life.experts
        await answers(engine)
        assert role.half.is_whole
        assert role.counters().rows_sent == experts.counters().rows_landed == 0
        assert role.half.meter.count == experts.half.meter.count == 3 * role.counters().passes
        assert min(role.measuring.times().attention_s, role.measuring.times().expert_s) > 0
        assert all(sum(of_layer.values()) > 0 for of_layer in experts.half.rows_by_layer())


@pytest.mark.parametrize(
    ("of", "name"),
    [(ExpertHalf, "run_here"), (Forward, "begin"), (Forward, "route"), (Forward, "sample")],
    ids=lambda one: one if isinstance(one, str) else one.__name__,
)
async def test_a_pass_that_raises_is_tried_again_one_by_one_and_the_next_ones_are_right(model, monkeypatch, of, name):
    async with Engine.local(model=model, **OPTIONS) as engine:
        wanted = await answers(engine)
    async with Engine.local(model=model, **OPTIONS) as engine:
        with monkeypatch.context() as patched:
            raises_now_and_then(patched, of, name)
            found = await asyncio.gather(
                *(tokens_of(engine, prompt, max_tokens=6) for prompt in PROMPTS), return_exceptions=True
            )
        assert all(one == right or "out of luck" in str(one) for one, right in zip(found, wanted, strict=True))
        assert await answers(engine) == wanted


async def test_of_a_pass_that_was_given_up_nothing_more_is_computed(model, monkeypatch):
    entered, go_on, layers = threading.Event(), threading.Event(), []

    def stands_still(half, layer, *given):
        layers.append(layer)
        entered.set()
        assert go_on.wait(20)

    async with Engine.local(model=model, **OPTIONS) as engine:
        (worker,) = engine._instance.workers
        role = worker.life.attention
        wanted = await answers(engine)
        batch = role.measuring._synthetic(1)
        with monkeypatch.context() as patched:
            patched.setattr(ExpertHalf, "run_here", stands_still)
            with pytest.raises(TimeoutError, match="nothing was computed"):
                await role.half.run_whole(0, batch, 3.0)
            assert entered.is_set()
            go_on.set()
            await role.half.run_whole(1, batch, 20.0)
        assert layers == [0, 0, 1, 2]
        assert await answers(engine) == wanted


@pytest.mark.skipif(native_library() is None or not has_bf16_units(), reason="bfloat16 is not computed natively here")
async def test_decode_passes_of_bfloat16_go_through_all_layers_in_one_call_with_the_same_tokens(tmp_path, monkeypatch):
    save_tiny(tmp_path, head_dim=32)
    options = {**OPTIONS, "dtype": "bfloat16"}
    with monkeypatch.context() as patched:
        patched.setattr(NativeLayers, "of", lambda *given, **named: None)
        async with Engine.local(model=tmp_path, **options) as engine:
            wanted = await answers(engine)
    async with Engine.local(model=tmp_path, **options) as engine:
        assert await answers(engine) == wanted
        (worker,) = engine._instance.workers
        half, experts = worker.life.attention.half, worker.life.experts.half
        in_one_call = sum(len(programs[0].meter.recent) for programs in half._in_one_call)
        assert 0 < in_one_call < worker.life.attention.counters().passes
        assert half.meter.count == experts.meter.count == 3 * worker.life.attention.counters().passes
        assert half.meter.median_s > 0
        assert experts.meter.median_s > 0


async def test_passes_of_two_lanes_run_through_their_programs_in_order():
    device, log = CpuDevice(num_threads=1), []

    def program(lane, place):
        return Program(partial(log.append, (lane, place)), log.append, StageMeter(), str(place), lane)

    programs = [[program(lane, place) for place in range(4)] for lane in range(2)]
    queues = WholeQueues(device, 2, lambda: 0.0)
    try:
        for _ in range(3):
            await asyncio.gather(*(queues.run(lane, programs[lane], 20.0) for lane in range(2)))
    finally:
        queues.close()
        await device.close()
    assert [place for lane, place in log if lane == 1] == 3 * [0, 1, 2, 3]
    assert len(log) == 24
