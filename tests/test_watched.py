"""What workers tell while somebody watches: spans of windows that belong together, rows by layer; all of it bounded."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.control.client_messages import WorkerStats
from msi.control.counters import AttentionCounters, ExpertCounters, LayerRows
from msi.control.messages import COORDINATOR_END, WORKER_END, Heartbeat
from msi.control.watched import MAX_SPANS, SPAN, WINDOW_S, Span, SpanWindow, Watched, Way
from msi.control.worker_status import WorkerStatus
from msi.server.pingpong import ExpertCounts, PingpongWindows, picture
from msi.types import StageTimes
from msi.worker.watching import SpanRecorder

spans = st.builds(
    Span,
    st.sampled_from(["attention", "experts", "sample", "expert-0"]),
    st.integers(0, 63),
    st.booleans(),
    st.integers(-(2**31), 2**31 - 1),
    st.integers(0, 2**32 - 1),
)
layer_rows = st.dictionaries(st.integers(0, 4095), st.integers(0, 2**40), max_size=40)


@given(st.lists(spans, max_size=40), st.lists(layer_rows, max_size=5))
def test_what_is_told_survives_the_wire(given_spans, rows):
    window = SpanWindow.of(7, 1.5, 300_000, given_spans)
    watched = Watched((window,), (Way("expert-0", "shared memory"),))
    sent = Heartbeat("a", 1, WorkerStatus(0, 0, 0, 0, 0, StageTimes(), watched=watched, layer_rows=LayerRows.of(rows)))
    status = COORDINATOR_END.decode(WORKER_END.encode(sent)).status
    assert status.watched == watched
    assert list(status.watched.windows[0].spans()) == given_spans
    assert status.layer_rows.by_expert() == rows


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: SpanWindow(1, 0.0, 1, ("a",), b"123"), "3 bytes and 1 names are no spans"),
        (lambda: SpanWindow(1, 0.0, 1, ("a",), bytes(SPAN.size * (MAX_SPANS + 1))), "are no spans of a window"),
        (lambda: SpanWindow(1, 0.0, 1, ("a\nb",), b""), "is no name of a span"),
        (lambda: SpanWindow(1, 0.0, 1, ("a",) * 300, b""), "300 names"),
        (lambda: Watched(windows=(SpanWindow.of(1, 0.0, 1, []),) * 3), "3 windows"),
        (lambda: LayerRows(((0, 1), (0, 1)), ((1, 2),)), "2 rows of 1 layers, experts of 2"),
        (lambda: LayerRows(((0, 1),), ((1, 2), (1,))), "1 rows of 2 experts of layer 1 are no such count"),
        (lambda: LayerRows(((0, 0),), ((1, 2),)), "2 rows of 2 experts of layer 0 are no such count"),
        (lambda: LayerRows(((0, 1),), ((1, -2),)), "2 rows of 2 experts of layer 0 are no such count"),
        (lambda: LayerRows(((0,),), ((1,),) * 4097), "4097 rows of 4097 layers, experts of 1"),
        (
            lambda: LayerRows((tuple(range(4096)),), (tuple(range(4096)),) * 65),
            "266240 rows of 65 layers, experts of 1",
        ),
        (lambda: Watched(ways=(Way("a", "b" * 400),)), "is no way to 'a'"),
    ],
)
def test_what_nobody_could_show_is_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


def test_names_that_are_none_are_left_out():
    assert list(SpanWindow(1, 0.0, 1, ("a",), SPAN.pack(9, 0, 0, 1, 2)).spans()) == []


# -- the recorder ------------------------------------------------------------------------------------------------------


class Clocks:
    """One that counts from the machine's start, and one of the wall."""

    def __init__(self, apart_s):
        self.now, self.apart_s = 100.25, apart_s

    def clock(self):
        return self.now

    def wall(self):
        return self.now + self.apart_s


@given(st.floats(0, 2e9), st.lists(st.tuples(st.floats(0, 5), st.floats(0, 0.9)), max_size=60))
def test_a_recorder_tells_each_window_once_and_what_lies_in_it(apart_s, given_spans):
    clocks = Clocks(apart_s)
    recorder = SpanRecorder(clocks.clock, clocks.wall)
    began = clocks.now
    for start_s, duration_s in given_spans:
        recorder.span("attention", 1, began + start_s, began + start_s + duration_s)
    told = []
    for _ in range(9):
        clocks.now += 1.0
        told += recorder.windows()
    numbers = [window.number for window in told]
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= 7, "one each second"
    for window in told:
        for span in window.spans():
            assert span.start_us < WINDOW_S * 1e6
            assert span.duration_us >= 0
            assert any(abs(window.began_s + span.start_us / 1e6 - began - start_s) < 1e-3 for start_s, _ in given_spans)


def test_windows_of_two_workers_of_a_host_have_the_same_numbers_and_begin_together():
    clocks = Clocks(1.7e9 + 0.123)
    recorders = [SpanRecorder(clocks.clock, clocks.wall) for _ in range(2)]
    told = [[], []]
    for _ in range(40):
        clocks.now += 0.2501
        index = random.Random(clocks.now).randrange(2)
        told[index] += recorders[index].windows()
    shared = {one.number for one in told[0]} & {one.number for one in told[1]}
    assert len(shared) >= 3
    for number in shared:
        (began,) = {round(one.began_s, 5) for of in told for one in of if one.number == number}
        assert abs((began + clocks.apart_s) - number) < 1e-3


def test_a_window_that_is_full_says_how_far_it_goes():
    clocks = Clocks(0.0)
    recorder = SpanRecorder(clocks.clock, clocks.wall)
    for index in range(3 * MAX_SPANS):
        start = 101.0 + index * 1e-4
        recorder.span("attention", 0, start, start + 5e-5)
    clocks.now = 101.9
    (window,) = recorder.windows()
    assert len(list(window.spans())) == MAX_SPANS
    assert window.until_us == pytest.approx(MAX_SPANS * 100, abs=2)


def test_a_recorder_keeps_little_however_much_is_computed():
    clocks = Clocks(0.0)
    recorder = SpanRecorder(clocks.clock, clocks.wall)
    for index in range(20_000):
        clocks.now += 5e-4
        recorder.span("attention", 0, clocks.now - 4e-4, clocks.now)
        if index % 2000 == 1999:
            assert len(recorder.windows()) <= 2
    assert sum(map(len, recorder._windows.values())) <= 2 * MAX_SPANS


# -- pictures ----------------------------------------------------------------------------------------------------------


def worker(worker_id, *windows, host="h", state="ready", watched=None, role=None, **status):
    role = role or worker_id.split("-")[0]
    told = watched or (Watched(tuple(windows)) if windows else None)
    status = WorkerStatus(0, 0, 0, 0, 0, StageTimes(), watched=told, **status)
    return WorkerStats(worker_id, role, 1, host, 0, state, status)


def window(number, began_s=0.0, spans=(), until_us=1000):
    return SpanWindow.of(number, began_s, until_us, spans)


def test_workers_of_one_host_share_a_clock_and_others_do_not():
    span = Span("attention", 0, False, 100, 50)
    told = [
        (worker("attention-0"), window(5, 10.0, [span])),
        (worker("attention-1"), window(5, 10.0002, [span])),
        (worker("expert-0", host="other"), window(5, 99.0, [Span("experts", 0, False, 100, 50)])),
    ]
    made = picture(5, told)
    assert [row.bars for row in made.rows] == [[(0, 0, 100, 50)], [(0, 0, 300, 50)], [(1, 0, 100, 50)]]
    assert made.names == ["attention", "experts"]
    assert [row.busy for row in made.rows] == [0.05] * 3


def test_a_colocated_worker_is_two_rows():
    both = [Span("attention", 0, False, 0, 400), Span("experts", 0, False, 400, 500), Span("a", 0, True, 0, 9)]
    made = picture(1, [(worker("attention-0"), window(1, 0.0, both))])
    assert [(row.role, row.busy, len(row.bars), len(row.away)) for row in made.rows] == [
        ("attention", 0.4, 1, 1),
        ("expert", 0.5, 1, 0),
    ]


def test_a_window_is_shown_once_all_have_told_it_and_who_is_lost_or_late_is_not_waited_for():
    windows = PingpongWindows()
    assert windows.take([worker("attention-0", window(5)), worker("expert-0")]).number == 5
    assert windows.take([worker("attention-0", window(6)), worker("expert-0", window(5))]) is None
    assert windows.take([worker("attention-0", window(6)), worker("expert-0", window(6))]).number == 6
    assert windows.take([worker("attention-0", window(6)), worker("expert-0", window(6))]) is None, "it was shown"
    made = windows.take([worker("attention-0", window(7)), worker("expert-0", window(6), state="lost")])
    assert (made.number, [row.worker_id for row in made.rows]) == (7, ["attention-0"])
    windows.take([worker("attention-0", window(8)), worker("attention-1", window(8))])
    assert windows.take([worker("attention-0", window(11)), worker("attention-1", window(8))]).number == 11


def test_only_so_many_rows_are_told_attention_first():
    told = [(worker(f"expert-{index}"), window(1)) for index in range(40)]
    made = picture(1, told)
    assert (len(made.rows), made.num_left_out) == (24, 16)


# -- experts -----------------------------------------------------------------------------------------------------------


def holder(worker_id, experts, counts, incarnation=0):
    """`experts`: of all layers, or of each."""
    one = worker(worker_id, watched=Watched(), experts=ExpertCounters())
    one = replace(one, status=replace(one.status, layer_rows=LayerRows(experts, counts)))
    return WorkerStats(worker_id, "expert", 1, "h", incarnation, "ready", one.status)


def test_rows_are_told_once_by_layer_and_the_experts_own_numbers():
    counts = ExpertCounts()
    differ = ((0,), (1,))
    was = [holder("expert-0", ((0, 2),), ((1, 2), (3, 4))), holder("expert-1", differ, ((5,), (6,)))]
    assert counts.take(was) is None, "what was computed before somebody watched"
    now = [holder("expert-0", ((0, 2),), ((2, 4), (6, 8))), holder("expert-1", differ, ((10,), (12,)))]
    first = counts.take(now)
    assert first.rows == [[6, 0, 2], [3, 6, 4]]
    assert [(one.worker_id, one.rows) for one in first.workers] == [("expert-0", 10), ("expert-1", 11)]
    now[0] = holder("expert-0", ((0, 2, 3),), ((2, 6, 1), (6, 8, 0)))  # which has come
    assert counts.take(now).rows == [[0, 0, 2, 1], [0, 0, 0, 0]]
    assert counts.take(now) is None


def test_counts_that_fall_are_nothing_new_and_say_nothing_of_others():
    counts = ExpertCounts()
    counts.take([holder("expert-0", ((0, 1),), ((9, 5), (3, 3)))])
    assert counts.take([holder("expert-0", ((0, 1),), ((4, 6), (3, 5)))]).rows == [[0, 1], [0, 2]]


def test_copies_of_an_expert_count_together_and_a_new_life_counts_anew():
    counts = ExpertCounts()
    assert counts.take([holder("expert-0", ((0, 1),), ((0, 0),)), holder("expert-1", ((1, 0),), ((0, 0),))]) is None
    two = [holder("expert-0", ((0, 1),), ((4, 1),)), holder("expert-1", ((1, 0),), ((2, 3),))]
    assert counts.take(two).rows == [[7, 3]]
    assert counts.take([holder("expert-0", ((0, 1),), ((1, 0),), incarnation=1)]) is None
    assert counts.take([holder("expert-0", ((0, 1),), ((2, 0),), incarnation=1)]).rows == [[1, 0]]


def test_workers_that_do_not_count_are_left_out():
    two = [worker("attention-0", attention=AttentionCounters()), worker("expert-1")]
    assert ExpertCounts().take(two) is None
