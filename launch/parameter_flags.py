"""Command-line flags out of parameters: each says of itself what it is called, what it may be and what it does."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msi.options import flag_of
from msi.parameters import Parameter

from .command_line import file_to_ask, file_to_write, integer, number, one_of, text
from .vllm_flags import DTYPES


def add_parameter(group: Any, one: Parameter) -> None:
    """Adds its flag, or its place among the words without one; in the namespace it is None where it was not given."""
    about = one.about
    options: dict[str, Any] = {"default": None, "help": _help_of(one)}
    if one.kind is bool:
        switch = "store_true" if not one.default else argparse.BooleanOptionalAction
        group.add_argument(flag_of(one), dest=one.name, action=switch, **options)
        return
    options |= {"metavar": about.metavar, "type": _reader_of(one)}
    if about.file == "directory":
        group.add_argument(one.name, nargs="?", **options)
    else:
        group.add_argument(flag_of(one), dest=one.name, **options)


def _help_of(one: Parameter) -> str:
    """With the default, where it is a number that says something."""
    if one.kind is bool:
        return f"{one.about.help}; on" if one.default else one.about.help
    return f"{one.about.help}; {one.default:g}" if one.kind in (int, float) and one.default else one.about.help


def _reader_of(one: Parameter) -> Callable[[str], Any]:
    """What makes its value of a word; bounds of integers are the section's to check."""
    about = one.about
    if about.zero:
        assert one.most is not None, one
        word_of = {about.zero: 0} | {str(value): value for value in range(1, int(one.most) + 1)}
        return _word(word_of)
    if one.kind is int:
        return integer()
    if one.kind is float:
        assert one.most is not None, one
        return number(one.least, one.most)
    if one.kind is Path:
        return {"read": file_to_ask, "write": file_to_write, "directory": model_directory}[about.file]
    if about.choices:
        read = one_of(*about.choices)
        return read if one.name != "dtype" else lambda word: read(DTYPES.get(word, word))
    return text(*about.form) if about.form[0] else str


def _word(values: Mapping[str, int]) -> Callable[[str], int]:
    read = one_of(*values)
    return lambda word: values[read(word)]


def model_directory(word: str) -> Path:
    if not word:
        raise argparse.ArgumentTypeError("is empty; give a Hugging Face model directory, or leave it out for the demo")
    return Path(word)
