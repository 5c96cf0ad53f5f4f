"""Members and clients that hold the secret and say whatever the codec lets pass: they hurt nobody but themselves."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections import Counter

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from msi.control.client_messages import ClientHello, Stats, StatsRequest, Welcome
from msi.control.coordinator import Coordinator
from msi.control.counters import AttentionCounters, ExpertCounters, ProcessCounters
from msi.control.members import NO_STATUS, InstancePlan
from msi.control.messages import (
    CLIENT_END,
    COORDINATOR_END,
    FROM_CLIENT,
    FROM_WORKER,
    PROTOCOL_VERSION,
    Heartbeat,
    Linked,
    PeerLost,
    Refused,
    Submit,
    WorkerHello,
    WorkerReady,
)
from msi.errors import ProtocolError
from msi.placement import place_evenly
from msi.precision import Precision
from msi.server.metrics import Metrics
from msi.settings import SchedulerLimits
from msi.types import Request, SamplingParams

PLAN = InstancePlan("token", 2, 2, False, place_evenly(8, 2), SchedulerLimits(1024, 64, 512))
FLOAT32 = Precision.of("float32")
IDS = ["attention-0", "attention-1", "expert-0", "expert-1"]
NUMBERS = [0, 1, 2, 3, -1, 64, 2**16 - 1, 2**31, 2**40 - 1, 2**60 - 1, 2**63 - 1, 2**64 - 1]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-310, 1e300, math.inf, -math.inf, math.nan]
TEXTS = [*IDS, "", "attention", "expert", "worker", "print", "float32", "a\nb", 'a"} 1', "\0", "x" * 300, "ü"]
COUNTERS = ["loop_stalls", "loop_stall_le_inf", "loop_stall_sum_s", "stale", "header", "a_b"]


def values(hint, name=""):
    """Plain values for a field, most of which the codec takes."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if name in ("incarnation", "peer_incarnation", "number"):
        return st.sampled_from([0, 0, 0, 1])
    if name in ("worker_id", "peer"):
        return st.sampled_from(IDS * 2 + TEXTS)
    if name in ("weights", "kv_cache", "rows", "compute"):
        return st.sampled_from(["float32"] * 20 + ["auto", *TEXTS])
    if name == "protocol_version":
        return st.sampled_from([PROTOCOL_VERSION] * 5 + NUMBERS)
    if origin is typing.Annotated:
        bounds = args[1]
        known = NUMBERS if isinstance(bounds, range) else FLOATS
        inside = (
            (lambda one: one in bounds) if isinstance(bounds, range) else (lambda one: bounds[0] <= one <= bounds[1])
        )
        return st.sampled_from([one for one in known if inside(one)])
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        return fields_of(hint)
    if origin is tuple:
        return st.lists(values(args[0], "peer" if args[0] is str else ""), max_size=3)
    if origin is dict:
        return st.dictionaries(st.sampled_from(COUNTERS + TEXTS), values(args[1]), max_size=4)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(st.none(), *(values(arg) for arg in args if arg is not type(None)))
    simple = {
        int: st.sampled_from(NUMBERS), float: st.sampled_from(FLOATS), str: st.sampled_from(TEXTS),
        bool: st.booleans(), bytes: st.binary(max_size=4),
    }  # fmt: skip
    return simple[hint]


def fields_of(kind):
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else kind._fields
    return st.tuples(*(values(hints[name], name) for name in names)).map(list)


def messages(kinds):
    return st.sampled_from(kinds).flatmap(lambda kind: fields_of(kind).map(lambda values: [kind.__name__, *values]))


class Ears:
    """A server that keeps what it is to send."""

    address = "nowhere"
    has_unread = False

    def __init__(self):
        self.sent = []
        self.dropped = Counter()

    def send(self, route, message):
        self.sent.append((route, message))

    def to(self, route):
        return [message for one, message in self.sent if one == route]


class Instance:
    """A coordinator with two honest workers of each role but `rogue`, which is one of them, and a client."""

    def __init__(self, num_micro_batches=2):
        self.ears = Ears()
        self.coordinator = Coordinator(
            self.ears, PLAN, Welcome("m", 100, 1024), num_micro_batches=num_micro_batches, num_layers=2, clock=lambda: 1
        )
        self.hear(b"client", ClientHello(PROTOCOL_VERSION, "a secret of its own"))
        for worker_id in IDS:
            role = worker_id.partition("-")[0]
            hello = WorkerHello(PROTOCOL_VERSION, worker_id, role, 7, "here", "print", FLOAT32, f"of {worker_id}")
            self.hear(worker_id.encode(), hello)
            self.hear(worker_id.encode(), WorkerReady(worker_id, 0, "shm://x", 100 * (role == "attention")))
        for worker_id in IDS[:2]:
            self.hear(worker_id.encode(), Linked(worker_id, 0, True))

    def hear(self, route, message):
        self.coordinator._handle(route, message, 1.0)

    def stats(self):
        self.hear(b"client", StatsRequest())
        found = self.ears.to(b"client")[-1]
        assert isinstance(found, Stats), found
        return CLIENT_END.decode(COORDINATOR_END.encode(found))

    def submit(self, name):
        self.hear(b"client", Submit(Request(name, (1, 2), SamplingParams(max_tokens=4, seed=1))))


def said(plain):
    """What the coordinator reads of it; None where the codec drops it."""
    try:
        return COORDINATOR_END.decode(msgpack.packb(plain))
    except ProtocolError:
        return None


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    st.lists(messages(FROM_WORKER + FROM_CLIENT), max_size=12),
    st.sampled_from([b"attention-1", b"expert-1", b"another", b"another client"]),
    st.sampled_from([0, 2]),
)
@pytest.mark.slow
def test_whatever_a_member_says_the_coordinator_and_the_metrics_go_on_and_others_stay(plain, route, lanes):
    instance = Instance(lanes)
    for number in range(4):
        instance.submit(f"r{number}")
    mine = {
        name for name, one in instance.coordinator._traffic._router._requests.items() if one.worker_id == route.decode()
    }
    for message in filter(None, map(said, plain)):
        instance.hear(route, message)
    stats = instance.stats()
    states = {one.worker_id: one.state for one in stats.workers}
    for honest in {"attention-0", "expert-0"} - {route.decode()}:
        if route != b"attention-1":  # whose word on its links is taken
            assert states[honest] == "ready"
    assert states["attention-0"] == "ready"
    failed = {
        one.request_id
        for message in instance.ears.to(b"client")
        if type(message).__name__ == "Outputs"
        for one in message.progress
        if one.failure is not None
    }
    assert failed <= mine
    list(text_string_to_metric_families(Metrics().exposition(stats, {}).decode()))
    for _, message in instance.ears.sent:
        COORDINATOR_END.encode(message)


@pytest.mark.parametrize("reporter", ["expert-1", "attention-1"])
@pytest.mark.parametrize("peer", ["attention-0"])
def test_a_report_of_a_lost_link_counts_only_where_links_lead(reporter, peer):
    instance = Instance()
    instance.hear(reporter.encode(), PeerLost(reporter, 0, peer, 0, "so it says"))
    assert {one.state for one in instance.stats().workers} == {"ready"}


@pytest.mark.parametrize(
    "counters",
    [{"a\nb": 1.0}, {'a"} 1': 1.0}, {"": 1.0}, {"x" * 65: 1.0}, {"a": math.nan}, {"a": -1.0}, {"a": math.inf}],
)
def test_counters_that_metrics_could_not_show_are_no_message(counters):
    assert heartbeat_said() is not None
    assert heartbeat_said(loop=counters) is None
    whole = {name: int(count) if math.isfinite(count) else count for name, count in counters.items()}
    for kind in ("process", "attention", "experts"):
        assert heartbeat_said(**{kind: {("cut_off" if kind == "process" else "dropped"): whole}}) is None


@pytest.mark.parametrize("name", ["expert_rows", "wave_sizes"])
@pytest.mark.parametrize(
    "counts", [{-1: 1}, {4096: 1}, {1 << 40: 1}, {0: -1}, {0: 1 << 63}, {0: 1.5}, {"0": 1}, {False: 1}, [[0, 1]]]
)
def test_counts_by_expert_or_size_that_metrics_could_not_show_are_no_message(name, counts):
    assert heartbeat_said(experts={name: {0: 5, 4095: 2**61}}) is not None
    assert heartbeat_said(experts={name: counts}) is None


@pytest.mark.parametrize(
    "peers",
    [[["a\nb", *[0.1] * 4, 1, 1]], [["x" * 257, *[0.1] * 4, 1, 1]], [["a", *[0.1] * 4, 1, 1]] * 2,
     [["a", -1.0, *[0.1] * 3, 1, 1]], [["a", *[0.1] * 4, -1, 1]], [["a", *[0.1] * 4, 1, 1.5]],
     [["a", math.nan, *[0.1] * 3, 1, 1]], [[f"{number}", *[0.1] * 4, 1, 1] for number in range(4097)]],
)  # fmt: skip
def test_peers_that_metrics_could_not_show_are_no_message(peers):
    assert heartbeat_said(peers=[["a", *[0.1] * 4, 1, 1], ["b", *[0.2] * 4, 0, 0]]) is not None
    assert heartbeat_said(peers=peers) is None


@pytest.mark.parametrize(
    "watched",
    [[[], [], 1], [[[1, 0.0, 1, ["a\nb"], b""]], []], [[[1, math.nan, 1, [], b""]], []],
     [[[-1, 0.0, 1, [], b""]], []], [[[1, 0.0, 1, [], b"1"]], []], [[], [["a\nb", "c"]]],
     [[[1, 0.0, 1, [], b""]] * 3, []]],
)  # fmt: skip
def test_spans_that_no_page_could_show_are_no_message(watched):
    assert heartbeat_said(watched=[[[1, 0.0, 1, ["a"], bytes(11)]], [["a", "b"]]]) is not None
    assert heartbeat_said(watched=watched) is None


@pytest.mark.parametrize(
    "batches",
    [[[1, 1, 1, 0.1]] * 2, [[1, -1, 1, 0.1]], [[1, 1, 1, math.nan]], [[-1, 1, 1, 0.1]],
     [[size, 1, 1, 0.1] for size in range(35)]],
)  # fmt: skip
def test_times_of_batches_that_cannot_be_are_no_message(batches):
    assert heartbeat_said(batches=[[1, 1, 1, 0.1], [2, 3, 5, 0.2]]) is not None
    assert heartbeat_said(batches=batches) is None


@pytest.mark.parametrize(
    "layer_rows",
    [[[[0], [0]], [[1]]], [[[0, 1]], [[1]]], [[[4096]], [[1]]], [[[-1]], [[1]]], [[[0]], [[-1]]], [[[0]], [[0.5]]],
     [[[0]], [[True]]], [[[0]], b"1"], [[[0]], [b"123"]]],
)  # fmt: skip
def test_rows_of_layers_that_are_none_are_no_message(layer_rows):
    assert heartbeat_said(layer_rows=[[[0, 4095]], [[2**40, 0], [7, 8]]]) is not None
    assert heartbeat_said(layer_rows=layer_rows) is None


def heartbeat_said(
    process=None, attention=None, experts=None, loop=None, peers=(), watched=None, batches=(), layer_rows=((), ())
):
    def plain(kind, changes):
        values = {**dataclasses.asdict(kind()), **(changes or {})}
        return [values[field.name] for field in dataclasses.fields(kind)]

    status = [
        0, 0, 0, 0, 0, [0.0] * 5, plain(ProcessCounters, process), plain(AttentionCounters, attention),
        plain(ExpertCounters, experts), loop or {}, list(peers), watched, list(batches),
        list(layer_rows),
    ]  # fmt: skip
    return said(["Heartbeat", "attention-0", 0, status, [-1, None, False, 0, [], 0, False, 0, False, 0]])


def test_a_member_that_counts_no_blocks_and_half_its_stalls_does_not_end_metrics():
    instance = Instance()
    counters = AttentionCounters(dropped={"a.b": 1})
    status = dataclasses.replace(NO_STATUS, attention=counters, loop={"loop_stalls": 1.0, "a.b": 1.0})
    instance.hear(b"attention-0", Heartbeat("attention-0", 0, status))
    assert b"msi_loop_stalls_total" in Metrics().exposition(instance.stats(), {})


@pytest.mark.parametrize("field", ["worker_id", "host", "fingerprint", "process"])
@pytest.mark.parametrize("text", ["a\nb", "x" * 257, "\x1b[2J"])
def test_a_hello_with_texts_that_no_log_should_show_is_refused_with_a_sentence(field, text):
    instance = Instance()
    hello = WorkerHello(PROTOCOL_VERSION, "", "attention", 8, "here", "print", FLOAT32, "p")
    instance.hear(b"new", dataclasses.replace(hello, **{field: text}))
    (answer,) = instance.ears.to(b"new")
    assert isinstance(answer, Refused)
    assert answer.reason.isprintable()
