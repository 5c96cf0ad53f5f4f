"""Typed messages to bytes and back: frozen dataclasses, and named tuples, as msgpack arrays, checked field by field.

A message is `[tag, field, field, ...]`, the tag its class name. Fields may be int, float, bool, str, bytes, None,
tuples of one type, dicts with str or int keys, and other such types; `Annotated[int, range(...)]` and
`Annotated[float, (least, most)]` bound a number. Long tuples of small integers travel as bytes, four for each.

Whatever is not exactly that is a ProtocolError, whatever it would have become: bytes from a socket are never trusted,
nothing is ever unpickled, and nothing large is made on the word of a few bytes. Each end reads only what the other
may say.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from array import array
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import msgpack

from msi.errors import ProtocolError

MAX_MESSAGE_BYTES = 256 * 1024 * 1024
ITEMS = 16 * 1024  # of an array, however many there are; more where that cannot come to ITEMS_IN_ALL
ITEMS_IN_ALL = 16 * 1024 * 1024  # that arrays may claim: msgpack makes room at their heads, at up to 1024 levels
LONG_HEADS = (b"\xdc", b"\xdd")  # of arrays of more than 15 items
MAX_ENTRIES = 16 * 1024  # of a map
MAX_TEXT_BYTES = 4 * 1024 * 1024  # of a string
PACKED_FROM = 32  # integers of a tuple
MAX_KNOWN = 64  # ways in which the types of a message's fields may go together, remembered
Check = Callable[[Any], Any]


class Codec:
    """One end of a conversation.

    Args:
        reads: the closed set of message types that `decode` knows.
        writes: those that `encode` knows; by default the same.
        max_bytes: of a message that is read.
        max_written_bytes: of a message that is written: what the other end reads at most.
    """

    def __init__(
        self,
        reads: Iterable[type],
        writes: Iterable[type] | None = None,
        *,
        max_bytes: int = MAX_MESSAGE_BYTES,
        max_written_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self.max_bytes = max_bytes
        self._max_written_bytes = max_written_bytes
        reads = tuple(reads)
        self._decoders = {message_type.__name__: _decoder(message_type) for message_type in reads}
        written = reads if writes is None else writes
        self._encoders = {message_type.__name__: _encoder(message_type) for message_type in written}

    def encode(self, message: Any) -> bytes:
        """Raises ProtocolError: it is larger than the other end takes."""
        name = type(message).__name__
        encoder = self._encoders.get(name)
        assert encoder is not None, f"{name} is not what this end says"
        payload = typing.cast(bytes, msgpack.packb([name, *encoder(message)]))
        if len(payload) > self._max_written_bytes:
            raise ProtocolError(f"{name} of {len(payload)} bytes; at most {self._max_written_bytes} can be sent")
        return payload

    def decode(self, payload: bytes | memoryview) -> Any:
        """Raises ProtocolError, which says what was wrong, and nothing else."""
        if len(payload) > self.max_bytes:
            raise ProtocolError(f"a message of {len(payload)} bytes; at most {self.max_bytes} are allowed")
        try:
            fields = msgpack.unpackb(
                payload,
                use_list=False,
                strict_map_key=False,
                max_array_len=_most_items(payload),
                max_map_len=min(MAX_ENTRIES, len(payload)),
                max_str_len=MAX_TEXT_BYTES,
                max_bin_len=len(payload),
                max_ext_len=0,
            )
        except Exception as error:  # msgpack raises half a dozen unrelated types on garbage
            raise ProtocolError(f"{len(payload)} bytes that are not msgpack: {type(error).__name__}") from error
        if not isinstance(fields, tuple) or not fields or not isinstance(fields[0], str):
            raise ProtocolError("a message is an array that starts with its name")
        decoder = self._decoders.get(fields[0])
        if decoder is None:
            raise ProtocolError(f"unknown message {fields[0][:40]!r}")
        try:
            return decoder(fields[1:])
        except ProtocolError:
            raise
        except Exception as error:  # what a type's own checks come to when it is given nonsense
            raise ProtocolError(f"{fields[0]}: {type(error).__name__}: {str(error)[:200]}") from error


def _most_items(payload: bytes | memoryview) -> int:
    """Of one array: such that all that the heads in there can claim is bounded."""
    payload = bytes(payload)
    num_heads = sum(payload.count(head) for head in LONG_HEADS)
    return min(len(payload), max(ITEMS, ITEMS_IN_ALL // (num_heads + 1)))


def _is_record(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or hasattr(hint, "_fields")


def _field_names(message_type: type) -> list[str]:
    if dataclasses.is_dataclass(message_type):
        return [field.name for field in dataclasses.fields(message_type)]
    return list(message_type._fields)  # type: ignore[attr-defined]


# -- what msgpack makes bytes of -------------------------------------------------------------------------------------


def _encoder(message_type: type) -> Callable[[Any], Sequence[Any]]:
    """Makes a message the values of its fields; what needs no change is looked at in no way."""
    hints = typing.get_type_hints(message_type, include_extras=True)
    names = _field_names(message_type)
    changed = [(at, plain) for at, name in enumerate(names) if (plain := _plain(hints[name])) is not None]
    if len(names) > 1:
        fields_of: Callable[[Any], Sequence[Any]] = attrgetter(*names)
    else:  # of one name that gives the value itself
        fields_of = lambda message: [getattr(message, name) for name in names]  # noqa: E731

    def encode(message: Any) -> Sequence[Any]:
        fields = list(fields_of(message))
        for at, plain in changed:
            if fields[at] is not None:
                fields[at] = plain(fields[at])
        return fields

    return encode


def _plain(hint: Any) -> Check | None:
    """What makes a value one that msgpack knows; None where it is one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _plain(args[0])
    if _is_record(hint):
        return _encoder(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = [arg for arg in args if arg is not type(None)]
        return _plain(inner)
    if origin is tuple and args[0] is int:
        return lambda value: _packed(value) if len(value) >= PACKED_FROM else value
    item = _plain(args[-1 if origin is dict else 0]) if origin in (tuple, dict) else None
    if item is None:
        return None
    return _plain_items(item) if origin is tuple else _plain_values(item)


def _plain_items(plain: Check) -> Check:
    return lambda values: [plain(value) for value in values]


def _plain_values(plain: Check) -> Check:
    return lambda values: {key: plain(value) for key, value in values.items()}


def _packed(values: tuple[int, ...]) -> bytes | tuple[int, ...]:
    try:
        packed = array("i", values)
    except (OverflowError, TypeError):
        return values
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpacked(value: bytes) -> tuple[int, ...]:
    packed = array("i")
    try:
        packed.frombytes(value)
    except ValueError as error:
        raise ProtocolError(f"{len(value)} bytes are no array of integers") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return tuple(packed)


# -- values that came, checked ---------------------------------------------------------------------------------------


def _decoder(message_type: type) -> Check:
    hints = typing.get_type_hints(message_type, include_extras=True)
    field_hints = [hints[name] for name in _field_names(message_type)]
    checks = [_check(hint) for hint in field_hints]
    sure = [_sure(hint) for hint in field_hints]
    name = message_type.__name__
    known: dict[tuple[type, ...], list[tuple[int, Check]]] = {}  # by the types of all fields: what is left to check

    def left_to_check(kinds: tuple[type, ...]) -> list[tuple[int, Check]]:
        left = [(at, checks[at]) for at, kind in enumerate(kinds) if kind not in sure[at]]
        if len(known) < MAX_KNOWN:
            known[kinds] = left
        return left

    def decode(values: Any) -> Any:
        if not isinstance(values, tuple) or len(values) != len(checks):
            raise ProtocolError(f"{name} has {len(checks)} fields")
        kinds = tuple(map(type, values))
        left = known.get(kinds)
        if left is None:
            left = left_to_check(kinds)
        try:
            if left:
                values = list(values)
                for at, check in left:
                    values[at] = check(values[at])
            return message_type(*values)
        except ProtocolError as error:
            raise ProtocolError(f"{name}: {error}") from error
        except ValueError as error:  # the type's own validation
            raise ProtocolError(f"{name}: {str(error)[:200]}") from error

    return decode


def _sure(hint: Any) -> set[type]:
    """Types whose values are right, and stay as they are, whatever they are."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {kind for arg in args for kind in _sure(arg)}
    return {hint} if hint in (int, float, bool, str, bytes, type(None)) else set()


def _check(hint: Any) -> Check:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _check_bounds(_check(args[0]), args[1])
    if _is_record(hint):
        return _decoder(hint)
    if origin is tuple:
        assert len(args) == 2, hint
        assert args[1] is Ellipsis, hint
        return _check_tuple(_check(args[0]), plain=args[0] if args[0] in (int, float, str) else None)
    if origin is dict:
        assert args[0] in (str, int), hint
        return _check_dict(args[0], _check(args[1]))
    if origin in (typing.Union, types.UnionType):
        (inner,) = [arg for arg in args if arg is not type(None)]
        check = _check(inner)
        return lambda value: None if value is None else check(value)
    assert hint in (int, float, bool, str, bytes), hint
    return _check_scalar(hint)


def _check_scalar(expected: type) -> Check:
    def check(value: Any) -> Any:
        if type(value) is expected:
            return value
        if expected is float and type(value) is int:
            return float(value)
        raise ProtocolError(f"expected {expected.__name__}, got {type(value).__name__}")

    return check


def _check_bounds(check: Check, bounds: range | tuple[float, float]) -> Check:
    def check_all(value: Any) -> Any:
        value = check(value)
        is_inside = value in bounds if isinstance(bounds, range) else bounds[0] <= value <= bounds[1]
        if not is_inside:  # not a number is nowhere inside
            raise ProtocolError(f"{value} is not from {bounds[0]} to {bounds[-1]}")
        return value

    return check_all


def _check_tuple(check: Check, plain: type | None) -> Check:
    def check_all(value: Any) -> Any:
        if plain is int and type(value) is bytes:
            return _unpacked(value)
        if not isinstance(value, tuple):
            raise ProtocolError(f"expected an array, got {type(value).__name__}")
        for item in value:
            if type(item) is not plain:
                return tuple([check(item) for item in value])
        return value

    return check_all


def _check_dict(key_type: type, check: Check) -> Check:
    def check_all(value: Any) -> Any:
        if not isinstance(value, dict) or not all(type(key) is key_type for key in value):
            raise ProtocolError(f"expected a map with {key_type.__name__} keys, got {type(value).__name__}")
        return {key: check(item) for key, item in value.items()}

    return check_all
