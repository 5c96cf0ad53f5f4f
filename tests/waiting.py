"""Waiting in tests for what nobody announces."""

from __future__ import annotations

import asyncio


async def until(condition, timeout_s=5.0):
    """Looks every millisecond until `condition()` holds; TimeoutError after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # there is no event: the thing itself is being tested
            await asyncio.sleep(0.001)
