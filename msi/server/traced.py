"""The gateway's OpenTelemetry span of a request: from its start to its last output, with what vLLM tells of one."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable

from msi.request_spans import OpenSpans
from msi.types import Output


async def traced(
    spans: OpenSpans, parent: str, request_id: str, start: Callable[[str], AsyncGenerator[Output, None]]
) -> AsyncGenerator[Output, None]:
    """The same outputs. Closing it closes them.

    Args:
        parent: the client's traceparent, "" for none.
        start: begins the request, below the traceparent that it is given.
    """
    key = object()
    started = time.monotonic()
    context = spans.begin(key, "llm_request", parent, gen_ai__request__id=request_id)
    num_prompt = num_tokens = 0
    first_s = queued_s = 0.0
    failure = "cancelled"
    try:
        async with contextlib.aclosing(start(context)) as outputs:
            async for output in outputs:
                if not num_prompt:
                    first_s, queued_s, num_prompt = (
                        time.monotonic() - started,
                        output.queued_s,
                        output.num_prompt_tokens,
                    )
                    spans.event(key, "first token")
                num_tokens += len(output.token_ids)
                yield output
        failure = ""
    except (GeneratorExit, asyncio.CancelledError):
        raise
    except Exception as error:
        failure = str(error)
        raise
    finally:
        spans.end(
            key, failure, gen_ai__usage__prompt_tokens=num_prompt, gen_ai__usage__completion_tokens=num_tokens,
            gen_ai__latency__time_to_first_token=first_s, gen_ai__latency__time_in_queue=queued_s,
            gen_ai__latency__e2e=time.monotonic() - started,
        )  # fmt: skip
