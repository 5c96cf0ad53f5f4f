"""Landing memory that peers reach through an endpoint of ours alone, never by a mapping of their own."""

from __future__ import annotations

import mmap

from msi.errors import ConfigError


class PlainLanding:
    """Plain memory. An endpoint remembers its seat's generation and writes no more once it has changed."""

    def __init__(self, num_seats: int, seat_bytes: int) -> None:
        self.num_seats = num_seats
        self.stride = -(-seat_bytes // 64) * 64
        size = num_seats * self.stride
        try:
            self.memory = memoryview(mmap.mmap(-1, size))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot map {size} bytes: {error}; use fewer or smaller slots") from error
        self._generations = [0] * num_seats

    def seat(self, index: int) -> memoryview:
        return self.memory[index * self.stride : (index + 1) * self.stride]

    def revoke(self, index: int) -> None:
        self._generations[index] += 1
        self.seat(index)[:] = bytes(self.stride)

    def generation(self, index: int) -> int:
        return self._generations[index]
