"""Who may ask from a browser: a web page of any origin can reach a server on its visitor's own machine. Pure.

A page is let in when it comes from this server itself, or from an origin that was allowed by name. A name that points
here without our knowing (DNS rebinding) is no way around: on a loopback address that asks for no key, the Host header
has to be an address, localhost, or a name that was given.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from msi.errors import ConfigError, shown

ANY = "*"


@dataclass(frozen=True, slots=True)
class Origins:
    """What is let in.

    Attributes:
        allowed: such as "https://chat.example.com"; ("*",) for all.
        host: what the server listens on, as it was given.
        has_key: whether every request needs a key.

    Raises:
        ConfigError: one of `allowed` is no origin.
    """

    allowed: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    has_key: bool = False

    def __post_init__(self) -> None:
        for origin in self.allowed:
            parts = urlsplit(origin)
            if origin != ANY and (not parts.scheme or not parts.netloc or parts.path or parts.query):
                raise ConfigError(f"`allowed_origins` {origin!r} is not one; give SCHEME://HOST[:PORT], or *")

    def refusal(self, headers: Mapping[str, str]) -> str:
        """Why a request is refused, or ""."""
        host = headers.get("Host", "")
        if host and not self._is_host_known(host):
            return (
                f"the Host header names {shown(host)}, by which this server does not know itself; use its address, or "
                "`api_key`, or allow the name with `allowed_origins` http://NAME:PORT"
            )
        origin = headers.get("Origin", "")
        if not origin or (host and _netloc(origin) == host.lower()) or self.is_allowed(origin):
            return ""
        return f"web pages from {shown(origin)} may not ask this server; `allowed_origins` lets them in"

    def is_allowed(self, origin: str) -> bool:
        return ANY in self.allowed or origin.lower() in {one.lower() for one in self.allowed}

    def _is_host_known(self, host: str) -> bool:
        if self.has_key or ANY in self.allowed or not is_loopback(self.host):
            return True
        name = _name_of(host)
        if is_address(name) or name == "localhost" or name.endswith(".localhost"):
            return True
        return name in {_name_of(_netloc(origin)) for origin in self.allowed} | {self.host.lower()}


@functools.lru_cache(maxsize=8)  # each request asks, too
def is_loopback(host: str) -> bool:
    """Whether what a server listens on is reached from its own machine only."""
    return host.lower() == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


@functools.lru_cache(maxsize=64)  # each request names a host
def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name_of(host: str) -> str:
    """Without the port, and without the brackets of an IPv6 address."""
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
