"""The clients of a coordinator: who is there, what each was told, and what was lost on the way to or from one.

Decides; does not act. Knows no sockets or clock; requests are the router's.
"""

from __future__ import annotations

from dataclasses import dataclass

from msi.control.client_messages import ClientHello, ClientPulse, InstanceStatus, Outputs, Welcome
from msi.control.members import Send
from msi.control.messages import PROTOCOL_VERSION, HeartbeatAck, Refused
from msi.control.routed import Updates

LOST_AFTER_S = 10.0
MAX_CLIENTS = 1024


@dataclass
class Client:
    """Attributes:
    token: as in its hello.
    status: as last told.
    """

    last_seen: float
    token: str
    num_outputs: int = 0
    num_submits: int = 0
    status: InstanceStatus | None = None


class Clients:
    """Those of one coordinator, by the route to each.

    Args:
        welcome: what each is told of the model.
    """

    def __init__(self, welcome: Welcome) -> None:
        self._welcome = welcome
        self._clients: dict[bytes, Client] = {}

    def __contains__(self, route: bytes) -> bool:
        return route in self._clients

    def hello(self, route: bytes, hello: ClientHello, now: float) -> tuple[Send, list[bytes]]:
        """The answer to it, and clients that are forgotten by it: what they were before their connection broke."""
        if hello.protocol_version != PROTOCOL_VERSION:
            reason = f"client speaks protocol version {hello.protocol_version}, the coordinator {PROTOCOL_VERSION}"
            return Send(route, Refused(reason)), []
        gone = [
            former
            for former, client in self._clients.items()
            if former == route or (hello.client and client.token == hello.client)
        ]
        for former in gone:
            del self._clients[former]
        if route not in gone and len(self._clients) >= MAX_CLIENTS:
            return Send(route, Refused(f"{MAX_CLIENTS} clients are connected already")), gone
        self._clients[route] = Client(now, hello.client)
        return Send(route, self._welcome), gone

    def beats(self, route: bytes, num_submits: int, now: float) -> bool:
        """A heartbeat of one; False where requests were lost on the way here, and with them the client."""
        client = self._clients[route]
        client.last_seen = now
        client.status = None  # it may have been lost, and nothing else says it again
        if num_submits == client.num_submits:
            return True
        del self._clients[route]
        return False

    def acknowledged(self, route: bytes, term: int) -> Send:
        """The answer to a heartbeat, of the coordinator of this term."""
        return Send(route, HeartbeatAck(num_outputs=self._clients[route].num_outputs, term=term))

    @property
    def routes(self) -> list[bytes]:
        """To all of them."""
        return list(self._clients)

    def pulse(self, pulse: ClientPulse, now: float) -> None:
        for client in self._clients.values():
            if client.token and client.token == pulse.client:
                client.last_seen = now

    def submits(self, route: bytes) -> None:
        """A request came from it."""
        self._clients[route].num_submits += 1

    def outputs(self, updates: Updates) -> list[Send]:
        """What is new of requests, for those who are still there."""
        sends = []
        for route, items in updates.items():
            if (client := self._clients.get(route)) is not None:
                client.num_outputs += 1
                sends.append(Send(route, Outputs(client.num_outputs, tuple(items))))
        return sends

    def are_told(self, is_ready: bool) -> bool:
        """Whether all know that much of the instance's status."""
        return all(one.status is not None and one.status.is_ready == is_ready for one in self._clients.values())

    def statuses(self, status: InstanceStatus) -> list[Send]:
        """For those to whom it is new."""
        sends = []
        for route, client in self._clients.items():
            if client.status != status:
                client.status = status
                sends.append(Send(route, status))
        return sends

    def tick(self, now: float, late_s: float) -> list[bytes]:
        """Those that were silent for too long, who are forgotten; `late_s` of it is nobody else's fault."""
        for client in self._clients.values():
            client.last_seen += late_s
        gone = [route for route, client in self._clients.items() if now - client.last_seen > LOST_AFTER_S]
        for route in gone:
            del self._clients[route]
        return gone
