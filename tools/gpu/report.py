"""What a section finds, as rows; and rows as JSON and as tables of Markdown. Knows no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

Value = str | float | int | bool


@dataclass(frozen=True, slots=True)
class Row:
    """One finding.

    Attributes:
        floor: the least that the value can be by the machine's own ceilings, in the same unit; None where nothing
            bounds it.
        asked: the share of the floor that is asked for, None where nothing is.
        section: that found it.
    """

    name: str
    value: Value
    unit: str = ""
    floor: float | None = None
    asked: float | None = None
    note: str = ""
    section: str = ""

    @property
    def share(self) -> float | None:
        """How much of what the machine can do is reached."""
        if self.floor is None or not isinstance(self.value, (int, float)) or not self.value:
            return None
        return self.floor / self.value


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a section ended: "ok", "failed", "too late" (its time was up), "left out" (nothing ran)."""

    section: str
    state: str
    seconds: float = 0.0
    note: str = ""


Add = Callable[[Row], None]


@dataclass(frozen=True, slots=True)
class Report:
    """All of one run.

    Attributes:
        about: what it ran on and when: device, date (UTC), commit, versions.
    """

    about: dict[str, str]
    outcomes: tuple[Outcome, ...]
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        sections = [asdict(outcome) for outcome in self.outcomes]
        return json.dumps({"about": self.about, "sections": sections, "rows": list(map(asdict, self.rows))}, indent=1)

    @staticmethod
    def of_json(text: str) -> Report:
        values: dict[str, Any] = json.loads(text)
        outcomes = tuple(Outcome(**one) for one in values["sections"])
        return Report(values["about"], outcomes, tuple(Row(**one) for one in values["rows"]))

    def with_section(self, outcome: Outcome, rows: Iterable[Row]) -> Report:
        found = tuple(replace(row, section=outcome.section) for row in rows)
        return Report(self.about, (*self.outcomes, outcome), (*self.rows, *found))

    def to_markdown(self) -> str:
        """A page: about, and of each section how it ended and a table of its rows."""
        lines = [f"# {self.about.get('device', 'unknown device')}, {self.about.get('date', '')}", ""]
        lines += [f"{name}: {value}  " for name, value in self.about.items() if name not in ("device", "date")]
        for outcome in self.outcomes:
            lines += ["", f"## {outcome.section}: {outcome.state}, {outcome.seconds:.0f} s", ""]
            if outcome.note:
                lines += [outcome.note.strip().splitlines()[-1], ""]
            found = [row for row in self.rows if row.section == outcome.section]
            if found:
                lines += ["| | | | of what can be | |", "|---|---|---|---|---|"]
                lines += [
                    f"| {_cell(row.name)} | {shown(row.value)} | {row.unit} | {share(row)} | {_cell(row.note)} |"
                    for row in found
                ]
        return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"

    def write(self, folder: Path) -> Path:
        """gpu_<device>_<date>.json and .md, with what instances were told in the name; the JSON's path."""
        folder.mkdir(parents=True, exist_ok=True)
        device = "-".join(self.about.get("device", "unknown").split()).lower()
        told = "".join(f"_{value}" for _, value in re.findall(r"(\w+)=([\w.-]+)", self.about.get("engine", "")))
        path = folder / f"gpu_{device}_{self.about.get('date', '')[:10]}{told}.json"
        path.write_text(self.to_json() + "\n")
        path.with_suffix(".md").write_text(self.to_markdown())
        return path


def line(row: Row) -> str:
    """For whoever watches."""
    return f"{row.name:66} {shown(row.value):>12} {row.unit:9} {share(row):18} {row.note}".rstrip()


def shown(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def share(row: Row) -> str:
    """ "84 %, asked 85": how near it comes, and what was asked for where that is missed or met."""
    if row.share is None:
        return ""
    return f"{row.share:.0%}" + ("" if row.asked is None else f", asked {row.asked:.0%}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
