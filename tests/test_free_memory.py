"""What is freed amid other things goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from msi_launch.free_memory import trimming

FREED_AMID_OTHERS = """
import ctypes
from msi_launch.free_memory import anonymous_bytes, trimming

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = libc.memset.argtypes = None
PIECE = 100_000
pieces = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(PIECE))) for _ in range(1000)]
for piece in pieces:
    libc.memset(piece, 1, ctypes.c_size_t(PIECE))
for piece in pieces[:-1]:  # the last keeps the arena's end where it is
    libc.free(piece)
before = anonymous_bytes()
trimming()()
print(before - anonymous_bytes())
"""


@pytest.mark.skipif(trimming() is None, reason="the C library cannot")
def test_pages_in_which_nothing_is_are_given_back():
    done = subprocess.run(
        [sys.executable, "-c", FREED_AMID_OTHERS], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) > 90_000_000
