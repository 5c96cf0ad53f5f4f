"""msi-launch from the outside: real processes, exit statuses, and sentences instead of stack traces."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
import time

import aiohttp
import pytest
import zmq
import zmq.asyncio

from msi import Engine, SamplingParams
from msi.control.messages import FROM_CLIENT, FROM_WORKER, Submit, WorkerHello
from msi.net.codec import Codec
from msi.precision import Precision
from msi.tracing import COMPUTE_ROW
from msi_launch.main import run

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["/nowhere"], "/nowhere is not a directory"),
        (["--hosts", "a"], "--hosts is for --check"),
        (["--plan", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["--api-key="], "--api-key is empty; give a key"),
        (["--chat-template", "/nowhere"], "--chat-template /nowhere is not a file"),
        (["--role", "expert"], "--role expert needs --coordinator tcp://HOST:PORT"),
        (["--device", "tpu"], "--device 'tpu' is not one; supported: cpu, cuda, cuda:N"),
        (["--attention-workers", "0"], "--attention-workers 0"),
        (["--peer-timeout", "0"], "--peer-timeout 0.0: give a number of seconds > 0"),
    ],
)
def test_what_cannot_work_is_a_sentence_and_status_2(capsys, arguments, complaint):
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert "Traceback" not in said


class Process:
    """A child whose output is collected, and which never outlives its test."""

    def __init__(self, process):
        self.process = process
        self.said = ""
        self._reader = asyncio.ensure_future(self._read())

    async def _read(self):
        while chunk := await self.process.stdout.read(4096):
            self.said += chunk.decode(errors="replace")

    async def until_said(self, pattern, within_s=90):
        deadline = time.monotonic() + within_s
        while not (found := re.search(pattern, self.said)):
            assert time.monotonic() < deadline, f"{pattern!r} was not said:\n{self.said}"
            assert self.process.returncode is None or not self._reader.done(), f"it ended:\n{self.said}"
            await asyncio.sleep(0.05)
        return found

    async def ended(self, within_s=60):
        status = await asyncio.wait_for(self.process.wait(), within_s)
        await self._reader
        return status


def launched(*arguments):
    return running(sys.executable, "-m", "msi_launch", *arguments)


@contextlib.asynccontextmanager
async def running(*command):
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True
    )
    child = Process(process)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await child.ended()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.slow
async def test_a_prompt_is_answered_once(tiny_model):
    async with launched(tiny_model, "--prompt", "It is", "--max-tokens", 5, "--threads-per-worker", 1) as child:
        assert await child.ended() == 0
        assert re.search(r"processes: coordinator \d+, expert-0 \d+, attention-0 \d+", child.said)
        assert "It is" in child.said
        assert "Traceback" not in child.said


@pytest.mark.slow
async def test_everything_on_this_machine_with_a_trace(tiny_model, tmp_path):
    port, trace = free_port(), tmp_path / "trace.json"
    arguments = (tiny_model, "--port", port, "--attention-workers", 2, "--trace", trace, "--threads-per-worker", 1)
    async with launched(*arguments) as child, aiohttp.ClientSession() as session:
        await child.until_said("ready: ")
        assert "micro-batches for" in child.said or "micro-batch" in child.said, "why m was chosen is in the log"
        body = {"prompt": "It is a truth", "max_tokens": 8, "temperature": 0}
        async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response:
            assert response.status == 200
        async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
            watched = set(re.findall(r'msi_loop_stalls_total{process="(.*)"}', await response.text()))
        assert watched >= {"coordinator", "attention-0", "attention-1", "expert-0"}
        child.process.send_signal(signal.SIGINT)
        assert await child.ended() == 0
    events = __import__("json").loads(trace.read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert tracks == {"attention-0", "attention-1", "expert-0"}
    spans = [event for event in events if event["ph"] == "X"]
    assert {"attention", "experts", "sample"} <= {span["name"] for span in spans}
    assert all(span["dur"] >= 0 and "cname" in span for span in spans)
    exchanges = [span for span in spans if span["tid"] != COMPUTE_ROW]
    assert {span["name"] for span in exchanges} == {"expert-0"}
    assert all(0 <= span["args"]["delay_ms"] <= span["dur"] / 1e3 for span in exchanges)


@pytest.mark.slow
async def test_a_key_and_a_chat_template_reach_the_gateway(tiny_model, tmp_path):
    port, template = free_port(), tmp_path / "template.jinja"
    arguments = (
        tiny_model,
        "--port",
        port,
        "--api-key=-secret",
        "--chat-template",
        template,
        "--threads-per-worker",
        1,
    )
    template.write_text("{{ messages[0].content }}")
    body = {"messages": [{"role": "user", "content": "It is"}], "max_tokens": 4, "n": 2, "logprobs": True,
            "frequency_penalty": 1, "logit_bias": {"5": -100}, "min_tokens": 2}  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    async with launched(*arguments) as child, aiohttp.ClientSession() as session:
        await child.until_said("ready: ")
        async with session.post(url, json=body) as response:
            assert response.status == 401
        async with session.post(url, json=body, headers={"Authorization": "Bearer -secret"}) as response:
            assert response.status == 200
            choices = (await response.json())["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert all(choice["logprobs"]["content"] for choice in choices)
    template.write_text("{% for %}")
    async with launched(*arguments) as child:
        assert await child.ended() == 2
        assert child.said.count("the chat template is not valid Jinja") == 1, "said once, however many processes"
        assert "Traceback" not in child.said


@pytest.mark.slow
async def test_a_coordinator_of_a_cluster_asks_clients_for_its_key(tiny_model):
    arguments = ("--role", "coordinator", "--coordinator", f"tcp://127.0.0.1:{free_port()}", "--port", 0)
    async with (
        launched(tiny_model, *arguments, "--api-key", "secret-key") as child,
        aiohttp.ClientSession() as session,
    ):
        url = (await child.until_said(r"HTTP at (http://\S+)"))[1]
        assert ":0" not in url
        for path, status in (("/health", 200), ("/version", 200), ("/v1/models", 401), ("/metrics", 401)):
            async with session.get(url + path) as response:
                assert response.status == status
        async with session.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret-key"}) as response:
            assert response.status == 200


@pytest.mark.slow
async def test_a_port_in_use_is_said_and_ends_it(tiny_model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with launched(tiny_model, "--port", taken.getsockname()[1]) as child:
            assert await child.ended() == 2
            assert "cannot serve HTTP on" in child.said
            assert "Traceback" not in child.said


@pytest.mark.slow
async def test_a_coordinator_that_cannot_be_reached_is_named(tiny_model):
    address = f"tcp://127.0.0.1:{free_port()}"
    async with launched(tiny_model, "--role", "expert", "--coordinator", address, "--start-timeout", 2) as child:
        assert await child.ended() == 2
        assert f"no coordinator answered at {address} for 2 s; is it running there?" in child.said
    async with launched(tiny_model, "--role", "expert", "--coordinator", "nonsense") as child:
        assert await child.ended() == 2
        assert "'nonsense' is not a coordinator's address; give tcp://HOST:PORT" in child.said


@pytest.mark.slow
async def test_processes_started_one_by_one_in_any_order(tiny_model, tmp_path):
    """A worker for any role first, then the coordinator, then the worker that wants a certain role; a second with the
    same id, garbage on the socket, and a drain."""
    address = f"tcp://127.0.0.1:{free_port()}"
    port = free_port()
    common = (tiny_model, "--coordinator", address, "--threads-per-worker", 1)
    async with (
        launched(*common, "--role", "worker") as chosen,
        launched(*common, "--role", "coordinator", "--expert-workers", 1, "--port", port) as coordinator,
    ):
        await coordinator.until_said("HTTP at")
        await chosen.until_said("waiting for other workers")
        async with (
            launched(*common, "--role", "expert", "--worker-id", "expert-0") as expert,
            Engine.connect(address) as engine,
        ):
            await engine.wait_ready(90)

            async def generate():
                params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
                return [t async for output in engine.generate("It is", params) for t in output.token_ids]

            expected = await generate()
            assert len(expected) == 6

            async with launched(*common, "--role", "expert", "--worker-id", "expert-0") as second:
                assert await second.ended() == 2
                assert re.search(r"expert-0 is live already \(pid \d+ on .*\); give another --worker-id", second.said)

            await send_garbage(address)
            assert await generate() == expected, "garbage on the coordinator's socket changes nothing"

            expert.process.send_signal(signal.SIGTERM)
            assert await expert.ended() == 0, "an expert worker that is drained ends"
            async with launched(*common, "--role", "expert", "--worker-id", "expert-0"):
                assert await asyncio.wait_for(generate(), 60) == expected, "and its successor is taken"
        assert chosen.process.returncode is None


@pytest.mark.slow
async def test_a_worker_that_waits_for_its_role_ends_when_it_is_told_to(tiny_model):
    address = f"tcp://127.0.0.1:{free_port()}"
    common = (tiny_model, "--coordinator", address, "--threads-per-worker", 1)
    async with (
        launched(*common, "--role", "worker") as first,
        launched(*common, "--role", "worker") as second,
        launched(*common, "--role", "coordinator", "--expert-workers", 2, "--no-gateway") as coordinator,
    ):
        for worker in (first, second):
            await worker.until_said("waiting for other workers")
        first.process.send_signal(signal.SIGTERM)
        assert await first.ended() == 0
        coordinator.process.send_signal(signal.SIGTERM)
        assert await second.ended() == 0, "the coordinator's end is told to it, too"


async def send_garbage(address):
    context = zmq.asyncio.Context()
    socket_ = context.socket(zmq.DEALER)
    socket_.connect(address)
    codec = Codec(FROM_WORKER + FROM_CLIENT)
    from msi.types import Request
    from msi.types import SamplingParams as Params

    for payload in (
        [b""],
        [b"\xff" * 100],
        [b"two", b"frames"],
        [b"\x91\xa5Hello"],
        [codec.encode(WorkerHello(99, "x", "expert", 1, "h", "f", Precision.of("float32")))],
        [codec.encode(Submit(Request("r", (1, 2), Params(seed=1))))],
    ):
        await socket_.send_multipart(payload)
    await asyncio.sleep(0.3)
    socket_.close()
    context.term()
    host, port = address.removeprefix("tcp://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\n\r\n" * 20)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
        await asyncio.wait_for(reader.read(10), 1)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.mark.slow
async def test_weights_that_cannot_be_loaded_are_named(tiny_model, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    async with launched(tmp_path, "--port", free_port()) as child:
        assert await child.ended() == 2
        assert re.search(r"has no tensor model\.layers\.1\.block_sparse_moe\.experts\.3\.w2\.weight", child.said)
        assert "Traceback" not in child.said


@pytest.mark.slow
async def test_it_waits_by_name_and_gives_up_with_a_sentence(tiny_model):
    address = f"tcp://127.0.0.1:{free_port()}"
    async with launched(
        tiny_model, "--role", "coordinator", "--coordinator", address, "--no-gateway", "--start-timeout", 3
    ) as coordinator:
        await coordinator.until_said("coordinator at")
        async with Engine.connect(address) as engine:
            deadline = time.monotonic() + 90
            while "gave up" not in engine.failure:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            assert "waiting for attention worker 1 of 1" in engine.failure


@pytest.mark.slow
async def test_more_kv_blocks_than_there_is_memory_for_are_said_and_not_tried_again(tiny_model):
    async with launched(tiny_model, "--num-gpu-blocks-override", 2**31 - 1, "--port", 0) as child:
        assert await child.ended() == 2
        assert "give a smaller --num-gpu-blocks-override or" in child.said
        assert "Traceback" not in child.said
        assert "started again" not in child.said
