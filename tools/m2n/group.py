"""All ranks of one system: started once, asleep between their runs, so that systems can take turns quickly."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tools.m2n.fabric import KEY_FILE, PATIENCE_S, Task
from tools.m2n.systems import SYSTEMS, environment_of

ROOT = Path(__file__).resolve().parent.parent.parent


class Run(NamedTuple):
    """What one run of a task measured."""

    times_s: list[float]  # a dispatch: of each message; an exchange: of each sender's rounds
    took_s: float  # of the slowest sender, for all rounds


class Group:
    """Raises SystemExit: a process does not come, or ends."""

    def __init__(self, name: str, num_senders: int, num_receivers: int, sizes: tuple[int, ...]) -> None:
        self._name = name
        self._num_senders = num_senders
        self._num_ranks = num_senders + num_receivers
        self._ranks: dict[int, _Rank] = {}
        self._folder = tempfile.TemporaryDirectory()
        folder = self._folder.name
        Path(folder, KEY_FILE).write_bytes(secrets.token_bytes(32))
        told = {
            "system": name, "num_senders": num_senders, "num_receivers": num_receivers, "folder": folder,
            "sizes": sizes,
        }  # fmt: skip
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/controller")
            listener.listen(self._num_ranks)
            listener.settimeout(PATIENCE_S)
            self._processes = self._start(json.dumps(told))
            try:
                opened = [_Rank(listener.accept()[0]) for _ in range(self._num_ranks)]
                self._ranks = {self._answer(rank)["rank"]: rank for rank in opened}
            except TimeoutError:
                self.close()
                raise SystemExit(f"{name}: not all {self._num_ranks} processes came within {PATIENCE_S:g} s") from None

    def _start(self, told: str) -> list[subprocess.Popen[bytes]]:
        system = SYSTEMS[self._name]
        command, environment = system.command(self._num_ranks), environment_of(system)
        words = [[told]] if system.by_mpi is not None else [[told, str(rank)] for rank in range(self._num_ranks)]
        return [
            subprocess.Popen([*command, *each], env=environment, cwd=ROOT, stdin=subprocess.DEVNULL) for each in words
        ]

    def run(self, task: Task) -> Run:
        line = json.dumps([task.pattern, task.size, task.rounds])
        for _, rank in sorted(self._ranks.items(), reverse=True):  # receivers first
            rank.say(line)
        found = {number: self._answer(rank) for number, rank in self._ranks.items()}
        times = [time_s for number in sorted(found) for time_s in found[number]["times"]]
        return Run(times, max(found[number]["took_s"] for number in range(self._num_senders)))

    def _answer(self, rank: _Rank) -> dict[str, Any]:
        line = rank.hear()
        if not line:
            self._kill()
            raise SystemExit(f"{self._name}: a process ended, or did nothing for {PATIENCE_S:g} s")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        for rank in self._ranks.values():
            rank.say("close")
        try:
            for process in self._processes:
                process.wait(10)
        except subprocess.TimeoutExpired:
            self._kill()
        for rank in self._ranks.values():
            rank.close()
        self._folder.cleanup()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(10)


class _Rank:
    """The connection to one process, which may be gone at any time."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE_S)
        self._connection = connection
        self._lines = connection.makefile("r")

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self._connection.sendall(line.encode() + b"\n")

    def hear(self) -> str:
        """ "" where it says nothing any more."""
        try:
            return self._lines.readline()
        except OSError:
            return ""

    def close(self) -> None:
        self._lines.close()
        self._connection.close()
