"""What clients noticed of chaos, in numbers and as a picture."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.hostility.disasters import Disaster
from tools.hostility.streams import BUCKET_S, PacedStream

RECOVERED = 0.8  # of the calm throughput
RECOVERED_OVER_S = 1.0
INK, QUIET, OURS, FAULT = "#22262a", "#7a7f85", "#2f5d8a", "#d9822b"


@dataclass(slots=True)
class Run:
    """What happened when, by time.monotonic()."""

    streams: list[PacedStream]
    disasters: list[Disaster] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    calm_from: float = 0.0
    storm_from: float = 0.0
    storm_until: float = 0.0

    def num_pieces(self, begin: float, end: float) -> int:
        first, last = int(begin / BUCKET_S), int(end / BUCKET_S)
        return sum(stream.pieces[bucket] for stream in self.streams for bucket in range(first, last))

    def rate(self, begin: float, end: float) -> float:
        """Pieces of text per second, of all streams."""
        return self.num_pieces(begin, end) / (end - begin) if end > begin else 0.0

    def recovery_s(self, disaster: Disaster, calm: float) -> float:
        """From the fault until a second in which the streams were nearly as fast as undisturbed; -1 where none came."""
        following = [one.began_at for one in self.disasters if one.began_at > disaster.began_at]
        until = min(following, default=self.storm_until)
        at = disaster.began_at
        while at + RECOVERED_OVER_S <= until:
            if self.rate(at, at + RECOVERED_OVER_S) >= RECOVERED * calm:
                return at - disaster.began_at
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
    """Everything; times in seconds since the calm began."""
    calm = run.rate(run.calm_from, run.storm_from)
    streams = run.streams
    wrong = [(stream, differences(stream.text or "", text)) for stream in streams for text in stream.wrong]
    errors = [f"{stream.name}: {what}" for stream in streams for _, _, what in stream.errors]
    stalls = sorted(one.stall_s(streams) for one in run.disasters)
    first = int(run.calm_from / BUCKET_S)
    buckets = range(first, int(run.storm_until / BUCKET_S))
    return {
        "num_faults": len(run.disasters),
        "num_answers": sum(stream.num_answers for stream in streams),
        "num_failed": len(errors),
        "num_changed_answers": len(wrong),
        **{f"{kind}_characters": sum(one[kind] for _, one in wrong) for kind in ("changed", "repeated", "lost")},
        "stall_median_ms": _rounded_ms(statistics.median(stalls)) if stalls else 0.0,
        "stall_max_ms": _rounded_ms(stalls[-1]) if stalls else 0.0,
        "calm_stall_ms": _rounded_ms(calm_stall_s(run)),
        "calm_pieces_per_s": round(calm, 1),
        "throughput_lost": round(1 - run.rate(run.storm_from, run.storm_until) / calm, 4) if calm else 0.0,
        "by_kind": by_kind(run),
        "faults": [
            {
                "kind": one.kind,
                "what": one.what,
                "at_s": round(one.began_at - run.calm_from, 2),
                "stall_ms": _rounded_ms(one.stall_s(streams)),
                "recovery_s": round(run.recovery_s(one, calm), 2),
                "whole_again_s": round(one.whole_at - one.began_at, 2),
            }
            for one in run.disasters
        ],
        "errors": errors,
        "changed": [f"{stream.name}: {how}" for stream, how in wrong],
        "deaths": run.deaths,
        "bucket_s": BUCKET_S,
        "pieces": [sum(stream.pieces[bucket] for stream in streams) for bucket in buckets],
    }


def by_kind(run: Run) -> dict[str, dict[str, float]]:
    """How often each kind of fault struck, and the streams' longest waits then."""
    kinds: dict[str, list[float]] = {}
    for one in run.disasters:
        kinds.setdefault(one.kind, []).append(one.stall_s(run.streams))
    return {
        kind: {
            "count": len(stalls),
            "stall_median_ms": _rounded_ms(statistics.median(stalls)),
            "stall_max_ms": _rounded_ms(max(stalls)),
        }
        for kind, stalls in sorted(kinds.items())
    }


def calm_stall_s(run: Run) -> float:
    gaps = (gap for stream in run.streams for gap in stream.gaps)
    return max((gap.seconds for gap in gaps if run.calm_from <= gap.ended_at <= run.storm_from), default=0.0)


def _rounded_ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)


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
    for one in seen["faults"]:
        rate.annotate(one["kind"], (one["at_s"], rate.get_ylim()[1]), fontsize=5, color=INK, rotation=75)
    figure.tight_layout()
    figure.savefig(output.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(output.with_suffix(".png"), dpi=200, metadata={"Software": None})
    pyplot.close(figure)
