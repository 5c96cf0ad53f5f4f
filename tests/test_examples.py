"""The small programs under tools/examples run, and print what they say they do."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_launch import free_port, launched

EXAMPLES = Path(__file__).parent.parent / "tools" / "examples"
WITHOUT_A_SERVER = {"choose_plan.py": "worth splitting: True", "simulate_faults.py": "expert-3 four times slower: "}
WITH_ITS_OWN = {"embedded.py": "It was a fine morning, and "}
OF_A_SERVER = {"streaming_client.py": ["It was"], "websocket_client.py": []}


def said(name: str, *arguments: object) -> str:
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, cwd="/").stdout


def test_every_example_is_run_by_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*WITHOUT_A_SERVER, *WITH_ITS_OWN, *OF_A_SERVER}


@pytest.mark.parametrize(("name", "expected"), WITHOUT_A_SERVER.items())
def test_what_needs_no_server_runs(name, expected):
    assert expected in said(name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), WITH_ITS_OWN.items())
def test_what_starts_an_instance_of_its_own_runs(name, expected):
    assert expected in said(name)


@pytest.mark.slow
async def test_clients_run_against_a_server(tiny_model):
    port = free_port()
    async with launched(tiny_model, "--port", port, "--threads-per-worker", 1) as child:
        await child.until_said("ready: ")
        texts = {
            name: await asyncio.to_thread(said, name, *arguments, "--url", f"http://127.0.0.1:{port}")
            for name, arguments in OF_A_SERVER.items()
        }
    assert texts["streaming_client.py"].strip()
    assert texts["websocket_client.py"].count("[done]") == 2
    assert texts["websocket_client.py"].count("[cancelled]") == 1
