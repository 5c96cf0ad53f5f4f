"""Where a decode pass's time goes: which passes count, and what is made of their operations."""

from __future__ import annotations

import pytest

from tools.profile_pass import PYTHON, WAITS, Part, Recorder, Span, passes_of, profile_of, table


def one_pass(start: float, num_rows: int, product_s: float = 0.25) -> list[Span]:
    """Of two layers, a second long."""
    return [
        Span("experts", 0, start + 0.3, product_s, 100, num_rows),
        Span("experts", 1, start + 0.9, product_s, 100, num_rows),
        Span("logits", 1, start + 1.0, 0.1, 0, num_rows),
    ]


def test_passes_count_that_follow_one_of_the_whole_batch():
    spans = [*one_pass(0, 8), *one_pass(1, 4), *one_pass(2, 4), *one_pass(3, 4), *one_pass(4, 1)]
    assert passes_of(spans, 4) == [(1.0, one_pass(2, 4)), (1.0, one_pass(3, 4))]
    assert passes_of(spans, 8) == []


def test_a_profile_is_of_median_passes_and_adds_up():
    spans = [span for start in range(4) for span in one_pass(start, 2, product_s=0.2 if start == 2 else 0.25)]
    profile = profile_of(spans, 2, busy=0.75)
    assert (profile.pass_s, profile.num_passes, profile.layer_s) == (1.0, 3, (0.25, 0.35))
    assert {part.name: part.calls for part in profile.parts} == {"experts": 2, "logits": 1, PYTHON: 0, WAITS: 0}
    assert profile.parts[0] == Part("experts", 2, 0.5, 200)
    assert sum(part.seconds for part in profile.parts) == pytest.approx(profile.pass_s)
    shown = table(profile, roof_gb_per_s=1e-6)
    assert shown.splitlines()[1].split() == ["experts", "500.00", "50.0", "2", "0.0", "0.0", "40"]


def test_a_batch_that_never_decoded_as_a_whole_has_no_profile():
    with pytest.raises(ValueError, match="give a longer --output-len"):
        profile_of(one_pass(0, 2), 3, busy=1.0)


def test_an_operation_is_timed_without_those_inside_it_and_each_layer_has_its_own():
    recorder = Recorder()
    inner = recorder.timed("rope_and_write", lambda: sum(range(200_000)))
    outer = recorder.timed("gated", lambda: (inner(), inner()), lambda: 7)
    outer()
    recorder.timed("logits", lambda: None)()
    inner()
    names = [(span.name, span.layer) for span in recorder.spans]
    assert names == [("rope_and_write", 0), ("rope_and_write", 1), ("gated", 1), ("logits", 1), ("rope_and_write", 0)]
    first, second, whole = recorder.spans[:3]
    assert whole.own_s < first.own_s + second.own_s
