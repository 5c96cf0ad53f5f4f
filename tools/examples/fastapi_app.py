#!/usr/bin/env python3
"""An instance inside a FastAPI application. Needs `pip install fastapi uvicorn`.

tools/examples/fastapi_app.py --port 8001 [MODEL]
curl -N "http://127.0.0.1:8001/tell?prompt=It+was"
"""

import argparse
import contextlib
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from msi import Engine, EngineError, InvalidRequest, SamplingParams


def application(model: str | None) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Engine.local(model=model) as app.state.engine:
            yield

    app = FastAPI(lifespan=lifespan)

    async def tell(prompt: str = "It was a fine morning, and") -> StreamingResponse:
        """The prompt and how it goes on, piece by piece."""
        outputs = app.state.engine.generate(prompt, SamplingParams(max_tokens=30, temperature=0))
        try:
            first = await anext(outputs)
        except InvalidRequest as error:
            raise HTTPException(400, str(error)) from error
        except EngineError as error:
            raise HTTPException(503, str(error)) from error

        async def pieces() -> AsyncIterator[str]:
            async with contextlib.aclosing(outputs):
                yield prompt + first.text
                async for output in outputs:
                    yield output.text

        return StreamingResponse(pieces(), media_type="text/plain; charset=utf-8")

    app.add_api_route("/tell", tell)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--port", type=int, default=8001)
    values = parser.parse_args()
    uvicorn.run(application(values.model), host="127.0.0.1", port=values.port, log_level="warning")


if __name__ == "__main__":
    main()
