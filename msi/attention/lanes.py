"""Lanes: m coroutines over one compute queue are the ping-pong pipeline.

A lane takes its next micro-batch, runs it through all layers, samples, reports, again. While its rows are away at the
experts the other lanes compute; nothing schedules this by hand, and there is no barrier across lanes. Knows how a pass
goes; knows no sequences, tensors or sockets.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from msi.net.dispatch_link import DispatchLink, Turn
from msi.types import MicroBatch, Sampled


class AttentionCompute(Protocol):
    """The attention half of the model on a device. Calls enqueue work, which runs in order."""

    num_layers: int

    def begin(self, lane: int, micro_batch: MicroBatch) -> None:
        """A pass begins: its tokens are embedded, and it uses the placement that is used now to its end."""

    def attention_route_pack(self, lane: int, layer: int, turn: Turn) -> None:
        """Attention and router of one layer; the rows for each expert node go straight into its outbox.

        Then `turn.post` is called where the work ran: a post that waited for the event loop would wake it once more
        per layer. Where the work failed, `turn.fail`.
        """

    def combine(self, lane: int, layer: int) -> None:
        """Adds what the expert nodes sent back, from the landing slots of the lane."""

    def sample(self, lane: int) -> Awaitable[Sampled]:
        """The next token of each of the micro-batch's `logit_rows`."""


class MicroBatches(Protocol):
    """Where lanes get their work and leave their results."""

    async def next(self, lane: int) -> MicroBatch:
        """Waits for work. Cancellation loses none."""

    def may_continue(self, lane: int) -> bool:
        """Whether this lane may have a micro-batch right after the one in flight."""

    def finish(self, lane: int, micro_batch: MicroBatch, sampled: Sampled) -> None:
        """A pass is through."""

    def fail(self, lane: int, micro_batch: MicroBatch, error: Exception) -> None:
        """A pass was given up: a peer was lost (TransportError), or whatever else came out of it."""


async def run_lane(lane: int, batches: MicroBatches, compute: AttentionCompute, link: DispatchLink) -> None:
    """One lane, for ever. Cancel it to stop; what was in flight is then lost."""
    while True:
        await link.wait_complete()
        micro_batch = await batches.next(lane)
        try:
            sampled = await run_pass(lane, micro_batch, compute, link, batches.may_continue)
        except Exception as error:  # whatever it is, this lane and the others go on
            link.skip_to(lane, compute.num_layers)
            batches.fail(lane, micro_batch, error)
        else:
            batches.finish(lane, micro_batch, sampled)


async def run_pass(
    lane: int,
    micro_batch: MicroBatch,
    compute: AttentionCompute,
    link: DispatchLink,
    may_continue: Callable[[int], bool],
) -> Sampled:
    """One micro-batch through the model.

    Raises:
        TransportError: an expert node was lost on the way, or refused.
        TimeoutError: this device computed nothing for too long.
        Exception: what a computation raised.
    """
    last = compute.num_layers - 1
    compute.begin(lane, micro_batch)
    link.begin(lane)
    for layer in range(compute.num_layers):
        turn = link.open(lane, more=layer < last or may_continue(lane))
        compute.attention_route_pack(lane, layer, turn)
        await link.landed(turn)
        compute.combine(lane, layer)
    sampled = await compute.sample(lane)
    link.check(turn)  # the last answers were read only now
    return sampled
