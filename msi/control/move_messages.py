"""What a coordinator and attention workers say of a request that is to go on at another worker; see `moving`."""

from __future__ import annotations

from dataclasses import dataclass

from msi.control.worker_status import Count, Seconds


@dataclass(frozen=True, slots=True)
class Release:
    """A worker is to let a request go, which goes on elsewhere; who has it no more says nothing.

    Attributes:
        number: for the answer; others are of a request that was called so before.
        address: where its KV blocks may go before; "" for nowhere.
        again_s: what computing them again is thought to take; 0 where that is not known.
    """

    request_id: str
    number: Count
    address: str = ""
    again_s: Seconds = 0.0


@dataclass(frozen=True, slots=True)
class Released:
    """A worker has let a request go; nothing more will be said of it there.

    Attributes:
        num_tokens, num_scored: of its output, and of its prompt, that have been told, here and before.
    """

    worker_id: str
    incarnation: Count
    request_id: str
    number: Count
    num_tokens: Count
    num_scored: Count
