"""What all command lines of msi have in common: whatever is wrong with one is one sentence; a flag that is not there
brings the nearest that is; values come with their bounds. Knows no flag but --help and --version.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from msi import __version__
from msi.errors import MAX_SHOWN_CHARS, ConfigError, shown

from .config_file import read_options

MAX_TEXT_CHARS = 100_000
HELP_COLUMN = 30
LIKENESS = 0.55  # from which on another flag may have been meant; difflib's ratio
PARAMETER = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`\s]+))?`")  # as errors of msi name one, and a value to give it
KINDS = {"int": "an integer", "float": "a number"}
T = TypeVar("T")


class CommandLine(argparse.ArgumentParser):
    """A parser that raises ConfigError, with one sentence, where argparse prints its usage and ends the process.

    Attributes:
        takes_config: --config names a file with options (see `config_file`).
    """

    takes_config = True

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            add_help=False,
            **{"formatter_class": lambda prog: argparse.HelpFormatter(prog, max_help_position=HELP_COLUMN), **options},
        )
        add = self.add_argument_group("about").add_argument
        add("-h", "--help", action="help", help="this page")
        if self.takes_config:
            add("--config", type=file_to_ask, metavar="FILE", default=argparse.SUPPRESS,
                help="options in TOML, by the names of these flags: port = 8000; the command line wins")  # fmt: skip
        add("--version", action="version", version=f"{prog.split()[0]} {__version__}", help="which version this is")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises ConfigError."""
        words = list(sys.argv[1:] if args is None else args)
        for word in words:
            if not is_text(word):
                raise ConfigError(f"{shown(word)} on the command line is not text in UTF-8")
        self._refuse_unknown(words)
        for action in self._actions:
            if action.dest != "ignored":
                _flags_of[action.dest] = tuple(action.option_strings) or (str(action.metavar),)
        return self._with_config(words) if namespace is None else self._parsed(words, namespace)

    def _parsed(self, words: Sequence[str], namespace: argparse.Namespace) -> argparse.Namespace:
        values, extra = self.parse_known_args(words, namespace)
        if extra:
            self.error(f"{quoted(extra[0])} is a word too many: a flag's value, or MODEL, is given already")
        return values

    def _with_config(self, words: Sequence[str]) -> argparse.Namespace:
        """What a command line and the file that it names say together."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        first.add_argument("--config", action="append", nargs="?", default=[])
        files = first.parse_known_args(words)[0].config if self.takes_config else []
        if not files or files[-1] is None or {"-h", "--help"} & set(words):
            return self._parsed(words, argparse.Namespace())
        if len(files) > 1:
            self.error("--config comes several times; give one file")
        config = next(one for one in self._actions if one.dest == "config")
        given = read_options(
            self._read_word(config, files[0]), self._actions, read=self._read_word, nearest=self._nearest, parser=self
        )
        return self._joined(words, given)

    def _joined(self, words: Sequence[str], given: argparse.Namespace) -> argparse.Namespace:
        flags = {word.partition("=")[0] for word in words}
        told, required = vars(given), []
        for action in self._actions:
            if isinstance(action, argparse._AppendAction) and flags & set(action.option_strings):
                told.pop(action.dest, None)  # else the command line's were added to the file's
            if action.dest in told and action.required:
                action.required = False
                required.append(action)
        values = self._parsed(words, argparse.Namespace(**told))
        for action in required:
            action.required = True
        for action in self._actions:  # argparse sets a word that may be left out even where it is left out
            if not action.option_strings and getattr(values, action.dest) is action.default and action.dest in told:
                setattr(values, action.dest, told[action.dest])
        del values.config
        return values

    def _read_word(self, action: argparse.Action, word: str) -> Any:
        """An option's value. Raises ConfigError."""
        try:
            value = self._get_value(action, word)
            self._check_value(action, value)
            return value
        except argparse.ArgumentError as error:
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError with argparse's complaint as a sentence."""
        named = re.match(r"argument (?P<name>[^:/]+)(?:/[^:]+)?: (?P<rest>.*)", message, flags=re.DOTALL)
        if named is not None:
            message = f"{named['name']} {named['rest']}"
            if named["rest"].startswith("expected "):
                message = _no_value(named["name"])
            elif named["rest"].startswith("ignored explicit argument"):
                message = f"{named['name']} takes no value"
            elif wrong := re.match(r"invalid (\w+) value: (.*)", named["rest"], flags=re.DOTALL):
                message = f"{named['name']} {wrong[2][:MAX_SHOWN_CHARS]}: give {KINDS.get(wrong[1], 'another')}"
        elif missing := re.match(r"the following arguments are required: (.*)", message):
            message = f"{missing[1]} is missing"
        raise ConfigError(f"{message} ({self.prog} --help lists what there is)")

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        """A flag that is not there, before its value is taken for MODEL."""
        known = self._option_string_actions
        for before, word in zip(["", *words], words, strict=False):
            if word == "--":
                return
            name = word.partition("=")[0]
            is_flag = len(word) > 1 and word.startswith("-") and " " not in name and not _is_number(word)
            if not is_flag or name in known or (not word.startswith("--") and word[:2] in known):
                continue
            if before in known and known[before].nargs is None:
                self.error(_no_value(before))
            self.error(f"there is no option {quoted(name)}{self._nearest(name)}")

    def _nearest(self, name: str) -> str:
        listed = {
            flag.lstrip("-"): flag
            for flag, action in self._option_string_actions.items()
            if action.help is not argparse.SUPPRESS and flag.startswith("--")
        }
        name = name.strip("-").replace("_", "-").lower()
        close = [flag for flag in listed if len(name) > 1 and flag.startswith(name)]
        close = close or difflib.get_close_matches(name, listed, n=1, cutoff=LIKENESS)
        return f"; did you mean {listed[close[0]]}?" if close else ""


class ScriptLine(CommandLine):
    """The command line of a script under tools/, whose docstring is its help: ends it with a line where it is wrong."""

    takes_config = False

    def __init__(self, docstring: str | None) -> None:
        name = f"tools/{Path(sys.argv[0]).name}"
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(name, docstring or "", usage=f"{name} [options]", formatter_class=formatter)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        try:
            return super().parse_args(args, namespace)
        except ConfigError as error:
            sys.stderr.write(f"{self.prog}: {error}\n")
            raise SystemExit(2) from None


_flags_of: dict[str, tuple[str, ...]] = {}  # by parameter: those of the command line that this process was given


def as_flags(sentence: str) -> str:
    """A sentence of msi's, which speaks of `parameters`, in the words of this process's command line."""

    def flag(found: re.Match[str]) -> str:
        name, value = found.groups()
        flags = _flags_of.get(name)
        if flags is None:
            return found[0]
        if value in ("True", "False"):
            return flags[0] if value == "True" else flags[-1]
        return flags[0] if value is None else f"{flags[0]} {value}"

    return PARAMETER.sub(flag, sentence)


def _no_value(flag: str) -> str:
    return f"{flag} needs a value; one that begins with - is written {flag}=VALUE"


def is_text(word: str) -> bool:
    """Whether a word of the command line is text, and not bytes that are none."""
    return word.isascii() or not any("\ud800" <= char <= "\udfff" for char in word)


def quoted(word: str) -> str:
    """A word as it was typed, if that is short and plain; else in quotes, and cut."""
    return word if re.fullmatch(r"[A-Za-z0-9_./:+@,={}-]{1,120}", word) else shown(word)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


# -- what values may be: for argparse's `type` ------------------------------------------------------------------------


def integer(least: int | None = None, most: int | None = None, *, of: str = "an integer") -> Callable[[str], int]:
    """A whole number; `of`: what it is, in a sentence."""
    return _bounded(int, r"[+-]?[0-9]{1,4000}", of, least, most)


def number(least: float | None, most: float, *, of: str = "a number") -> Callable[[str], float]:
    """A finite number."""
    return _bounded(float, r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", of, least, most)


def _bounded(kind: Callable[[str], T], form: str, of: str, least: Any, most: Any) -> Callable[[str], T]:
    shown_most = f"{most:g}" if kind is float and most is not None else most
    allowed = of if most is None else f"{of}, at most {shown_most}"
    if least is not None:
        allowed = f"{of} from {least} to {shown_most}"

    def read(word: str) -> T:
        if not re.fullmatch(form, word):
            raise argparse.ArgumentTypeError(f"{quoted(word)}: give {allowed}")
        value: Any = kind(word)
        if (least is not None and value < least) or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{quoted(word)}: give {allowed}")
        return kind(word)

    return read


def one_of(*allowed: str) -> Callable[[str], str]:
    """One of these words."""

    def read(word: str) -> str:
        if word not in allowed:
            raise argparse.ArgumentTypeError(f"{shown(word)} is not one; supported: {', '.join(filter(None, allowed))}")
        return word

    read.words = allowed  # type: ignore[attr-defined]
    return read


def text(form: str, of: str) -> Callable[[str], str]:
    """Text of a form (a regular expression, for the whole); `of`: what it is, in a sentence."""

    def read(word: str) -> str:
        if len(word) > MAX_TEXT_CHARS or not re.fullmatch(form, word, flags=re.DOTALL):
            raise argparse.ArgumentTypeError(f"{shown(word)}: give {of}" if word else f"is empty; give {of}")
        return word

    return read


def file_to_read(word: str) -> Path:
    """A regular file that is there: nothing that opening or reading would wait for."""
    mode = _mode_of(word)
    if mode is None or not stat.S_ISREG(mode):
        raise argparse.ArgumentTypeError(f"{quoted(word)} is not a file")
    if not os.access(word, os.R_OK):
        raise argparse.ArgumentTypeError(f"{quoted(word)} cannot be read: permission denied")
    return Path(word)


def file_to_write(word: str) -> Path:
    """A file that can be made, or written anew."""
    mode = _mode_of(word)
    path = Path(word)
    if not word or (mode is not None and not stat.S_ISREG(mode)):
        raise argparse.ArgumentTypeError(f"{quoted(word)} is not a file; give a file's name")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{quoted(word)} cannot be written: there is no directory {path.parent}")
    if not os.access(path.parent if mode is None else path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{quoted(word)} cannot be written: permission denied")
    return path


def file_to_ask(word: str) -> Path:
    """As `file_to_read`, in the words of those who read such files."""
    if word and _mode_of(word) is None:
        raise argparse.ArgumentTypeError(f"{quoted(word)} cannot be read: there is no such file")
    return file_to_read(word)


def _mode_of(word: str) -> int | None:
    """What kind of file; None where there is none."""
    try:
        return os.stat(word).st_mode
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # such as a name that is too long, or no right to look
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"{quoted(word)} cannot be read: {reason}") from None
