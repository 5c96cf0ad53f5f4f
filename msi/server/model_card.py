"""What /v1/models says of a model: OpenAI's fields, and those that vLLM adds. Pure; knows no HTTP."""

from __future__ import annotations

from typing import Any


def model_card(name: str, max_model_len: int, created: int) -> dict[str, Any]:
    """Args: created: since when it is served here, in seconds since 1970."""
    permission = {
        "id": f"modelperm-{name}", "object": "model_permission", "created": created, "allow_create_engine": False,
        "allow_sampling": True, "allow_logprobs": True, "allow_search_indices": False, "allow_view": True,
        "allow_fine_tuning": False, "organization": "*", "group": None, "is_blocking": False,
    }  # fmt: skip
    return {
        "id": name, "object": "model", "created": created, "owned_by": "msi", "root": name, "parent": None,
        "max_model_len": max_model_len, "permission": [permission],
    }  # fmt: skip
