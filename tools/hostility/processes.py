"""The processes under attack, as /proc shows them: who they are, what they hold, where they listen."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
ESTABLISHED, LISTEN = "01", "0A"  # a TCP socket's state in /proc/net/tcp
ACCEPTS = 0x10000  # a listening socket's flag in /proc/net/unix


@dataclass(frozen=True, slots=True)
class Held:
    """What one process holds. `num_mappings`: of memory that it shares with others, by descriptor."""

    resident_bytes: int
    num_descriptors: int
    num_mappings: int


@dataclass(frozen=True, slots=True)
class TcpPorts:
    """Of one process: where it listens, and those at the other ends of its connections."""

    listening: frozenset[int]
    connected: frozenset[int]


def family(launcher: int) -> dict[str, int]:
    """Process ids of a launcher and all that it started, by name; of one kind they are numbered, the eldest first."""
    parents, began_at = {}, {}
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(folder.name)], began_at[int(folder.name)] = int(fields[1]), int(fields[19])
    members = [launcher]
    for pid in members:
        children = (child for child, parent in parents.items() if parent == pid)
        members += sorted(children, key=lambda child: (began_at[child], child))
    named: dict[str, int] = {"launcher": launcher}
    for pid in members[1:]:
        name = _name(pid)
        number = 1
        while name in named:
            number += 1
            name = f"{_name(pid)}-{number}"
        named[name] = pid
    return named


def _name(pid: int) -> str:
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "gone"
    for flag in ("--worker-id", "--role"):
        if flag in words:
            return words[words.index(flag) + 1]
    module = next((word for word in words if word.startswith("msi")), "")
    return module.rpartition(".")[2] or "helper"


def held(pid: int) -> Held:
    """Raises OSError: it is gone."""
    pages = int((PROC / str(pid) / "statm").read_text().split()[1])
    num_descriptors = len(list((PROC / str(pid) / "fd").iterdir()))
    num_mappings = (PROC / str(pid) / "maps").read_bytes().count(b" /memfd:")
    return Held(pages * os.sysconf("SC_PAGE_SIZE"), num_descriptors, num_mappings)


def all_held(launcher: int) -> dict[str, Held]:
    """Of a launcher and all that it started, by name; nothing of one that has just gone."""
    found = {}
    for name, pid in family(launcher).items():
        found[name] = Held(0, 0, 0)
        with contextlib.suppress(OSError):
            found[name] = held(pid)
    return found


def shared_out_mb(launcher: int) -> float:
    """Memory of a process and all that it started; a page that n of them share is an nth for each."""
    total = 0
    for pid in family(launcher).values():
        rollup = (PROC / str(pid) / "smaps_rollup").read_text()
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1e3


def num_descriptors(launcher: int) -> dict[str, int]:
    """Of a launcher and all that it started, by name; 0 of one that has just gone."""
    return {name: one.num_descriptors for name, one in all_held(launcher).items()}


def tcp_ports(pid: int) -> TcpPorts:
    """Over IPv4. Raises OSError: it is gone."""
    sockets = _tcp_sockets(_inodes(pid))
    return TcpPorts(
        frozenset(port for state, port, _ in sockets if state == LISTEN),
        frozenset(port for state, _, port in sockets if state == ESTABLISHED),
    )


def _inodes(pid: int) -> set[str]:
    """Of a process's sockets. Raises OSError: it is gone."""
    inodes = set()
    for link in (PROC / str(pid) / "fd").iterdir():
        with contextlib.suppress(OSError):
            if found := re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink())):
                inodes.add(found[1])
    return inodes


def _tcp_sockets(inodes: set[str]) -> list[tuple[str, int, int]]:
    """State, own port, and the port at the other end, of those of them that are TCP over IPv4."""
    lines = (PROC / "net/tcp").read_text().splitlines()[1:]
    return [
        (words[3], int(words[1].rpartition(":")[2], 16), int(words[2].rpartition(":")[2], 16))
        for words in map(str.split, lines)
        if words[9] in inodes
    ]


def listening(launcher: int) -> list[str]:
    """Where a launcher's family listens, its HTTP port included: "unix:PATH" (abstract: "unix:@NAME") or "tcp:PORT"."""
    inodes: set[str] = set()
    for pid in family(launcher).values():
        with contextlib.suppress(OSError):
            inodes |= _inodes(pid)
    found_at = [f"tcp:{port}" for state, port, _ in _tcp_sockets(inodes) if state == LISTEN]
    for line in (PROC / "net/unix").read_text().splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8 and int(words[3], 16) & ACCEPTS and words[6] in inodes:
            found_at.append(f"unix:{words[7]}")
    return sorted(set(found_at))
