"""Who takes completions from a card, and when: the event loop, or the thread that computes.

The event loop sleeps for the card's descriptor, polls in batches, and lets others have their turn. A poller (see
`msi.net.transport`) polls between programs, and sleeps for the same descriptor beside its bell. Before either sleeps
the queue is armed and polled once more: what came in between wakes nobody.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

from msi.net.rdma.patience import Patience
from msi.net.rdma.verbs import COMPLETIONS_PER_POLL, Card, Completion
from msi.net.transport import Poller

MOST_EVENTS = 2  # that have not been taken: of the last time that the queue was armed, and of the one before
POLLS_PER_TURN = 4  # before others on the event loop get theirs


class Reader:
    """Of a card that was started. Used from the event loop, but for `take`.

    Args:
        took: gets what was polled, with the lock held, on the thread that polled it.
        failed: the card is of no use any more; called on the event loop.
        poller: takes completions in place of the event loop.

    Attributes:
        lock: held while completions are taken, so that they stay in order.
    """

    def __init__(
        self,
        card: Card,
        took: Callable[[Sequence[Completion]], None],
        failed: Callable[[OSError], None],
        *,
        poll_s: float,
        poller: Poller | None,
    ) -> None:
        self.lock = threading.RLock()
        self._acquire, self._release = self.lock.acquire, self.lock.release  # `with` costs twice as much
        self._card = card
        self._took = took
        self._failed = failed
        self._patience = Patience(poll_s)
        self._poller = poller
        self._loop = asyncio.get_running_loop()
        self._is_started = self._is_open = self._is_armed = False
        self._num_events = 0  # that completions have caused, and nobody has taken

    def start(self) -> None:
        self._is_started = self._is_open = True
        if self._poller is not None:
            self._poller.add(self._take_polled, self._card.fd)
            return
        self._loop.add_reader(self._card.fd, self._readable)
        self._card.arm()

    def stop(self) -> None:
        """Nothing is taken any more. Idempotent."""
        with self.lock:
            self._is_open = False
            was_started, self._is_started = self._is_started, False
            self._patience.close()
        if not was_started:
            return
        if self._poller is not None:
            self._poller.remove(self._take_polled, self._card.fd)
        else:
            self._loop.remove_reader(self._card.fd)

    def take(self) -> None:
        """What has come by now. Any thread where there is a poller, else the event loop."""
        if self._poller is not None:
            self._take_polled()
        elif self._is_open:
            self._poll_again()

    # -- a poller ----------------------------------------------------------------------------------------------------

    def _take_polled(self) -> bool:
        """Whether it has to be called once more before the thread sleeps: programs may have their turn first."""
        self._acquire()
        try:
            if not self._is_open:
                return False
            completions = self._card.poll()
            if not completions:
                if not self._take_events() and self._is_armed:
                    return False
                self._card.arm()
                self._is_armed = True
                completions = self._card.poll()
                if not completions:
                    return False
            if self._is_armed:
                self._is_armed = False
                if self._num_events < MOST_EVENTS:
                    self._num_events += 1
            self._took(completions)
            return self._is_open
        except OSError as error:
            self._is_open = False
            self._loop.call_soon_threadsafe(self._fail, error)
            return False
        finally:
            self._release()

    def _take_events(self) -> bool:
        """Whether any was there. Only those are taken that completions have caused: asking in vain is dear.

        One may come later than what caused it. Cards may ignore that they are armed before the last event was taken; so
        when it is here, and has woken us, they are armed again.
        """
        num_events = self._num_events
        while self._num_events and self._card.take_event():
            self._num_events -= 1
        return self._num_events < num_events

    # -- the event loop ----------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            self._card.take_event()
        except OSError as error:
            self._fail(error)
        else:
            self._poll_again()

    def _poll_again(self) -> None:
        if self._is_open:
            try:
                with self.lock:
                    self._poll()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.stop()
        self._failed(error)

    def _poll(self) -> None:
        card, patience = self._card, self._patience
        is_armed = False
        for _ in range(POLLS_PER_TURN):
            completions = card.poll()
            if not completions and not is_armed:
                completions = patience.look(card.look)
            if completions:
                self._took(completions)
                if not self._is_open:
                    return
            elif is_armed:
                return
            if not is_armed and (not completions or (patience.is_none and len(completions) < COMPLETIONS_PER_POLL)):
                card.arm()  # that was all
                is_armed = True
        self._loop.call_soon(self._poll_again)
