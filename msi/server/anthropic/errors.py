"""Errors as Anthropic's API has them."""

from __future__ import annotations

from typing import Any

PATH = "/v1/messages"  # and all below it
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def is_anthropics(path: str) -> bool:
    """Whether what is asked at a path is answered as Anthropic would."""
    return path == PATH or path.startswith(PATH + "/")


def error_body(error: dict[str, Any], status: int) -> dict[str, Any]:
    """Of OpenAI's error object."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error["message"]}}
