"""Every error a user of msi can meet.

    EngineError
    ├── ConfigError            a flag, a model directory or a set-up that cannot work
    │   └── CheckpointError    a tensor that is missing, truncated or misshapen
    ├── InvalidRequest         what a client asked for cannot be done (HTTP 400)
    │   └── ModelNotFound      it names a model that is not served here (HTTP 404)
    ├── Unavailable            the instance cannot serve now, try again later (HTTP 503)
    │   └── Overloaded         it could, but not within its objectives: `.retry_after_s` says when (HTTP 429)
    ├── DeadlineExceeded       a request's own time was over before its answer was whole (HTTP 408)
    ├── RequestFailed          a request was accepted and then lost; the message names the worker (HTTP 502)
    ├── ProtocolError          bytes that are not ours, or of another protocol version
    └── TransportError         a peer failed: `.peer` names it
        └── BatchRefused       it is there, and could not compute this one thing

Messages are sentences: what was given, what is allowed, what to do. Between processes an error travels as a `Failure`,
and comes out as what it was.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Annotated

CONTEXT_EXCEEDED = "context_length_exceeded"  # OpenAI's code
MAX_SHOWN_CHARS = 100
MAX_LINE_CHARS = 200


class EngineError(Exception):
    """Root of the tree.

    Attributes:
        param: the field of the request that is to blame, "" where none is.
        code: a word for programs that react to this very error, such as "context_length_exceeded"; "" for none.
    """

    def __init__(self, message: str = "", *, param: str = "", code: str = "") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ConfigError(EngineError):
    """A flag, a model directory or a set-up that cannot work."""


class CheckpointError(ConfigError):
    """A tensor is missing, truncated or misshapen; the message names it."""


class InvalidRequest(EngineError, ValueError):
    """What a client asked for cannot be done."""


class ModelNotFound(InvalidRequest):
    """The request names a model that is not served here."""


class Unavailable(EngineError):
    """The instance cannot serve now; trying again later may help."""


class Overloaded(Unavailable):
    """What is asked now would come too late.

    Attributes:
        retry_after_s: until it is predicted to come in time; 0 where nothing is predicted.
    """

    def __init__(self, message: str = "", *, param: str = "", code: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(EngineError):
    """The time that a request gave itself was over before its answer was whole."""


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


class BatchRefused(TransportError):
    """A peer that is there could not compute one batch; nothing else is lost."""


def context_exceeded(
    max_model_len: int, num_prompt: int, max_tokens: int, *, is_at_least: bool = False
) -> InvalidRequest:
    """The refusal of a prompt that leaves no room for an answer, in vLLM's words: clients look for them.

    Args:
        num_prompt: tokens of the prompt; with `is_at_least`, a lower bound of them.
        max_tokens: what was asked for.
    """
    about = "at least " if is_at_least else ""
    return InvalidRequest(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested {max_tokens} output "
        f"tokens and your prompt contains {about}{num_prompt} input tokens, for a total of {about}"
        f"{num_prompt + max_tokens} tokens. Please reduce the length of the input prompt or the number of requested "
        "output tokens.",
        param="prompt",
        code=CONTEXT_EXCEEDED,
    )


def shown(value: object) -> str:
    """A value as an error quotes it: on one line, of at most MAX_SHOWN_CHARS characters."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # Python writes no integer of more than 4300 digits, and an object may refuse
        return f"a {type(value).__name__} that cannot be written"
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."


def one_line(error: BaseException) -> str:
    """The class of an exception that is a bug of ours or of a library, and the beginning of its message."""
    try:
        words = str(error).split()
    except Exception:
        words = []
    message = " ".join(words)
    if len(message) > MAX_LINE_CHARS:
        message = message[:MAX_LINE_CHARS] + "..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = 60


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a value.

    Attributes:
        kind: one of `KINDS`.
        peer: of a TransportError, or of a kind of it.
        retry_after_s: of an Overloaded.
    """

    kind: str
    message: str
    param: str = ""
    code: str = ""
    peer: str = ""
    retry_after_s: Annotated[float, (0.0, 1e6)] = 0.0

    @staticmethod
    def of(error: EngineError) -> Failure:
        kind = next(kind for kind, known in KINDS.items() if isinstance(error, known))
        if isinstance(error, TransportError):
            return Failure(kind, error.reason, error.param, error.code, error.peer)
        if isinstance(error, Overloaded):
            return Failure(kind, str(error), error.param, error.code, retry_after_s=error.retry_after_s)
        return Failure(kind, str(error), error.param, error.code)

    def error(self) -> EngineError:
        """What it was; an EngineError where a newer version of msi said a kind that this one does not know."""
        known = KINDS.get(self.kind, EngineError)
        if issubclass(known, TransportError):
            return known(self.peer, self.message)
        if issubclass(known, Overloaded):
            return known(self.message, param=self.param, code=self.code, retry_after_s=self.retry_after_s)
        return known(self.message, param=self.param, code=self.code)


KINDS: dict[str, type[EngineError]] = {  # a class before its bases
    "checkpoint": CheckpointError,
    "config": ConfigError,
    "model_not_found": ModelNotFound,
    "invalid_request": InvalidRequest,
    "overloaded": Overloaded,
    "unavailable": Unavailable,
    "deadline_exceeded": DeadlineExceeded,
    "request_failed": RequestFailed,
    "protocol": ProtocolError,
    "batch_refused": BatchRefused,
    "transport": TransportError,
    "engine": EngineError,
}
