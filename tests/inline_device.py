"""A device that computes on the event loop: programs run soon after the gates before them are open."""

from __future__ import annotations

import asyncio
from collections import deque

from msi.device.compute_thread import as_failure


class InlineWords:
    def __init__(self):
        self._values, self._queues, self.told = [], [], {}

    def take(self):
        self._values.append(0)
        return len(self._values) - 1

    def give_back(self, word):
        self.told.pop(word, None)

    def is_there(self, word, at_least):
        return (self._values[word] - at_least) % (1 << 32) < 1 << 31

    def open(self, word, value):
        if not self.is_there(word, value):
            self._values[word] = value % (1 << 32)
            for queue in self._queues:
                queue.go_on_soon()

    def add(self, queue):
        self._queues.append(queue)

    def signal(self, word, value):
        self.open(word, value)
        try:
            self.told.get(word, lambda value: None)(value)
        except Exception as error:
            self.complaint = error


class InlineQueue:
    def __init__(self, words):
        self._words, self._steps = words, deque()
        words.add(self)

    def wait(self, word, at_least):
        self._add(lambda: self._words.is_there(word, at_least))

    def run(self, program):
        def run():
            try:
                program.run()
            except BaseException as error:
                program.failed(as_failure(error))
            return True

        self._add(run)

    def signal(self, word, value):
        self._add(lambda: self._words.signal(word, value) or True)

    def _add(self, step):
        self._steps.append(step)
        self.go_on_soon()

    def go_on_soon(self):
        if self._steps:
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self):
        while self._steps and self._steps[0]():
            self._steps.popleft()


class InlineDevice:
    """Implements `msi.device.queues.QueueDevice`."""

    busy_s = 0.0

    def __init__(self):
        self.words = InlineWords()

    def queue(self, name):
        return InlineQueue(self.words)

    def follow(self, word, changed):
        self.words.told[word] = changed

    watch = follow
