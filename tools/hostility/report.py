"""What an attack saw: counts by outcome, and what should not have happened. A line of JSON each."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter

from tools.hostility.wire import Answer


class Report:
    """Of one attack."""

    def __init__(self, attack: str) -> None:
        self.attack = attack
        self.outcomes: Counter[str] = Counter()
        self.violations: list[str] = []
        self._began_at = time.monotonic()

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] += 1

    def answer(self, answer: Answer, *, may_close: bool = False) -> None:
        """Anything is right but a server error other than 503, silence, and an error that is no JSON object."""
        self.count(str(answer.status or "closed"))
        if not answer.status and not may_close:
            self.violation("the connection was closed without an answer")
        if answer.status >= 500 and answer.status != 503:
            self.violation(f"{answer.status}: {answer.body[:300].decode(errors='replace')}")
        elif answer.status >= 400 and not _is_error(answer.body):
            self.violation(f"{answer.status} without an error object: {answer.body[:120]!r}")

    def violation(self, sentence: str) -> None:
        self.violations.append(sentence)

    def print(self) -> None:
        values = {
            "attack": self.attack, "began_at": self._began_at, "ended_at": time.monotonic(), "outcomes": self.outcomes,
            "violations": self.violations,
        }  # fmt: skip
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()


def _is_error(body: bytes) -> bool:
    try:
        return isinstance(json.loads(body)["error"]["message"], str)
    except (ValueError, KeyError, TypeError):
        return False
