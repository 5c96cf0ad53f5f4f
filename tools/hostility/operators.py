"""An operator's hand in a run of `tools/chaos.py`: workers that are drained, that come, and that go."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from tools.hostility.server import ROOT

WITHIN_S = 60.0


def coordinator_address(pid: int) -> str:
    """Where a coordinator listens, or would if it led. Raises OSError: it is gone."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return words[words.index("--coordinator") + 1]


def coordinator_addresses(pids: Mapping[str, int]) -> str:
    """Of the one that there is, or of the two of which one leads."""
    return ",".join(coordinator_address(pid) for name, pid in pids.items() if name.startswith("coordinator"))


async def ctl(address: str, *words: str) -> tuple[str, str]:
    """What msi-ctl did, in its words; and its complaint, "" where all went well."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "msi_launch.ctl", *words, "--json", "--coordinator", address,
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        said, complaints = await asyncio.wait_for(process.communicate(), WITHIN_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        return "", f"msi-ctl {' '.join(words)} did not end within {WITHIN_S:g} s"
    if process.returncode:
        return "", complaints.decode().strip()
    return str(json.loads(said)["text"]), ""


async def come_and_go(address: str, role: str) -> str:
    """One worker more, which goes again; a complaint, "" where all went well."""
    said, complaint = await ctl(address, "add", "--role", role)
    if not complaint:
        _, complaint = await ctl(address, "remove", said.split()[0], "--within", "1")
    return complaint
