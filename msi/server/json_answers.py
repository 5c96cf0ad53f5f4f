"""Answers of HTTP in JSON: whole ones, errors in the shape that clients of a path know, and long ones in pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from aiohttp import web

from msi.server.anthropic.errors import error_body, is_anthropics
from msi.server.event_stream import MAX_PIECE_BYTES, write_pieces

RETRY_AFTER_S = 1  # what a client waits that nothing could take now


def json_response(values: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=orjson.dumps(values), content_type="application/json", status=status, headers=headers)


def error_response(
    path: str, status: int, error: dict[str, Any], headers: Mapping[str, str] | None = None
) -> web.Response:
    """An error in the shape that clients of a path know; `error`: OpenAI's object."""
    headers = dict(headers or {})
    if status in (429, 503):
        headers.setdefault("Retry-After", str(RETRY_AFTER_S))
    return json_response(error_body(error, status) if is_anthropics(path) else {"error": error}, status, headers)


async def answer_in_pieces(
    request: web.BaseRequest, parts: Sequence[bytes], headers: Mapping[str, str]
) -> web.StreamResponse:
    """JSON that is there as bytes; where it is long, the client's connection is not filled with it at once."""
    num_bytes = sum(map(len, parts))
    if num_bytes <= MAX_PIECE_BYTES:
        return web.Response(body=b"".join(parts), content_type="application/json")
    response = web.StreamResponse(headers={"Content-Type": "application/json", **headers})
    response.content_length = num_bytes
    await response.prepare(request)
    for part in parts:
        await write_pieces(response, part)
    await response.write_eof()
    return response
