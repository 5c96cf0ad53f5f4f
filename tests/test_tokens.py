"""Greedy tokens equal transformers' in float32, whatever the layout, the lanes and the arrivals."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from msi import Engine, SamplingParams
from msi.net.auto import AutoTransport
from msi.net.rdma.transport import RdmaTransport
from msi.worker.torch_host import TorchHost
from tests.everyday import mostly_slow, thorough
from tests.fake_engine import fake_engine
from tests.loopback_verbs import Fabric, LoopbackDriver
from tests.reference import references, save_tiny

NUM_TOKENS = 12
LENGTHS = [1, 2, 15, 16, 17, 40, 64, 129, 300]
LAYOUTS = [
    (1, 1), (2, 2), pytest.param((1, 3), marks=pytest.mark.slow), pytest.param((3, 2), marks=pytest.mark.slow),
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    model = save_tiny(path)
    return path, references(model, LENGTHS, NUM_TOKENS)


async def tokens_of(engine, prompt, delay_s=0.0, **params):
    await asyncio.sleep(delay_s)
    params = SamplingParams(**{"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, **params})
    tokens = []
    async for output in engine.generate(prompt, params):
        tokens += output.token_ids
    return tuple(tokens)


async def check_equal(engine, expected, seed):
    chance = random.Random(seed)
    order = chance.sample(expected, len(expected))
    results = await asyncio.gather(*(tokens_of(engine, one.prompt, chance.uniform(0, 0.3)) for one in order))
    for one, tokens in zip(order, results, strict=True):
        assert tokens == one.tokens, f"prompt of {len(one.prompt)} tokens"


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}x{layout[1]}")
async def test_tokens_equal_transformers_in_process(checkpoint, layout, micro_batches):
    path, expected = checkpoint
    async with Engine.local(
        model=path,
        attention_workers=layout[0],
        expert_workers=layout[1],
        micro_batches=micro_batches,
        transport="inproc",
        threads_per_worker=1,
        slot_rows=48,
        max_num_seqs=8,
    ) as engine:
        await check_equal(engine, expected, seed=micro_batches)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "micro_batches"), [((1, 1), 2), ((2, 2), 3), ((3, 2), 1)])
async def test_tokens_equal_transformers_as_processes_over_shared_memory(checkpoint, layout, micro_batches):
    path, expected = checkpoint
    async with Engine.local(
        model=path,
        attention_workers=layout[0],
        expert_workers=layout[1],
        micro_batches=micro_batches,
        threads_per_worker=1,
        slot_rows=48,
        max_num_seqs=8,
    ) as engine:
        await check_equal(engine, expected, seed=0)


class CardHost(TorchHost):
    """The host of a real worker, with an RDMA card that exists in this process alone."""

    def __init__(self, settings, fabric):
        super().__init__(settings)
        self.fabric = fabric

    def new_transport(self, assignment):
        return RdmaTransport(LoopbackDriver(self.fabric), poller=self._device.poller)


class LoopCardHost(CardHost):
    """The same, but the event loop takes completions, as where the device is none of a thread of ours."""

    def new_transport(self, assignment):
        return RdmaTransport(LoopbackDriver(self.fabric))


class FarCardHost(CardHost):
    """As `auto` on a host that no other worker is on."""

    def new_transport(self, assignment):
        transport = AutoTransport("127.0.0.1", poller=self._device.poller, rdma=super().new_transport(assignment))
        transport._identity = str(id(self))
        return transport


@pytest.mark.slow
@pytest.mark.parametrize("host", [CardHost, LoopCardHost, FarCardHost])
async def test_tokens_equal_transformers_over_rdma(checkpoint, host, caplog):
    path, expected = checkpoint
    caplog.set_level("INFO")
    options = {"model": path, "attention_workers": 2, "expert_workers": 2, "micro_batches": 3, "slot_rows": 48}
    async with fake_engine(Fabric(), host, threads_per_worker=1, max_num_seqs=8, **options) as engine:
        await check_equal(engine, expected, seed=0)
    assert ("is reached by RDMA: both hosts have cards" in caplog.text) is (host is FarCardHost)
    assert "is reached by TCP" not in caplog.text


@pytest.mark.slow
async def test_tokens_equal_transformers_colocated(checkpoint):
    path, expected = checkpoint
    async with Engine.local(model=path, colocated=True, threads_per_worker=1) as engine:
        await check_equal(engine, expected, seed=0)


LONG = [5, 14, 30, 31, 60], 44  # prompt lengths, tokens of each answer
SCARCE = {"micro_batches": 2, "threads_per_worker": 1, "num_gpu_blocks_override": 11}  # 176 tokens of 49 to 104 each


async def check_equal_when_blocks_are_scarce(engine, expected):
    for _ in range(2):
        results = await asyncio.gather(*(tokens_of(engine, one.prompt, max_tokens=LONG[1]) for one in expected))
        assert results == [one.tokens for one in expected]
    (attention,) = (one.status for one in (await settled(engine)).workers if one.role == "attention")
    assert attention.counters["preemptions"] > 0
    assert attention.counters["prefix_hit_tokens"] > 0
    assert attention.counters["kv_blocks_evicted"] > 0


@pytest.mark.slow
async def test_tokens_equal_transformers_with_forced_preemption_and_prefix_hits(tmp_path):
    expected = references(save_tiny(tmp_path), *LONG)
    async with Engine.local(model=tmp_path, transport="inproc", **SCARCE) as engine:
        await check_equal_when_blocks_are_scarce(engine, expected)


async def settled(engine):
    """Counters after the next heartbeat."""
    await asyncio.sleep(1.5)
    return await engine.stats()


# -- the other families ------------------------------------------------------------------------------------------------

FAMILIES = ["qwen3", "qwen2", "olmoe", "dbrx", "glm4", "gpt_oss"]
SCARCE_OVER = dict(zip(["mixtral", *FAMILIES], itertools.cycle(["tcp", "shm"]), strict=False))  # in the full check


@pytest.fixture(scope="module")
def family_checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    model = save_tiny(path, family=request.param)
    return path, references(model, [1, 17, 64], NUM_TOKENS)


@pytest.mark.parametrize(
    ("layout", "micro_batches"),
    [
        ((2, 2), 2),
        thorough((1, 1), 1),
        pytest.param((1, 1), 2, marks=pytest.mark.slow),
        thorough((2, 2), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("family_checkpoint", mostly_slow(FAMILIES[::-1], keep=2), indirect=True, scope="module")
async def test_tokens_of_every_family_equal_transformers(family_checkpoint, layout, micro_batches):
    path, expected = family_checkpoint
    async with Engine.local(
        model=path,
        attention_workers=layout[0],
        expert_workers=layout[1],
        micro_batches=micro_batches,
        transport="inproc",
        threads_per_worker=1,
        slot_rows=48,
    ) as engine:
        await check_equal(engine, expected, seed=micro_batches)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family_checkpoint",
    [one if SCARCE_OVER[one] == "tcp" else thorough(one) for one in FAMILIES[::-1]],
    indirect=True,
    scope="module",
)
async def test_tokens_of_every_family_equal_transformers_as_processes_over_shared_memory(family_checkpoint):
    path, expected = family_checkpoint
    async with Engine.local(
        model=path, attention_workers=2, expert_workers=2, micro_batches=2, threads_per_worker=1, slot_rows=48
    ) as engine:
        await check_equal(engine, expected, seed=0)


@pytest.fixture(scope="module")
def long_checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(f"long-{request.param}")
    return path, references(save_tiny(path, family=request.param), *LONG)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("long_checkpoint", "transport"),
    [
        (family, transport) if SCARCE_OVER[family] == transport else thorough(family, transport)
        for family in SCARCE_OVER
        for transport in ("shm", "tcp")
    ],
    indirect=["long_checkpoint"],
    scope="module",
)
async def test_tokens_of_every_family_equal_transformers_when_blocks_are_scarce(long_checkpoint, transport):
    path, expected = long_checkpoint
    async with Engine.local(model=path, transport=transport, expert_workers=2, **SCARCE) as engine:
        await check_equal_when_blocks_are_scarce(engine, expected)


@pytest.mark.slow
async def test_tokens_equal_transformers_over_encrypted_rows(tmp_path):
    expected = references(save_tiny(tmp_path), *LONG)
    options = {"transport": "tcp", "encrypt_rows": True, "expert_workers": 2, **SCARCE}
    async with Engine.local(model=tmp_path, **options) as engine:
        await check_equal_when_blocks_are_scarce(engine, expected)
