"""Synchronisations of the product that can be left out, each a patch of one place; see `tests.fake_roles`.

`LEFT_OUT` and `LEFT_OUT_AT_A_LOSS` give, by what is left out, a context in which it is.
"""

from __future__ import annotations

import contextlib
from collections import deque
from functools import partial

from msi.attention.half import AttentionHalf
from msi.attention.launching import _Lane
from msi.device.fake.transport import FakeTransport
from msi.experts.half import ExpertHalf
from msi.experts.wave import Wave
from msi.net.combine_link import CombineLink
from msi.net.dispatch_link import DispatchLink
from msi.net.turns import Turns
from tests.fake_roles import Play


@contextlib.contextmanager
def patched(owner, name, change):
    """`change` is called with the original before its arguments."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, original)


def made(owner, change):
    """`change` is called with every new `owner`."""

    def init(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        change(self)

    return patched(owner, "__init__", init)


def nothing(*_):
    """In place of something."""


# -- cards -------------------------------------------------------------------------------------------------------------


def transports(*sides, **changes):
    def new_transport(original, play, side, device):
        return FakeTransport(device, **changes) if side in sides else original(play, side, device)

    return patched(Play, "new_transport", new_transport)


def before_rows(wire, rows, header, announce):
    wire.post(None, header, announce)
    wire.post(rows, None, nothing)


def before_header(wire, rows, header, announce):
    wire.post(rows, None, announce)
    wire.post(None, header, nothing)


def before_all(wire, rows, header, announce):
    wire.post(None, None, announce)
    wire.post(rows, header, nothing)


# -- queues and gates --------------------------------------------------------------------------------------------------


class OtherQueue:
    """A queue that waits for something else, and gives some words their value before what comes ahead of it has run.

    Args:
        waits: from what is waited for to what is waited for instead; None for nothing.
    """

    def __init__(self, queue, early=(), waits=lambda value: value):
        self._queue, self._early, self._waits, self._held = queue, early, waits, []

    def wait(self, word, value):
        if (instead := self._waits(value)) is not None:
            self._queue.wait(word, instead)

    def run(self, program):
        if self._early:
            self._held.append(program)
        else:
            self._queue.run(program)

    def signal(self, word, value):
        held, self._held = self._held, []
        if word in self._early:
            self._queue.signal(word, value)
        for program in held:
            self._queue.run(program)
        if word not in self._early:
            self._queue.signal(word, value)


def lane_queues(early=(), **changes):
    def change(lane):
        lane.queue = OtherQueue(lane.queue, [getattr(lane, word) for word in early], **changes)

    return made(_Lane, change)


def done_early(half):
    half._queue = OtherQueue(half._queue, [half._done])


class OnePlace(deque):
    """What comes takes the place of what was there."""

    def append(self, one):
        if self:
            self[-1] = one
        super().append(one)


def one_descriptor(half):
    half._batches = OnePlace()


def counts_before(half):
    """The host takes them for a turn when it opens the gate before it."""
    counts, open_gate = half.counts, half.open
    half.counts = memoryview(bytearray(counts.nbytes)).cast("i", counts.shape)

    def open_and_read(lane, turn):
        half.counts.cast("B")[:] = counts.cast("B")
        open_gate(lane, turn)

    half.open = open_and_read


# -- links and waves ---------------------------------------------------------------------------------------------------


def first_answer(original, turns, landed):
    for one in landed:
        lane = one[1] >> 26 & 7
        passing, num_answers = turns.passes[lane], turns.counters.answers
        original(turns, (one,))
        if turns.counters.answers > num_answers and turns.waiting[lane]:
            passing.gates.open(lane, passing.turn)


def clear_rows(endpoint, lane):
    memory = endpoint.transport.device.memory
    with memory.opened():
        endpoint.out_rows.tensor().view(len(endpoint.out_headers), -1)[lane].zero_()


def clear_header(endpoint, lane):
    endpoint.out_headers[lane][:] = bytes(endpoint.out_headers[lane].nbytes)


def cleared_once_posted(clear, original, turns, lane, turn):
    original(turns, lane, turn)
    for peer in turns.nodes.connected:
        clear(peer.endpoint, lane)


def cleared_once_answered(clear, original, link, lane, answers, compute_s):
    original(link, lane, answers, compute_s)
    for seat, _, _ in answers:
        if link._seats[seat] is not None:
            clear(link._seats[seat].endpoint, lane)


def no_patience(original, wave):
    return original(wave) if wave.waited_since is None else wave.waited_since


LEFT_OUT = {
    "attention does not flush what landed": partial(transports, "attention", flush=nothing),
    "an expert does not flush what landed": partial(transports, "expert", flush=nothing),
    "immediates overtake rows": partial(transports, "attention", "expert", send=before_rows),
    "immediates overtake headers": partial(transports, "attention", "expert", send=before_header),
    "a completion is seen before the write": partial(transports, "attention", "expert", send=before_all),
    "attention does not wait for its gate": partial(lane_queues, waits=lambda turn: None),
    "a gate is a flag that is never taken back": partial(lane_queues, waits=lambda turn: min(turn, 1)),
    "a gate opens a turn early": partial(lane_queues, waits=lambda turn: turn - 1),
    "a gate opens at the first answer": partial(patched, Turns, "take", first_answer),
    "rows are posted before they are packed": partial(lane_queues, ["packed"]),
    "counts are read before they are packed": partial(made, AttentionHalf, counts_before),
    "tokens are read before they are there": partial(lane_queues, ["sampled"]),
    "an answer is posted before it is done": partial(made, ExpertHalf, done_early),
    "a descriptor is used again before it was read": partial(made, ExpertHalf, one_descriptor),
    "a batch is taken before all have landed": partial(patched, Wave, "due_at", no_patience),
    "rows are overwritten once they are posted": partial(
        patched, Turns, "packed", partial(cleared_once_posted, clear_rows)
    ),
    "a header is overwritten once it is posted": partial(
        patched, Turns, "packed", partial(cleared_once_posted, clear_header)
    ),
    "answers are overwritten once they are posted": partial(
        patched, CombineLink, "answer", partial(cleared_once_answered, clear_rows)
    ),
    "an answer's header is overwritten once it is posted": partial(
        patched, CombineLink, "answer", partial(cleared_once_answered, clear_header)
    ),
}


# -- when a node is lost -----------------------------------------------------------------------------------------------


class Deaf:
    """Gates that nobody opens."""

    def __init__(self, gates):
        self.num_layers, self.counts, self.open = gates.num_layers, gates.counts, nothing


@contextlib.contextmanager
def no_gates_at_a_loss():
    def fail(original, link, lane, passing, error):
        passing.gates = Deaf(passing.gates)
        original(link, lane, passing, error)

    def give_up(original, link, lane):
        if (passing := link.turns.passes[lane]) is not None:
            passing.gates = Deaf(passing.gates)
        original(link, lane)

    with patched(DispatchLink, "_fail", fail), patched(DispatchLink, "give_up", give_up):
        yield


LEFT_OUT_AT_A_LOSS = {"a failure opens no gates": no_gates_at_a_loss}
