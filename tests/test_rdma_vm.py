"""RDMA over verbs of a real kernel, in a virtual machine: everything that `tests/rdma_guest.py` checks there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CANNOT = 77
CHECKS = (
    "contract:direct", "contract:direct-polled", "contract:ibverbs", "contract:pyverbs",
    "briefly:direct:pyverbs", "briefly:ibverbs:direct-polled", "exchanges:pyverbs:ibverbs",
    "lossy:direct-polled:direct-polled", "lossy:ibverbs:ibverbs", "lossy:pyverbs:pyverbs",
    "keys:direct:pyverbs", "keys:ibverbs:pyverbs", "keys:pyverbs:direct",
    "wire:direct:pyverbs", "wire:ibverbs:direct", "roles:direct:pyverbs:ibverbs",
    "roles:direct-polled:direct-polled:ibverbs-polled", "leftovers:direct:ibverbs", "silent:ibverbs:pyverbs",
    "silent:pyverbs:ibverbs", "killed:direct-polled:ibverbs", "killed:ibverbs:ibverbs", "killed:pyverbs:pyverbs",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_drivers_keep_the_contract_on_real_verbs():
    """Losses, deaths, silence and wrong keys included; one machine for all, as it takes seconds to boot."""
    command = [ROOT / "tools/rdma_vm.py", "--installed", "--timeout", "800", "--"]
    guest = [sys.executable, "-B", "-m", "tests.rdma_guest", *CHECKS]
    done = subprocess.run([*command, *guest], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.strip())
    passed = [line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert (done.returncode, passed) == (0, list(CHECKS)), done.stdout + done.stderr
