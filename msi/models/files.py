"""Reading the files of a model directory: whatever lies there, an answer at once or a sentence.

A model may come from anywhere. So nothing here waits (a FIFO, a device), nothing reads without a bound, and nothing
that JSON can say, however deep, large or broken, ends in anything but a ConfigError that names the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msi.errors import ConfigError, shown

MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json and weight index seen are below 40 MB
MAX_TEXT_BYTES = 16 << 20
MAX_JSON_DEPTH = 64  # objects and lists in one another


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, read-only. Never waits. Raises ConfigError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a device may do something
            raise ConfigError(f"{path} is {_kind(path.stat().st_mode)}; it must be a regular file")
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(f"{path} is a link to {os.readlink(path)}, which does not exist") from None
        raise ConfigError(f"{path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise ConfigError(f"{shown(str(path))} is not a path: {error}") from error
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise ConfigError(f"{path} changed while it was opened; it must be a regular file")


def read_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """All of a regular file. Raises ConfigError: it is something else, or cannot be read, or is larger."""
    with open(open_regular(path), "rb") as file:
        try:
            content = file.read(max_bytes + 1)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise ConfigError(f"{path} is larger than {max_bytes >> 20} MiB; that is no such file of a model")
    return content


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """A file of UTF-8 text. Raises ConfigError."""
    return _decode(read_bytes(path, max_bytes), path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; of keys that come twice, the last counts. Raises ConfigError."""
    return parse_json(read_bytes(path), path)


def parse_json(content: bytes, source: Path | str) -> dict[str, Any]:
    """A JSON object from the bytes of `source`, which is named in sentences.

    Raises:
        ConfigError: not UTF-8, not JSON, not an object, or nested too deeply.
    """
    try:
        values = json.loads(_decode(content, source))
        _check_depth(values)
    except RecursionError:
        raise ConfigError(f"{source} is nested deeper than {MAX_JSON_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} is not valid JSON: {error}") from error
    except ValueError:
        raise ConfigError(f"{source} is not valid: one of its numbers has thousands of digits") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds {type(values).__name__}; it must be a JSON object")
    return values


def _decode(content: bytes, source: Path | str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{source} is UTF-16 text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _check_depth(value: object) -> None:
    """Level by level: what is too deep to visit recursively is what this looks for."""
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
        if not level:
            return
    raise RecursionError


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _kind(mode: int) -> str:
    kinds = (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket")
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device")
