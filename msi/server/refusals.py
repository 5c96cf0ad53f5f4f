"""Answers of HTTP that are no engine's errors: each a status, a sentence, and whether the connection goes on."""

from __future__ import annotations

from collections.abc import Mapping


class Refused(Exception):
    """A request is answered with this instead.

    Args:
        headers: more of them.
        is_unread: the body was not read and will not be, so the connection ends.
    """

    def __init__(
        self, status: int, sentence: str, *, headers: Mapping[str, str] | None = None, is_unread: bool = False
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = dict(headers or {})
        self.is_unread = is_unread
