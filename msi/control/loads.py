"""What attention workers have been given and have not finished, and which of them takes least time for one more.

A decode step of a worker takes a time that grows with its sequences and with their contexts, and every sequence waits
for all of them: so a load is the sum of both. How long an answer will be is not known; the mean of those before stands
for it. Decides; does not act.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msi.attention.sequence import CONTEXT_UNIT
from msi.control.overload import FIRST_ANSWER
from msi.control.prediction import Mean
from msi.control.routed import Load, Routed
from msi.types import Request


class Loads:
    """Of all workers.

    Args:
        max_model_len: the longest sequence, prompt included.
        time_of: a worker's step by a load, as steps have taken time there before.
    """

    def __init__(self, max_model_len: int, time_of: Callable[[str, float], float]) -> None:
        self._max_model_len = max_model_len
        self._time_of = time_of
        self._loads: dict[str, Load] = {}
        self._outputs = Mean()  # tokens of finished answers

    def of(self, worker_id: str) -> Load:
        return self._loads.get(worker_id, Load())

    def num_excess(self, max_num_seqs: int) -> int:
        """Requests that wait at workers for others to end, where so many run at a time."""
        return sum(max(0, load.num_requests - max_num_seqs) for load in self._loads.values())

    def soonest(self, routed: Routed, capacities: Mapping[str, int]) -> str:
        """Of the workers with room the one whose steps are predicted to take least with it; the most room where none
        has enough.
        """
        extra, time_of = self._predicted(routed.request), self._time_of
        loads = {worker: self._loads.setdefault(worker, Load()) for worker in capacities}
        room = {worker: capacity - loads[worker].num_tokens for worker, capacity in capacities.items()}
        roomy = [worker for worker in room if room[worker] >= routed.num_tokens]
        if roomy:
            return min(roomy, key=lambda worker: (time_of(worker, loads[worker].predicted + extra), -room[worker]))
        return max(room, key=room.__getitem__)

    # -- what is expected of a request -------------------------------------------------------------------------------

    def expected_tokens(self, request: Request) -> float:
        """Prompt and answer."""
        num_output = min(request.params.max_tokens, self.mean_output or FIRST_ANSWER)
        return min(len(request.prompt_token_ids) + num_output, self._max_model_len)

    def expected_left(self, request: Request, num_output: int) -> float:
        """Tokens that its answer still has; what is longer than others are is thought to go on for half as long."""
        most = min(request.params.max_tokens, self._max_model_len - len(request.prompt_token_ids)) - num_output
        return max(0.0, min(most, max((self.mean_output or FIRST_ANSWER) - num_output, num_output / 2)))

    @property
    def mean_output(self) -> float:
        """Tokens of an answer; 0 before the first has ended."""
        return self._outputs.value

    def answered(self, num_tokens: int) -> None:
        """An answer of so many has come to its end."""
        self._outputs.add(num_tokens)

    def _predicted(self, request: Request) -> float:
        """Of a request in the middle of its answer, whose length is taken to be the mean of those before."""
        most = min(request.params.max_tokens, self._max_model_len)
        num_output = min(most, self.mean_output) if self.mean_output else most
        return 1 + (len(request.prompt_token_ids) + num_output / 2) / CONTEXT_UNIT

    # -- what workers are given --------------------------------------------------------------------------------------

    def give(self, routed: Routed) -> None:
        """To its worker."""
        routed.predicted = self._predicted(routed.request)
        load = self._loads.setdefault(routed.worker_id, Load())
        load.predicted += routed.predicted
        load.num_tokens += routed.num_tokens
        load.num_requests += 1
        load.num_expected += routed.cost
        load.num_unstarted += 1
        load.num_prompt_tokens += len(routed.request.prompt_token_ids)
        routed.num_computed = load.num_prompt_tokens
        routed.is_started = False

    def start(self, routed: Routed) -> Load:
        """Its first token is there."""
        load = self._loads[routed.worker_id]
        _count_started(routed, load)
        return load

    def free(self, routed: Routed) -> None:
        """It counts for its worker no longer."""
        if (load := self._loads.get(routed.worker_id)) is not None:
            load.predicted -= routed.predicted
            load.num_tokens -= routed.num_tokens
            load.num_requests -= 1
            load.num_expected -= routed.cost
            if not routed.is_started:
                _count_started(routed, load)

    def lost(self, worker_id: str) -> None:
        self._loads.pop(worker_id, None)


def _count_started(routed: Routed, load: Load) -> None:
    routed.is_started = True
    load.num_unstarted -= 1
    load.num_prompt_tokens -= len(routed.request.prompt_token_ids)
