"""Finding a verbs library, when somebody asks for RDMA and not before."""

from __future__ import annotations

from msi.errors import ConfigError
from msi.net.complaints import Complaints
from msi.net.rdma.fabric import open_place
from msi.net.rdma.options import RdmaOptions
from msi.net.rdma.transport import RdmaTransport
from msi.net.rdma.verbs import Driver
from msi.net.transport import Poller

NAMES = ("direct", "ibverbs", "pyverbs")
MISSING = {
    "direct": "install libibverbs of your distribution (Debian: libibverbs1 ibverbs-providers)",
    "ibverbs": "install it with `pip install msi[rdma]`, and libibverbs (Debian: libibverbs1 ibverbs-providers)",
    "pyverbs": "install python3-pyverbs of your distribution, for its own Python or one of the same version",
}


def load_driver(name: str) -> Driver:
    """One of `NAMES`, or "auto": the first that is there. Raises ConfigError: none is; says what to do."""
    reasons = []
    for one in NAMES if name == "auto" else (name,):
        try:
            return _load(one)
        except ImportError as error:
            reasons.append(f"{one} cannot be imported ({error}): {MISSING[one]}")
    raise ConfigError("`transport` rdma needs a verbs library; " + "; or ".join(reasons))


def _load(name: str) -> Driver:
    if name == "direct":
        from msi.net.rdma.direct_driver import DirectDriver

        return DirectDriver()
    if name == "ibverbs":
        from msi.net.rdma.ibverbs_driver import IbverbsDriver

        return IbverbsDriver()
    from msi.net.rdma.pyverbs_driver import PyverbsDriver

    return PyverbsDriver()


def check_rdma(options: RdmaOptions) -> None:
    """Raises ConfigError: a library or a device is missing, or of no use."""
    open_place(load_driver(options.rdma_driver), options).card.close()


def open_rdma(
    options: RdmaOptions,
    host: str,
    *,
    key: bytes | None = None,
    complain: Complaints | None = None,
    poll_s: float = 0.0,
    poller: Poller | None = None,
) -> RdmaTransport:
    """Raises ConfigError, as `check_rdma`."""
    driver = load_driver(options.rdma_driver)
    return RdmaTransport(driver, options, host, key=key, complain=complain, poll_s=poll_s, poller=poller)
