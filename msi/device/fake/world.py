"""Whose turn it is among all queues, cards and looks of hosts at their words: of those who could go on, by the seed."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from typing import Protocol

STEPS_AT_ONCE = 6  # at most, before the host gets its turn
PACES = (1, 1, 4, 16)  # how often somebody is picked, compared with others
PACES_LAST = 25  # steps; a queue or card may be slow for a while, and then fast
PATIENCE = 20  # rounds of the event loop in which nothing is to do before all counts as quiet


class Actor(Protocol):
    """A queue, one direction of a card, or a host that is to look at words."""

    def is_ready(self) -> bool: ...

    def step(self) -> None:
        """One thing that happens at once. What it raises ends the world, and is raised by `quiet`."""


class FakeWorld:
    """All hardware of one test, on the running event loop.

    Args:
        seed: of the order in which things happen.

    Attributes:
        chance: for whatever else is left to luck.
        num_steps: that were made.
    """

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.num_steps = 0
        self._actors: list[Actor] = []
        self._paces: dict[Actor, int] = {}
        self._lock = threading.Lock()  # over whether a round is due
        self._is_due = False
        self._failure: Exception | None = None
        self._thread = threading.get_ident()
        self._loop = asyncio.get_running_loop()

    def join(self, actor: Actor) -> None:
        self._actors.append(actor)

    def leave(self, actor: Actor) -> None:
        """Idempotent."""
        if actor in self._actors:
            self._actors.remove(actor)

    def poke(self) -> None:
        """Somebody may be ready now. From any thread."""
        with self._lock:
            if self._is_due:
                return
            self._is_due = True
        if threading.get_ident() == self._thread:
            self._loop.call_soon(self._round)
        else:
            self._loop.call_soon_threadsafe(self._round)

    async def quiet(self, max_steps: float = math.inf) -> None:
        """Until nobody can go on, and no callback of the host's changes that; or until so many steps were made."""
        rounds = 0
        while rounds < PATIENCE and self.num_steps < max_steps:
            await asyncio.sleep(0)
            if self._failure is not None:
                raise self._failure
            rounds = 0 if self._is_due or self._ready() else rounds + 1

    def _ready(self) -> list[Actor]:
        return [actor for actor in self._actors if actor.is_ready()]

    def _round(self) -> None:
        with self._lock:
            self._is_due = False
        for _ in range(self.chance.randint(1, STEPS_AT_ONCE)):
            ready = self._ready()
            if not ready or self._failure is not None:
                return
            if self.num_steps % PACES_LAST == 0:
                self._paces.clear()
            self.num_steps += 1
            actor = self.chance.choices(ready, [self._pace_of(actor) for actor in ready])[0]
            try:
                actor.step()
            except Exception as error:
                self._failure = error
                raise
        self.poke()

    def _pace_of(self, actor: Actor) -> int:
        if actor not in self._paces:
            self._paces[actor] = self.chance.choice(PACES)
        return self._paces[actor]
