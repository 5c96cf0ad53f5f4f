"""Control messages that are lost on their way, under a virtual clock: nothing hangs, and no token is missing unsaid."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from msi.net.control_inproc import InprocClient, InprocServer
from msi.planner.stage_costs import ConstantCosts
from msi.simulator.deployment import LIMITS, Deployment
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival
from tests.everyday import mostly_slow

NUM_TOKENS = 60
DEPLOYMENT = Deployment(
    num_layers=4,
    num_experts=8,
    top_k=2,
    num_attention=2,
    num_expert=2,
    num_micro_batches=2,
    limits=replace(LIMITS, num_gpu_blocks_override=400),
)
COSTS = ConstantCosts(1e-3, 1e-3, 0.2e-3, 0.3e-3)
ARRIVALS = [Arrival(index * 0.1, 4, NUM_TOKENS) for index in range(40)]
# what is said once, and what says it again; without these, tokens are still all there
SAID_ONCE = {
    "Assignment", "WorkerReady", "Linked", "Topology", "UseLanes", "Welcome", "Fence", "InstanceStatus", "HeartbeatAck",
    "ClientHeartbeat",
}  # fmt: skip


def lose(monkeypatch, seed, share, names=None):
    """From now on this share of the messages is lost."""
    chance = random.Random(seed)

    def is_lost(message):
        return (names is None or type(message).__name__ in names) and chance.random() < share

    for end in (InprocServer, InprocClient):
        send = end.send

        def lossy(self, *words, send=send):
            if not is_lost(words[-1]):
                send(self, *words)

        monkeypatch.setattr(end, "send", lossy)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05])
@pytest.mark.parametrize("seed", mostly_slow(range(4)))
def test_whatever_is_lost_every_request_ends_with_all_its_tokens_or_an_error(monkeypatch, seed, share):
    lose(monkeypatch, seed, share)
    report = simulate(replace(DEPLOYMENT, num_micro_batches=seed % 3), COSTS, ARRIVALS, limit_s=600)
    assert len(report.requests) == len(ARRIVALS)
    for one in report.requests:
        assert one.error or one.num_tokens == NUM_TOKENS
        assert one.end_s - one.arrival_s < 60


@pytest.mark.parametrize("num_micro_batches", [0, 2])
@pytest.mark.parametrize("seed", mostly_slow(range(4)))
def test_what_is_said_once_is_said_again_until_it_has_come(monkeypatch, seed, num_micro_batches):
    lose(monkeypatch, seed, 0.3, SAID_ONCE)
    report = simulate(replace(DEPLOYMENT, num_micro_batches=num_micro_batches), COSTS, ARRIVALS, limit_s=600)
    assert not report.failed, report.failed
    assert {one.num_tokens for one in report.requests} == {NUM_TOKENS}
