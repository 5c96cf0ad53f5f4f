"""What clients noticed of chaos, in numbers and as a picture."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.hostility.disasters import Disaster
from tools.hostility.streams import BUCKET_S, PacedStream

MOST_NAMED = 60  # faults whose kinds a picture says
RECOVERED = 0.8  # of the calm throughput
RECOVERED_OVER_S = 1.0
INK, QUIET, OURS, FAULT = "#22262a", "#7a7f85", "#2f5d8a", "#d9822b"


@dataclass(slots=True)
class Run:
    """What happened when, by time.monotonic(). In an hour it grows by a number for each tenth of a second.

    Attributes:
        calm_stall_s: the longest wait for a piece before the storm.
    """

    streams: list[PacedStream]
    disasters: list[Disaster] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    calm_from: float = 0.0
    storm_from: float = 0.0
    storm_until: float = 0.0
    calm_stall_s: float = 0.0

    def begin_storm(self, now: float) -> None:
        self.storm_from = now
        self.calm_stall_s = max((gap.seconds for one in self.streams for gap in one.gaps), default=0.0)
        self._forget_gaps(now)

    def settle(self, now: float) -> None:
        """What is measured of each fault so far is known: the next comes. Call it when all workers are there."""
        calm = self.rate(self.calm_from, self.storm_from)
        for one in self.disasters:
            if not one.is_settled:
                one.stall_s, one.is_settled = one.stall_of(self.streams), True
                one.recovery_s = self._recovery_s(one.began_at, now, calm)
        self._forget_gaps(now)

    def _forget_gaps(self, now: float) -> None:
        for stream in self.streams:
            stream.forget_gaps(now)

    def num_pieces(self, begin: float, end: float) -> int:
        pieces = self.streams[0].pieces
        return sum(pieces[bucket] for bucket in range(int(begin / BUCKET_S), int(end / BUCKET_S)))

    def rate(self, begin: float, end: float) -> float:
        """Pieces of text per second, of all streams."""
        return self.num_pieces(begin, end) / (end - begin) if end > begin else 0.0

    def _recovery_s(self, began_at: float, until: float, calm: float) -> float:
        """From then until a second in which the streams were nearly as fast as undisturbed; -1 where none came."""
        at = began_at
        while at + RECOVERED_OVER_S <= until:
            if self.rate(at, at + RECOVERED_OVER_S) >= RECOVERED * calm:
                return at - began_at
            at += BUCKET_S
        return -1.0


def differences(expected: str, given: str) -> dict[str, int]:
    """How an answer is wrong, in characters: those that differ before both end, and those too many or too few."""
    return {
        "changed": sum(one != other for one, other in zip(expected, given, strict=False)),
        "repeated": max(0, len(given) - len(expected)),
        "lost": max(0, len(expected) - len(given)),
    }


def summary(run: Run) -> dict[str, Any]:
    """Everything so far; times in seconds since the calm began."""
    until = run.storm_until or time.monotonic()
    calm = run.rate(run.calm_from, run.storm_from)
    streams = run.streams
    wrong = [(stream, differences(stream.text or "", text)) for stream in streams for text in stream.wrong]
    errors = [f"{stream.name}: {what}" for stream in streams for _, _, what in stream.errors]
    settled = [one for one in run.disasters if one.is_settled]
    stalls = sorted(one.stall_s for one in settled)
    first = int(run.calm_from / BUCKET_S)
    buckets, pieces = range(first, int(until / BUCKET_S)), streams[0].pieces
    return {
        "num_faults": len(settled),
        "num_answers": sum(stream.num_answers for stream in streams),
        "num_failed": sum(stream.num_errors for stream in streams),
        "num_changed_answers": sum(stream.num_wrong for stream in streams),
        **{f"{kind}_characters": sum(one[kind] for _, one in wrong) for kind in ("changed", "repeated", "lost")},
        "stall_median_ms": _rounded_ms(statistics.median(stalls)) if stalls else 0.0,
        "stall_max_ms": _rounded_ms(stalls[-1]) if stalls else 0.0,
        "calm_stall_ms": _rounded_ms(run.calm_stall_s),
        "calm_pieces_per_s": round(calm, 1),
        "throughput_lost": round(1 - run.rate(run.storm_from, until) / calm, 4) if calm else 0.0,
        "by_kind": by_kind(settled),
        "faults": [
            {
                "kind": one.kind,
                "what": one.what,
                "at_s": round(one.began_at - run.calm_from, 2),
                "stall_ms": _rounded_ms(one.stall_s),
                "recovery_s": round(one.recovery_s, 2),
                "whole_again_s": round(one.whole_at - one.began_at, 2),
            }
            for one in settled
        ],
        "errors": errors,
        "changed": [f"{stream.name}: {how}" for stream, how in wrong],
        "deaths": run.deaths,
        "bucket_s": BUCKET_S,
        "pieces": [pieces[bucket] for bucket in buckets],
    }


def by_kind(disasters: Sequence[Disaster]) -> dict[str, dict[str, float]]:
    """How often each kind of fault struck, and the streams' longest waits then."""
    kinds: dict[str, list[float]] = {}
    for one in disasters:
        kinds.setdefault(one.kind, []).append(one.stall_s)
    return {
        kind: {
            "count": len(stalls),
            "stall_median_ms": _rounded_ms(statistics.median(stalls)),
            "stall_max_ms": _rounded_ms(max(stalls)),
        }
        for kind, stalls in sorted(kinds.items())
    }


def _rounded_ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)


def write(output: Path, seen: dict[str, Any]) -> None:
    """Whoever reads it meanwhile has all that was written before, or all of this."""
    part = output.with_name(f"{output.name}.part")
    part.write_text(json.dumps(seen) + "\n")
    os.replace(part, output)


def draw(output: Path, seen: dict[str, Any]) -> None:
    """Writes `output`.svg and `output`.png: pieces per second, and each fault's stall."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    mpl.rcParams.update({"font.size": 8, "font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "msi"})
    figure, (rate, stalls) = pyplot.subplots(2, 1, figsize=(9.0, 4.4), sharex=True, height_ratios=(2, 1))
    per_second = round(1 / seen["bucket_s"])
    seconds = [sum(seen["pieces"][at : at + per_second]) for at in range(0, len(seen["pieces"]), per_second)]
    rate.step(range(len(seconds)), seconds, where="post", color=OURS, linewidth=1.0)
    rate.axhline(seen["calm_pieces_per_s"], color=QUIET, linewidth=0.6, linestyle=":")
    rate.set_ylabel("tokens/s", color=QUIET)
    rate.set_ylim(bottom=0)
    stalls.bar([one["at_s"] for one in seen["faults"]], [one["stall_ms"] for one in seen["faults"]], 1.0, color=FAULT)
    stalls.set_ylabel("stall, ms", color=QUIET)
    stalls.set_xlabel("seconds", color=QUIET)
    for panel in (rate, stalls):
        panel.tick_params(colors=QUIET, labelsize=7, length=2, width=0.5)
        panel.spines[["top", "right"]].set_visible(False)
        for one in seen["faults"]:
            panel.axvline(one["at_s"], color=FAULT, linewidth=0.5, alpha=0.6)
    for one in seen["faults"] if len(seen["faults"]) <= MOST_NAMED else ():
        rate.annotate(one["kind"], (one["at_s"], rate.get_ylim()[1]), fontsize=5, color=INK, rotation=75)
    figure.tight_layout()
    figure.savefig(output.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(output.with_suffix(".png"), dpi=200, metadata={"Software": None})
    pyplot.close(figure)
