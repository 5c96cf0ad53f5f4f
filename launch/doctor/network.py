"""Ports here, hosts elsewhere, and their clocks. Nothing is sent to what does not answer HTTP; every wait is short."""

from __future__ import annotations

import errno
import http.client
import socket
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime

from msi.errors import ConfigError
from msi.instance.instance import listen as listen_as_coordinator
from msi.net.rdma.drivers import load_driver
from msi.net.rdma.fabric import open_place, shown_gid
from msi.net.rdma.options import RdmaOptions
from msi.net.rdma.verbs import ETHERNET, Driver
from msi.net.secret import Trust, is_loopback
from msi.server.listening import listen, url_of

from ..arguments import Peer
from .findings import Finding, failed, ok, refused, warning

WITHIN_S = 3.0
MAX_SKEW_S = 0.5
NUM_DATES, BETWEEN_DATES_S = 12, 0.1  # more than a second


def check_http_port(host: str, port: int) -> Finding:
    where = url_of(host, port).removeprefix("http://")
    try:
        for one in listen(host, port):
            one.close()
    except ConfigError as error:
        return refused("HTTP port", error, "choose another `port`")
    return ok("HTTP port", f"{where} is free" if port else "a free one is taken")


def check_coordinator_port(address: str, trust: Trust) -> Finding:
    """Of a coordinator, where it is to listen."""
    try:
        listen_as_coordinator(address or "tcp://127.0.0.1:*", trust).close()
    except ConfigError as error:
        return refused("coordinator's port", error, "give another port as `coordinator`")
    return ok("coordinator's port", f"{address or 'one of its own'} is free")


def check_coordinator(address: str, *, within_s: float = WITHIN_S) -> Finding:
    """Of whoever joins one."""
    check = "coordinator"
    if address.startswith("ipc://"):
        return ok(check, f"{address} is a socket of this host")
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return failed(check, f"{address} is no address", "give `coordinator` as tcp://HOST:PORT")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), within_s):
            return ok(check, f"{address} listens")
    except ConnectionRefusedError:
        return warning(
            check, f"{host} is reached, and nothing listens at port {port} yet", "start the coordinator; workers wait "
            "for it for `start_timeout_s`",
        )  # fmt: skip
    except OSError as error:
        return failed(
            check, f"{address} is not reached: {reason_of(error)}", "check the name, the route and firewalls between "
            "the two hosts, and that the coordinator listens at an address of the network",
        )  # fmt: skip


def check_secret(address: str, trust: Trust) -> Finding:
    """What the processes of a cluster know each other by, for one that joins a coordinator at `address`."""
    host = address.removeprefix("tcp://").rpartition(":")[0]
    if trust.secret is not None:
        return ok("secret", "is there; that all hosts have the same one shows when they join")
    if not address.startswith("tcp://") or is_loopback(host.strip("[]")):
        return ok("secret", "is not needed: the coordinator is on this host")
    try:
        trust.check_listening(host, "this worker")
    except ConfigError as error:
        return refused("secret", error, "give every process the same `secret_file`")
    return warning("secret", "there is none: whoever reaches the network can read prompts")


def check_host(peer: Peer, default_port: int, *, within_s: float = WITHIN_S) -> list[Finding]:
    """Whether another host is reached, and where it answers HTTP, whether its clock agrees."""
    port = peer.port or default_port or 8000
    check = f"host {peer.host}"
    try:
        with socket.create_connection((peer.host, port), within_s):
            pass
    except ConnectionRefusedError:
        return [ok(check, f"is reached; nothing listens at its port {port}, so its clock was not asked")]
    except OSError as error:
        return [
            failed(check, f"port {port} is not reached: {reason_of(error)}",
                   "check the name, the route, and firewalls: workers connect to each other at any port")
        ]  # fmt: skip
    return [ok(check, f"port {port} answers"), check_clock(peer.host, port, within_s=within_s)]


def check_clock(host: str, port: int, *, within_s: float = WITHIN_S) -> Finding:
    """By the Dates of HTTP answers, such as any gateway's. They count whole seconds: where one turns tells the rest."""
    check = f"clock of {host}"
    connection = http.client.HTTPConnection(host, port, timeout=within_s)
    answers = []
    until_s = time.monotonic() + within_s
    try:
        for at in range(NUM_DATES):
            if at:
                time.sleep(BETWEEN_DATES_S)
            before_s = time.time()
            connection.request("GET", "/version")
            response = connection.getresponse()
            after_s = time.time()
            response.read()
            theirs_s = parsedate_to_datetime(response.getheader("Date") or "").timestamp()
            answers.append((before_s, theirs_s, after_s))
            if time.monotonic() > until_s:
                break
    except (OSError, http.client.HTTPException, TypeError, ValueError):
        return ok(check, f"was not told at port {port}: no HTTP answers there")
    finally:
        connection.close()
    return judge_clock(check, answers)


def judge_clock(check: str, answers: Sequence[tuple[float, float, float]]) -> Finding:
    """By (our time before it, theirs in whole seconds, ours after it) of each answer."""
    least_s = max(theirs_s - after_s for _, theirs_s, after_s in answers)  # that theirs is ahead of ours
    most_s = min(theirs_s + 1 - before_s for before_s, theirs_s, _ in answers)
    off_s = max(least_s, -most_s, 0.0)
    if off_s <= MAX_SKEW_S:
        return ok(check, f"agrees with this one's, to within {max(abs(least_s), abs(most_s)):.1f} s")
    return failed(
        check, f"is {off_s:.1f} s {'ahead of' if least_s > 0 else 'behind'} this one's", "set both by NTP (chrony, "
        "systemd-timesyncd): logs and traces of the two do not line up, and certificates may be refused",
    )  # fmt: skip


def reason_of(error: OSError) -> str:
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return "no answer in time"
    return error.strerror or str(error)


def is_usable(rdma: Finding) -> bool:
    """Whether `check_rdma` found a card."""
    return rdma.state == "ok" and " is active " in rdma.sentence


def check_rdma(options: RdmaOptions, transport: str, driver: Driver | None = None) -> Finding:
    """Library, device, the state of its port, and a GID: as a worker would choose them.

    Args:
        driver: in place of an installed library.
    """
    if transport not in ("auto", "rdma"):
        return ok("RDMA", f"is not used by the transport {transport}")
    try:
        place = open_place(driver or load_driver(options.rdma_driver), options)
    except ConfigError as error:
        if transport == "rdma":
            return refused("RDMA", error, "see `ibv_devinfo`, or give `transport=tcp`")
        return ok("RDMA", f"is not used: across hosts rows go by TCP ({error})")
    name, kind = place.card.name, "RoCE" if place.port.link_layer == ETHERNET else "InfiniBand"
    place.card.close()
    return ok(
        "RDMA", f"{name}, port {options.rdma_port} is active ({kind}); GID {place.gid_index} is {shown_gid(place.gid)}"
    )
