"""Stop strings: where a text ends, what may still become one, and that long ones cost next to nothing."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from msi.sampling_params import MAX_CHOICES, MAX_STOP_CHARS, MAX_STOP_STRINGS
from msi.text.stop_strings import StopSearch
from msi.text.text_stream import text_streams
from msi.types import SamplingParams

strings = st.text("ab€", min_size=1, max_size=6)


@given(stop=st.lists(strings, max_size=4), pieces=st.lists(st.text("ab€c", min_size=1, max_size=9), max_size=12))
def test_a_text_ends_where_the_first_stop_string_begins_and_holds_back_what_may_become_one(stop, pieces):
    search, text = StopSearch(tuple(stop)), ""
    for piece in pieces:
        text += piece
        found = search.push(piece)
        start = min((text.find(one) for one in stop if one in text), default=len(text))
        assert len(text) - found.start == start
        if found.start:
            assert text[start : len(text) - found.end] in stop
            return
        ends = [text[at:] for at in range(len(text)) if any(one.startswith(text[at:]) for one in stop)]
        assert found.num_open == max(map(len, ends), default=0)


@given(st.integers(0, 12), st.integers(1, 3), st.integers(1, 20))
def test_strings_that_repeat_themselves_are_found(num_before, period, times):
    unit = "aab"[:period]
    stop = unit * times + "c"
    text = unit * num_before + stop
    search = StopSearch((stop,))
    starts = [search.push(character).start for character in text]
    assert starts == [0] * (len(text) - 1) + [len(stop)]


def test_the_longest_stop_strings_for_the_most_choices_take_little_memory():
    """A table of all their beginnings took 134 MB for each choice, and a process of 17 GB with it."""
    stop = tuple(chr(ord("a") + index) * MAX_STOP_CHARS for index in range(MAX_STOP_STRINGS))
    params = SamplingParams(stop=stop, n=MAX_CHOICES)
    tracemalloc.start()
    try:
        streams = text_streams(None, (1,), params)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(streams) == MAX_CHOICES
    assert peak_bytes < 4 * 1024 * 1024
