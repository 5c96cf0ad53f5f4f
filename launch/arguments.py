"""The command line of msi-launch.

What an instance is told is written in `msi.options` and `msi.settings`, and its flags come from there. An option of the
launcher is one line in one of the `_add_...` functions below, and a field of the same name in `LaunchArguments`. What
is added in `_add_serving` reaches the process that serves HTTP by itself.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from msi.errors import ConfigError
from msi.net.rdma.options import GROUP as RDMA
from msi.net.secret import Trust, find_secret, read_private
from msi.options import DIAGNOSIS, PARAMETERS, InstanceOptions, with_plan
from msi.server.origins import Origins
from msi.settings import LIMITS, MODEL_AND_WORKERS

from .command_line import CommandLine, file_to_read, integer, number, one_of, quoted, text
from .parameter_flags import add_parameter
from .vllm_flags import add_foreign

DESCRIPTION = """Serve a Mixture-of-Experts model with attention and experts on different workers. Without --role:
everything on this machine, with an HTTP server in front. Names are vLLM's where vLLM has the option. `msi-launch
run-batch` answers a file of requests."""
ROLES = ("coordinator", "gateway", "attention", "expert", "worker")
LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_CHILD_NUMBER = 2**22  # of processes and descriptors
API_KEY_VARIABLES = ("MSI_API_KEY", "VLLM_API_KEY")  # the first that is set
SECRET = r"[!-~]+"  # what can stand in an Authorization header


@dataclass(frozen=True, slots=True)
class LaunchArguments:
    """What msi-launch was told.

    Attributes:
        role: "" for everything on this machine, else the one process to run.
        standby: the coordinator for which this one stands by; "" for none.
        slurm: this process is a task of srun's.
        parent: process with which this one ends; 0 for none.
        host: where HTTP is served: an address or a name, IPv6 without brackets.
        api_keys: one of them is what HTTP clients must give; () asks for none.
        chat_template: file with a template to use in place of the model's.
        enable_log_requests: a line for every request that ended.
        disable_log_stats: no lines on throughput and load.
        trust: by what peers on a network are known; see --secret-file.
        shutdown_timeout_s: what runs when the server is asked to end may go on for so long.
        announce: descriptor through which a launcher is told how things are (see `msi.instance.children`); -1 for none.
        allowed_origins: web pages of other origins that may ask.
        has_page: HTTP serves the page that shows the instance at work.
        http_sockets: descriptors that listen already, for a gateway.
        log_json: each line of the log is a JSON object.
        check: nothing is started; what would stand in the way is said (see `launch/doctor`), with `json` as an object.
        hosts: others of the cluster, for --check.
        ignored: flags of vLLM's that were given and change nothing here.
        serving_flags: for the process that serves HTTP, what was said of it.
    """

    options: InstanceOptions
    role: str
    coordinator: str
    standby: str
    slurm: bool
    worker_id: str
    advertise_host: str
    host: str
    port: int
    prompt: str | None
    max_tokens: int
    has_gateway: bool
    api_keys: tuple[str, ...]
    chat_template: Path | None
    enable_log_requests: bool
    disable_log_stats: bool
    allowed_origins: tuple[str, ...]
    has_page: bool
    log_level: str
    log_json: bool
    check: bool
    json: bool
    hosts: tuple[Peer, ...]
    parent: int
    shutdown_timeout_s: float
    announce: int
    http_sockets: tuple[int, ...]
    trace_dir: Path | None
    ignored: tuple[str, ...]
    serving_flags: tuple[str, ...]
    trust: Trust

    @property
    def log_flags(self) -> tuple[str, ...]:
        """For processes that this one starts."""
        return ("--log-level", self.log_level, *(("--log-json",) if self.log_json else ()))


def parse(argv: list[str]) -> LaunchArguments:
    """Raises ConfigError. --help and --version print, and end the process."""
    parser = CommandLine("msi-launch", DESCRIPTION, usage="msi-launch [MODEL] [options]")
    for heading in (MODEL_AND_WORKERS, LIMITS, RDMA):
        add_parameters(parser.add_argument_group(heading), heading)
    serving = parser.add_argument_group("serving over HTTP")
    _add_serving(serving)
    _add_once(parser)
    _add_role(parser)
    _add_diagnosis(parser)
    add_foreign(parser)
    values = parser.parse_args(argv)
    told = {one.name: getattr(values, one.name) for one in PARAMETERS}
    given = {name: value for name, value in told.items() if value is not None}
    options = InstanceOptions.of(**with_plan(given))
    _check(values)
    trust = _trust(values)
    if values.standby and trust.secret is None:
        raise ConfigError(
            "--standby needs a secret: else whoever connects could tell a coordinator that it is superseded"
        )
    own: dict[str, Any] = {
        "options": options,
        "serving_flags": _flags_of(serving, values),
        "trust": trust,
        "api_keys": _api_keys(values),
    }
    for one in fields(LaunchArguments):
        if one.name not in own:
            value = getattr(values, one.name)
            own[one.name] = "" if value is None and one.type == "str" else value
    return LaunchArguments(**own)


def _check(values: argparse.Namespace) -> None:
    """Raises ConfigError: what no value alone says."""
    if not values.check and (values.json or values.hosts):
        raise ConfigError(f"{'--json' if values.json else '--hosts'} is for --check; give that, too, or leave it out")
    if values.role and values.role != "coordinator" and not values.coordinator:
        raise ConfigError(f"--role {values.role} needs --coordinator tcp://HOST:PORT")
    if values.standby and (values.role != "coordinator" or not values.coordinator or values.has_gateway):
        raise ConfigError(
            "--standby is for --role coordinator with --no-gateway and a --coordinator address of its own: what serves "
            "HTTP is to survive both coordinators"
        )
    if values.prompt is not None and values.role:
        raise ConfigError(f"--prompt and --role {values.role}: a prompt is answered by an instance of its own")


def _trust(values: argparse.Namespace) -> Trust:
    """Raises ConfigError: the secret cannot be one, or nobody would ask for it."""
    is_cluster = bool(values.role) or values.slurm or "TORCHELASTIC_RUN_ID" in os.environ
    if not is_cluster and (values.secret_file is not None or values.insecure_network):
        flag = "--insecure-network" if values.secret_file is None else "--secret-file"
        raise ConfigError(
            f"{flag} is for --role, --slurm and torchrun: without them no socket but HTTP's is open to others"
        )
    return Trust(find_secret(values.secret_file) if is_cluster else None, values.insecure_network)


def _api_keys(values: argparse.Namespace) -> tuple[str, ...]:
    """From flags, a file, or the environment: a command line is no place for them, as every user can read those."""
    if values.api_key is not None:
        return tuple(values.api_key)
    if values.api_key_file is not None:
        said, source = read_private(values.api_key_file, "--api-key-file"), f"--api-key-file {values.api_key_file}"
    else:
        source = next((name for name in API_KEY_VARIABLES if name in os.environ), "")
        if not source:
            return ()
        said = os.environ[source]
    keys = tuple(line.strip() for line in said.splitlines() if line.strip())
    if not keys or not all(re.fullmatch(SECRET, key) for key in keys):
        raise ConfigError(f"{source} has to hold keys of visible ASCII characters, one a line; or do without it")
    return keys


def _flags_of(group: Any, values: argparse.Namespace) -> tuple[str, ...]:
    """A group's options as words of a command line, where they are not the default."""
    words = []
    for action in group._group_actions:
        value = getattr(values, action.dest)
        if value == action.default or action.dest in ("api_key", "api_key_file"):  # told by the environment
            continue
        if isinstance(value, bool):
            words.append(next(flag for flag in action.option_strings if flag.startswith("--no-") is not value))
        else:
            shown = ",".join(value) if isinstance(value, tuple) else value
            words.append(f"{action.option_strings[0]}={shown}")
    return tuple(words)


# -- what values may be ----------------------------------------------------------------------------------------------


def host(word: str) -> str:
    """An address or a name to listen at; IPv6 with or without brackets."""
    bare = word[1:-1] if word.startswith("[") and word.endswith("]") else word
    try:
        ipaddress.ip_address(bare)
    except ValueError:
        text(r"[A-Za-z0-9_.-]{1,253}", "a host's name or address alone; the port is --port")(word)
    return bare


def origins(word: str) -> tuple[str, ...]:
    """One or several, with commas between them, or as vLLM has them: a JSON array."""
    try:
        given = json.loads(word) if word.startswith("[") else word.split(",")
        allowed = tuple(str(one).strip().rstrip("/") for one in given)
        Origins(allowed)
    except (ValueError, ConfigError):
        raise argparse.ArgumentTypeError(
            f"{quoted(word)}: give SCHEME://HOST[:PORT], several with commas between them, or * for all"
        ) from None
    return allowed


class Peer(NamedTuple):
    """Another host; port 0 where none was said."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.port else self.host


def peers(word: str) -> tuple[Peer, ...]:
    """Hosts, with commas between them, each with a port or without."""
    return tuple(_peer(one.strip()) for one in word.split(","))


def _peer(word: str) -> Peer:
    name, colon, port = word.rpartition(":")
    if not colon or word.endswith("]") or (":" in name and not name.startswith("[")):
        return Peer(host(word), 0)  # a bare IPv6 address has no port
    return Peer(host(name), integer(1, 65535, of="a port")(port))


def descriptors(word: str) -> tuple[int, ...]:
    return tuple(int(one) for one in word.split(","))


# -- the options -----------------------------------------------------------------------------------------------------


def add_parameters(group: Any, heading: str) -> None:
    """Those of an instance that stand under a heading."""
    for one in PARAMETERS:
        if one.about.group == heading:
            add_parameter(group, one)


def _add_serving(group: Any) -> None:
    add = group.add_argument
    add("--host", type=host, default="127.0.0.1", metavar="H", help="where to listen; 127.0.0.1, 0.0.0.0 for all")
    add("--port", type=integer(0, 65535, of="a port"), default=8000, metavar="P", help="8000; 0 takes a free one")
    add("--api-key", type=text(SECRET, "a key of visible ASCII characters, or leave the flag out to ask for none"),
        metavar="K", action="append",
        help="clients must send it as Authorization: Bearer K, on all paths but those that probes ask; may come "
        "several times")  # fmt: skip
    add("--api-key-file", type=Path, metavar="FILE", help="keys, one a line, in a file of mode 600; or MSI_API_KEY")
    add("--chat-template", type=file_to_read, metavar="FILE", help="Jinja file in place of the model's chat template")
    add("--enable-log-requests", action=argparse.BooleanOptionalAction, default=True,
        help="a line in the log for every request that ended; on")  # fmt: skip
    add("--shutdown-timeout", dest="shutdown_timeout_s", type=number(0, 86_400), metavar="S", default=30.0,
        help="requests that run when it is asked to end have so long; 30; asked again, it ends at once")  # fmt: skip
    add("--allowed-origins", type=origins, default=(), metavar="O,..",
        help="web pages that may ask, such as https://chat.example.com, or *; none but this server's own")  # fmt: skip
    add("--disable-log-stats", action="store_true", help="no lines in the log on throughput, queues and KV cache")
    add("--page", dest="has_page", action=argparse.BooleanOptionalAction, default=True,
        help="/ is a page that shows the instance at work; on")  # fmt: skip


def _add_once(parser: CommandLine) -> None:
    add = parser.add_argument_group("one answer").add_argument
    add("--prompt", metavar="TEXT", help="answer once, to standard output, and exit")
    add("--max-tokens", type=integer(1, 2**31 - 1), default=128, metavar="N", help="of that answer; 128")


def _add_role(parser: CommandLine) -> None:
    add = parser.add_argument_group("one process of a cluster").add_argument
    add("--role", type=one_of(*ROLES), metavar="R",
        help="coordinator (with a gateway), gateway (HTTP alone), attention, expert, or worker (any)")  # fmt: skip
    add("--coordinator", default="", metavar="ADDRESS",
        help="tcp://HOST:PORT, or several with commas between them where one coordinator stands by for another; for "
        "the coordinator: where to listen")  # fmt: skip
    add("--standby", default="", metavar="ADDRESS",
        help="of another coordinator: this one takes over once that is silent; workers and gateways are given "
        "both")  # fmt: skip
    add("--slurm", action="store_true",
        help="this process is one of srun's tasks: each is a worker, task 0 starts the coordinator, too")  # fmt: skip
    add("--worker-id", type=text(r"[A-Za-z0-9_.-]{1,64}", "up to 64 letters, digits, and any of _ . -"),
        metavar="ID", help="role-index by default")  # fmt: skip
    add("--advertise-host", type=host, metavar="H",
        help="this host's address for workers on others; found by default")  # fmt: skip
    add("--secret-file", type=Path, metavar="FILE",
        help="a secret that all processes of the instance share and prove; or MSI_SECRET")  # fmt: skip
    add("--insecure-network", action="store_true", help="listen on a network without a secret, for whoever reaches it")
    add("--no-gateway", dest="has_gateway", action="store_false",
        help="a coordinator without HTTP: gateways are processes of their own, which survive it")  # fmt: skip
    hidden = argparse.SUPPRESS  # what a launcher tells its children
    add("--parent", type=integer(0, MAX_CHILD_NUMBER), default=0, help=hidden)
    add("--announce", type=integer(-1, MAX_CHILD_NUMBER), default=-1, help=hidden)
    add("--trace-dir", type=Path, help=hidden)
    add("--http-sockets", type=descriptors, default=(), help=hidden)


def _add_diagnosis(parser: CommandLine) -> None:
    group = parser.add_argument_group(DIAGNOSIS)
    add = group.add_argument
    add("--log-level", type=one_of(*LOG_LEVELS), default="info", metavar="L", help="debug, info, warning or error")
    add("--log-json", action="store_true", help="the log as JSON, one object a line: time, level, process, message")
    add_parameters(group, DIAGNOSIS)
    add("--check", action="store_true",
        help="start nothing: look at devices, network, limits, model files and memory, and say what stands in the way; "
        "status 0, or 2 where something does")  # fmt: skip
    add("--hosts", type=peers, default=(), metavar="H,..", help="for --check: other hosts to reach, each HOST[:PORT]")
    add("--json", action="store_true", help="for --check: one JSON object")
    add(
        "--disable-log-requests", dest="enable_log_requests", action="store_false", help=argparse.SUPPRESS
    )  # vLLM's own
