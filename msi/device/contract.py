"""What every device promises of its queues, as checks that any device can run: `await check_queues(device, program)`.

A failed promise is an AssertionError. Each check takes words and queues of its own, so one device can run them all.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from msi.device.queues import QueueDevice

ENDS_WITHIN_S = 10.0
AROUND = 1 << 32  # words are 32 bits wide

# (what it does, what is told of what that raises) -> work for the device's queues
MakeProgram = Callable[[Callable[[], None], Callable[[Exception], None]], Any]


async def check_queues(device: QueueDevice[Any], program: MakeProgram) -> None:
    """Runs all checks, one after another."""
    for check in CHECKS:
        try:
            await asyncio.wait_for(check(Checked(device, program)), ENDS_WITHIN_S)
        except TimeoutError as error:
            promise = check.__name__.replace("_", " ")
            raise AssertionError(f"{promise}: it did not happen within {ENDS_WITHIN_S:g} s") from error


class Checked:
    """A device, and a log of what its programs did."""

    def __init__(self, device: QueueDevice[Any], program: MakeProgram) -> None:
        self.device = device
        self.words = device.words
        self.log: list[object] = []
        self._program = program

    def says(self, what: object) -> Any:
        """A program that adds to the log."""
        return self._program(lambda: self.log.append(what), self._unexpected)

    def raises(self, error: BaseException) -> Any:
        def run() -> None:
            raise error

        return self._program(run, lambda told: self.log.append(told))

    def _unexpected(self, error: Exception) -> None:
        self.log.append(f"failed: {error}")

    async def until(self, num_said: int) -> None:
        """Until the log has so many entries."""
        while len(self.log) < num_said:  # noqa: ASYNC110  # programs may not touch the loop
            await asyncio.sleep(0.001)

    async def through(self, queue: Any) -> None:
        """Until all is through that was enqueued before."""
        done = asyncio.Event()
        word = self.words.take()
        self.device.watch(word, lambda value: done.set())
        queue.signal(word, 1)
        await done.wait()


async def words_start_at_zero_and_only_rise(on: Checked) -> None:
    word, other = on.words.take(), on.words.take()
    assert on.words.is_there(word, 0)
    assert not on.words.is_there(word, 1)
    on.words.open(word, 5)
    on.words.open(word, 3)
    assert on.words.is_there(word, 5)
    assert not on.words.is_there(word, 6)
    assert not on.words.is_there(other, 1), "words are one's own"


async def words_go_on_at_zero_after_32_bits(on: Checked) -> None:
    word = on.words.take()
    for value in (AROUND // 4, AROUND // 2, 3 * AROUND // 4, AROUND - 1):
        on.words.open(word, value)
        assert on.words.is_there(word, value)
    queue = on.device.queue("around")
    queue.wait(word, AROUND + 1)
    queue.run(on.says("later"))
    await asyncio.sleep(0.01)
    assert on.log == []
    on.words.open(word, AROUND + 2)
    await on.through(queue)
    assert on.log == ["later"]


async def programs_of_a_queue_run_in_order(on: Checked) -> None:
    queue = on.device.queue("order")
    for number in range(100):
        queue.run(on.says(number))
    await on.through(queue)
    assert on.log == list(range(100))


async def a_signal_is_seen_after_all_before_it(on: Checked) -> None:
    word, seen = on.words.take(), []
    on.device.follow(word, lambda value: seen.append((value, len(on.log), on.words.is_there(word, value))))
    queue = on.device.queue("signals")
    for number in range(1, 20):
        queue.run(on.says(number))
        queue.signal(word, number)
    await on.through(queue)
    assert [value for value, _, _ in seen] == list(range(1, 20)), "a follower sees each value"
    assert all(num_run >= value and is_there for value, num_run, is_there in seen), seen


async def a_watcher_is_called_on_the_loop_and_sees_the_last_value(on: Checked) -> None:
    word, seen = on.words.take(), []
    on.device.watch(word, lambda value: seen.append((value, threading.get_ident())))
    queue = on.device.queue("watched")
    for number in range(1, 20):
        queue.signal(word, number)
    await on.through(queue)
    assert seen[-1] == (19, threading.get_ident())
    assert [value for value, _ in seen] == sorted(value for value, _ in seen)


async def nothing_behind_a_closed_gate_runs_and_nobody_waits_for_it(on: Checked) -> None:
    gate, queue, free = on.words.take(), on.device.queue("gated"), on.device.queue("free")
    for number in range(1, 10):
        queue.wait(gate, number)
        queue.run(on.says(number))
    free.run(on.says("free"))
    await on.through(free)
    assert on.log == ["free"]
    on.words.open(gate, 2)
    await on.until(3)
    free.run(on.says("free again"))
    await on.through(free)
    assert on.log == ["free", 1, 2, "free again"]
    on.words.open(gate, 9)
    await on.through(queue)
    assert on.log == ["free", 1, 2, "free again", 3, 4, 5, 6, 7, 8, 9]


async def nobody_is_told_within_a_call(on: Checked) -> None:
    """Whoever launches may hold what the told need."""
    word, gate, queue, lock = on.words.take(), on.words.take(), on.device.queue("calls"), threading.Lock()

    def changed(value: int) -> None:
        with lock:
            on.log.append(value)

    on.device.follow(word, changed)
    with lock:
        queue.signal(word, 1)
        queue.wait(gate, 1)
        queue.signal(word, 2)
        on.words.open(gate, 1)
        queue.run(on.says("run"))
        queue.signal(word, 3)
    await on.through(queue)
    assert on.log == [1, 2, "run", 3]


async def a_gate_that_is_open_already_holds_nothing(on: Checked) -> None:
    gate, queue = on.words.take(), on.device.queue("open")
    on.words.open(gate, 7)
    queue.wait(gate, 7)
    queue.run(on.says("through"))
    await on.through(queue)
    assert on.log == ["through"]


async def a_gate_that_opens_wide_drains_the_queue(on: Checked) -> None:
    """As a pass that is given up opens it: all that was launched runs out, and the queue serves the next pass."""
    gate, queue = on.words.take(), on.device.queue("drained")
    for number in range(1, 5):
        queue.wait(gate, number)
        queue.run(on.says(number))
    on.words.open(gate, 10)
    queue.wait(gate, 11)
    queue.run(on.says("next"))
    await asyncio.sleep(0.01)
    on.words.open(gate, 11)
    await on.through(queue)
    assert on.log == [1, 2, 3, 4, "next"]


async def queues_that_opened_run_whatever_the_order_of_their_launch(on: Checked) -> None:
    gates = [on.words.take() for _ in range(3)]
    queues = [on.device.queue(f"turn {number}") for number in range(3)]
    for number, queue in enumerate(queues):
        queue.wait(gates[number], 1)
        queue.run(on.says(number))
    for number in (2, 0, 1):
        on.words.open(gates[number], 1)
        await on.through(queues[number])
    assert on.log == [2, 0, 1]


async def one_queue_may_wait_for_another(on: Checked) -> None:
    word, first, second = on.words.take(), on.device.queue("first"), on.device.queue("second")
    second.wait(word, 1)
    second.run(on.says("second"))
    first.run(on.says("first"))
    first.signal(word, 1)
    await on.through(second)
    assert on.log == ["first", "second"]


async def a_program_that_raises_is_told_and_the_queue_goes_on(on: Checked) -> None:
    class Panic(BaseException):
        """As libraries in other languages raise it."""

    word, seen, queue = on.words.take(), [], on.device.queue("raising")
    on.device.follow(word, lambda value: seen.append(len(on.log)))
    for value, error in enumerate((ValueError("one"), StopIteration("two"), Panic("three")), 1):
        queue.run(on.raises(error))
        queue.signal(word, value)
    queue.run(on.says("on"))
    await on.through(queue)
    *told, last = on.log
    assert last == "on"
    assert [str(error).rpartition(": ")[2] for error in told] == ["one", "two", "three"]
    assert all(isinstance(error, Exception) and not isinstance(error, StopIteration) for error in told), told
    assert seen[0] >= 1, "told before what comes behind it"


async def a_follower_that_raises_stops_nothing(on: Checked) -> None:
    word, queue = on.words.take(), on.device.queue("followed")

    def changed(value: int) -> None:
        raise ValueError("followers must not raise")

    on.device.follow(word, changed)
    queue.signal(word, 1)
    queue.run(on.says("on"))
    await on.through(queue)
    assert on.log == ["on"]


async def work_can_be_launched_by_a_follower(on: Checked) -> None:
    """As a pass that is kept a few layers ahead of the device."""
    word, queue = on.words.take(), on.device.queue("ahead")

    def changed(value: int) -> None:
        if value < 50:
            queue.run(on.says(value))
            queue.signal(word, value + 1)

    on.device.follow(word, changed)
    queue.signal(word, 1)
    await on.until(49)
    await on.through(queue)
    assert on.log == list(range(1, 50))


async def a_word_that_was_given_back_tells_nobody(on: Checked) -> None:
    followed, watched, queue = on.words.take(), on.words.take(), on.device.queue("given back")
    on.device.follow(followed, on.log.append)
    on.device.watch(watched, on.log.append)
    on.words.give_back(followed)
    on.words.give_back(watched)
    queue.signal(followed, 1)
    queue.signal(watched, 1)
    await on.through(queue)
    assert on.log == []


CHECKS = (
    words_start_at_zero_and_only_rise,
    words_go_on_at_zero_after_32_bits,
    programs_of_a_queue_run_in_order,
    a_signal_is_seen_after_all_before_it,
    a_watcher_is_called_on_the_loop_and_sees_the_last_value,
    nothing_behind_a_closed_gate_runs_and_nobody_waits_for_it,
    nobody_is_told_within_a_call,
    a_gate_that_is_open_already_holds_nothing,
    a_gate_that_opens_wide_drains_the_queue,
    queues_that_opened_run_whatever_the_order_of_their_launch,
    one_queue_may_wait_for_another,
    a_program_that_raises_is_told_and_the_queue_goes_on,
    a_follower_that_raises_stops_nothing,
    work_can_be_launched_by_a_follower,
    a_word_that_was_given_back_tells_nobody,
)
