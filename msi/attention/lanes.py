"""Lanes: m coroutines over one device's queues are the ping-pong pipeline.

A lane takes its next micro-batch, launches its pass through all layers, waits for the tokens, reports, again. While its
rows are away at the experts the other lanes compute; nothing schedules this by hand, and there is no barrier across
lanes. Between the layers no coroutine runs: the device packs rows, the link posts them and opens the lane's gate when
the answers have landed. Knows how a pass goes; knows no sequences, tensors or sockets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msi.errors import TransportError
from msi.net.dispatch_link import DispatchLink
from msi.net.passes import Gates
from msi.types import MicroBatch, Sampled


class AttentionCompute(Gates, Protocol):
    """The attention half of the model on a device, whose queues it keeps a few layers ahead."""

    def begin(self, lane: int, micro_batch: MicroBatch, first: int, link: DispatchLink) -> None:
        """What the pass computes that `launch` is called for next; `link.failed` is called where that raises. It uses
        the placement that is used now to its end.
        """

    def launch(self, lane: int, first: int, link: DispatchLink) -> None:
        """A pass whose turns are numbered from `first`: of each layer, once the answers to the turn before have landed,
        attention and router, whose rows go straight into the outboxes; then `link.packed`. After the last layer the
        tokens are chosen.
        """

    @property
    def is_whole(self) -> bool:
        """Whether it has all experts, too: its passes are run by `run_whole` alone."""

    async def run_whole(self, lane: int, micro_batch: MicroBatch, within_s: float) -> Sampled:
        """A pass through both halves. Raises what a computation raised; TimeoutError: nothing was computed in time."""

    async def sampled(self, lane: int) -> Sampled:
        """The next token of each of the micro-batch's `logit_rows`; raises what choosing them raised."""


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

    def hold_is_over(self, error: TransportError) -> None:
        """What passes cannot do without has been missing for as long as requests are held."""


async def run_lane(lane: int, batches: MicroBatches, compute: AttentionCompute, link: DispatchLink) -> None:
    """One lane, for ever. Cancel it to stop; what was in flight is then lost."""
    while True:
        try:
            await link.nodes.wait_complete()
        except TransportError as error:
            batches.hold_is_over(error)
            continue
        micro_batch = await batches.next(lane)
        try:
            sampled = await run_pass(lane, micro_batch, compute, link, batches.may_continue)
        except Exception as error:  # whatever it is, this lane and the others go on
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
    """One micro-batch through the model. When it raises, or is cancelled, the lane is ready for another pass.

    Raises:
        TransportError: an expert node was lost on the way and nobody stood in for it in time, or it refused.
        TimeoutError: this device computed nothing for too long.
        Exception: what a computation raised.
    """
    if compute.is_whole:
        return await compute.run_whole(lane, micro_batch, link.timeout_s)
    first = link.begin(lane, compute, may_continue)
    try:
        compute.begin(lane, micro_batch, first, link)
        compute.launch(lane, first, link)
        await link.passed(lane)
        sampled = await compute.sampled(lane)
        link.end(lane)
    except BaseException:
        link.give_up(lane)
        raise
    return sampled
