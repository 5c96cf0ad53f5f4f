"""The first page's picture: which pass is shown, and that what was recorded can be drawn again."""

from __future__ import annotations

import json

from tools import draw_pingpong
from tools.draw_pingpong import RESULTS, Recording, Span, busy_share, journeys, usual_pass


def events(pass_ms):
    """One lane of two layers, whose passes take so long in all."""
    now = 0.0
    for duration in pass_ms:
        for name, share in (
            ("attention", 0.2),
            ("experts", 0.2),
            ("attention", 0.2),
            ("experts", 0.3),
            ("sample", 0.1),
        ):
            yield {"ph": "X", "name": name, "args": {"lane": 0}, "ts": now * 1e3, "dur": duration * share * 1e3}
            now += duration * share


def test_the_pass_that_is_shown_takes_the_median_time_and_its_layers_are_counted():
    spans = usual_pass(
        [{"ph": "M"}, *events([50.0] * draw_pingpong.SETTLED + [10.0, 90.0, 20.0, 30.0, 40.0, 10.0, 10.0])]
    )
    first = spans[:5]
    assert [(span.name, span.layer) for span in first] == [
        ("attention", 1), ("experts", 1), ("attention", 2), ("experts", 2), ("sample", 1),
    ]  # fmt: skip
    assert (first[0].start_ms, first[-1].end_ms) == (0.0, 30.0)


def test_what_is_busy_is_what_spans_cover_of_the_window():
    spans = (Span("attention", 0, -5.0, 10.0, 1), Span("experts", 0, 5.0, 5.0, 1), Span("sample", 0, 10.0, 20.0, 1))
    recording = Recording(1, 1.0, 0.0, spans)
    assert busy_share(recording, 1.0, 20.0) == 0.75
    assert busy_share(recording, 0.0, 20.0) == 0.25
    assert journeys(spans) == [(spans[0], spans[1]), (spans[1], spans[2])]


def test_what_was_recorded_is_drawn_again(tmp_path):
    recorded = json.loads((RESULTS / "pingpong.json").read_text())
    draw_pingpong.draw(recorded, tmp_path / "again")
    assert "<svg" in (tmp_path / "again.svg").read_text()
    assert (tmp_path / "again.png").stat().st_size > 10_000
