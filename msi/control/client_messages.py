"""Messages that only clients say or hear, gateways among them; `msi.control.messages` says which go where."""

from __future__ import annotations

from dataclasses import dataclass, field

from msi.control.worker_status import Count, Seconds, WorkerStatus
from msi.sampling_params import NO_DEFAULTS, SamplingDefaults
from msi.types import Progress, Request


@dataclass(frozen=True, slots=True)
class ClientHello:
    """`client`: random, one per client: tells one whose connection broke from another."""

    protocol_version: int
    client: str = ""


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a client needs to know about the model.

    Attributes:
        tokenizer: tokenizer.json, b"" when there is none.
        chat_templates: in Jinja, by name; "default" if there are any.
        special_tokens: texts that templates name, such as bos_token.
        sampling_defaults: for requests that leave parameters out.
        tool_call_parser, reasoning_parser: how the model writes calls of tools, and what it thinks.
        coordinator_grace_s: requests wait so long for a coordinator in place of this one.
    """

    model_name: str
    vocab_size: int
    max_model_len: int
    tokenizer: bytes = b""
    chat_templates: dict[str, str] = field(default_factory=dict, hash=False)
    special_tokens: dict[str, str] = field(default_factory=dict, hash=False)
    sampling_defaults: SamplingDefaults = NO_DEFAULTS
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    coordinator_grace_s: Seconds = 60.0


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """Whether requests are taken, and if not what is waited for; `failure` is set when it will never be."""

    is_ready: bool
    sentence: str
    failure: str


@dataclass(frozen=True, slots=True)
class Resubmit:
    """A request that the coordinator may not know, with the tokens that its client has; the rest is wanted."""

    request: Request


@dataclass(frozen=True, slots=True)
class ClientHeartbeat:
    """`num_submits`: Submits that it has sent since its hello."""

    num_submits: Count


@dataclass(frozen=True, slots=True)
class ClientPulse:
    """The client's process lives, however busy its loop is; `client` as in its hello."""

    client: str


@dataclass(frozen=True, slots=True)
class Outputs:
    """What is new of a client's requests. `number` counts those to a client: none may be missing."""

    number: Count
    progress: tuple[Progress, ...]


@dataclass(frozen=True, slots=True)
class StatsRequest:
    """`is_watching`: workers are asked to tell more (`msi.control.watched`), until a while after the last of these."""

    is_watching: bool = False


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """`reason`: why it is lost."""

    worker_id: str
    role: str
    pid: int
    host: str
    incarnation: int
    state: str
    status: WorkerStatus
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Stats:
    """Everything countable in the instance.

    Attributes:
        num_waiting: requests that no worker has yet.
        drift: where a plan runs, measured over planned by stage ("attention", "expert", "comm"), and "alarms".
        dropped: what the coordinator did not take from its sockets, by kind.
        counters: the coordinator's own.
    """

    num_lanes: int
    num_requests: int
    workers: tuple[WorkerStats, ...]
    drift: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    num_waiting: int = 0
