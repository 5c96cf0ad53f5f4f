#!/usr/bin/env python3
"""An instance inside an aiohttp application: it starts and ends with it, and a client that leaves cancels its request.

tools/examples/aiohttp_app.py --port 8001 [MODEL]
curl -N "http://127.0.0.1:8001/tell?prompt=It+was"
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator

from aiohttp import web

from msi import Engine, InvalidRequest, SamplingParams

ENGINE: web.AppKey[Engine] = web.AppKey("engine", Engine)


async def tell(request: web.Request) -> web.StreamResponse:
    """The prompt and how it goes on, piece by piece."""
    prompt = request.query.get("prompt", "It was a fine morning, and")
    response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
    try:
        async for output in request.app[ENGINE].generate(prompt, SamplingParams(max_tokens=30, temperature=0)):
            if not response.prepared:
                await response.prepare(request)
                await response.write(prompt.encode())
            await response.write(output.text.encode())
    except InvalidRequest as error:
        raise web.HTTPBadRequest(text=str(error)) from error
    await response.write_eof()
    return response


def application(model: str | None) -> web.Application:
    async def engine(app: web.Application) -> AsyncIterator[None]:
        async with Engine.local(model=model) as app[ENGINE]:
            yield

    app = web.Application()
    app.cleanup_ctx.append(engine)
    app.router.add_get("/tell", tell)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--port", type=int, default=8001)
    values = parser.parse_args()
    web.run_app(application(values.model), host="127.0.0.1", port=values.port)


if __name__ == "__main__":
    main()
