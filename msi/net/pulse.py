"""A sign of life at a steady pace, from a thread that no busy event loop can starve."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import zmq


class PulseThread:
    """Sends a message again and again through a socket that is its own.

    Args:
        socket: closed by `stop`.
        payload: makes the message; is told how late the thread itself is.
    """

    def __init__(self, socket: zmq.Socket[bytes], payload: Callable[[float], bytes], every_s: float) -> None:
        self._socket = socket
        self._payload = payload
        self._every_s = every_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Idempotent."""
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        late_s = 0.0
        while True:
            with contextlib.suppress(zmq.Again):  # there is no connection now
                self._socket.send(self._payload(late_s), zmq.NOBLOCK)
            due = time.monotonic() + self._every_s
            if self._is_over.wait(self._every_s):
                break
            late_s = max(0.0, time.monotonic() - due)
        self._socket.close()
