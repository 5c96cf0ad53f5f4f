"""The keys that clients give, and whether a request has one. Knows no HTTP beyond the header's form.

Which key it is, or how near it comes to one, takes no time that could be measured: digests of one length are compared,
and always all of them. No key is kept, only its digest.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection

FLOW_CHARS = 16


class ApiKeys:
    """Args: keys: any of them will do; without any, every request will."""

    def __init__(self, keys: Collection[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admits(self, authorization: str) -> bool:
        """Whether an Authorization header has a key, as `Bearer KEY`."""
        return not self._digests or bool(self.flow_of(authorization))

    def flow_of(self, authorization: str) -> str:
        """A name for whoever has the key of an Authorization header; "" where it has none of them."""
        scheme, _, given = authorization.partition(" ")
        digest = _digest(given.strip())
        is_known = False
        for known in self._digests:
            is_known |= hmac.compare_digest(digest, known)
        return digest.hex()[:FLOW_CHARS] if is_known and scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()  # a header may hold any bytes
