"""What a simulation found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of times in seconds."""

    p50_s: float
    p90_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class RequestResult:
    """One request. Times in seconds since the start; `first_token_s` is None where there was none."""

    request_id: str
    arrival_s: float
    first_token_s: float | None
    end_s: float
    input_len: int
    num_tokens: int
    error_kind: str = ""
    error: str = ""

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None with fewer than two."""
        if self.first_token_s is None or self.num_tokens < 2:
            return None
        return (self.end_s - self.first_token_s) / (self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """Shares of the time: `busy` computing, of all of it; `bubble` idle, of that in which the instance had requests."""

    worker_id: str
    busy: float
    bubble: float


@dataclass(frozen=True, slots=True)
class Report:
    """One simulation.

    Attributes:
        duration_s: from the first moment the instance was ready to the end of the last request.
        num_tokens: generated.
        num_messages: of the data plane, either way.
        num_micro_batches: m, as given or as chosen.
        ttft_s, tpot_s: of requests that ended well; None where there is none (with two tokens).
        requests: in order of arrival.
    """

    duration_s: float
    num_requests: int
    num_failed: int
    num_tokens: int
    tokens_per_s: float
    requests_per_s: float
    ttft_s: Percentiles | None
    tpot_s: Percentiles | None
    workers: tuple[WorkerUse, ...]
    num_messages: int
    num_micro_batches: int
    requests: tuple[RequestResult, ...]

    def to_json(self) -> dict[str, object]:
        """Without the requests that ended well. Times in seconds."""
        values = asdict(self)
        del values["requests"]
        failed = [
            {"request_id": one.request_id, "end_s": one.end_s, "kind": one.error_kind, "reason": one.error}
            for one in self.failed
        ]
        return {"schema_version": SCHEMA_VERSION} | values | {"failed": failed}

    @property
    def failed(self) -> tuple[RequestResult, ...]:
        return tuple(result for result in self.requests if result.error_kind)


def percentiles(times: Sequence[float]) -> Percentiles | None:
    """By linear interpolation; None of nothing."""
    if not times:
        return None
    ordered = sorted(times)
    return Percentiles(_at(ordered, 0.50), _at(ordered, 0.90), _at(ordered, 0.99))


def _at(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def build_report(
    results: Sequence[RequestResult], busy_s: dict[str, float], *, num_messages: int, num_micro_batches: int
) -> Report:
    """Args: busy_s: seconds of computing, by worker id."""
    duration_s = max(result.end_s for result in results)
    serving_s = _covered_s([(result.arrival_s, result.end_s) for result in results])
    well = [result for result in results if not result.error_kind]
    num_tokens = sum(result.num_tokens for result in results)
    return Report(
        duration_s=duration_s,
        num_requests=len(results),
        num_failed=len(results) - len(well),
        num_tokens=num_tokens,
        tokens_per_s=num_tokens / duration_s if duration_s else 0.0,
        requests_per_s=len(well) / duration_s if duration_s else 0.0,
        ttft_s=percentiles([one.ttft_s for one in well if one.ttft_s is not None]),
        tpot_s=percentiles([one.tpot_s for one in well if one.tpot_s is not None]),
        workers=tuple(
            WorkerUse(
                worker_id,
                busy=seconds / duration_s if duration_s else 0.0,
                bubble=max(0.0, 1 - seconds / serving_s) if serving_s else 0.0,
            )
            for worker_id, seconds in busy_s.items()
        ),
        num_messages=num_messages,
        num_micro_batches=num_micro_batches,
        requests=tuple(results),
    )


def _covered_s(spans: list[tuple[float, float]]) -> float:
    """Length of the union."""
    covered, reached = 0.0, 0.0
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
