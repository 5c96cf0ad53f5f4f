"""What batches of an expert node take, by how many rows landed for them: places of experts are planned from it."""

from __future__ import annotations

from msi.control.counters import BatchTimes


class BatchMeter:
    """Of one life. Sizes are told apart by powers of two."""

    def __init__(self) -> None:
        self._sums: dict[int, list[float]] = {}  # by exponent: batches, rows, seconds

    def add(self, num_rows: int, seconds: float) -> None:
        sums = self._sums.setdefault(max(0, num_rows - 1).bit_length(), [0, 0, 0.0])
        sums[0] += 1
        sums[1] += num_rows
        sums[2] += seconds

    def told(self) -> tuple[BatchTimes, ...]:
        return tuple(
            BatchTimes(1 << size, int(batches), int(rows), seconds)
            for size, (batches, rows, seconds) in sorted(self._sums.items())
        )
