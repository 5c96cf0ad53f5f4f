"""What every compared system does for one rank, and what a rank knows of its place."""

from __future__ import annotations

import math
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

STAMP = struct.Struct("<dII")  # when its sender began the round, round, sender
ROW_BYTES = 128  # every size is a multiple
PATTERNS = ("dispatch", "exchange")
MODULUS = 251  # of a round's number in a payload's last byte
PATIENCE_S = 60.0
KEY_FILE = "key"


@dataclass(frozen=True, slots=True)
class Place:
    """One process of a comparison. Ranks below `num_senders` send, the others receive.

    Attributes:
        folder: where ranks of one system leave each other their addresses; only this user's processes read there.
        sizes: bytes per pair that will be asked for.
    """

    system: str
    rank: int
    num_senders: int
    num_receivers: int
    folder: Path
    sizes: tuple[int, ...]

    @property
    def is_sender(self) -> bool:
        return self.rank < self.num_senders

    @property
    def num_ranks(self) -> int:
        return self.num_senders + self.num_receivers

    @property
    def peers(self) -> range:
        """Ranks of the other side."""
        return range(self.num_senders, self.num_ranks) if self.is_sender else range(self.num_senders)

    @property
    def max_bytes(self) -> int:
        return max(self.sizes)

    @property
    def row_bytes(self) -> int:
        """The largest row of which every size is a whole number."""
        return math.gcd(*self.sizes)

    @property
    def key(self) -> bytes:
        """By which ranks of one comparison know each other."""
        return (self.folder / KEY_FILE).read_bytes()

    def publish(self, address: bytes) -> None:
        path = self.folder / f"address-{self.rank}"
        path.with_suffix(".tmp").write_bytes(address)
        path.with_suffix(".tmp").rename(path)

    def published(self, rank: int) -> bytes:
        """Waits for it. Raises SystemExit: it does not come."""
        path, deadline = self.folder / f"address-{rank}", time.monotonic() + PATIENCE_S
        while not path.exists():
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.system}: rank {rank} did not come within {PATIENCE_S:g} s")
            time.sleep(0.01)
        return path.read_bytes()


@dataclass(frozen=True, slots=True)
class Task:
    """So many rounds of a pattern, in the same order at every rank.

    dispatch: every sender sends to every receiver and waits for their empty acknowledgements.
    exchange: every receiver answers, with as many bytes, once it has what all senders sent in the round.
    """

    pattern: str
    size: int
    rounds: int

    @property
    def is_exchange(self) -> bool:
        return self.pattern == "exchange"


class Fabric(Protocol):
    """A rank's end of a system, connected to all of the other side."""

    def run(self, task: Task) -> list[float]:
        """Seconds: a receiver's of each dispatched message, from when its sender began the round; a sender's of each
        exchange, until all answers are there. The other role measures nothing.
        """

    def close(self) -> None: ...


def stamp(payload: Any, size: int, started: float, round_number: int, sender: int) -> None:
    """Makes a payload's content that of its round, whatever lies between its ends."""
    payload[size - 1] = round_number % MODULUS
    STAMP.pack_into(payload, 0, started, round_number, sender)


def check(payload: Any, size: int, round_number: int) -> tuple[float, int]:
    """When the round began and who sent it. Raises SystemExit: it is not what was sent in that round."""
    started, stamped, sender = STAMP.unpack_from(payload)
    last = payload[size - 1]
    if stamped != round_number or last != round_number % MODULUS:
        raise SystemExit(f"round {round_number}: wrong contents (stamped {stamped}, last byte {last})")
    return started, sender
