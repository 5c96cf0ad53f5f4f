"""The control plane's messages: a few per pass or rarer, all typed, all through `net.codec`; who may say which.

worker -> coordinator   WorkerHello, WorkerReady, Linked, Heartbeat, PassDone, PeerLost, RequestsFailed,
                        Calibrated, CalibrationCutShort, WorkerFailed, Placed, Draining, Goodbye, Account,
                        RequestAccount, Released; Pulse, by a socket of its own
coordinator -> worker   Assignment, Undecided, Refused, HelloAgain, AccountWanted, Adopted, Topology, UsePlacement,
                        Fence, Submit, Cancel, Release, Calibrate, UseLanes, HeartbeatAck, Drain, Shutdown, Superseded
client -> coordinator   ClientHello, Submit, Resubmit, Cancel, ClientHeartbeat, StatsRequest, Superseded, Order;
                        ClientPulse, by a socket of its own
coordinator -> client   Welcome, Refused, HelloAgain, InstanceStatus, Outputs, Stats, HeartbeatAck, Ordered, Superseded

Any message may be lost with a connection that breaks. Heartbeats say what their sender believes, and their answers how
far the other side has come, so that what is missing is said again, and what cannot be made good ends with a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msi.attention.journal import RequestAccount
from msi.control.client_messages import (
    ClientHeartbeat,
    ClientHello,
    ClientPulse,
    InstanceStatus,
    Outputs,
    Resubmit,
    Stats,
    StatsRequest,
    Welcome,
)
from msi.control.move_messages import Release, Released
from msi.control.orders import Order, Ordered
from msi.control.worker_status import Count, Seconds, WorkerStatus
from msi.errors import Failure
from msi.net.codec import Codec
from msi.placement import Placement, at_layer
from msi.placement_change import merged
from msi.precision import Precision
from msi.settings import Lanes, LinkShape, SchedulerLimits, Timeouts
from msi.types import Place, Progress, Request, StageTimes

PROTOCOL_VERSION = 15

Seats = Annotated[int, range(2**16)]
Index = Annotated[int, range(2**24)]


@dataclass(frozen=True, slots=True)
class WorkerHello:
    """A worker offers itself.

    Attributes:
        worker_id: wanted id; "" lets the coordinator choose.
        role: "attention", "expert", or "worker" for whichever is needed.
        fingerprint: of its model; all workers of an instance must have the same.
        precision: what its device would do, without "auto".
        process: random, one per process: tells a worker whose connection broke from another that wants its id.
        products: whose they are, where those of others would round otherwise; "" where nothing hangs on it.
    """

    protocol_version: int
    worker_id: str
    role: str
    pid: int
    host: str
    fingerprint: str
    precision: Precision
    process: str = ""
    products: str = ""


@dataclass(frozen=True, slots=True)
class Assignment:
    """The coordinator's answer: who the worker is from now on, and the shape of the instance.

    Attributes:
        instance: the instance's token; links refuse peers of another.
        former: the placement before it, as long as rows may be of that; see `msi.placement_change`.
        num_seats: seats of an expert worker.
        is_colocated: an attention worker that hosts all experts too.
        memory_share: of the memory for KV cache, when several attention workers share a host.
        link: with the lanes that slots are made for; UseLanes says how many run.
        term: of the coordinator; see `msi.control.succession`.
    """

    instance: str
    worker_id: str
    role: str
    place: Place
    incarnation: Count
    placement: Placement
    num_seats: Seats
    is_colocated: bool
    memory_share: Annotated[float, (0.0, 1.0)]
    limits: SchedulerLimits
    link: LinkShape
    timeouts: Timeouts
    precision: Precision
    former: Placement | None = None
    term: Count = 0

    @property
    def has_attention(self) -> bool:
        """Whether this worker computes attention."""
        return self.role == "attention"

    @property
    def experts(self) -> tuple[tuple[int, ...], ...]:
        """Those that this worker holds, by their local ids: of all layers, or of each; () for none in any."""
        if self.is_colocated:
            return (tuple(range(self.placement.num_experts)),)
        if self.role != "expert":
            return ()
        node, now = self.place.node, self.placement.layers
        before = now if self.former is None else self.former.layers
        num_layers = max(len(now), len(before))
        held = [
            merged(at_layer(now, layer).experts[node], at_layer(before, layer).experts[node])
            for layer in range(num_layers)
        ]
        return tuple(held if len(set(held)) > 1 else held[:1]) if any(held) else ()


@dataclass(frozen=True, slots=True)
class Undecided:
    """To a worker that has no place yet, and why. It says hello again until it is told.

    Which role is left for a worker that takes any is open until others have come; a place that another holds, until
    that one has been heard of.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """No; `reason` is a sentence for the user."""

    reason: str


@dataclass(frozen=True, slots=True)
class HelloAgain:
    """The coordinator of this term does not (or no longer) know this worker or client: it may say hello anew."""

    reason: str
    term: Count = 0


@dataclass(frozen=True, slots=True)
class AccountWanted:
    """A coordinator that is new asks a worker that serves already what it does; see `msi.control.takeover`."""


@dataclass(frozen=True, slots=True)
class Adopted:
    """A worker goes on as it is under a new coordinator. `term`: which one of the instance's coordinators that is."""

    term: Count


@dataclass(frozen=True, slots=True)
class Standing:
    """What a worker keeps for a coordinator that comes after this one, where it is not as at the start.

    Attributes:
        num_changes: of the places that are wanted, since the instance began: whoever knows of more heard of them last.
        attention, expert: those places.
        is_leaving: this worker is to end; `leaves_in_s`: then whatever it runs goes on elsewhere.
    """

    num_changes: Count
    attention: tuple[Index, ...]
    expert: tuple[Index, ...]
    is_leaving: bool
    leaves_in_s: Seconds


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """Weights are loaded.

    Attributes:
        address: where links reach an expert worker, and where others send an attention worker KV blocks; or "".
        num_blocks: of KV cache; or 0.
    """

    worker_id: str
    incarnation: int
    address: str
    num_blocks: Count


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """A worker cannot do its work and ends; `reason` is a sentence for the user."""

    worker_id: str
    incarnation: Count
    reason: str


@dataclass(frozen=True, slots=True)
class ExpertAddress:
    """Where one rank of an expert node is reached."""

    place: Place
    worker_id: str
    incarnation: int
    address: str


@dataclass(frozen=True, slots=True)
class Topology:
    """The expert nodes that are there now, every rank of each; `lost` says why others are not, by worker id."""

    experts: tuple[ExpertAddress, ...]
    lost: dict[str, str]


@dataclass(frozen=True, slots=True)
class UsePlacement:
    """From now on experts are placed like this; see `msi.control.placing` for who is told when.

    Attributes:
        former: an expert worker holds the experts of that one, too, and takes its rows; None: no longer.
    """

    placement: Placement
    former: Placement | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """An expert worker has done as UsePlacement said; or, with a reason, cannot, and is as it was."""

    worker_id: str
    incarnation: Count
    version: Count
    has_former: bool
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Fence:
    """To expert workers: this attention worker is lost, free its seat."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Linked:
    """An attention worker is connected to every expert worker (or, with `is_complete` False, no longer)."""

    worker_id: str
    incarnation: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class WorkerBelief:
    """How a worker thinks that things are; the coordinator says again what it turns out not to know.

    Attributes:
        acked: number of the last HeartbeatAck that came: whatever was sent before that one has come, too.
        ready: weights are loaded; repeats the WorkerReady that may have been lost.
        is_linked: as in Linked.
        num_lanes: that it was told of last; 0 before UseLanes.
        placement_version: of the placement that it uses; an attention worker of which nothing older is on its way.
        has_former: of an expert worker, whether it takes rows of the placement before that.
        follows_version, follows_former: the same of a UsePlacement that it follows now, which may take a while; 0 for
            none.
        request_ids: all that it holds.
        term: of the coordinator that it follows.
    """

    acked: int = -1
    ready: WorkerReady | None = None
    is_linked: bool = False
    num_lanes: Count = 0
    request_ids: tuple[str, ...] = ()
    placement_version: Count = 0
    has_former: bool = False
    follows_version: Count = 0
    follows_former: bool = False
    term: Count = 0


@dataclass(frozen=True, slots=True)
class Account:
    """What a worker does, for a coordinator that is new; a `RequestAccount` of each of its requests follows.

    Attributes:
        hello: as it would introduce itself.
        assignment: that it follows.
        term: of the coordinator that gave it, or took it over last.
        placement: that it uses now.
        num_passes: PassDones that it has sent.
        num_requests: whose accounts follow.
        standing: as it last heard.
    """

    hello: WorkerHello
    assignment: Assignment
    term: Count
    ready: WorkerReady
    placement: Placement
    is_linked: bool
    is_draining: bool
    num_lanes: Count
    num_passes: Count
    num_requests: Count
    acked: int
    standing: Standing | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    worker_id: str
    incarnation: int
    status: WorkerStatus
    belief: WorkerBelief = WorkerBelief()


@dataclass(frozen=True, slots=True)
class HeartbeatAck:
    """Answers a heartbeat.

    Attributes:
        number: counts up, for each worker.
        num_outputs: Outputs that were sent to this client so far.
        is_watched: somebody watches: this worker is to tell more with its next heartbeats.
        term: the coordinator's.
        standing: of this worker.
    """

    number: Count = 0
    num_outputs: Count = 0
    is_watched: bool = False
    term: Count = 0
    standing: Standing | None = None


@dataclass(frozen=True, slots=True)
class Pulse:
    """The worker's process lives, however busy its loop is. Comes from a thread and over a connection of its own.

    Attributes:
        process: the worker's secret, from its hello: nobody else can count for it.
        loop_lag_s: for how long the worker's loop has been standing still.
    """

    worker_id: str
    incarnation: Count
    process: str
    loop_lag_s: Seconds


@dataclass(frozen=True, slots=True)
class PassDone:
    """New tokens of one lane's pass. `number` counts those of a life: none may be missing."""

    worker_id: str
    incarnation: Count
    number: Count
    progress: tuple[Progress, ...]


@dataclass(frozen=True, slots=True)
class RequestsFailed:
    """Requests that end without (further) tokens."""

    worker_id: str
    incarnation: int
    request_ids: tuple[str, ...]
    failure: Failure


@dataclass(frozen=True, slots=True)
class PeerLost:
    """An attention worker lost its link to an expert worker."""

    worker_id: str
    incarnation: int
    peer: str
    peer_incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Calibrate:
    """Run synthetic micro-batches of this many sequences on this many lanes, and report stage times.

    Attributes:
        order: names it in the answer. What is asked again has a number of its own.
    """

    order: Count
    num_lanes: Lanes
    num_seqs: Count
    num_passes: Annotated[int, range(1, 2**16)]


@dataclass(frozen=True, slots=True)
class Calibrated:
    worker_id: str
    incarnation: Count
    order: Count
    times: StageTimes


@dataclass(frozen=True, slots=True)
class CalibrationCutShort:
    """There are no times to report: an expert worker was lost on the way. `reason` says so."""

    worker_id: str
    incarnation: Count
    order: Count
    reason: str


@dataclass(frozen=True, slots=True)
class UseLanes:
    """Serve with this many micro-batches in flight from now on."""

    num_lanes: Lanes


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish what runs, take nothing new, then say Goodbye and end."""


@dataclass(frozen=True, slots=True)
class Draining:
    """A worker was asked to end and wants to be drained."""

    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Goodbye:
    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    reason: str


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Superseded:
    """Another coordinator has taken over, and is reached at `address`: to one that was taken for dead, and from it to
    those who follow it still.
    """

    term: Count
    address: str


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str


FROM_WORKER = (
    WorkerHello, WorkerReady, Linked, Heartbeat, Pulse, PassDone, PeerLost, RequestsFailed, Calibrated,
    CalibrationCutShort, WorkerFailed, Placed, Draining, Goodbye, Account, RequestAccount, Released,
)  # fmt: skip
TO_WORKER = (
    Assignment, Undecided, Refused, HelloAgain, AccountWanted, Adopted, Topology, UsePlacement, Fence, Submit, Cancel,
    Release, Calibrate, UseLanes, HeartbeatAck, Drain, Shutdown, Superseded,
)  # fmt: skip
FROM_CLIENT = (ClientHello, Submit, Resubmit, Cancel, ClientHeartbeat, ClientPulse, StatsRequest, Superseded, Order)
TO_CLIENT = (Welcome, Refused, HelloAgain, InstanceStatus, Outputs, Stats, HeartbeatAck, Ordered, Superseded)

# Each end reads only what the other may say.
MAX_BYTES = 16 * 1024 * 1024  # of what a coordinator reads; what it says may be longer, such as a tokenizer
COORDINATOR_END = Codec(FROM_WORKER + FROM_CLIENT, TO_WORKER + TO_CLIENT, max_bytes=MAX_BYTES)
WORKER_END = Codec(TO_WORKER, FROM_WORKER, max_written_bytes=MAX_BYTES)
CLIENT_END = Codec(TO_CLIENT, FROM_CLIENT, max_written_bytes=MAX_BYTES)
