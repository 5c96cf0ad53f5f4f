"""Two ends of a data connection prove to each other that they are of one instance, without telling how they know.

    accepting end -> dialling end     challenge: a nonce
    dialling end -> accepting end     hello:     a nonce, a proof over both nonces and all that it says, its hello
    accepting end -> dialling end     welcome:   a proof over all of that and all that it says, its welcome

Hello and welcome name the instance, both workers and their lives, so proofs are bound to those. Each proof is of its
end alone, and of one connection: it can neither be sent back nor used again. Knows no sockets.
"""

from __future__ import annotations

import hmac
import os

from msi.errors import ProtocolError

NONCE_BYTES = 32
PROOF_BYTES = 32
CHALLENGE_BYTES = NONCE_BYTES
PROVED_BYTES = NONCE_BYTES + PROOF_BYTES  # in front of a hello
DIFFERS = "it does not prove that it is of this instance: the secret differs, or it belongs to another"


class Proofs:
    """Of one process. `key`: what both have to hold; None proves nothing."""

    def __init__(self, key: bytes | None) -> None:
        self._key = key

    def challenge(self) -> bytes:
        return os.urandom(NONCE_BYTES)

    def hello(self, challenge: bytes, hello: bytes, layout: bytes) -> bytes:
        """What the dialling end answers to a challenge. Raises ProtocolError: it is none."""
        if len(challenge) != CHALLENGE_BYTES:
            raise ProtocolError(f"a challenge of {len(challenge)} bytes")
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._proof(b"dial", challenge, nonce, layout, hello) + hello

    def check_hello(self, challenge: bytes, said: bytes, layout: bytes) -> bytes:
        """The hello, once it is proved. Raises ProtocolError."""
        if len(said) < PROVED_BYTES:
            raise ProtocolError("a hello without proof")
        nonce, proof, hello = said[:NONCE_BYTES], said[NONCE_BYTES:PROVED_BYTES], said[PROVED_BYTES:]
        if not hmac.compare_digest(proof, self._proof(b"dial", challenge, nonce, layout, hello)):
            raise ProtocolError(DIFFERS)
        return hello

    def welcome(self, challenge: bytes, said: bytes, welcome: bytes, layout: bytes) -> bytes:
        """What the accepting end answers to the hello that `said`."""
        return self._proof(b"accept", challenge, said, layout, welcome) + welcome

    def check_welcome(self, challenge: bytes, said: bytes, answer: bytes, layout: bytes) -> bytes:
        """The welcome, once it is proved. Raises ProtocolError."""
        proof, welcome = answer[:PROOF_BYTES], answer[PROOF_BYTES:]
        if not hmac.compare_digest(proof, self._proof(b"accept", challenge, said, layout, welcome)):
            raise ProtocolError(DIFFERS)
        return welcome

    def _proof(self, end: bytes, challenge: bytes, said: bytes, layout: bytes, text: bytes) -> bytes:
        """Each part goes in with its length, so that none can be taken for another."""
        if self._key is None:
            return bytes(PROOF_BYTES)
        parts = (end, challenge, said, layout, text)
        joined = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
        return hmac.digest(self._key, joined, "sha256")
