"""What a check found: a line for people, a value for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from msi.errors import ConfigError

from ..command_line import as_flags
from ..logs import printable

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line.

    Attributes:
        check: what was looked at.
        sentence: what was found.
        advice: what to do; never empty where it failed.
    """

    check: str
    state: State
    sentence: str
    advice: str = ""

    def __post_init__(self) -> None:
        assert self.advice or self.state != "failed", self

    def line(self) -> str:
        said = f"{self.sentence}; {self.advice}" if self.advice else self.sentence
        return f"{self.state:<8}{self.check}: {as_flags(printable(said))}"

    def to_json(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "state": self.state,
            "message": as_flags(self.sentence),
            "advice": as_flags(self.advice) or None,
        }


def ok(check: str, sentence: str) -> Finding:
    return Finding(check, "ok", sentence)


def warning(check: str, sentence: str, advice: str = "") -> Finding:
    return Finding(check, "warning", sentence, advice)


def failed(check: str, sentence: str, advice: str) -> Finding:
    return Finding(check, "failed", sentence, advice)


def refused(check: str, error: ConfigError, advice: str) -> Finding:
    """An error of msi's, which mostly says itself what to do: behind its last semicolon, or as ": give ..".

    Args:
        advice: for one that does not.
    """
    sentence, semicolon, own = str(error).rpartition("; ")
    if not semicolon:
        sentence, colon, own = str(error).partition(": give ")
        own = f"give {own}" if colon else advice
    return failed(check, sentence, own)
