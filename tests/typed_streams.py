"""Streams of typed events put together again by what each event says, as clients do; every promise is checked."""

from __future__ import annotations

from itertools import pairwise

import orjson

from msi.server.fields import Streaming
from msi.server.parsing.parser import Parsing
from msi.server.prepare import Prepared
from msi.types import Output, SamplingParams

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
PARSING = Parsing("hermes", "qwen3", orjson.dumps({"weather": WEATHER}))
SAID = f"<think>hm, well</think>\n\nI look.\n{CALL}\n{CALL}"


def asked(endpoint, *, stream=True, parsing=PARSING, told=b'{"tools":[],"metadata":{}}'):
    return Prepared(endpoint, (), SamplingParams(), Streaming(stream), parsing=parsing, told=told)


def outputs_of(pieces, reason="stop", stopped_by=""):
    """Pieces of an answer, each a token; a prompt of 10 of which 4 were cached."""
    given = [Output("r", piece, (1,), None, 10, 0, (), 4) for piece in pieces]
    return [*given, Output("r", "", (2,), reason, 10, 0, (), 4, stopped_by=stopped_by)]


def cut(text, *places):
    """A text in pieces."""
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


def plain(events):
    """As a client reads them."""
    return [orjson.loads(orjson.dumps(event)) for event in events]


def response_of(events):
    """The response that a stream of the Responses API ends with, held against everything that was told before it."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    for event in events[:2]:
        assert (event["response"]["status"], event["response"]["output"]) == ("in_progress", [])
    items, texts, state = {}, {}, {}
    for event in events[2:-1]:
        kind, at = event["type"].removeprefix("response."), event["output_index"]
        if kind == "output_item.added":
            assert at == len(items)
            assert all(one == "item done" for one in state.values()), "one item at a time"
            items[at], texts[at], state[at] = event["item"], "", "item"
            assert event["item"]["status"] == "in_progress"
            continue
        if kind == "output_item.done":
            assert event["item"]["id"] == items[at]["id"]
            assert event["item"]["status"] != "in_progress"
            items[at], state[at] = event["item"], "item done"
            continue
        assert event["item_id"] == items[at]["id"]
        name, _, step = kind.rpartition(".")
        assert (event.get("content_index", 0), state[at]) != (0, "item done")
        if name == "content_part":
            state[at] = f"part {step}"
            assert step == "added" or event["part"]["text"] == texts[at]
        elif step == "delta":
            assert event["delta"]
            texts[at] += event["delta"]
        else:
            assert event["arguments" if "arguments" in name else "text"] == texts[at]
    last = events[-1]["response"]
    assert kinds[-1] == f"response.{last['status']}"
    assert last["output"] == [items[at] for at in sorted(items)]
    assert {**events[0]["response"], "output": last["output"]}.keys() == last.keys()
    assert all(one == "item done" for one in state.values())
    for at, item in items.items():
        whole = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert whole == texts[at]
    return last


def message_of(events):
    """The message that a stream of the Messages API tells."""
    first, *events, delta, stop = events
    assert (first["type"], delta["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    message = first["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    is_open = False
    for event in events:
        if event["type"] == "content_block_start":
            assert (is_open, event["index"]) == (False, len(message["content"]))
            is_open = True
            message["content"].append(dict(event["content_block"]))
            written = ""
            continue
        assert is_open
        assert event["index"] == len(message["content"]) - 1
        block = message["content"][-1]
        if event["type"] == "content_block_stop":
            is_open = False
            if block["type"] == "tool_use":
                block["input"] = orjson.loads(written)
            continue
        assert event["type"] == "content_block_delta"
        match event["delta"]:
            case {"type": "text_delta", "text": text}:
                block["text"] += text
            case {"type": "thinking_delta", "thinking": text}:
                block["thinking"] += text
            case {"type": "signature_delta", "signature": text}:
                block["signature"] += text
            case {"type": "input_json_delta", "partial_json": text}:
                written += text
            case other:
                raise AssertionError(other)
    assert not is_open
    return {**message, **delta["delta"], "usage": delta["usage"]}
