#!/usr/bin/env python3
"""Three requests on one WebSocket, side by side, of which one is cancelled. The client chooses the ids.

tools/examples/websocket_client.py --url http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import asyncio
import os

import aiohttp

PROMPTS = {"one": "It was a fine morning, and", "two": "Mr. Darcy, who had", "endless": "She went on, and"}


async def ask(url: str) -> dict[str, str]:
    """What came of each request: its text, and how it ended."""
    key = os.environ.get("MSI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    texts = dict.fromkeys(PROMPTS, "")
    running = set(PROMPTS)
    async with aiohttp.ClientSession(headers=headers) as session, session.ws_connect(f"{url}/v1/stream") as socket:
        for name, prompt in PROMPTS.items():
            asked = {"max_tokens": 400, "ignore_eos": True} if name == "endless" else {"max_tokens": 20}
            await socket.send_json({"type": "generate", "id": name, "prompt": prompt, **asked})
        while running:
            message = await socket.receive_json()
            name, kind = message["id"], message["type"]
            if kind == "output":
                if name == "endless" and not texts[name]:
                    await socket.send_json({"type": "cancel", "id": name})
                texts[name] += message["text"]
            else:  # exactly one of done, cancelled or error
                reason = f": {message['error']['message']}" if kind == "error" else ""
                texts[name] += f"  [{kind}{reason}]"
                running.discard(name)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    for name, text in asyncio.run(ask(parser.parse_args().url)).items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
