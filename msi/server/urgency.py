"""How urgent a request is: what its body says of it, and what the headers of clients and proxies do. Knows no HTTP.

Clients made by Stainless (openai, anthropic) say in a header for how long they wait for an answer, or, in a stream, for
its next piece. Envoy, and what is built on it, says within what time a whole answer has to be there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msi.errors import InvalidRequest, shown
from msi.server.fields import whole_number, written
from msi.types import MAX_PRIORITY, MAX_TIMEOUT_S

FOR_WHOLE_ANSWERS = {"x-stainless-read-timeout": 1.0, "x-stainless-timeout": 1.0}  # in seconds
FOR_ALL = {"x-envoy-expected-rq-timeout-ms": 0.001}


@dataclass(frozen=True, slots=True)
class Urgency:
    """Attributes:
    priority: lower is earlier.
    timeout_s: the whole answer has to come in that time; 0 for none.
    """

    priority: int = 0
    timeout_s: float = 0.0


def urgency(values: Mapping[str, Any]) -> Urgency:
    """What a body says. Raises InvalidRequest."""
    priority, timeout_s = whole_number(values, "priority"), written(values.get("timeout_s"))
    if type(priority) not in (int, type(None), bool) or not -MAX_PRIORITY <= (priority or 0) <= MAX_PRIORITY:
        raise _wrong("priority", priority, f"an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}; lower is earlier")
    is_time = timeout_s is None or (type(timeout_s) in (int, float) and 0 < timeout_s <= MAX_TIMEOUT_S)
    if not is_time:
        raise _wrong("timeout_s", timeout_s, f"a number of seconds above 0, at most {MAX_TIMEOUT_S:g}")
    return Urgency(int(priority or 0), float(timeout_s or 0.0))


def shortest_timeout_s(asked_s: float, headers: Mapping[str, str], *, is_streamed: bool) -> float:
    """Of what a body asks and what headers say, the shortest; 0 for none. A header that is no time says nothing."""
    names = FOR_ALL if is_streamed else FOR_ALL | FOR_WHOLE_ANSWERS
    times = [_seconds(headers[name], unit_s) for name, unit_s in names.items() if name in headers]
    return min((one for one in (asked_s, *times) if one > 0), default=0.0)


def _seconds(text: str, unit_s: float) -> float:
    try:
        value = float(text) * unit_s
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and 0 < value <= MAX_TIMEOUT_S else 0.0


def _wrong(name: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {shown(value)}; it must be {allowed}", param=name)
