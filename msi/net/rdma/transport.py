"""The RDMA transport: workers on hosts with cards, two queue pairs per pair of workers.

Each end writes through a queue pair of its own, and acknowledges through the other: so acknowledgements have a traffic
class of their own, which switches can prefer. All of a worker's queue pairs share one receive queue and one completion
queue, whose descriptor wakes the event loop.

Connections are made, watched and ended over TCP (`msi.net.tcp`, with its handshake and proofs): there the two ends
introduce their queue pairs, there a peer says goodbye and how many posts it made, and there the end of a process is
seen at once. A peer whose host falls silent is lost when it does not acknowledge. The dialling end *knocks*: a first
word by RDMA, which shows that the cards reach each other, and tells the other end that it may write.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from msi.errors import ConfigError, EngineError, TransportError
from msi.net.complaints import Complaints
from msi.net.delivery import Delivery
from msi.net.rdma.endpoint import NUM_SENDS, RdmaEndpoint
from msi.net.rdma.fabric import Place, open_place
from msi.net.rdma.goodbyes import GONE, Goodbyes
from msi.net.rdma.introduction import NUM_BYTES, Introduction
from msi.net.rdma.landing import RdmaLanding, RdmaOutbox, new_landing
from msi.net.rdma.options import RdmaOptions
from msi.net.rdma.queues import Queues, open_queues
from msi.net.rdma.reader import Reader
from msi.net.rdma.verbs import (
    RECEIVED_IMMEDIATE,
    RECEIVES_PER_REFILL,
    SUCCESS,
    Completion,
    Driver,
    status_sentence,
)
from msi.net.regions import HOST_MEMORY, Allocator
from msi.net.slots import SlotLayout
from msi.net.tcp import TcpTransport
from msi.net.transport import (
    CONNECT_TIMEOUT_S,
    MAX_HELLO_BYTES,
    Admission,
    CompletionKind,
    Endpoint,
    Handler,
    Landed,
    Landing,
    Poller,
    Together,
)

log = logging.getLogger(__name__)

SCHEME = "rdma://"
CONTROL_LAYOUT = SlotLayout(1, 1, 128)  # of a seat in which nothing lands: control connections carry words alone
KNOCK = 0x4B4E4F43  # never delivered
RECEIVES_PER_SEAT = 32
IMMEDIATE = CompletionKind.IMMEDIATE  # looked up once for each that lands, it would cost as much as the rest


class RdmaTransport:
    """Create it on its event loop.

    Args:
        driver: of a verbs library; see `msi.net.rdma.drivers`.
        host: this host's address as peers reach it, for the control connections.
        key: what peers have to prove that they hold; control connections are encrypted by it.
        complain: told who is cut off.
        poll_s: how long completions are looked for before they are slept for; see `msi.net.rdma.patience`.
        poller: takes immediates in place of the event loop.

    Raises:
        ConfigError: no device that could be used.
    """

    def __init__(
        self,
        driver: Driver,
        options: RdmaOptions | None = None,
        host: str = "127.0.0.1",
        *,
        key: bytes | None = None,
        complain: Complaints | None = None,
        poll_s: float = 0.0,
        poller: Poller | None = None,
    ) -> None:
        self.options = options or RdmaOptions()
        self.place: Place = open_place(driver, self.options)
        self._card = self.place.card
        self._reader = Reader(self._card, self._took, self._fail, poll_s=poll_s, poller=poller)
        self._poller = poller
        # keys of seats are not for whoever reads the network
        self._control = TcpTransport(host, key=key, encrypt=key is not None, complain=complain)
        self._control_landing = self._control.register(1, CONTROL_LAYOUT, HOST_MEMORY)
        self._control.deliver(self._controlled)
        self._deliver = Delivery()
        self._loop = asyncio.get_running_loop()
        self._accept: Callable[[bytes], Admission] | None = None
        self._landings: list[RdmaLanding] = []
        self._flushes: list[Callable[[], None]] = []  # of landings in a device's memory
        self._num_used = 0  # receives, since the last refill
        self._most_peers = 0  # that the queues have room for
        self._incoming: dict[int, RdmaEndpoint] = {}  # by the number of the queue pair that receives
        self._outgoing: dict[int, RdmaEndpoint] = {}  # that sends
        self._by_control: dict[Endpoint, RdmaEndpoint] = {}
        self._accepted: dict[bytes, RdmaEndpoint] = {}  # by what they said, until they are connected
        self._knocking: dict[RdmaEndpoint, asyncio.Future[None]] = {}
        self._goodbyes = Goodbyes(
            has_seat=lambda endpoint: endpoint.receives.number in self._incoming,
            end=lambda endpoint: self._end(endpoint, "its process is gone or closed the connection"),
            release=self._release,
        )
        self._early: list[tuple[RdmaEndpoint, int]] = []  # words to a poller before there was a connection
        self._is_open = True

    def register(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> RdmaLanding:
        return self._kept(new_landing(self._card, num_seats, layout, allocator))

    def landing_over(self, inner: Landing) -> RdmaLanding:
        """Another transport's landing, for peers of ours, too."""
        return self._kept(RdmaLanding(self._card, inner))

    def _kept(self, landing: RdmaLanding) -> RdmaLanding:
        self._landings.append(landing)
        if (flush := landing.rows.flush) is not None:
            self._flushes.append(flush)
        return landing

    def deliver(self, handler: Handler, together: Together | None = None) -> None:
        with self._reader.lock:
            self._deliver.start(handler, together)

    def take(self) -> None:
        if self._poller is not None:
            self._reader.take()

    # -- connections -------------------------------------------------------------------------------------------------

    async def listen(self, accept: Callable[[bytes], Admission]) -> str:
        self._accept = accept
        address = await self._control.listen(self._admit)
        return SCHEME + address.removeprefix("tcp://")

    async def connect(
        self, address: str, hello: bytes, landing: Landing, seat: int, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Endpoint:
        assert isinstance(landing, RdmaLanding)
        assert len(hello) + NUM_BYTES <= MAX_HELLO_BYTES, len(hello)
        if not address.startswith(SCHEME):
            raise TransportError(address, "is not an RDMA address (rdma://HOST:PORT)")
        until = self._loop.time() + timeout_s
        with contextlib.ExitStack() as undo:
            try:
                queues = self._open_queues()
                undo.callback(queues.close)
                ours = queues.introduce(landing, seat)
                undo.callback(landing.shut, seat)
                control = await self._control.connect(
                    "tcp://" + address.removeprefix(SCHEME), ours.encode() + hello, self._control_landing, 0,
                    timeout_s=timeout_s,
                )  # fmt: skip
                undo.callback(control.close)
                theirs, welcome = Introduction.decode(control.peer)
                outbox = RdmaOutbox(self._card, theirs.layout, landing.allocator)
                undo.callback(outbox.registered.close)
                queues.join(theirs, self.options.rdma_dispatch_class)
            except TransportError as error:
                raise TransportError(address, error.reason) from error
            except EngineError as error:
                raise TransportError(address, str(error)) from error
            except OSError as error:
                raise TransportError(address, f"no queue pair to it: {error.strerror or error}") from error
            endpoint = self._endpoint(address, welcome, landing, seat, outbox, queues, theirs, is_ready=True)
            self._watch(endpoint, control)
            undo.pop_all()
        try:
            await self._knock(endpoint, until - self._loop.time())
        except BaseException:
            endpoint.close()
            raise
        return endpoint

    async def _knock(self, endpoint: RdmaEndpoint, timeout_s: float) -> None:
        """Raises TransportError: the peer's card cannot be reached."""
        answered = self._knocking[endpoint] = self._loop.create_future()
        try:
            async with asyncio.timeout(timeout_s):
                endpoint.knock(KNOCK)
                await answered
        except OSError as error:
            why = "is not reached by RDMA in time" if isinstance(error, TimeoutError) else error.strerror
            raise TransportError(endpoint.name, f"{why}; see whether rping works between the two hosts") from error
        finally:
            del self._knocking[endpoint]

    def _admit(self, said: bytes) -> Admission:
        """The accepting half. Raises EngineError: the peer is refused, with its text."""
        assert self._accept is not None
        theirs, hello = Introduction.decode(said)
        if not self._is_open or not self._landings:
            raise ConfigError("there is no memory for peers")
        with contextlib.ExitStack() as undo:
            try:
                queues = self._open_queues()
                undo.callback(queues.close)
                outbox = RdmaOutbox(self._card, theirs.layout, self._landings[0].allocator)
                undo.callback(outbox.registered.close)
                queues.join(theirs, self.options.rdma_combine_class)
            except OSError as error:
                raise ConfigError(f"no queue pair to it: {error.strerror or error}") from error
            admission = self._accept(hello)
            undo.pop_all()
        # From here on the seat is taken: what fails now ends like any other connection.
        landing, seat = self._landing_of(admission.landing), admission.seat
        try:
            welcome = queues.introduce(landing, seat).encode() + admission.welcome
        except ConfigError as error:
            log.warning("the peer at seat %d is sent away: %s", seat, error)
            welcome = b""  # which the peer cannot use
        name = f"the RDMA peer at seat {seat}"
        self._accepted[said] = self._endpoint(name, hello, landing, seat, outbox, queues, theirs, is_ready=False)
        return Admission(self._control_landing, 0, welcome)

    def _landing_of(self, landing: Landing) -> RdmaLanding:
        return next(one for one in self._landings if landing in (one, one.inner))

    def _open_queues(self) -> Queues:
        """Raises OSError, or ConfigError: there are too many."""
        if not self._most_peers:
            self._start()
        if len(self._outgoing) >= self._most_peers:
            raise ConfigError(f"there are {self._most_peers} peers and such as are leaving: no more fit the queues")
        return open_queues(self.place, self.options)

    def _start(self) -> None:
        """The queues that all peers share; every landing is registered by now."""
        num_seats = sum(landing.num_seats for landing in self._landings)
        num_receives = RECEIVES_PER_SEAT * num_seats
        self._most_peers = 2 * num_seats  # a peer may come back before the last of its former life has left
        self._card.start(num_receives, num_receives + (NUM_SENDS + 1) * self._most_peers)
        self._reader.start()

    def _endpoint(
        self, name: str, peer: bytes, landing: RdmaLanding, seat: int, outbox: RdmaOutbox, queues: Queues,
        theirs: Introduction, *, is_ready: bool,
    ) -> RdmaEndpoint:  # fmt: skip
        endpoint = RdmaEndpoint(
            name=name, peer=peer, landing=landing, seat=seat, outbox=outbox, out_layout=theirs.layout,
            sends=queues.sends, receives=queues.receives, max_bytes=self.options.rdma_outstanding_bytes,
            is_ready=is_ready, leave=self._leave,
        )  # fmt: skip
        endpoint.aim(theirs.headers, theirs.rows)
        self._outgoing[queues.sends.number] = endpoint
        self._incoming[queues.receives.number] = endpoint
        landing.tell(seat, lambda: self._incoming.pop(queues.receives.number, None))
        return endpoint

    def _watch(self, endpoint: RdmaEndpoint, control: Endpoint) -> None:
        endpoint.control = control
        self._by_control[control] = endpoint

    # -- what the cards did ------------------------------------------------------------------------------------------

    def _fail(self, error: OSError) -> None:
        """Our card is of no use any more, to nobody."""
        log.error("RDMA device %s failed: %s", self._card.name, error.strerror or error)
        for endpoint in list(self._outgoing.values()):
            self._end(endpoint, f"our RDMA device failed: {error.strerror or error}")

    def _took(self, completions: Sequence[Completion]) -> None:
        """On the event loop or the poller's thread, with the reader's lock held."""
        for flush in self._flushes:
            flush()
        if self._early:
            self._hear_early()
        incoming = self._incoming
        landed: list[Landed] = []
        num_sent = 0
        for status, opcode, word, number in completions:
            if opcode != RECEIVED_IMMEDIATE or status != SUCCESS:
                num_sent += 1
                if status != SUCCESS and landed:  # which may end its connection: first what came before
                    self._deliver.all(landed)
                    landed = []
                self._sent(status, number)
                continue
            try:
                endpoint = incoming[number]
            except KeyError:
                continue  # it was closed or revoked
            endpoint.num_received += 1
            if endpoint.is_ready:
                landed.append((endpoint, word, 0.0))
            else:
                self._hear(endpoint, word)
        if landed:
            self._deliver.all(landed)
        self._num_used += len(completions) - num_sent
        while self._num_used >= RECEIVES_PER_REFILL:
            self._num_used -= RECEIVES_PER_REFILL
            self._card.refill()
        if self._goodbyes.heard:
            self._on_loop(self._goodbyes.settle)

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        if self._poller is None:
            call(*arguments)
        else:
            self._loop.call_soon_threadsafe(call, *arguments)

    def _sent(self, status: int, number: int) -> None:
        """Our writes up to here are acknowledged, or will never be."""
        endpoint = self._outgoing.get(number)
        if endpoint is None:
            endpoint = self._incoming.get(number)
        if endpoint is None:
            return  # flushed after its end
        if status != SUCCESS:
            self._on_loop(self._end, endpoint, status_sentence(status))
            return
        try:
            endpoint.completed()
        except OSError as error:
            self._on_loop(self._end, endpoint, f"the card took no post: {error.strerror or error}")
        if endpoint in self._knocking:
            self._on_loop(self._answered, endpoint)

    def _answered(self, endpoint: RdmaEndpoint) -> None:
        knocking = self._knocking.get(endpoint)
        if knocking is not None and not knocking.done():
            knocking.set_result(None)

    def _hear(self, endpoint: RdmaEndpoint, word: int) -> None:
        """The first words of a peer that we accepted."""
        if endpoint.control is None:
            self._early.append((endpoint, word))  # it was faster than our event loop
        elif endpoint.is_ready:
            self._deliver(endpoint, IMMEDIATE, word)
        elif word != KNOCK:
            self._on_loop(self._end, endpoint, "it wrote before it knocked")
        else:
            try:
                endpoint.become_ready()
            except OSError as error:
                self._on_loop(self._end, endpoint, f"the card took no post: {error.strerror or error}")

    def _hear_early(self) -> None:
        early, self._early = self._early, []
        for endpoint, word in early:
            self._hear(endpoint, word)

    # -- what is said over control connections -----------------------------------------------------------------------

    def _controlled(self, control: Endpoint, kind: CompletionKind, word: int, reason: str) -> None:
        if kind is CompletionKind.CONNECTED:
            endpoint = self._accepted.pop(control.peer)
            with self._reader.lock:
                self._deliver(endpoint, CompletionKind.CONNECTED)
                self._watch(endpoint, control)
                self._hear_early()
            return
        watched = self._by_control.get(control)
        if watched is None:
            return
        if not watched.is_open:  # we are leaving, and it has what we posted
            self._release(watched)
            return
        self._goodbyes.hear(watched, word if kind is CompletionKind.IMMEDIATE else GONE)
        self._reader.take()  # what it posted before
        self._goodbyes.settle()

    # -- the end -----------------------------------------------------------------------------------------------------

    def _end(self, endpoint: RdmaEndpoint, reason: str) -> None:
        """The peer's doing, not ours."""
        with self._reader.lock:
            was_open = endpoint.shut()
            self._release(endpoint)
            knocking = self._knocking.get(endpoint)
            if knocking is not None:
                if not knocking.done():
                    knocking.set_exception(TransportError(endpoint.name, reason))
            elif was_open:
                self._deliver(endpoint, CompletionKind.CLOSED, 0, reason)

    def _leave(self, endpoint: RdmaEndpoint) -> None:
        """We close it."""
        self._incoming.pop(endpoint.receives.number, None)
        self._goodbyes.say(endpoint)

    def _release(self, endpoint: RdmaEndpoint) -> None:
        """Nothing is left of it. Idempotent."""
        self._incoming.pop(endpoint.receives.number, None)
        self._outgoing.pop(endpoint.sends.number, None)
        self._goodbyes.forget(endpoint)
        if endpoint.control is not None:
            self._by_control.pop(endpoint.control, None)
            endpoint.control.close()
        endpoint.release()

    async def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        for endpoint in list(self._by_control.values()):
            endpoint.close()
        await self._goodbyes.all_said()
        self._reader.stop()
        for endpoint in list(self._outgoing.values()):
            self._release(endpoint)
        for landing in self._landings:
            landing.close()
        self._card.close()
        await self._control.close()
