"""A file with options in place of a command line: TOML, the flags' names as keys, `KEY = VALUE` one a line.

    model = "/models/mixtral"           # what stands on a command line without a flag
    expert-workers = 2                  # or expert_workers, or "--expert-workers"
    enable-prefix-caching = false       # a switch

What a command line says, too, wins there. Values have the types that options have: text stands in quotes, numbers and
switches do not. Knows of options only what the parser does.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from msi.errors import ConfigError, shown

MAX_BYTES = 1 << 20
KEPT_OUT = ("config", "help", "version")
HIDDEN_BUT_TAKEN = ("ignored", "enable_log_requests")  # what vLLM calls otherwise
WANTED = {bool: "true or false", str: "text, in quotes", float: "a number, without quotes"}
KINDS = {bool: "a switch's value", str: "text", int: "an integer", float: "a number", list: "an array", dict: "a table"}


def read_options(
    path: Path,
    actions: Iterable[argparse.Action],
    *,
    read: Callable[[argparse.Action, str], Any],
    nearest: Callable[[str], str],
    parser: argparse.ArgumentParser,
) -> argparse.Namespace:
    """What a file says, by the options' destinations.

    Args:
        read: makes an option's value of a word, or raises ConfigError.
        nearest: "; did you mean ..?" for a name that is not there.
        parser: whose actions those are.

    Raises:
        ConfigError: the file is no TOML, or names the key and the line that cannot be.
    """
    text = _text_of(path)
    known = _by_key(actions)
    found = argparse.Namespace()
    taken: dict[str, str] = {}
    for key, value in _values_of(path, text).items():
        name = key.strip("-").replace("_", "-")
        where = f"{path}, line {_line_of(key, text)}"
        if name not in known:
            raise ConfigError(f"{where}: there is no option {shown(key)}{nearest(name)}")
        action, flag = known[name]
        if action.dest == "api_key":
            raise ConfigError(f"{where}: a key does not belong into a file of options; name its own as `api_key_file`")
        if action.dest != "ignored" and taken.setdefault(action.dest, key) != key:
            raise ConfigError(f"{where}: {key} and {taken[action.dest]} are the same option; give one")
        try:
            _put(found, action, flag, value, read, parser)
        except _WrongKindError as error:
            raise ConfigError(f"{where}: {key} is {_kind_of(value)}; give {error}") from None
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    return found


class _WrongKindError(Exception):
    """Says what kind of value is wanted."""


def _text_of(path: Path) -> str:
    """Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES} bytes; a file of options is shorter")
        return content.decode()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8; write options in TOML: KEY = VALUE, one a line") from error


def _values_of(path: Path, text: str) -> dict[str, Any]:
    """Raises ConfigError."""
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not TOML: {reason[:200]}; write KEY = VALUE, one a line") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deep; write KEY = VALUE, one a line") from error


def _by_key(actions: Iterable[argparse.Action]) -> dict[str, tuple[argparse.Action, str]]:
    """What may stand there: each option, and the flag that it is then given by; what has none ("") goes first."""
    found: dict[str, tuple[argparse.Action, str]] = {}
    for action in sorted(actions, key=lambda one: bool(one.option_strings)):
        is_hidden = action.help is argparse.SUPPRESS and action.dest not in HIDDEN_BUT_TAKEN
        if is_hidden or action.dest in KEPT_OUT:
            continue
        for flag in action.option_strings or ("",):
            found.setdefault(flag.strip("-") or action.dest.replace("_", "-"), (action, flag))
    return found


def _put(
    found: argparse.Namespace,
    action: argparse.Action,
    flag: str,
    value: Any,
    read: Callable[[argparse.Action, str], Any],
    parser: argparse.ArgumentParser,
) -> None:
    """Sets what the option says. Raises _WrongKindError or ConfigError."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise _WrongKindError(WANTED[bool])
        if isinstance(action, argparse.BooleanOptionalAction):
            setattr(found, action.dest, value is not flag.startswith("--no-"))
        elif value:
            _act(found, action, flag, [], parser)
        return
    is_repeated = isinstance(action, argparse._AppendAction)
    if isinstance(value, list) and value and not any(isinstance(one, list | dict | bool) for one in value):
        values = [_read(action, one, read) for one in value] if is_repeated else None
        if values is None and not all(isinstance(one, str) for one in value):
            raise _WrongKindError(WANTED[str])
        setattr(found, action.dest, values if values is not None else read(action, ",".join(value)))
        return
    taken = _read(action, value, read)
    if is_repeated:
        setattr(found, action.dest, [taken])
    elif action.nargs == 1:
        _act(found, action, flag, [str(value)], parser)
    else:
        setattr(found, action.dest, taken)


def _act(
    found: argparse.Namespace, action: argparse.Action, flag: str, words: list[str], parser: argparse.ArgumentParser
) -> None:
    if not hasattr(found, action.dest):
        setattr(found, action.dest, action.default)
    action(parser, found, words, flag)


def _read(action: argparse.Action, value: object, read: Callable[[argparse.Action, str], Any]) -> Any:
    """One value, of the kind that the option has. Raises _WrongKindError or ConfigError."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and not isinstance(value, str):
        raise _WrongKindError("a value of its own" if isinstance(value, bool) else "one value")
    word = str(value)
    words = getattr(action.type, "words", ())  # of a choice: some are written as numbers
    if action.nargs == 1:  # of vLLM's: it takes what it takes
        return word
    taken = read(action, word)
    is_number_wanted = isinstance(taken, int | float)
    if is_number and not is_number_wanted and word not in words:
        raise _WrongKindError(WANTED[str])
    if not is_number and is_number_wanted and re.fullmatch(r"[+-]?[0-9.][0-9.eE+-]*", word):
        raise _WrongKindError(WANTED[float])
    return taken


def _kind_of(value: object) -> str:
    return KINDS.get(type(value), "a date or a time")


def _line_of(key: str, text: str) -> int:
    """Where a key is set; it is set once."""
    name = re.escape(key)
    form = re.compile(rf"""^\s*(\[\[?\s*)?["']?{name}["']?\s*[\].=]""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if form.match(line)), 1)
