"""Files of a model directory that are not what their names say: a sentence at once, whatever it is."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.errors import ConfigError
from msi.models.files import MAX_JSON_DEPTH, parse_json, read_bytes, read_json, read_text, shown


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not valid JSON"),
        (b"{oops", "is not valid JSON"),
        (b"[]", "holds list; it must be a JSON object"),
        (b"null", "holds NoneType; it must be"),
        (b"7", "holds int; it must be"),
        (b'{"a": 1} {"b": 2}', "is not valid JSON: Extra data"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 64 levels"),
        (b'{"a":' * 100_000, "nested deeper than 64 levels"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested deeper than 64 levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "one of its numbers has thousands of digits"),
        (b"\x80\x04\x95 a pickle", "is not UTF-8 text: invalid start byte at byte 0"),
        (b'{"a": "\xff"}', "is not UTF-8 text"),
        (b"\x00" * 1000, "is not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (b'{"a": "\x00"}', "is not valid JSON: Invalid control character"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else "",
)
def test_what_is_no_json_object_is_said_in_a_sentence(tmp_path, content, complaint):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        read_json(path)
    assert str(refusal.value).startswith(str(path))
    assert complaint in str(refusal.value)
    assert len(str(refusal.value)) < len(str(path)) + 120


@given(st.binary(max_size=60) | st.text(alphabet='[]{}":,0e+-x\\un ', max_size=60).map(str.encode))
def test_any_bytes_are_an_object_or_a_sentence(content):
    sentence = ""
    try:
        values = parse_json(content, "config.json")
    except ConfigError as error:
        sentence = str(error)
    assert sentence.startswith("config.json ") if sentence else isinstance(values, dict)


def test_as_much_as_json_may_say_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1, "a": 2, "b": NaN, "c": -Infinity, "d": 1e999, "e": "\\ud800"}')
    values = read_json(path)
    assert (values["a"], values["d"], values["e"]) == (2, float("inf"), "\ud800")
    depth = MAX_JSON_DEPTH - 1
    path.write_text('{"a":' + "[" * depth + "]" * depth + "}")
    assert list(read_json(path)) == ["a"]


def test_only_regular_files_are_opened_and_nothing_waits(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "real").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to("real")
    for name, complaint in {
        "fifo": "fifo is a FIFO; it must be a regular file",
        "folder": "folder is a directory; it must be",
        "loop": "loop cannot be read: Too many levels of symbolic links",
        "dangling": "dangling is a link to nowhere, which does not exist",
        "zero": "zero is a device; it must be a regular file",
        "nowhere": "nowhere does not exist",
        "real/below": "cannot be read: Not a directory",
        "nul\0byte": "is not a path: embedded null byte",
        "x" * 300: "cannot be read: File name too long",
    }.items():
        for read in (read_json, read_text, read_bytes):
            with pytest.raises(ConfigError, match=complaint):
                read(tmp_path / name)
    assert read_json(tmp_path / "link") == {"a": 1}


def test_files_are_read_up_to_a_bound(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: a terabyte that takes no space
    with pytest.raises(ConfigError, match=r"is larger than 256 MiB; that is no such file of a model"):
        read_json(path)
    with pytest.raises(ConfigError, match=r"is larger than 16 MiB"):
        read_text(path)
    path.write_bytes(b"x" * 100)
    assert len(read_bytes(path, 100)) == 100


def test_values_are_quoted_in_at_most_a_line():
    for value in ("x" * 10_000, 10**4000, {"a": ["b" * 1000] * 1000}, json.loads("[" * 60 + "]" * 60)):
        assert len(shown(value)) < 400
