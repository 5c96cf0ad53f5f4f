"""Decode passes of every size, run once and captured before the first that anybody asked for.

They are of fillers alone: rows that go to no expert. Says how far it is, as it may take long, and where nothing can be
captured. Knows the sizes, and how many there are; knows no tensors or layers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from msi.attention.graphs import Bucket, LaneGraphs

log = logging.getLogger(__name__)

SAID_EACH_S = 2.0


async def capture_all(
    lanes: Sequence[LaneGraphs | None],
    buckets: Sequence[Bucket],
    capture: Callable[[int, Bucket], Awaitable[None]],
    free_bytes: Callable[[], int],
) -> None:
    """Of lanes that have graphs, one size after another. Cancelling it leaves what is captured by then.

    Args:
        capture: of a lane; it ends, whatever becomes of it, and a lane of which nothing can be captured is given up.
        free_bytes: of the device's memory.
    """
    todo = [(lane, bucket) for bucket in buckets for lane, graphs in enumerate(lanes) if graphs is not None]
    if not todo:
        return
    started = said = time.monotonic()
    before = free_bytes()
    for number, (lane, bucket) in enumerate(todo):
        graphs = lanes[lane]
        assert graphs is not None
        if not graphs.is_eager:
            await capture(lane, bucket)
        if (now := time.monotonic()) - said > SAID_EACH_S:
            said = now
            log.info("decode passes captured: %d of %d sizes and lanes", number + 1, len(todo))
    num_graphs = sum(graphs.num_captured for graphs in lanes if graphs is not None)
    num_eager = sum(graphs.is_eager for graphs in lanes if graphs is not None)
    log.info(
        "%d graphs of decode passes of up to %d sequences captured in %.1f s, in %.0f MB; %d lanes of %d have none",
        num_graphs, max(bucket.num_seqs for bucket in buckets), time.monotonic() - started,
        max(0, before - free_bytes()) / 1e6, num_eager, len(lanes),
    )  # fmt: skip
