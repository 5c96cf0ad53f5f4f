#!/usr/bin/env python3
"""A completion over HTTP, printed piece by piece as it comes, with the standard library alone.

tools/examples/streaming_client.py "It was a fine morning" --url http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import Request, urlopen


def pieces(url: str, body: dict[str, object]) -> Iterator[str]:
    """The text of a streamed completion. Raises HTTPError, whose body is OpenAI's JSON with a sentence."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("MSI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = Request(f"{url}/v1/completions", json.dumps(body | {"stream": True}).encode(), headers)
    with urlopen(request) as response:
        for line in response:  # server-sent events: "data: {...}", blank lines between them
            event = line.decode().removeprefix("data: ").strip()
            if event == "[DONE]":
                return
            if event:
                for choice in json.loads(event)["choices"]:
                    yield choice["text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=60)
    arguments = parser.parse_args()
    try:
        for piece in pieces(arguments.url, {"prompt": arguments.prompt, "max_tokens": arguments.max_tokens}):
            print(piece, end="", flush=True)
    except HTTPError as error:
        sys.exit(json.load(error)["error"]["message"])
    print()


if __name__ == "__main__":
    main()
