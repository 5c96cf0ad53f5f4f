"""The small programs under tools/examples run, and print what they say they do."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from tests.test_launch import free_port, launched, running

EXAMPLES = Path(__file__).parent.parent / "tools" / "examples"
WITHOUT_A_SERVER = {"choose_plan.py": "worth splitting: True", "simulate_faults.py": "expert-3 four times slower: "}
WITH_ITS_OWN = {"embedded.py": "It was a fine morning, and ", "notebook.py": "log-probability of"}
APPLICATIONS = {"aiohttp_app.py": (), "fastapi_app.py": ("fastapi", "uvicorn")}  # and the packages that they need
OF_A_SERVER = {"streaming_client.py": ["It was"], "websocket_client.py": []}


def said(name: str, *arguments: object) -> str:
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, cwd="/").stdout


def test_every_example_is_run_by_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        *WITHOUT_A_SERVER,
        *WITH_ITS_OWN,
        *APPLICATIONS,
        *OF_A_SERVER,
    }


@pytest.mark.parametrize(("name", "expected"), WITHOUT_A_SERVER.items())
def test_what_needs_no_server_runs(name, expected):
    assert expected in said(name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), WITH_ITS_OWN.items())
def test_what_starts_an_instance_of_its_own_runs(name, expected):
    assert expected in said(name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "packages"), APPLICATIONS.items())
async def test_applications_serve_and_end(name, packages, tiny_model):
    for package in packages:
        pytest.importorskip(package)
    port = free_port()
    async with running(sys.executable, EXAMPLES / name, "--port", port, tiny_model) as child:
        url = f"http://127.0.0.1:{port}/tell"
        async with aiohttp.ClientSession() as session:
            for _ in range(600):
                assert child.process.returncode is None, child.said
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    async with session.get(url, params={"prompt": "It is"}) as response:
                        assert response.status == 200
                        assert (await response.text()).startswith("It is")
                        break
                await asyncio.sleep(0.1)
            async with session.get(url, params={"prompt": ""}) as response:
                assert response.status == 400
        child.process.send_signal(signal.SIGINT)
        assert await child.ended() == 0
    assert "Traceback" not in child.said


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
