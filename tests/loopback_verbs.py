"""Cards that do not exist, behind the seam of `msi.net.rdma.verbs`: queue pairs of one process, joined by a thread.

They do what the verbs say and nothing better: what is not inline is read after the post returned; slots of a send queue
come back with a completion that was asked for; a full completion queue loses what comes; whoever has no receive left is
waited for; keys, bounds and states are checked, and what is wrong ends the queue pair and flushes the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from msi.net.rdma.verbs import (
    COMPLETIONS_PER_POLL,
    ETHERNET,
    RECEIVED_IMMEDIATE,
    RECEIVES_PER_REFILL,
    SUCCESS,
    Port,
)

FLUSHED, ACCESS, NO_ANSWER = 5, 10, 12
RETRY_S = 0.3


class Completion(NamedTuple):
    status: int
    opcode: int
    immediate: int
    number: int


@dataclass
class Write:
    """A work request: bytes (inline) or where they are, to where, with what."""

    source: bytes | tuple[int, int, int]  # address, length, key
    address: int
    key: int
    immediate: int | None
    is_signalled: bool


class Fabric:
    """What joins the cards: a thread that carries out work requests, each queue pair's in order.

    Attributes:
        num_writes, num_bytes: carried.
        is_silent: queue pairs, by number, that never answer.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.queue_pairs: dict[int, LoopbackQueuePair] = {}
        self.memory: dict[int, Registered] = {}
        self.posted: deque[tuple[LoopbackQueuePair, float]] = deque()  # who has something to send, and since when
        self.numbers = itertools.count(17)
        self.keys = itertools.count(1001)
        self.num_writes = self.num_bytes = 0
        self.is_silent: set[int] = set()
        threading.Thread(target=self._carry, daemon=True).start()

    def _carry(self) -> None:
        while True:
            with self.changed:
                while not self.posted:
                    self.changed.wait()
                for _ in range(len(self.posted)):
                    sender, since = self.posted.popleft()
                    if sender.is_broken or not sender.sends:
                        continue
                    outcome = self._carry_one(sender)
                    if outcome is None and time.monotonic() - since < RETRY_S:
                        self.posted.append((sender, since))  # once more
                    elif outcome is None:
                        sender.fail(NO_ANSWER)
                    elif outcome:
                        sender.fail(outcome)
                is_stuck = bool(self.posted)
            if is_stuck:
                time.sleep(0.001)

    def _carry_one(self, sender: LoopbackQueuePair) -> int | None:
        """The status; None: no answer."""
        write = sender.sends[0]
        to = self.queue_pairs.get(sender.remote)
        if to is None or to.remote != sender.number or to.expected_psn != sender.psn or to.number in self.is_silent:
            return None
        if write.immediate is not None and not to.card.num_receives:
            self.posted.append((sender, time.monotonic()))  # for ever
            return SUCCESS
        content = write.source if isinstance(write.source, bytes) else self._read(write.source)
        if content:
            into = self.memory.get(write.key)
            if (
                into is None
                or not into.holds(write.address, len(content))
                or not into.is_remote
                or into.card is not to.card
            ):
                return ACCESS
            ctypes.memmove(into.pointer(write.address), content, len(content))
        self.num_writes += 1
        self.num_bytes += len(content)
        sender.sends.popleft()
        if write.immediate is not None:
            to.card.num_receives -= 1
            to.card.complete(Completion(SUCCESS, RECEIVED_IMMEDIATE, write.immediate, to.number))
        sender.num_done += 1
        if write.is_signalled:
            sender.card.complete(Completion(SUCCESS, 1, 0, sender.number), frees=(sender, sender.num_done))
            sender.num_done = 0
        return SUCCESS

    def _read(self, source: tuple[int, int, int]) -> bytes:
        address, length, key = source
        registered = self.memory[key]
        assert registered.holds(address, length), "a read outside of what is registered"
        return ctypes.string_at(registered.pointer(address), length)


@dataclass
class Registered:
    """Implements `msi.net.rdma.verbs.Registration`; of exported memory, addresses begin at 0."""

    card: LoopbackCard
    base: int  # where it is mapped here
    address: int
    num_bytes: int
    is_remote: bool
    local_key: int
    remote_key: int
    keep: object = None

    def holds(self, address: int, num_bytes: int) -> bool:
        return self.address <= address and address + num_bytes <= self.address + self.num_bytes

    def pointer(self, address: int) -> int:
        return self.base + address - self.address

    def close(self) -> None:
        with self.card.fabric.changed:
            self.card.fabric.memory.pop(self.local_key, None)


@dataclass
class LoopbackLane:
    queue_pair: LoopbackQueuePair
    header: tuple[int, int]
    rows: tuple[int, int]
    to_header: tuple[int, int]
    to_rows: tuple[int, int]
    row_bytes: int

    def post(self, immediate, num_rows):
        self._post(immediate, num_rows, ctypes.string_at(self.header[0], 128), False)  # inline

    def post_signalled(self, immediate, num_rows):
        self._post(immediate, num_rows, ctypes.string_at(self.header[0], 128), True)

    def post_note(self, immediate, num_rows, header_bytes, is_signalled):
        self._post(immediate, num_rows, (self.header[0], header_bytes, self.header[1]), is_signalled)

    def _post(self, immediate, num_rows, header, is_signalled):
        writes = [Write(header, *self.to_header, immediate, is_signalled)]
        if num_rows:
            source = (self.rows[0], num_rows * self.row_bytes, self.rows[1])
            writes.insert(0, Write(source, *self.to_rows, None, False))
        self.queue_pair.post(writes)


class LoopbackQueuePair:
    def __init__(self, card: LoopbackCard, num_sends: int) -> None:
        self.card = card
        self.number = next(card.fabric.numbers)
        self.sends: deque[Write] = deque()
        self.num_free = num_sends
        self.num_done = 0  # since the last completion
        self.remote = self.psn = self.expected_psn = -1
        self.is_broken = False
        card.fabric.queue_pairs[self.number] = self

    def connect(self, remote, psn, path):
        self.remote, self.psn, self.expected_psn = remote.number, psn, remote.psn
        self.path = path

    def lane(self, header, rows, to_header, to_rows, row_bytes, max_rows):
        return LoopbackLane(self, header, rows, to_header, to_rows, row_bytes)

    def word(self, immediate, is_signalled):
        self.post([Write(b"", 0, 0, immediate, is_signalled)])

    def post(self, writes: list[Write]) -> None:
        with self.card.fabric.changed:
            if self.number not in self.card.fabric.queue_pairs:
                raise OSError(22, "Invalid argument")
            self.num_free -= len(writes)
            if self.num_free < 0:
                raise OSError(12, "Cannot allocate memory")
            if self.is_broken:
                self.card.complete(Completion(FLUSHED, 0, 0, self.number))
                return
            now = time.monotonic()
            self.sends += writes
            self.card.fabric.posted.extend([(self, now)] * len(writes))
            self.card.fabric.changed.notify()

    def fail(self, status: int) -> None:
        self.is_broken = True
        for index in range(len(self.sends)):
            self.card.complete(Completion(FLUSHED if index else status, 0, 0, self.number))
        self.sends.clear()

    def close(self):
        with self.card.fabric.changed:
            self.card.fabric.queue_pairs.pop(self.number, None)
            self.is_broken = True


class LoopbackCard:
    """Implements `msi.net.rdma.verbs.Card`."""

    def __init__(self, fabric: Fabric, name: str) -> None:
        self.fabric = fabric
        self.name = name
        self.fd = -1
        self.num_receives = 0
        self.num_lost = 0  # completions, for want of room
        self.num_polls = self.num_completed = 0
        self._completions: deque[tuple[Completion, tuple[LoopbackQueuePair, int] | None]] = deque()
        self._is_armed = False

    def port(self, number):
        return Port(4, ETHERNET, 0, 3, 4)

    def gid(self, port, index):
        return [b"\xfe\x80" + bytes(14), bytes(10) + b"\xff\xff\x0a\x00\x00\x01", bytes(16), bytes(16)][index]

    def register(self, address, num_bytes, is_remote):
        return self._register(address, address, num_bytes, is_remote, None)

    def register_exported(self, fd, offset, num_bytes, is_remote):
        memory = mmap.mmap(fd, 0)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + offset
        return self._register(base, offset, num_bytes, is_remote, memory)

    def _register(self, base, address, num_bytes, is_remote, keep):
        key = next(self.fabric.keys)
        registered = Registered(self, base, address, num_bytes, is_remote, key, key, keep)
        with self.fabric.changed:
            self.fabric.memory[key] = registered
        return registered

    def start(self, num_receives, num_completions):
        self.num_receives = num_receives
        self.num_completions = num_completions
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def queue_pair(self, port, num_sends, inline_bytes):
        with self.fabric.changed:
            return LoopbackQueuePair(self, num_sends)

    def complete(self, completion, frees=None) -> None:
        if len(self._completions) >= self.num_completions:
            self.num_lost += 1
            return
        self.num_completed += 1
        self._completions.append((completion, frees))
        if self._is_armed:
            self._is_armed = False
            os.eventfd_write(self.fd, 1)

    def poll(self):
        self.num_polls += 1
        found = []
        with self.fabric.changed:
            while self._completions and len(found) < COMPLETIONS_PER_POLL:
                completion, frees = self._completions.popleft()
                if frees is not None:
                    frees[0].num_free += frees[1]
                found.append(completion)
        return found

    def look(self):
        return self.poll()

    def arm(self):
        with self.fabric.changed:
            self._is_armed = True

    def take_event(self):
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
            return True
        return False

    def refill(self):
        with self.fabric.changed:
            self.num_receives += RECEIVES_PER_REFILL

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass
class LoopbackDriver:
    """Implements `msi.net.rdma.verbs.Driver`.

    Attributes:
        cards: that were opened.
    """

    fabric: Fabric = field(default_factory=Fabric)
    cards: list[LoopbackCard] = field(default_factory=list)
    name: str = "loopback"

    def devices(self):
        return ["loop0"]

    def open(self, device):
        self.cards.append(LoopbackCard(self.fabric, device))
        return self.cards[-1]
