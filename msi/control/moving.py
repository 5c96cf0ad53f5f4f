"""Which requests that run go on at another attention worker, whose steps take less time or that is not about to end.

A step of each worker takes a time by its load that was measured: tokens are counted in windows. A request moves from
the worker whose steps take longest to the one where they take least, if those are by more than a threshold longer
than the other's will be *with* it: then it does not move back. What it saves over the rest of its answer, and what
others gain and lose by it, must be more than what it costs: its prompt and output are computed again, or its KV blocks
are sent and what follows them is computed, whichever was measured to take less; whoever runs there waits as long. What
runs on a worker that is to end moves without being weighed.

The worker is asked to let a request go, and it goes on elsewhere only once that one has said so, as one goes on whose
worker was lost. Decides; does not act. Knows no sockets or clock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count

from msi.control.loads import Loads
from msi.control.overload import Service
from msi.control.routed import Routed
from msi.kernels import BLOCK_TOKENS
from msi.settings import AttentionBalance

MOVES_AT_ONCE = 4  # from being asked for to the first token at the other worker
MOST_MOVES = 2  # of one request, for the sake of balance
RESTS_S = 2.0  # a request that has just come stays for so long
PATIENCE_S = 10.0  # with a worker that was asked; then others get their turn
WINDOW_S = 1.0  # in which tokens are counted


@dataclass(frozen=True, slots=True)
class Running:
    """A request that may move.

    Attributes:
        load: its part of its worker's.
        num_context: tokens of its prompt, and of its answer so far.
        num_left: that its answer is thought to have yet.
        num_tokens: of KV cache that it may come to need.
    """

    request_id: str
    load: float
    num_context: int
    num_left: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Laden:
    """An attention worker with what it has.

    Attributes:
        load: as `msi.control.routed.Load.predicted`.
        num_requests: that it has, be it that they may not move.
        num_free: sequences that it could begin with at once.
        room: tokens of KV cache that nobody may come to need.
    """

    worker_id: str
    load: float
    num_requests: int
    num_free: int
    room: int
    running: tuple[Running, ...] = ()


@dataclass(frozen=True, slots=True)
class Move:
    """Decision: a request goes on at another worker, which saves so many seconds of all sequences together."""

    request_id: str
    source: str
    target: str
    saved_s: float


def goes_on_after_s(num_context: int, again_s: Callable[[int], float], sent_per_s: float) -> float:
    """Seconds in which a sequence can go on elsewhere: by computing it again, or by sending its full KV blocks.

    Args:
        num_context: its tokens; the last of them has no keys and values yet.
        again_s: seconds in which a prompt of so many tokens is computed.
        sent_per_s: tokens whose blocks are sent in a second; 0 where none can be, or that is not known.
    """
    num_sent = (num_context - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    all_again_s = again_s(num_context)
    if not sent_per_s or not num_sent:
        return all_again_s
    return min(all_again_s, num_sent / sent_per_s + again_s(num_context - num_sent))


def best_move(
    workers: Collection[Laden],
    step_s: Callable[[str, float], float],
    moved_s: Callable[[str, str, int], float],
    threshold: float,
) -> Move | None:
    """The one that saves most; None where none does.

    Args:
        step_s: seconds of a worker's step by its load.
        moved_s: seconds in which a sequence of one worker, of so many tokens, can go on at another.
        threshold: by how much longer steps are to be, as a share.
    """
    targets = [one for one in workers if one.num_free > 0]
    sources = [one for one in workers if one.running]
    if not targets or not sources:
        return None
    source = max(sources, key=lambda one: step_s(one.worker_id, one.load))
    target = min(targets, key=lambda one: step_s(one.worker_id, one.load))
    here_s, there_s = step_s(source.worker_id, source.load), step_s(target.worker_id, target.load)
    best: Move | None = None
    for one in source.running:
        with_it_s = step_s(target.worker_id, target.load + one.load)
        if source is target or one.num_tokens > target.room or here_s <= (1 + threshold) * with_it_s:
            continue
        without_it_s = step_s(source.worker_id, source.load - one.load)
        gained_s = here_s - with_it_s + (source.num_requests - 1) * (here_s - without_it_s)
        lost_s = target.num_requests * (with_it_s - there_s)
        cost_s = moved_s(source.worker_id, target.worker_id, one.num_context)
        saved_s = one.num_left * (gained_s - lost_s) - (1 + target.num_requests) * cost_s
        if saved_s > 0 and (best is None or saved_s > best.saved_s):
            best = Move(one.request_id, source.worker_id, target.worker_id, saved_s)
    return best


def after(workers: Iterable[Laden], move: Move) -> list[Laden]:
    """The workers once a request has moved, which does not move again."""
    workers = list(workers)
    (moved,) = (one for worker in workers for one in worker.running if one.request_id == move.request_id)
    changed = []
    for worker in workers:
        sign = (worker.worker_id == move.target) - (worker.worker_id == move.source)
        changed.append(
            replace(
                worker,
                load=worker.load + sign * moved.load,
                num_requests=worker.num_requests + sign,
                num_free=worker.num_free - sign,
                room=worker.room - sign * moved.num_tokens,
                running=tuple(one for one in worker.running if one is not moved),
            )
        )
    return changed


class Moves:
    """Of one instance.

    Args:
        loads: of its workers.
        service: knows what steps and prompts took.
    """

    def __init__(self, settings: AttentionBalance, loads: Loads, service: Service) -> None:
        self._settings = settings
        self._loads = loads
        self._service = service
        self._numbers = count(1)
        self._under_way: dict[str, float] = {}  # each with when it is not waited for any more
        self._window_began = 0.0
        self._told: dict[str, tuple[str, int]] = {}  # of each request when the window began: its worker, and tokens
        self._loads_then: dict[str, float] = {}

    def due(
        self,
        requests: Mapping[str, Routed],
        capacities: Mapping[str, int],
        leaving: Collection[str],
        sent_per_s: Mapping[str, float],
        now: float,
    ) -> list[Routed]:
        """Requests that their workers are to let go now, each by its `Routed.release`.

        Args:
            capacities: tokens of KV cache of each worker that serves.
            leaving: workers that take nothing new and are to end.
            sent_per_s: of each worker that takes KV blocks, tokens whose blocks it sends in a second; 0 where that is
                not known.
        """
        if self._settings.balance_attention == "off":
            return []
        self._measure(requests.values(), now)
        for name, until in list(self._under_way.items()):
            if now > until or name not in requests or not requests[name].is_moving:
                del self._under_way[name]
        asked: list[Routed] = []
        if len(self._under_way) < MOVES_AT_ONCE and capacities:
            asked += self._from_leaving(requests, capacities, leaving, now)
            asked += self._for_balance(requests, capacities, sent_per_s, now)
        return asked

    def _from_leaving(
        self, requests: Mapping[str, Routed], capacities: Mapping[str, int], leaving: Collection[str], now: float
    ) -> Iterator[Routed]:
        """While others could begin with them at once."""
        for routed in requests.values() if leaving else ():
            if len(self._under_way) >= MOVES_AT_ONCE:
                return
            if routed.worker_id in leaving and self._may_move(routed) and self._has_place(routed, capacities):
                yield self._ask(routed, self._loads.soonest(routed, capacities), now)

    def _for_balance(
        self,
        requests: Mapping[str, Routed],
        capacities: Mapping[str, int],
        sent_per_s: Mapping[str, float],
        now: float,
    ) -> Iterator[Routed]:
        meters = self._service.meters

        def moved_s(source: str, target: str, num_context: int) -> float:
            rate = sent_per_s.get(source, 0.0) if target in sent_per_s else 0.0
            return goes_on_after_s(num_context, meters.prefill.at, rate)

        if len(capacities) < 2 or not meters.step.y.num_seen or not meters.prefill.y.num_seen:
            return
        workers = self._laden(requests, capacities, now)
        while len(self._under_way) < MOVES_AT_ONCE:
            threshold = self._settings.balance_attention_threshold
            move = best_move(workers, meters.step_s, moved_s, threshold)
            if move is None:
                return
            workers = after(workers, move)
            yield self._ask(requests[move.request_id], move.target, now)

    def _ask(self, routed: Routed, target: str, now: float) -> Routed:
        routed.moves_to = target
        routed.release = routed.release or next(self._numbers)  # asked again, it is the same
        self._under_way[routed.request.request_id] = now + PATIENCE_S
        return routed

    def _may_move(self, routed: Routed) -> bool:
        return not routed.is_suspect and routed.request.request_id not in self._under_way

    def _has_place(self, routed: Routed, capacities: Mapping[str, int]) -> bool:
        """Whether a worker could begin with it at once."""
        return any(self._service.is_free(self._loads.of(one), size, routed.cost) for one, size in capacities.items())

    def _laden(self, requests: Mapping[str, Routed], capacities: Mapping[str, int], now: float) -> list[Laden]:
        """The workers as they will be once what is under way has moved."""
        running: dict[str, list[Running]] = {worker_id: [] for worker_id in capacities}
        for name, routed in requests.items():
            is_settled = routed.num_moves < MOST_MOVES and now >= routed.given_at + RESTS_S and self._may_move(routed)
            if routed.worker_id in running and routed.is_started and (is_settled or name in self._under_way):
                running[routed.worker_id].append(self._running(routed))
        workers = []
        for worker_id, capacity in capacities.items():
            load = self._loads.of(worker_id)
            num_free = self._service.num_places(capacity) - load.num_requests
            room = capacity - load.num_tokens
            told = Laden(worker_id, load.predicted, load.num_requests, num_free, room, tuple(running[worker_id]))
            workers.append(told)
        for name in self._under_way:
            routed = requests[name]
            if routed.is_started and routed.worker_id in running:
                workers = after(workers, Move(name, routed.worker_id, routed.moves_to, 0.0))
        return workers

    def _running(self, routed: Routed) -> Running:
        num_output = len(routed.token_ids)
        num_context = len(routed.request.prompt_token_ids) + num_output
        num_left = self._loads.expected_left(routed.request, num_output)
        return Running(routed.request.request_id, routed.predicted, num_context, num_left, routed.num_tokens)

    def _measure(self, requests: Iterable[Routed], now: float) -> None:
        """What steps take at each worker, by the tokens that its sequences have got while the window lasted."""
        elapsed_s = now - self._window_began
        if elapsed_s < WINDOW_S:
            return
        started = {one.request.request_id: one for one in requests if one.worker_id and one.is_started}
        counts: dict[str, list[int]] = {}
        for name, (worker_id, num_tokens) in self._told.items():
            if (routed := started.get(name)) is not None and routed.worker_id == worker_id:
                counts.setdefault(worker_id, []).append(len(routed.token_ids) - num_tokens)
        for worker_id, told in counts.items():
            if sum(told) > 0:
                load = (self._loads_then.get(worker_id, 0.0) + self._loads.of(worker_id).predicted) / 2
                self._service.meters.add_step(worker_id, load, elapsed_s * len(told) / sum(told))
        self._window_began = now
        self._told = {name: (one.worker_id, len(one.token_ids)) for name, one in started.items()}
        self._loads_then = {one.worker_id: self._loads.of(one.worker_id).predicted for one in started.values()}
