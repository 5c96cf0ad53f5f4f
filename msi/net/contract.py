"""What every transport promises, as checks that a driver of anybody's can be put to.

    asyncio.run(check_transport(MyTransport, nobody="my://nobody"))

Each rule is a sentence and a check of it over two transports of the same kind in this process. Nothing here is known
of how bytes travel.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from msi.errors import EngineError, TransportError
from msi.net.contract_pair import (
    LEFT,
    NUM_SEATS,
    RIGHT,
    SETTLE_S,
    HostRows,
    Memory,
    Pair,
    Subject,
    paired,
    raises,
    same,
    until,
)
from msi.net.slots import HEADER_BYTES, NOTE_BYTES, ROW_ALIGNMENT
from msi.net.transport import Admission, CompletionKind, Transport


class ContractBroken(EngineError):
    """A transport does not do what it has to: `rule` says what, the text how it came out."""

    def __init__(self, rule: str, found: str) -> None:
        super().__init__(f"the rule is broken that {rule}: {found}")
        self.rule = rule


class Rule(NamedTuple):
    sentence: str
    check: Callable[[Pair], Awaitable[None]]


async def check_transport(
    make: Callable[[], Transport], *, nobody: str, memory: Memory | None = None, timeout_s: float = 5.0
) -> None:
    """Puts transports of one kind to every rule; see `Subject`. Raises ContractBroken at the first that is broken."""
    subject = Subject(make, nobody, memory or HostRows(), timeout_s)
    for rule in RULES:
        await check_rule(rule, subject)


async def check_rule(rule: Rule, subject: Subject) -> None:
    """Raises ContractBroken."""
    try:
        async with paired(subject) as pair:
            await rule.check(pair)
    except TimeoutError as error:
        raise ContractBroken(rule.sentence, f"it did not happen within {subject.timeout_s:g} s") from error
    except Exception as error:
        raise ContractBroken(rule.sentence, f"{type(error).__name__}: {error}") from error


# -- rules ----------------------------------------------------------------------------------------------------------


async def _hello(pair: Pair) -> None:
    ours, theirs = await pair.connect(b"anna", seat=2)
    same((theirs.peer, ours.peer), (b"anna", b"welcome anna"), "what the two ends were told")
    same((ours.seat, theirs.seat), (2, 0), "the seats of the two ends")


async def _layouts(pair: Pair) -> None:
    ours, theirs = await pair.connect()
    for endpoint, layout in ((ours, LEFT), (theirs, RIGHT)):
        same(endpoint.out_rows.num_bytes, layout.rows_bytes, "bytes of rows towards the peer")
        sizes = [header.nbytes for header in endpoint.out_headers]
        same(sizes, [HEADER_BYTES + NOTE_BYTES] * layout.num_lanes, "bytes of headers towards the peer")


async def _refusal(pair: Pair) -> None:
    address = await pair.address()
    connecting = pair.right.transport.connect(address, b"go away", pair.right.landing, 0)
    await raises(connecting, "we do not like you")


async def _nobody(pair: Pair) -> None:
    nobody = pair.subject.nobody
    await raises(pair.right.transport.connect(nobody, b"anna", pair.right.landing, 0), nobody)


async def _before_immediate(pair: Pair) -> None:
    ours, theirs = await pair.connect()
    for number in range(50):
        rows, header = bytes([number]) * (5 * LEFT.row_bytes), bytes([100 + number]) * (HEADER_BYTES + number)
        pair.write(ours, LEFT, 1, header, rows)
        ours.post(1, number, num_rows=5, note_bytes=number)
        (completion,) = await pair.left.take(1)
        same(completion, (theirs, CompletionKind.IMMEDIATE, number, ""), "the completion")
        same(pair.left.rows(0, 1, len(rows)), rows, f"rows of post {number}")
        same(bytes(pair.left.header(0, 1)[: len(header)]), header, f"header and note of post {number}")


async def _note_alone(pair: Pair) -> None:
    ours, _ = await pair.connect()
    pair.write(ours, LEFT, 0, b"h" * HEADER_BYTES + b"n" * NOTE_BYTES, b"")
    ours.post(0, 1, note_bytes=NOTE_BYTES)
    await pair.left.immediates(1)
    same(bytes(pair.left.header(0, 0)), b"h" * HEADER_BYTES + b"n" * NOTE_BYTES, "header and note")


async def _immediates(pair: Pair) -> None:
    ours, theirs = await pair.connect(seat=2)
    for immediate in (0, 1, 2**31, 2**32 - 1):
        ours.post(0, immediate)
        pair.write(theirs, RIGHT, 2, b"", b"back")
        theirs.post(2, immediate, num_rows=1)
        same(await pair.left.immediates(1), [immediate], "what came to the left")
        same(await pair.right.immediates(1), [immediate], "what came to the right")
        same(pair.right.rows(2, 2, 4), b"back", "rows that came to the right")


async def _order(pair: Pair) -> None:
    ours, _ = await pair.connect()
    for immediate in range(3000):
        ours.post(0, immediate)
        if immediate % 500 == 0:
            await asyncio.sleep(0)
    same(await pair.left.immediates(3000), list(range(3000)), "the immediates of 3000 posts")


async def _close(pair: Pair) -> None:
    ours, theirs = await pair.connect()
    ours.post(0, 7)
    ours.close()
    ours.close()  # idempotent
    posted, closed = await pair.left.take(2)
    same((posted.kind, closed.kind), (CompletionKind.IMMEDIATE, CompletionKind.CLOSED), "the last completions")
    same(bool(closed.reason), True, "whether a reason is given")
    for endpoint in (ours, theirs):
        try:
            endpoint.post(0, 8)
        except TransportError:
            continue
        raise AssertionError("a post after the close raised nothing")


async def _early(pair: Pair) -> None:
    make, memory = pair.subject.make, pair.subject.memory
    early, right = make(), make()
    try:
        landing = early.register(1, LEFT, memory.allocator)
        address = await early.listen(lambda hello: Admission(landing, 0, b""))
        ours = await right.connect(address, b"anna", right.register(1, RIGHT, memory.allocator), 0)
        ours.post(0, 1)
        await asyncio.sleep(SETTLE_S)
        kinds: list[CompletionKind] = []
        early.deliver(lambda endpoint, kind, immediate, reason: kinds.append(kind))
        await until(lambda: len(kinds) >= 2, pair.subject.timeout_s)
        same(kinds, [CompletionKind.CONNECTED, CompletionKind.IMMEDIATE], "what the handler was told")
    finally:
        await right.close()
        await early.close()


async def _thread(pair: Pair) -> None:
    ours, _ = await pair.connect()
    threads: list[threading.Thread] = []
    pair.left.transport.deliver(lambda *completion: threads.append(threading.current_thread()))

    def post() -> None:
        for immediate in range(100):
            ours.post(0, immediate)

    await asyncio.to_thread(post)
    await until(lambda: len(threads) == 100, pair.subject.timeout_s)
    taker = pair.subject.taker or threading.current_thread()
    same(set(threads), {taker}, "threads that the handler ran on")


async def _close_under_post(pair: Pair) -> None:
    ours, _ = await pair.connect()
    is_closing = threading.Event()

    def post() -> None:
        while not is_closing.is_set():
            ours.post(0, 1)
            time.sleep(0)
        while True:
            ours.post(0, 2)

    posting = asyncio.create_task(asyncio.to_thread(post))
    await asyncio.sleep(SETTLE_S / 5)
    is_closing.set()
    ours.close()
    await raises(asyncio.wait_for(posting, pair.subject.timeout_s), "closed")


async def _revoked(pair: Pair) -> None:
    ours, _ = await pair.connect()
    pair.write(ours, LEFT, 0, b"seen", b"seen")
    ours.post(0, 1, num_rows=1)
    await pair.left.immediates(1)
    same(pair.left.landing.generation(0), 0, "how often the seat was revoked")
    pair.left.landing.revoke(0)
    same(pair.left.landing.generation(0), 1, "how often the seat was revoked")
    same(pair.left.is_zero(0), True, "whether the seat reads zero")
    pair.write(ours, LEFT, 0, b"late", b"late")
    with contextlib.suppress(TransportError):  # it may know already
        ours.post(0, 2, num_rows=1)
    await asyncio.sleep(SETTLE_S)
    same(pair.left.is_zero(0), True, "whether the seat reads zero after its old peer has written")


async def _given_away(pair: Pair) -> None:
    header, address = pair.left.header(0, 0), pair.subject.memory.address(pair.left.landing.rows)
    ours, _ = await pair.connect(b"anna", seat=0)
    pair.left.landing.revoke(0)
    ours.close()
    await pair.left.take(1)
    pair._next_seat = 0
    again, _ = await pair.connect(b"bert", seat=1)
    pair.write(again, LEFT, 0, b"anew", b"anew")
    again.post(0, 1, num_rows=1)
    await pair.left.immediates(1)
    same((bytes(header[:4]), pair.left.rows(0, 0, 4)), (b"anew", b"anew"), "what the next peer of the seat wrote")
    same(pair.subject.memory.address(pair.left.landing.rows), address, "the address of the rows")


async def _seats(pair: Pair) -> None:
    for seat, letter in ((0, b"a"), (1, b"b")):
        endpoint, _ = await pair.connect(letter, seat=seat)
        for lane in range(LEFT.num_lanes):
            pair.write(endpoint, LEFT, lane, letter * (HEADER_BYTES + NOTE_BYTES), letter * LEFT.slot_bytes)
            endpoint.post(lane, lane, LEFT.slot_rows, NOTE_BYTES)
        await pair.left.take(LEFT.num_lanes)
    for seat, letter in ((0, b"a"), (1, b"b")):
        for lane in range(LEFT.num_lanes):
            same(set(pair.left.rows(seat, lane, LEFT.slot_bytes)), set(letter), f"letters in the rows of seat {seat}")
            same(set(pair.left.header(seat, lane)), set(letter), f"letters in the headers of seat {seat}")
    same(pair.left.is_zero(2), True, "whether a seat that nobody has reads zero")


async def _lanes(pair: Pair) -> None:
    ours, _ = await pair.connect()
    for lane, letter in enumerate((b"a", b"b")):
        pair.write(ours, LEFT, lane, letter * 4, letter * LEFT.slot_bytes)
    ours.post(1, 7, num_rows=LEFT.slot_rows)
    ours.post(0, 8, num_rows=2)
    await pair.left.immediates(2)
    same(pair.left.rows(0, 1, LEFT.slot_bytes), b"b" * LEFT.slot_bytes, "rows of lane 1")
    same(pair.left.rows(0, 0, 2 * LEFT.row_bytes), b"a" * (2 * LEFT.row_bytes), "rows of lane 0")
    same([bytes(pair.left.header(0, lane)[:4]) for lane in (0, 1)], [b"aaaa", b"bbbb"], "headers of both")


async def _aligned(pair: Pair) -> None:
    ours, _ = await pair.connect()
    address = pair.subject.memory.address
    for region, what in ((pair.left.landing.rows, "rows that land"), (ours.out_rows, "rows that leave")):
        same(address(region) % ROW_ALIGNMENT, 0, f"the address of {what}, modulo {ROW_ALIGNMENT}")
    stride = pair.right.landing.rows.num_bytes // NUM_SEATS
    same(stride % ROW_ALIGNMENT, 0, f"bytes from seat to seat, modulo {ROW_ALIGNMENT}")


RULES = (
    Rule("a hello and its welcome reach the other side", _hello),
    Rule("each end lays its outbox out as the peer's seat", _layouts),
    Rule("a refusal carries its reason", _refusal),
    Rule("nobody there is an error that names the address", _nobody),
    Rule("header, note and rows are there when their immediate is", _before_immediate),
    Rule("a note travels without rows", _note_alone),
    Rule("both directions carry every 32-bit immediate", _immediates),
    Rule("immediates arrive in order and none is lost", _order),
    Rule("what was posted before a close arrives before it", _close),
    Rule("what comes before there is a handler is kept for it", _early),
    Rule("a post from another thread arrives on the one that takes immediates", _thread),
    Rule("closing while another thread posts is an error there and nothing else", _close_under_post),
    Rule("a revoked seat reads zero and what its peer writes is not seen", _revoked),
    Rule("a seat that was revoked and given away anew is the same memory", _given_away),
    Rule("seats are apart", _seats),
    Rule("lanes are apart", _lanes),
    Rule("rows start on a line of memory", _aligned),
)
