"""Packets that are late or lost: within a network namespace of one's own, by a detour that they take (`detour.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tools.hostility.detour import MTU

INSIDE = "MSI_CHAOS_NAMESPACE"  # set where this process runs in its namespace already
ROOT = Path(__file__).resolve().parent.parent.parent
TROUBLES = {
    "delay-packets": (("20", "10", "0"), "packets 20 ms late, give or take 10,"),
    "lose-packets": (("0", "0", "0.05"), "one packet in twenty lost"),
}
NEEDED = "faults of the network cannot be had here (root, iproute2 and TUN devices are needed)"
PREPARED = (
    ("ip", "link", "set", "dev", "lo", "mtu", str(MTU), "up"),
    ("ip", "rule", "add", "pref", "100", "lookup", "local"),  # so that there is room for a rule before it
    ("ip", "rule", "del", "pref", "0"),
)


def enter_namespace() -> None:
    """Runs this program anew in a namespace of its own, once; SystemExit with a sentence where that cannot be."""
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        try:
            os.execvp("unshare", ["unshare", "--net", "--", sys.executable, *sys.argv])
        except OSError as error:
            raise SystemExit(f"faults of the network need unshare (util-linux): {error.strerror}") from None
    try:
        for words in PREPARED:
            subprocess.run(words, check=True, capture_output=True, text=True)
        Trouble("delay-packets").end()
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{NEEDED}: {' '.join(error.cmd)}: {error.stderr.strip()}") from None
    except OSError as error:
        raise SystemExit(f"{NEEDED}: {error}") from None


class Trouble:
    """Of all packets between processes of this namespace, from now on.

    Attributes:
        words: what it is.

    Raises:
        OSError: it cannot be had here.
    """

    def __init__(self, kind: str) -> None:
        settings, self.words = TROUBLES[kind]
        self._detour = subprocess.Popen(
            (sys.executable, "-m", "tools.hostility.detour", *settings),
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._detour.stdout is not None
        if not self._detour.stdout.readline():
            _, said = self._detour.communicate()
            raise OSError(said.strip())

    def end(self) -> None:
        """Packets come as they did. Raises OSError: it had ended by itself."""
        _, said = self._detour.communicate()
        if self._detour.returncode:
            raise OSError(said.strip())
