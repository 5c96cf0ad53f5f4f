"""Parameters: fields of frozen sections that say of themselves what a user can give.

A parameter is written once, as a field whose default is made by `parameter(...)`. From there it reaches the command
line (`msi_launch`), the keywords of `Engine.local` and the checks; its bounds are those of its `Annotated` type, which
the codec keeps too. Sections may hold sections. Knows no section and no command line.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from msi.errors import ConfigError, shown

KEY = "parameter"  # of a field's metadata
KINDS = {bool: "True or False", str: "a text", Path: "a path"}
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a field says of itself; see `parameter`."""

    help: str
    metavar: str | None
    group: str
    name: str
    zero: str
    choices: tuple[str, ...]
    form: tuple[str, str]
    file: str


def parameter(
    default: T,
    help: str,
    *,
    metavar: str | None = None,
    group: str = "",
    name: str = "",
    zero: str = "",
    choices: tuple[str, ...] = (),
    form: tuple[str, str] = ("", ""),
    file: str = "",
) -> T:
    """A field's default, with what a user has to know.

    Args:
        help: one sentence; a default that is worth showing is added where it is shown.
        metavar: what stands for a value in the help; None for a switch.
        group: heading of the help under which it stands.
        name: where users know it by another name than the code: vLLM's.
        zero: the word that stands for 0 on a command line.
        choices: all values of a text.
        form: of a text on a command line: a regular expression for the whole of it, and what it is, in words.
        file: of a path: "read" (it is there), "write" (it can be made) or "directory".
    """
    about = About(help=help, metavar=metavar, group=group, name=name, zero=zero, choices=choices, form=form, file=file)
    return dataclasses.field(default=default, metadata={KEY: about})


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a section, or of a section within it.

    Attributes:
        name: the keyword by which users give it.
        path: the fields that lead to it from the section it was asked of.
        kind: int, float, bool, str or Path.
        least, most: bounds of a number; a float is above its least.
    """

    name: str
    path: tuple[str, ...]
    kind: type
    default: Any
    least: float | None
    most: float | None
    about: About

    def of(self, section: object) -> Any:
        """Its value there."""
        for name in self.path:
            section = getattr(section, name)
        return section

    def check(self, value: object) -> None:
        """Raises ConfigError: names the parameter, what was given and what is allowed."""
        if self.kind is int:
            self._check_integer(value)
        elif self.kind is float:
            self._check_number(value)
        elif self.about.choices and value not in self.about.choices:
            allowed = ", ".join(self.about.choices)
            raise ConfigError(f"`{self.name}` {shown(value)} is not one; supported: {allowed}")
        elif not isinstance(value, self.kind) and (value is not None or self.default is not None):
            raise ConfigError(f"`{self.name}` {shown(value)}: give {KINDS[self.kind]}")

    def _check_integer(self, value: object) -> None:
        assert self.least is not None, self
        assert self.most is not None, self
        if isinstance(value, int) and not isinstance(value, bool) and self.least <= value <= self.most:
            return
        allowed = f"give an integer from {self.least} to {self.most}"
        if self.about.zero:
            allowed = f"give {self.about.zero} or 1 to {self.most}"
        raise ConfigError(f"`{self.name}` {shown(value)}: {allowed}")

    def _check_number(self, value: object) -> None:
        assert self.least is not None, self
        assert self.most is not None, self
        if isinstance(value, int | float) and not isinstance(value, bool) and self.least < value <= self.most:
            return
        what = "a number of seconds" if self.name.endswith("_s") else "a number"
        raise ConfigError(f"`{self.name}` {shown(value)}: give {what} > {self.least:g}, at most {self.most:g}")


@cache
def parameters_of(section: type) -> tuple[Parameter, ...]:
    """All parameters of a section, in the order of its fields; those of sections within it where they stand."""
    hints = typing.get_type_hints(section, include_extras=True)
    found: list[Parameter] = []
    for one in dataclasses.fields(section):
        hint = hints[one.name]
        if dataclasses.is_dataclass(hint):
            inner = parameters_of(typing.cast(type, hint))
            found += [dataclasses.replace(each, path=(one.name, *each.path)) for each in inner]
        elif (about := one.metadata.get(KEY)) is not None:
            kind, least, most = _bounds_of(hint)
            found.append(Parameter(about.name or one.name, (one.name,), kind, one.default, least, most, about))
    names = [each.name for each in found]
    assert len(set(names)) == len(names), f"{section.__name__} has two parameters of one name: {names}"
    return tuple(found)


def _bounds_of(hint: Any) -> tuple[type, float | None, float | None]:
    """The type that a value has, and the bounds that it is annotated with."""
    if typing.get_origin(hint) is typing.Annotated:
        kind, bounds = typing.get_args(hint)
        return kind, bounds[0], bounds[-1]
    if isinstance(hint, types.UnionType):
        (hint,) = [each for each in typing.get_args(hint) if each is not types.NoneType]
    assert hint in (bool, str, Path), f"{hint} needs bounds"
    return hint, None, None


def check_parameters(section: object) -> None:
    """For a section's `__post_init__`. Raises ConfigError: a parameter of its own has a value that is not allowed."""
    kind: Any = type(section)
    for one in parameters_of(kind):
        if len(one.path) == 1:
            one.check(one.of(section))


def section_of(section: type[S], given: Mapping[str, Any]) -> S:
    """A section, and those within it, from parameters by their names; others keep their defaults.

    Raises:
        ConfigError: a value is not allowed.
    """
    hints = typing.get_type_hints(section, include_extras=True)
    values: dict[str, Any] = {}
    for one in dataclasses.fields(typing.cast(Any, section)):
        about = one.metadata.get(KEY)
        if dataclasses.is_dataclass(hints[one.name]):
            values[one.name] = section_of(typing.cast(type, hints[one.name]), given)
        elif about is not None and (about.name or one.name) in given:
            value = given[about.name or one.name]
            is_path = isinstance(value, str | os.PathLike) and _bounds_of(hints[one.name])[0] is Path
            values[one.name] = Path(value) if is_path else value
    return section(**values)
