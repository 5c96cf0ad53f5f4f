"""Every error a user of msi can meet.

    EngineError
    ├── ConfigError            a flag, a model directory or a set-up that cannot work
    │   └── CheckpointError    a tensor that is missing, truncated or misshapen
    ├── InvalidRequest         what a client asked for cannot be done (HTTP 400)
    ├── Unavailable            the instance cannot serve now, try again later (HTTP 503)
    ├── RequestFailed          a request was accepted and then lost; the message names the worker (HTTP 502)
    ├── ProtocolError          bytes that are not ours, or of another protocol version
    └── TransportError         a peer failed: `.peer` names it

Messages are sentences: what was given, what is allowed, what to do.
"""


class EngineError(Exception):
    """Root of the tree."""


class ConfigError(EngineError):
    """A flag, a model directory or a set-up that cannot work."""


class CheckpointError(ConfigError):
    """A tensor is missing, truncated or misshapen; the message names it."""


class InvalidRequest(EngineError, ValueError):
    """What a client asked for cannot be done."""


class Unavailable(EngineError):
    """The instance cannot serve now; trying again later may help."""


class RequestFailed(EngineError):
    """A request was accepted and then lost; the message names the worker that was lost."""


class ProtocolError(EngineError):
    """Bytes that are not ours, or of another protocol version."""


class TransportError(EngineError):
    """A peer failed.

    Attributes:
        peer: the worker id of the peer, as it said in its hello.
    """

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"{peer}: {reason}")
        self.peer = peer
        self.reason = reason
