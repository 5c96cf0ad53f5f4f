"""Typed messages to bytes and back: frozen dataclasses as msgpack arrays, checked field by field.

A message is `[tag, field, field, ...]`, the tag its class name. Fields may be int, float, bool, str, bytes, None,
tuples of one type, dicts with str keys, and other dataclasses. Whatever is not exactly that is a ProtocolError: bytes
from a socket are never trusted, and nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

import msgpack

from msi.errors import ProtocolError

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
Check = Callable[[Any], Any]


class Codec:
    """Encodes and decodes a closed set of message types."""

    def __init__(self, *message_types: type) -> None:
        self._decoders = {message_type.__name__: _decoder(message_type) for message_type in message_types}

    def encode(self, message: Any) -> bytes:
        name = type(message).__name__
        assert name in self._decoders, f"{name} is not a message of this codec"
        return typing.cast(bytes, msgpack.packb([name, *_plain(message)]))

    def decode(self, payload: bytes | memoryview) -> Any:
        """Raises ProtocolError, which says what was wrong."""
        if len(payload) > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"a message of {len(payload)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
        try:
            fields = msgpack.unpackb(payload, use_list=False, strict_map_key=False)
        except Exception as error:  # msgpack raises half a dozen unrelated types on garbage
            raise ProtocolError(f"{len(payload)} bytes that are not msgpack: {type(error).__name__}") from error
        if not isinstance(fields, tuple) or not fields or not isinstance(fields[0], str):
            raise ProtocolError("a message is an array that starts with its name")
        decoder = self._decoders.get(fields[0])
        if decoder is None:
            raise ProtocolError(f"unknown message {fields[0][:40]!r}")
        return decoder(fields[1:])


def _plain(message: Any) -> list[Any]:
    return [_plain_value(getattr(message, field.name)) for field in dataclasses.fields(message)]


def _plain_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _plain(value)
    if isinstance(value, tuple):
        if value and (dataclasses.is_dataclass(value[0]) or isinstance(value[0], tuple)):
            return [_plain_value(item) for item in value]
        return value
    if isinstance(value, dict):
        return {key: _plain_value(item) for key, item in value.items()}
    return value


def _decoder(message_type: type) -> Check:
    hints = typing.get_type_hints(message_type)
    fields = [(field.name, _check(hints[field.name])) for field in dataclasses.fields(message_type)]
    name = message_type.__name__

    def decode(values: Any) -> Any:
        if not isinstance(values, tuple) or len(values) != len(fields):
            raise ProtocolError(f"{name} has {len(fields)} fields")
        try:
            return message_type(*[check(value) for (_, check), value in zip(fields, values, strict=True)])
        except ProtocolError as error:
            raise ProtocolError(f"{name}: {error}") from error
        except ValueError as error:  # the type's own validation
            raise ProtocolError(f"{name}: {error}") from error

    return decode


def _check(hint: Any) -> Check:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _decoder(typing.cast(type, hint))
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


def _check_tuple(check: Check, plain: type | None) -> Check:
    def check_all(value: Any) -> Any:
        if not isinstance(value, tuple):
            raise ProtocolError(f"expected an array, got {type(value).__name__}")
        if plain is not None and all(type(item) is plain for item in value):
            return value
        return tuple(check(item) for item in value)

    return check_all


def _check_dict(key_type: type, check: Check) -> Check:
    def check_all(value: Any) -> Any:
        if not isinstance(value, dict) or not all(type(key) is key_type for key in value):
            raise ProtocolError(f"expected a map with {key_type.__name__} keys, got {type(value).__name__}")
        return {key: check(item) for key, item in value.items()}

    return check_all
