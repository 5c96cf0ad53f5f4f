"""A gateway for tools/check_clients.py whose model thinks, calls the first tool that is given, and then answers.

PORT. It has no instance: what it says is fixed, so that agents can be seen to run a tool and go on with its result.
"""

import asyncio
import signal
import sys
from pathlib import Path

from msi.control.client_messages import Welcome
from msi.engine import Engine
from msi.server.gateway import Gateway
from msi.text.prompts import Prompts
from msi.types import Output

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENIZER = (ROOT / "msi" / "demo_model" / "tokenizer.json").read_bytes()
VOCAB_SIZE, MAX_MODEL_LEN = 2048, 1 << 18
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "TOOLS:{{ (tools or []) | map(attribute='function.name') | join(' ') }}{# <tool_call> <think></think> #}"
)
CALLS = {"weather": '{"city": "Paris"}', "Bash": '{"command": "echo sunny", "description": "says so"}'}
ANSWER = "It is sunny in Paris."


class Calling(Engine):
    """Says the same to everybody, depending on whether a tool has said something."""

    def __init__(self):
        super().__init__()
        self._welcome = Welcome("demo", VOCAB_SIZE, MAX_MODEL_LEN, TOKENIZER, {"default": TEMPLATE})
        self._prompts = Prompts.of(TOKENIZER, VOCAB_SIZE, MAX_MODEL_LEN)

    async def generate(self, prompt, params=None, **context):
        text = self._prompts.decode(prompt)
        name = next((name for name in text.rpartition("TOOLS:")[2].split() if name in CALLS), None)
        said = ANSWER
        if name is not None and "<tool>" not in text:
            call = f'{{"name": "{name}", "arguments": {CALLS[name]}}}'
            said = f"<think>I have to ask.</think>I look.\n<tool_call>\n{call}\n</tool_call>"
        for at in range(0, len(said), 4):
            yield Output("r", said[at : at + 4], (1,), None, len(prompt))
        yield Output("r", "", (2,), "stop", len(prompt))


async def main(port):
    gateway = Gateway(Calling(), host="127.0.0.1", port=port)
    await gateway.start()
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    await over.wait()
    await gateway.close()


asyncio.run(main(int(sys.argv[1])))
