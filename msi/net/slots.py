"""Slots: where rows land, and the header and immediate that announce them.

A peer has a slot for each of its lanes. A slot is two things: a *header*, always in host memory, with room behind it
for a note, and `slot_rows` *rows* in whatever memory computes. Both travel in one post; the 32-bit immediate that the
receiver is woken with says what landed where:

    kind 2 | more 1 | lane 3 | attempt 2 | sequence number, low 12 bits | incarnation, low 12 bits

The header repeats these in full. What does not match is dropped and counted by the link, never used.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from msi.errors import ProtocolError

HEADER_BYTES = 128
NOTE_BYTES = 384  # behind a header: the reason of an ERROR
ROW_ALIGNMENT = 128  # rows are whole lines of a GPU's memory and start on one
MAX_LANES = 8
SEQ_BITS = 12
SEQ_SHIFT, ATTEMPT_SHIFT, LANE_SHIFT = 12, 24, 26  # in an immediate
SEQ_STEP = 1 << SEQ_SHIFT
ATTEMPT_WORD_SHIFT = 48  # in a header's first word
HEADER_ATTEMPT_AT = 6  # the byte of a header
ATTEMPT_MASK = 3  # of which an immediate holds so much
SEQ_MASK = (1 << SEQ_BITS) - 1
INCARNATION_MASK = (1 << 12) - 1
LIFE_MASK = (1 << 32) - 1  # an incarnation in full
MAGIC = b"MSI2"
# magic, kind, lane, attempt, more, incarnation, placement version, sequence number, rows, bytes per row, two times
HEADER = struct.Struct("<4sBBBBIIQIIdd")
# the same, its first seven fields as `opening_bytes` gives them: what a link knows beforehand
WORDS = struct.Struct("<16sQIIdd")
WORD_PAIR = struct.Struct("<QQ")
OPENING = struct.Struct("<QQQII")  # those as two words, without the times
TIMES = struct.Struct("<dd")  # what follows
# what tells rows and an answer apart; words that are only compared are cheaper as bytes
ROWS = struct.Struct("<16sQII")
ANSWER = struct.Struct("<12s4xQI")


class Kind(IntEnum):
    """What an immediate announces."""

    DISPATCH = 0  # rows in the lane's slot, to be answered
    COMBINE = 1  # the answer, in the lane's slot
    EMPTY = 2  # no rows for you at this sequence number: no slot, no answer
    ERROR = 3  # no answer will come; the slot's note is the reason, UTF-8


class Immediate(NamedTuple):
    """The fields of a 32-bit immediate; `seq` and `incarnation` are low bits."""

    kind: int
    more: bool
    lane: int
    attempt: int
    seq: int
    incarnation: int


def pack_immediate(kind: int, more: bool, lane: int, attempt: int, seq: int, incarnation: int) -> int:
    return (
        kind << 30 | more << 29 | lane << 26 | attempt << 24 | (seq & SEQ_MASK) << 12 | (incarnation & INCARNATION_MASK)
    )


KIND_WORD_FIXED = (1 << 48) - 1  # of a header's first word: magic, kind and lane; not attempt and more


def kind_word(kind: int, lane: int, more: bool) -> int:
    """The first word of a header, as `WORDS` has it."""
    return int.from_bytes(MAGIC, "little") | kind << 32 | lane << 40 | more << 56


def life_word(incarnation: int, placement_version: int) -> int:
    """The second."""
    return incarnation | placement_version << 32


def opening_bytes(kind_word: int, life_word: int) -> bytes:
    """Both, as `ROWS` has them, and with the first 12 `ANSWER`, which leaves the placement version out."""
    return WORD_PAIR.pack(kind_word, life_word)


def split_life_word(word: int) -> tuple[int, int]:
    """Incarnation and placement version."""
    return word & LIFE_MASK, word >> 32


def unpack_immediate(immediate: int) -> Immediate:
    return Immediate(
        immediate >> 30,
        bool(immediate >> 29 & 1),
        immediate >> 26 & 7,
        immediate >> 24 & 3,
        immediate >> 12 & SEQ_MASK,
        immediate & INCARNATION_MASK,
    )


class Header(NamedTuple):
    """What a slot's header begins with, as `HEADER` packs it.

    In an answer `service_s` is the time from the landing of the rows to the post of their answer, and `compute_s`
    what of it the device computed; else both are 0.
    """

    magic: bytes
    kind: int
    lane: int
    attempt: int
    more: int
    incarnation: int
    placement_version: int
    seq: int
    num_rows: int  # of an ERROR: bytes of its note
    row_bytes: int
    service_s: float
    compute_s: float


def aligned_row_bytes(num_bytes: int) -> int:
    """Bytes of a row that holds so many."""
    return -(-num_bytes // ROW_ALIGNMENT) * ROW_ALIGNMENT


LAYOUT = struct.Struct("<III")
MAX_SEAT_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """The slots of one peer: `num_lanes` of them, each a header and `slot_rows` rows of `row_bytes`."""

    num_lanes: int
    slot_rows: int
    row_bytes: int

    def __post_init__(self) -> None:
        assert 1 <= self.num_lanes <= MAX_LANES, self
        assert self.slot_rows >= 1, self
        assert self.row_bytes >= 1, self
        assert self.row_bytes % ROW_ALIGNMENT == 0, self

    @property
    def slot_bytes(self) -> int:
        """Of the rows of one slot."""
        return self.slot_rows * self.row_bytes

    @property
    def rows_bytes(self) -> int:
        """Of the rows of all slots."""
        return self.num_lanes * self.slot_bytes

    @property
    def headers_bytes(self) -> int:
        """Of the headers of all slots, notes included."""
        return self.num_lanes * (HEADER_BYTES + NOTE_BYTES)

    def split_headers(self, memory: memoryview) -> tuple[memoryview, ...]:
        """Each lane's header with its note, of a peer's."""
        return _split(memory, self.num_lanes, HEADER_BYTES + NOTE_BYTES)

    def split_rows(self, memory: memoryview) -> tuple[memoryview, ...]:
        """Each lane's rows, of a peer's."""
        return _split(memory, self.num_lanes, self.slot_bytes)

    def encode(self) -> bytes:
        return LAYOUT.pack(self.num_lanes, self.slot_rows, self.row_bytes)

    @staticmethod
    def decode(payload: bytes) -> SlotLayout:
        """Raises ProtocolError: it is no layout that we could serve."""
        if len(payload) != LAYOUT.size:
            raise ProtocolError(f"offers a layout of {len(payload)} bytes, not {LAYOUT.size}")
        num_lanes, slot_rows, row_bytes = LAYOUT.unpack(payload)
        is_sound = 1 <= num_lanes <= MAX_LANES and slot_rows and row_bytes and not row_bytes % ROW_ALIGNMENT
        if not is_sound or num_lanes * slot_rows * row_bytes > MAX_SEAT_BYTES:
            raise ProtocolError(f"offers a seat of {num_lanes} lanes of {slot_rows} rows of {row_bytes} bytes")
        return SlotLayout(num_lanes, slot_rows, row_bytes)


def _split(memory: memoryview, count: int, size: int) -> tuple[memoryview, ...]:
    return tuple(memory[index * size : (index + 1) * size] for index in range(count))
