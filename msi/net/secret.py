"""The secret that the processes of a cluster share. It is never sent: each purpose has a key derived from it.

Without one a process listens where only this machine reaches it, unless it is told that its network can be trusted.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from msi.errors import ConfigError

VARIABLE = "MSI_SECRET"
MIN_CHARS = 16
MAX_BYTES = 4096
ADVICE = "write one with: openssl rand -hex 32"


class Secret:
    """Shows nothing of itself.

    Args:
        source: where the text is from, for sentences.

    Raises:
        ConfigError: the text is too short or too long to be one.
    """

    def __init__(self, text: str, source: str = VARIABLE) -> None:
        text = text.strip()
        if len(text) < MIN_CHARS:
            raise ConfigError(
                f"the secret in {source} has {len(text)} characters, and at least {MIN_CHARS} are needed; {ADVICE}"
            )
        if len(text) > MAX_BYTES:
            raise ConfigError(f"the secret in {source} has {len(text)} characters; at most {MAX_BYTES} are allowed")
        self.text = text
        # guessing a weak one from what passes on the network is to cost something
        self._root = hashlib.scrypt(text.encode(), salt=b"msi instance secret 1", n=2**14, r=8, p=1, dklen=32)

    def key(self, purpose: str) -> bytes:
        """32 bytes for this purpose alone."""
        return hmac.digest(self._root, purpose.encode(), "sha256")

    def __repr__(self) -> str:
        return "Secret(...)"


def find_secret(path: Path | None, environment: Mapping[str, str] = os.environ) -> Secret | None:
    """The secret in a file, or else in the environment; None where neither says one.

    Raises:
        ConfigError: the file cannot be one that keeps a secret.
    """
    if path is not None:
        return Secret(read_private(path, "`secret_file`"), f"`secret_file` {path}")
    text = environment.get(VARIABLE)
    return None if text is None else Secret(text)


def without_secret(environment: Mapping[str, str]) -> dict[str, str]:
    """For a child that is not to know it."""
    return {name: value for name, value in environment.items() if name != VARIABLE}


def read_private(path: Path, name: str) -> str:
    """A short text that nobody but its owner can read. Raises ConfigError: it is not that; begins with `name`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # nobody is waited for, such as at a FIFO
    except OSError as error:
        raise ConfigError(f"{name} {path} cannot be read: {error.strerror}; {ADVICE}") from error
    try:
        _check_file(f"{name} {path}", os.fstat(fd))
        raw = os.read(fd, MAX_BYTES + 1)
    finally:
        os.close(fd)
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{name} {path} is longer than {MAX_BYTES} bytes; {ADVICE}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} {path} is not text; {ADVICE}") from error


def _check_file(name: str, status: os.stat_result) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{name} is not a regular file")
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{name} belongs to user {status.st_uid}, who can read and change it")
    if mode & 0o077:
        raise ConfigError(f"{name} is open to others than its owner (mode {mode:o}); close it with chmod 600")


@dataclass(frozen=True, slots=True)
class Trust:
    """By what a process knows its own kind on a network.

    Attributes:
        secret: what others have to hold; None takes whoever comes.
        is_insecure_allowed: without a secret, too, it may listen where other machines reach it.
    """

    secret: Secret | None = None
    is_insecure_allowed: bool = False

    def check_listening(self, host: str, what: str) -> None:
        """Whether `what` may listen at `host`.

        Raises:
            ConfigError: others than this machine reach it, and it has no secret to know its own by.
        """
        if self.secret is None and not self.is_insecure_allowed and not is_loopback(host):
            raise ConfigError(
                f"{what} would listen on {host} without a secret, and whoever reaches that could read prompts and "
                f"take its place: give every process of the instance the same `secret_file` FILE (or {VARIABLE}), "
                f"or `insecure_network` where everybody on that network may do so"
            )

    def check_encrypting(self) -> None:
        """Whether rows can be encrypted. Raises ConfigError: without a secret anybody could have the key."""
        if self.secret is None:
            raise ConfigError(
                "`encrypt_rows` needs a secret to make its key of: give every process of the instance the same "
                f"`secret_file` FILE (or {VARIABLE})"
            )

    def link_key(self, instance: str) -> bytes:
        """For proofs between the workers of an instance, by its token: who was let in knows that."""
        root = b"" if self.secret is None else self.secret.key("data plane")
        return hmac.digest(root, instance.encode(), "sha256")


NO_SECRET = Trust()


def public_name(instance: str) -> str:
    """What an instance may be called where others hear it: its token is only for who was let in."""
    return hashlib.sha256(b"msi instance " + instance.encode()).hexdigest()[:32]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or name, by every address that it has."""
    host = host.strip("[]")
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)} if host not in ("", "*") else set()
        return bool(found) and all(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in found)
    except (OSError, ValueError, UnicodeError):
        return False
