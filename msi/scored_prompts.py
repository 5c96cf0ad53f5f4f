"""A prompt's log-probabilities come with the passes that compute it; here they become one piece, before all else."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from msi.errors import ProtocolError, RequestFailed
from msi.prompt_logprobs import PromptLogprobs
from msi.types import Progress


async def gathered(updates: AsyncGenerator[Progress, None], scored: str) -> AsyncGenerator[Progress, None]:
    """The updates of several requests with one prompt; the first one has all of the prompt's log-probabilities.

    Those of other requests that come before are held back. Closing it closes `updates`.

    Args:
        scored: the id of the request whose prompt is scored.

    Raises:
        RequestFailed: parts of them are missing.
    """
    parts: list[PromptLogprobs] = []
    held: list[Progress] = []
    has_all = False
    queued_s = 0.0
    try:
        async for update in updates:
            if has_all:
                yield update
                continue
            if update.prompt_logprobs is not None:
                parts.append(update.prompt_logprobs)
            if update.request_id != scored:
                held.append(update)
                continue
            queued_s += update.queued_s
            if update.token_ids or update.is_last:
                has_all = True
                yield update._replace(prompt_logprobs=_joined(parts), queued_s=queued_s)
                for one in held:
                    yield one
                held.clear()
    finally:
        await updates.aclose()


def _joined(parts: list[PromptLogprobs]) -> PromptLogprobs:
    try:
        return PromptLogprobs.joined(parts)
    except ProtocolError as error:
        raise RequestFailed(str(error)) from error
