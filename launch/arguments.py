"""The command line of msi-launch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from msi.errors import ConfigError
from msi.options import InstanceOptions, with_plan

LATER = ("--check",)
LEFT_OUT = object()  # an option that the command line does not name
MICRO_BATCHES = ("auto", "1", "2", "3", "4")


@dataclass(frozen=True, slots=True)
class LaunchArguments:
    """What msi-launch was told.

    Attributes:
        role: "" for everything on this machine, else the one process to run.
        parent: process with which this one ends; 0 for none.
        api_key: what HTTP clients must give; "" asks for none.
        chat_template: file with a template to use in place of the model's.
        announce: descriptor to write the coordinator's address to; -1 for none.
    """

    options: InstanceOptions
    role: str
    coordinator: str
    worker_id: str
    advertise_host: str
    host: str
    port: int
    prompt: str | None
    max_tokens: int
    has_gateway: bool
    api_key: str
    chat_template: Path | None
    log_level: str
    parent: int
    announce: int
    trace_dir: Path | None


def parse(argv: list[str]) -> LaunchArguments:
    """Raises ConfigError; argparse itself ends the process on words that it does not know."""
    for flag in LATER:
        if any(word == flag or word.startswith(flag + "=") for word in argv):
            raise ConfigError(f"{flag} is not built yet")
    parser = argparse.ArgumentParser(
        prog="msi-launch",
        description="Serve a Mixture-of-Experts model with attention and experts on different workers. "
        "Without --role: everything on this machine, with an HTTP server in front.",
        allow_abbrev=False,
    )
    _add_instance(parser)
    _add_serving(parser)
    _add_role(parser)
    names = InstanceOptions.__dataclass_fields__
    values = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, LEFT_OUT)))
    given = {name: getattr(values, name) for name in names if getattr(values, name) is not LEFT_OUT}
    if "micro_batches" in given:
        given["micro_batches"] = 0 if values.micro_batches == "auto" else int(values.micro_batches)
    options = InstanceOptions(**with_plan(given))
    if values.role and values.role != "coordinator" and not values.coordinator:
        raise ConfigError(f"--role {values.role} needs --coordinator tcp://HOST:PORT")
    if values.api_key == "":
        raise ConfigError("--api-key is empty; give a key, or leave the flag out to ask for none")
    if values.chat_template is not None and not values.chat_template.is_file():
        raise ConfigError(f"--chat-template {values.chat_template} is not a file")
    return LaunchArguments(
        options=options,
        role=values.role,
        coordinator=values.coordinator,
        worker_id=values.worker_id,
        advertise_host=values.advertise_host,
        host=values.host,
        port=values.port,
        prompt=values.prompt,
        max_tokens=values.max_tokens,
        has_gateway=not values.no_gateway,
        api_key=values.api_key or "",
        chat_template=values.chat_template,
        log_level=values.log_level,
        parent=values.parent,
        announce=values.announce,
        trace_dir=values.trace_dir,
    )


def _add_instance(parser: argparse.ArgumentParser) -> None:
    defaults = {name: field.default for name, field in InstanceOptions.__dataclass_fields__.items()}
    add = parser.add_argument_group("instance").add_argument
    add("model", nargs="?", type=Path, metavar="MODEL", help="Hugging Face model directory; the demo model without it")
    add("--attention-workers", type=int, metavar="N", default=defaults["attention_workers"])
    add("--expert-workers", type=int, metavar="N", default=defaults["expert_workers"])
    add("--micro-batches", choices=MICRO_BATCHES, default="auto", help="in flight per attention worker; auto measures")
    add("--colocated", action="store_true", help="both roles in one process: the baseline, best for small models")
    add("--device", default=defaults["device"], help="cpu, cuda or cuda:N")
    add("--threads-per-worker", type=int, metavar="N", default=0, help="0 shares the cores among a role's workers")
    add(
        "--transport",
        default=defaults["transport"],
        help="auto (shared memory within a host, TCP across), shm, tcp, or inproc: all workers in one process",
    )
    add("--dtype", default=defaults["dtype"], help="auto, float32, bfloat16 or float16")
    add("--load-format", default=defaults["load_format"], help="auto, or dummy: random weights from config.json alone")
    add("--max-model-len", type=int, metavar="N", default=0, help="longest sequence; 0 for the model's own")
    add("--max-num-seqs", type=int, metavar="N", default=defaults["max_num_seqs"], help="running, per attention worker")
    add("--max-num-batched-tokens", type=int, metavar="N", default=0, help="per micro-batch; 0 for a slot's rows")
    add("--max-num-waiting", type=int, metavar="N", default=defaults["max_num_waiting"],
        help="requests that wait at an attention worker; more are refused")  # fmt: skip
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
        help="share the KV blocks of common prefixes")  # fmt: skip
    add("--num-gpu-blocks-override", type=int, metavar="N", default=0, help="KV blocks, whatever the memory allows")
    add("--generation-config", default=defaults["generation_config"], metavar="auto|vllm|DIR",
        help="sampling parameters for requests that leave them out: the model's own generation_config.json, none, or "
        "that of a folder")  # fmt: skip
    add("--slot-rows", type=int, metavar="N", default=defaults["slot_rows"], help="rows of a landing slot")
    add("--gpu-memory-utilization", type=float, metavar="F", default=defaults["gpu_memory_utilization"],
        help="share of free memory (on a CPU: of free RAM) for KV cache")  # fmt: skip
    add("--served-model-name", default="", metavar="S")
    add("--trace", type=Path, metavar="FILE", help="write a Chrome trace at the end")
    add("--plan", type=Path, metavar="FILE", help="run a plan that msi-plan wrote, and watch its predictions")
    add("--plan-drift", type=float, metavar="F", default=defaults["plan_drift"],
        help="say so when stage times part from the plan's by more than this fraction")  # fmt: skip
    add(
        "--start-timeout",
        dest="start_timeout_s",
        type=float,
        metavar="S",
        default=defaults["start_timeout_s"],
        help="give up after that long",
    )
    add("--peer-timeout", dest="peer_timeout_s", type=float, metavar="S", default=defaults["peer_timeout_s"],
        help="an expert worker that owes an answer for that long is lost")  # fmt: skip


def _add_serving(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("serving").add_argument
    add("--host", default="127.0.0.1", metavar="H")
    add("--port", type=int, default=8000, metavar="P")
    add("--api-key", metavar="K", help="clients must send it as Authorization: Bearer K, on all paths but /health")
    add("--chat-template", type=Path, metavar="F", help="Jinja file to use in place of the model's chat template")
    add("--prompt", metavar="TEXT", help="answer once, to standard output, and exit")
    add("--max-tokens", type=int, default=128, metavar="N", help="of the answer to --prompt")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))


def _add_role(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("one process of a cluster").add_argument
    add("--role", default="", choices=("coordinator", "attention", "expert", "worker"))
    add("--coordinator", default="", metavar="ADDRESS", help="tcp://HOST:PORT; for the coordinator: where to listen")
    add("--worker-id", default="", metavar="ID", help="role-index by default")
    add("--advertise-host", default="", metavar="H", help="this host's address for workers on others; found by default")
    hidden = argparse.SUPPRESS  # what a launcher tells its children
    add("--no-gateway", action="store_true", help=hidden)
    add("--parent", type=int, default=0, help=hidden)
    add("--announce", type=int, default=-1, help=hidden)
    add("--trace-dir", type=Path, help=hidden)
