"""Messages to bytes and back; whatever is not a message is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import tracemalloc

import msgpack
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msi.control.client_messages import Outputs, Welcome
from msi.control.counters import AttentionCounters, ExpertCounters, PeerDelay, ProcessCounters
from msi.control.messages import (
    CLIENT_END,
    COORDINATOR_END,
    FROM_CLIENT,
    FROM_WORKER,
    TO_CLIENT,
    TO_WORKER,
    WORKER_END,
    Assignment,
    ExpertAddress,
    Heartbeat,
    PassDone,
    RequestsFailed,
    Submit,
    Topology,
    WorkerHello,
)
from msi.control.worker_status import WorkerStatus
from msi.errors import Failure, InvalidRequest, ProtocolError
from msi.net.codec import Codec
from msi.placement import Placement
from msi.precision import Precision
from msi.settings import LinkShape, SchedulerLimits, Timeouts
from msi.structured_outputs import StructuredOutputs
from msi.types import Place, Progress, Request, SamplingParams, StageTimes, TokenLogprobs

CODEC = Codec({*FROM_CLIENT, *FROM_WORKER, *TO_CLIENT, *TO_WORKER})
EXAMPLES = [
    WorkerHello(1, "expert-0", "expert", 12, "host", "abc", Precision.of("float32")),
    Assignment(
        "i",
        "expert-0",
        "expert",
        Place(1),
        3,
        Placement(((0, 1), (2,)), 3, 4),
        4,
        False,
        0.5,
        SchedulerLimits(max_model_len=1024, max_num_batched_tokens=512),
        LinkShape(num_lanes=3),
        Timeouts(peer_timeout_s=2.5),
        Precision.of("bfloat16"),
    ),
    Topology((ExpertAddress(Place(0), "expert-0", 1, "shm://x"),), {"expert-1": "it died"}),
    Heartbeat("a", 0, WorkerStatus(1, 2, 3, 4, 5, StageTimes(0.1, 0.2, 0.3, 0.4, 0.5), loop={"x": 1.5})),
    Heartbeat("a", 0, WorkerStatus(1, 2, 3, 4, 5, StageTimes(), peers=(PeerDelay("expert-0", 0.1, 0.2, 0.3, 0.4),))),
    Heartbeat(
        "e",
        0,
        WorkerStatus(
            1,
            2,
            3,
            4,
            5,
            StageTimes(),
            ProcessCounters(1.5, cut_off={"a_b": 2}),
            AttentionCounters(7, dropped={"stale": 1}),
            ExpertCounters(3, wave_sizes={2: 9}, expert_rows={0: 2**61}),
        ),
    ),
    PassDone("a", 0, 7, (Progress("r", (1, 2)), Progress("s", (3,), "stop"))),
    Submit(Request("r", (1, 2, 3), SamplingParams(max_tokens=3, seed=2**64 - 1, stop=("a", "b")))),
    Submit(Request("r", (1,), SamplingParams(seed=1, logit_bias={5: -100, 7: 0.5}, stop_token_ids=(3,), logprobs=2))),
    Outputs(3, (Progress("r", (1,)),)),
    Outputs(3, (Progress("r", (1,), None, (TokenLogprobs(1, -0.5, (1, 2), (-0.5, -1.0)),)),)),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_messages_survive_the_wire(message):
    assert CODEC.decode(CODEC.encode(message)) == message


def submit(**changes):
    params = dataclasses.asdict(SamplingParams()) | changes
    return msgpack.packb(["Submit", ["r", [1], list(params.values()), "", [], 0, 0, 0, 0.0, "", ""]])


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (b"", "not msgpack"),
        (b"\xc1\xc1", "not msgpack"),
        (b"GET / HTTP/1.1\r\n", "not msgpack|array"),
        (msgpack.packb({"a": 1}), "starts with its name"),
        (msgpack.packb(["Unheard", 1]), "unknown message 'Unheard'"),
        (msgpack.packb(["Shutdown"]), "Shutdown has 1 fields"),
        (msgpack.packb(["Shutdown", 3]), "expected str, got int"),
        (msgpack.packb(["ClientHello", True, "c"]), "expected int, got bool"),
        (msgpack.packb(["Outputs", 0, [["r", 3, "", [], 0, None, 0.0, False, None]]]), "expected an array"),
        (submit(max_tokens=-1), "max_tokens is -1"),
        (submit(temperature=float("nan")), "temperature is nan"),
        (submit(logit_bias={"5": 1.0}), "expected a map with int keys"),
        (submit(n=True), "expected int, got bool"),
    ],
)
def test_what_is_no_message_is_refused(payload, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        CODEC.decode(payload)


@given(st.binary(max_size=200))
def test_garbage_never_gets_further_than_a_protocol_error(payload):
    with pytest.raises(ProtocolError):
        CODEC.decode(payload)


@given(st.recursive(st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5), st.lists, max_leaves=8))
def test_well_formed_msgpack_that_is_no_message_is_refused_too(value):
    for name in ("Heartbeat", "Submit", "PassDone"):
        with pytest.raises(ProtocolError):
            CODEC.decode(msgpack.packb([name, value]))


# -- each end reads only what the other may say -----------------------------------------------------------------------

ENDS = {"coordinator": COORDINATOR_END, "worker": WORKER_END, "client": CLIENT_END}
SAID_TO = {
    "coordinator": {*FROM_CLIENT, *FROM_WORKER},
    "worker": {*TO_WORKER},
    "client": {*TO_CLIENT},
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_an_end_reads_only_what_is_said_to_it(end, message):
    payload = CODEC.encode(message)
    if type(message) in SAID_TO[end]:
        assert ENDS[end].decode(payload) == message
    else:
        with pytest.raises(ProtocolError, match="unknown message"):
            ENDS[end].decode(payload)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_an_end_says_only_what_is_its_to_say(message):
    if type(message) not in {*TO_CLIENT, *TO_WORKER}:
        with pytest.raises(AssertionError):
            COORDINATOR_END.encode(message)


# -- nothing large is made on the word of a few bytes -----------------------------------------------------------------


def assignment(**changes):
    (example,) = [one for one in EXAMPLES if isinstance(one, Assignment)]
    values = [getattr(example, field.name) for field in dataclasses.fields(Assignment)]
    names = [field.name for field in dataclasses.fields(Assignment)]
    sections = {}
    for section in ("placement", "limits", "link", "timeouts", "precision"):
        whole = getattr(example, section)
        inner = [field.name for field in dataclasses.fields(whole)]
        part = values[names.index(section)] = [getattr(whole, name) for name in inner]
        sections |= {name: (part, inner.index(name)) for name in inner}
    values[names.index("place")] = [1, 0, 1]
    for name, value in changes.items():
        part, at = sections.get(name) or (values, names.index(name))
        part[at] = value
    return msgpack.packb(["Assignment", *values])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 2**40}, {"num_experts": 2**64 - 1}, {"num_experts": -1}, {"num_experts": 0}, {"num_experts": 4},
        {"experts": []}, {"experts": [0, 5]}, {"experts": [[], [0, 1]]}, {"experts": [[-2], [0, 1, 2]]},
        {"experts": [b"\0" * 7, [0, 1, 2]]},
        {"experts": [[0, 1, 2], b"\1" * 4000]}, {"experts": [[0, 1, 1], [2]]}, {"experts": [[0, 1, 2], [7]]},
        {"version": -1}, {"version": 2**40},
        {"num_lanes": 0}, {"num_lanes": 10**9}, {"num_seats": 2**63}, {"num_seats": -1}, {"slot_rows": 0},
        {"slot_rows": 2**62}, {"max_num_seqs": -5}, {"max_model_len": 2**60}, {"incarnation": -1},
        {"place": [1 << 40, 0, 1]}, {"place": [0, 1, 1]},
        {"place": [0, -1, 1]}, {"place": [0, 0, 0]}, {"place": [0, 0, 1 << 20]}, {"place": 0},
        {"memory_share": float("nan")}, {"memory_share": 7.0}, {"heartbeat_s": float("nan")}, {"lost_after_s": -1},
        {"peer_timeout_s": float("-inf")}, {"num_gpu_blocks_override": 2**63}, {"is_colocated": 2},
        {"enable_prefix_caching": 1}, {"max_num_waiting": 0}, {"start_timeout_s": 0.0}, {"weights": "float3"},
        {"kv_cache": 2}, {"rows": "a\nb"}, {"compute": "x" * 10_000},
    ],
    ids=str,
)  # fmt: skip
def test_absurd_sizes_in_an_assignment_are_refused(changes):
    assert WORKER_END.decode(assignment()) is not None
    with pytest.raises(ProtocolError):
        WORKER_END.decode(assignment(**changes))
    with pytest.raises(ProtocolError):
        COORDINATOR_END.decode(assignment(**changes))


def peak_bytes(run):
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "payload",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdd\x00\xff\xff\xff" * 1000,
        b"\xdd\x00\x10\x00\x00" * 200_000,
        b"\xdc\xff\xff" * 300_000,
        b"\xdc\x3f\xff" * 300_000,
        b"\x91" * 3_000_000,
        b"\x81" * 3_000_000,
        b"\xdf\xff\xff\xff\xff" * 200_000,
        b"\x92\xa6Submit" + b"\x91" * 1_000_000,
        b"\xc6\xff\xff\xff\xff" + b"x" * 100,
        b"\xdb\xff\xff\xff\xff" + b"x" * 100,
        b"\xc9\xff\xff\xff\xff\x05" + b"x" * 100,
        msgpack.packb(["Shutdown", msgpack.ExtType(5, b"x" * 10)]),
        msgpack.packb(["Shutdown", msgpack.Timestamp(1)]),
        msgpack.packb(["Cancel", "x" * (5 << 20)]),
        msgpack.packb(["ClientHello", dict.fromkeys(range(20000))]),
    ],
    ids=range(16),
)
def test_what_claims_to_be_large_or_deep_costs_little_and_is_refused(payload):
    def decode():
        for end in ENDS.values():
            with pytest.raises(ProtocolError):
                end.decode(payload)

    assert peak_bytes(decode) < 200 << 20


def test_whatever_a_worker_holds_fits_into_what_it_says():
    failed = RequestsFailed("a", 0, tuple(f"req-{number:032x}" for number in range(200_000)), Failure("engine", "x"))
    assert COORDINATOR_END.decode(WORKER_END.encode(failed)) == failed
    logprobs = tuple(TokenLogprobs(1, -0.5, tuple(range(20)), (-0.5,) * 20) for _ in range(16))
    updates = tuple(Progress(f"r{number}", (220,) * 16, None, logprobs) for number in range(500))
    outputs = Outputs(1, updates)
    assert CLIENT_END.decode(COORDINATOR_END.encode(outputs)) == outputs


def test_a_message_longer_than_an_end_reads_is_refused_unread():
    with pytest.raises(ProtocolError, match="at most 16777216 are allowed"):
        COORDINATOR_END.decode(bytes(17 << 20))


def test_a_message_that_the_other_end_would_not_read_is_not_sent():
    """It would cut the connection, and with it everything else that runs on it."""
    long = Submit(Request("r", (2**31 - 1,) * (5 << 20), SamplingParams(seed=1)))
    with pytest.raises(ProtocolError, match=r"Submit of 2.* bytes; at most 16777216 can be sent"):
        CLIENT_END.encode(long)
    welcome = Welcome("m", 1, 1, bytes(100 << 20))
    assert CLIENT_END.decode(COORDINATOR_END.encode(welcome)) == welcome


def test_prompts_of_every_length_and_value_survive():
    for prompt in ((), (1,), tuple(range(31)), tuple(range(32)), tuple(range(100_000)), (2**40,) * 50, (-1,) * 40):
        message = Submit(Request("r", prompt, SamplingParams(seed=1)))
        assert COORDINATOR_END.decode(CLIENT_END.encode(message)) == message
    assert len(CLIENT_END.encode(Submit(Request("r", (5,) * 100_000, SamplingParams(seed=1))))) < 410_000


LEAVES = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5)
    | st.binary(max_size=9)
)  # fmt: skip
HOSTILE = LEAVES | st.lists(LEAVES, max_size=4) | st.dictionaries(st.integers(-3, 3), LEAVES, max_size=3)
PAYLOADS = [CODEC.encode(example) for example in EXAMPLES]


@st.composite
def mutated(draw):
    """A valid message in which a value somewhere is another."""
    message = msgpack.unpackb(draw(st.sampled_from(PAYLOADS)), strict_map_key=False)
    at = message
    while True:
        inner = [index for index, value in enumerate(at) if isinstance(value, list) and value]
        if not inner or draw(st.booleans()):
            break
        at = at[draw(st.sampled_from(inner))]
    match draw(st.sampled_from(["other", "more", "less"])):
        case "other":
            at[draw(st.integers(0, len(at) - 1))] = draw(HOSTILE)
        case "more":
            at.append(draw(HOSTILE))
        case "less":
            at.pop()
    return msgpack.packb(message)


@settings(max_examples=200, deadline=None)
@given(mutated())
def test_a_message_with_another_value_somewhere_is_a_message_or_a_protocol_error(payload):
    for end in ENDS.values():
        with contextlib.suppress(ProtocolError):
            end.decode(payload)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_valid_message_with_flipped_bytes_is_a_message_or_a_protocol_error(data):
    payload = bytearray(data.draw(st.sampled_from(PAYLOADS)))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    for end in ENDS.values():
        with contextlib.suppress(ProtocolError):
            end.decode(bytes(payload[: data.draw(st.integers(0, len(payload)))]))


class Number(enum.IntEnum):
    THREE = 3


class Name(str):
    pass


ODD = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63), 0.0, 0.5, 3.0, 5e-324,
    1e308, float("nan"), float("inf"), numpy.int64(3), numpy.float32(0.5), numpy.float64(0.5), numpy.bool_(True),
    Number.THREE, Name("a"), "", "a", "\ud800", "x" * 10**5, b"a", (), ("a",), ("\ud800",), (Name("a"),), ["a"], (1,),
    [1], (numpy.int64(1),), (True,), (Number.THREE,), (-1,), (2**31,), (1.5,), ((1, 2),), [[1, 2]], ((),), {}, {1: 1},
    {1: True}, {1: numpy.float64(0.5)}, {1: numpy.float32(0.5)}, {Number.THREE: 1}, {True: 1}, {1: float("nan")},
    {"1": 1}, set(), object(), 1 + 1j, StructuredOutputs(regex="a"), {"regex": "a"},
]  # fmt: skip


@pytest.mark.parametrize("kind", [SamplingParams, StructuredOutputs, Request])
def test_what_a_request_takes_in_one_process_its_reader_takes_in_another(kind):
    """What only its reader refused would be dropped there, and whoever asked would wait for ever."""
    others = {SamplingParams: {}, StructuredOutputs: {}, Request: {"request_id": "r", "prompt_token_ids": (1,)}}[kind]
    others = others | ({"params": SamplingParams()} if kind is Request else {})
    checked_elsewhere = {"prompt_token_ids", "output_token_ids", "num_scored", "num_resumptions", "params"}
    num_taken = 0
    for field in dataclasses.fields(kind):
        for value in ODD if field.name not in checked_elsewhere else ():
            try:
                made = kind(**others | {field.name: value})
                if kind is StructuredOutputs:
                    made = SamplingParams(structured_outputs=made)
                if kind is not Request:
                    made = Request("r", (1,), made)
            except InvalidRequest:
                continue
            assert COORDINATOR_END.decode(CLIENT_END.encode(Submit(made))).request == made, (field.name, value)
            num_taken += 1
    assert num_taken > 5
