"""Packets that are late or lost: the loopback device of a network namespace of one's own, by the kernel's netem."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

INSIDE = "MSI_CHAOS_NAMESPACE"  # set where this process runs in its namespace already
TROUBLES = {
    "delay-packets": (("delay", "20ms", "10ms"), "packets 20 ms late, give or take 10,"),
    "lose-packets": (("loss", "5%"), "one packet in twenty lost"),
}


def enter_namespace() -> None:
    """Runs this program anew in a namespace of its own, once; SystemExit with a sentence where that cannot be."""
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        try:
            os.execvp("unshare", ["unshare", "--net", "--", sys.executable, *sys.argv])
        except OSError as error:
            raise SystemExit(f"faults of the network need unshare (util-linux): {error.strerror}") from None
    why_not = _run("ip", "link", "set", "dev", "lo", "up") or _run(*_netem("add", ("delay", "1ms"))) or calm()
    if why_not:
        raise SystemExit(f"faults of the network cannot be had here (root, iproute2 and netem are needed): {why_not}")


def trouble(kind: str) -> str:
    """From now on; what it is, in words."""
    settings, words = TROUBLES[kind]
    if complaint := _run(*_netem("replace", settings)):
        raise OSError(complaint)
    return words


def calm() -> str:
    """Packets come as they did; a complaint, "" for none."""
    return _run("tc", "qdisc", "del", "dev", "lo", "root")


def _netem(verb: str, settings: Sequence[str]) -> tuple[str, ...]:
    return ("tc", "qdisc", verb, "dev", "lo", "root", "netem", *settings)


def _run(*words: str) -> str:
    """Its complaint, "" for none."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{words[0]}: {error.strerror}"
    return f"{' '.join(words)}: {done.stderr.strip() or 'failed'}" if done.returncode else ""
