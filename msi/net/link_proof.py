"""Two ends of a data connection prove to each other that they hold the instance's secret, without telling it.

    accepting end -> dialling end     challenge: whether there is a secret, and a nonce
    dialling end -> accepting end     hello:     a nonce, a proof over both nonces and all that it says, its hello
    accepting end -> dialling end     welcome:   a proof over all of that and all that it says, its welcome

Hello and welcome name the instance, both workers and their lives, so proofs are bound to those. Each proof is of its
end alone, and of one connection: it can neither be sent back nor used again. Without a secret the same is said, and
proves nothing. Knows no sockets.
"""

from __future__ import annotations

import hmac
import os

from msi.errors import ProtocolError
from msi.net.secret import VARIABLE, Secret

NONCE_BYTES = 32
PROOF_BYTES = 32
CHALLENGE_BYTES = 1 + NONCE_BYTES
PROVED_BYTES = NONCE_BYTES + PROOF_BYTES  # in front of a hello
DIFFERS = f"the secret differs: give all processes of an instance the same --secret-file (or {VARIABLE})"


class Proofs:
    """Of one process."""

    def __init__(self, secret: Secret | None) -> None:
        self._key = None if secret is None else secret.key("data plane")

    def challenge(self) -> bytes:
        return bytes([self._key is not None]) + os.urandom(NONCE_BYTES)

    def hello(self, challenge: bytes, hello: bytes, seat_bytes: int) -> bytes:
        """What the dialling end answers to a challenge. Raises ProtocolError: the other has a secret, or none."""
        if len(challenge) != CHALLENGE_BYTES:
            raise ProtocolError(f"a challenge of {len(challenge)} bytes")
        if challenge[0] and self._key is None:
            raise ProtocolError("it asks for a secret, and this process was given none: give it the --secret-file")
        if not challenge[0] and self._key is not None:
            raise ProtocolError(f"it has no secret, and this process has one: give it the same (or {VARIABLE})")
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._proof(b"dial", challenge, nonce, seat_bytes, hello) + hello

    def check_hello(self, challenge: bytes, said: bytes, seat_bytes: int) -> bytes:
        """The hello, once it is proved. Raises ProtocolError."""
        if len(said) < PROVED_BYTES:
            raise ProtocolError("a hello without proof")
        nonce, proof, hello = said[:NONCE_BYTES], said[NONCE_BYTES:PROVED_BYTES], said[PROVED_BYTES:]
        if not hmac.compare_digest(proof, self._proof(b"dial", challenge, nonce, seat_bytes, hello)):
            raise ProtocolError(DIFFERS)
        return hello

    def welcome(self, challenge: bytes, said: bytes, welcome: bytes, seat_bytes: int) -> bytes:
        """What the accepting end answers to the hello that `said`."""
        return self._proof(b"accept", challenge, said, seat_bytes, welcome) + welcome

    def check_welcome(self, challenge: bytes, said: bytes, answer: bytes, seat_bytes: int) -> bytes:
        """The welcome, once it is proved. Raises ProtocolError."""
        proof, welcome = answer[:PROOF_BYTES], answer[PROOF_BYTES:]
        if not hmac.compare_digest(proof, self._proof(b"accept", challenge, said, seat_bytes, welcome)):
            raise ProtocolError(DIFFERS)
        return welcome

    def _proof(self, end: bytes, challenge: bytes, said: bytes, seat_bytes: int, text: bytes) -> bytes:
        """Each part goes in with its length, so that none can be taken for another."""
        if self._key is None:
            return bytes(PROOF_BYTES)
        parts = (end, challenge, said, seat_bytes.to_bytes(8, "little"), text)
        joined = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
        return hmac.digest(self._key, joined, "sha256")
