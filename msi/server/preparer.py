"""A process that understands requests for a gateway: `python -m msi.server.preparer SOCKET PARENT [json]`.

The first frame is a `Setup`. Each that follows is a task, the endpoint's number and a body; each is answered with
whether this process goes on, and what the body asks. It ends when the gateway is gone, or when it has grown large.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import signal
import socket
import sys

from msi.json_log import JsonLine
from msi.net.framing import receive_frame, send_frame
from msi.server.prepare import ANSWERS, ENDPOINTS, SETUP, Preparation

PR_SET_PDEATHSIG = 1
GOES_ON, ENDS = b"\1", b"\0"
NICENESS = 5  # whoever serves tokens goes first where processors are few
LARGE_BYTES = 512 * 1024 * 1024  # of memory: whoever has grown so large gives it back by ending
MAX_MEMORY_BYTES = 4 * 1024 * 1024 * 1024


def main(fd: int, parent: int) -> None:
    """Until the other end of the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everybody; the gateway says when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    os.nice(NICENESS)
    if os.getppid() != parent:
        return
    with socket.socket(fileno=fd) as gateway, contextlib.suppress(OSError, EOFError):
        preparation = Preparation(SETUP.decode(receive_frame(gateway)))
        while True:
            task = receive_frame(gateway)
            answer = ANSWERS.encode(preparation.understand(ENDPOINTS[task[0]], task[1:]))
            is_large = peak_memory_bytes() > LARGE_BYTES
            send_frame(gateway, (ENDS if is_large else GOES_ON) + answer)
            if is_large:
                return


def peak_memory_bytes() -> int:
    """The most that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s preparer: %(message)s", datefmt="%H:%M:%S")
    if sys.argv[3:] == ["json"]:
        logging.getLogger().handlers[0].setFormatter(JsonLine("preparer"))
    main(int(sys.argv[1]), int(sys.argv[2]))
