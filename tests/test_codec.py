"""Messages to bytes and back; whatever is not a message is refused by name."""

from __future__ import annotations

import dataclasses

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.errors import ProtocolError
from msi.messages import (
    MESSAGES,
    Assignment,
    ExpertAddress,
    Heartbeat,
    Outputs,
    PassDone,
    RequestUpdate,
    Submit,
    Topology,
    WorkerHello,
    WorkerStatus,
)
from msi.net.codec import Codec
from msi.scheduler import Progress, Request
from msi.types import Placement, SamplingParams, StageTimes, TokenLogprobs

CODEC = Codec(*MESSAGES)
EXAMPLES = [
    WorkerHello(1, "expert-0", "expert", 12, "host", "abc", "float32"),
    Assignment(
        "i",
        "expert-0",
        "expert",
        0,
        3,
        Placement((0, 0, 1), 2, 4),
        3,
        512,
        4,
        "bfloat16",
        1024,
        64,
        512,
        False,
        0.5,
        4.0,
        1.0,
        3.0,
    ),
    Topology((ExpertAddress(0, "expert-0", 1, "shm://x"),), {"expert-1": "it died"}),
    Heartbeat("a", 0, WorkerStatus(1, 2, 3, 4, 5, StageTimes(0.1, 0.2, 0.3, 0.4, 0.5), {"x": 1.5})),
    PassDone("a", 0, (Progress("r", (1, 2)), Progress("s", (3,), "stop"))),
    Submit(Request("r", (1, 2, 3), SamplingParams(max_tokens=3, seed=2**64 - 1, stop=("a", "b")))),
    Submit(Request("r", (1,), SamplingParams(seed=1, logit_bias={5: -100, 7: 0.5}, stop_token_ids=(3,), logprobs=2))),
    Outputs((RequestUpdate("r", (1,)),)),
    Outputs((RequestUpdate("r", (1,), "", (TokenLogprobs(1, -0.5, (1, 2), (-0.5, -1.0)),)),)),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_messages_survive_the_wire(message):
    assert CODEC.decode(CODEC.encode(message)) == message


def submit(**changes):
    params = dataclasses.asdict(SamplingParams()) | changes
    return msgpack.packb(["Submit", ["r", [1], list(params.values())]])


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
        (msgpack.packb(["ClientHello", True]), "expected int, got bool"),
        (msgpack.packb(["Outputs", [["r", 3, "", [], None]]]), "expected an array"),
        (submit(max_tokens=0), "max_tokens is 0"),
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
