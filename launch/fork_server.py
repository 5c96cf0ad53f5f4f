"""The process by which a launcher has others forked: `python -m msi_launch.fork_server WHAT SOCKET PARENT ROOM`.

It loads what they need (WHAT: `workers`, or a `coordinator`, which needs no torch), and has no thread, no event loop
and no device. Each packet that comes is a command line, with the socket over which that process speaks with the
launcher; `msi/instance/fork_server.py` is the other side. It ends when the launcher is gone, and those that it forked
end with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import sys
from pathlib import Path

from .command import open_missing_streams
from .parent import end_with_parent

MAX_PACKET_BYTES = 1 << 16
COMMAND_LINE_AT = 45  # words of /proc/PID/stat behind the name: where the command line begins in memory, where it ends


def main(what: str, fd: int, parent: int) -> None:
    """Until the launcher is gone; in a process that was forked, until that has ended."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # the launcher says what they mean
        signal.signal(number, signal.SIG_IGN)
    open_missing_streams()
    end_with_parent(parent)
    show_command_line("msi_launch.fork_server", what)
    if what == "workers":
        import msi.worker.torch_host
        import msi.worker.worker  # noqa: F401

    from . import processes  # noqa: F401
    from .main import load_loop, run

    load_loop()
    gc.freeze()  # what is there now stays shared
    words: list[str] = []
    with socket.socket(fileno=fd) as launcher, contextlib.suppress(ConnectionError):
        words = fork_as_asked(launcher)
    if words:
        sys.argv[1:] = words
        show_command_line("msi_launch", *words)
        sys.exit(run(words))


def fork_as_asked(launcher: socket.socket) -> list[str]:
    """In a process that was forked: the words of its command line; else, once the launcher is gone, none."""
    with selectors.DefaultSelector() as waiting:
        waiting.register(launcher, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is not launcher:
                    waiting.unregister(key.fileobj)
                    _say_how_it_ended(launcher, key.fd, key.data)
                    continue
                packet, fds, _, _ = socket.recv_fds(launcher, MAX_PACKET_BYTES, 1)
                if not packet:
                    return []
                try:
                    pid = os.fork()
                except OSError as error:  # the machine has no room
                    launcher.send(json.dumps({"errno": error.errno}).encode())
                    os.close(fds[0])
                    continue
                if pid == 0:
                    for one in waiting.get_map().values():
                        if one.fileobj is not launcher:
                            os.close(one.fd)
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    os.set_inheritable(fds[0], False)
                    return [*json.loads(packet), "--parent", str(os.getppid()), "--announce", str(fds[0])]
                os.close(fds[0])
                launcher.send(json.dumps({"pid": pid}).encode())
                waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)


def _say_how_it_ended(launcher: socket.socket, pidfd: int, pid: int) -> None:
    os.close(pidfd)
    _, status = os.waitpid(pid, 0)
    launcher.send(json.dumps({"ended": pid, "returncode": os.waitstatus_to_exitcode(status)}).encode())


def show_command_line(*words: str) -> None:
    """What others see of this process: `python -m` and these words, as far as there is room for them."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = (int(field) for field in fields[COMMAND_LINE_AT : COMMAND_LINE_AT + 2])
    if not begin:  # this system keeps it to itself
        return
    line = b"\0".join(map(os.fsencode, (sys.executable, "-m", *words)))[: end - begin - 1]
    ctypes.memmove(begin, line.ljust(end - begin, b"\0"), end - begin)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
