"""Lines of a log that are JSON objects: one for each message, for whatever collects logs.

    {"time": "2026-11-22T10:00:00.123Z", "level": "info", "process": "gateway", "pid": 17, "logger": "msi.server",
     "message": "...", "fields": {"request_id": "cmpl-1", "generated_tokens": 34}}                      (on one line)

`fields` is there where who logs knows some (`log.info(..., extra=with_fields(...))`), `traceback` where there is one.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

MAX_CHARS = 4000  # of a message
MAX_TRACEBACK_CHARS = 20_000
FIELDS = "msi_fields"  # of a record


def with_fields(**fields: Any) -> Mapping[str, Any]:
    """For a log call's `extra`: values that a program may read without taking the sentence apart."""
    return {FIELDS: fields}


class JsonLine(logging.Formatter):
    """One object a record; ASCII, so that no reader stumbles.

    Args:
        name: of the process.
        said: what becomes of a message before it is told.
    """

    def __init__(self, name: str, said: Callable[[str], str] = str) -> None:
        super().__init__()
        self._name = name
        self._said = said

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "process": self._name,
            "pid": record.process,
            "logger": record.name,
            "message": _cut(self._said(record.getMessage()).removeprefix(f"{self._name}: "), MAX_CHARS),
        }
        if fields := getattr(record, FIELDS, None):
            values["fields"] = fields
        if record.exc_info:
            values["traceback"] = _cut(self.formatException(record.exc_info), MAX_TRACEBACK_CHARS)
        elif record.stack_info:
            values["traceback"] = _cut(record.stack_info, MAX_TRACEBACK_CHARS)
        return json.dumps(values, default=str)


def is_json_logged() -> bool:
    """Whether this process writes such lines: what it starts should, too."""
    return any(isinstance(one.formatter, JsonLine) for one in logging.getLogger().handlers)


def _utc(seconds: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1000):03d}Z"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
