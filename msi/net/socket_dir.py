"""A directory for the sockets of one instance on this machine that nobody else on it can enter.

Whoever makes one holds a lock on it for as long as it lives, and the kernel gives that up however it ends: directories
of this user that nobody holds are swept away when the next one is made.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from msi.errors import ConfigError

PREFIX = "msi-sockets-"
MAX_PATH_BYTES = 103  # of a Unix socket: the least that kernels allow (Linux: 107)
LONGEST_NAME = 24  # of our directory, and of a socket in it
TRIES = 10


class SocketDir:
    """Fresh, of mode 700. `close` removes it.

    Raises:
        ConfigError: there is no place for one; says what is wrong with each.
    """

    def __init__(self) -> None:
        parent = _parent()
        for stale in _stale(parent):
            shutil.rmtree(stale, ignore_errors=True)
        for _ in range(TRIES):  # another's sweep may come between its making and its locking
            try:
                self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            except OSError as error:
                raise ConfigError(
                    f"cannot make a directory for sockets in {parent}: {error.strerror}; set XDG_RUNTIME_DIR"
                ) from error
            if (lock := _lock(self.path)) is not None:
                self._lock = lock
                return
        raise ConfigError(f"cannot keep a directory for sockets in {parent}: others remove it")

    def address(self, name: str) -> str:
        """Of a control socket there."""
        assert len(name) <= LONGEST_NAME, name
        return f"ipc://{self.path}/{name}"

    def close(self) -> None:
        """Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def addresses_here(name: str) -> list[str]:
    """Control sockets of this name in directories of this user that somebody holds."""
    parent = _parent()
    held = (path for path in parent.glob(f"{PREFIX}*") if _is_held(path))
    return sorted(f"ipc://{path}/{name}" for path in held if (path / name).is_socket())


def _is_held(path: Path) -> bool:
    try:
        if path.lstat().st_uid != os.geteuid():
            return False
    except OSError:
        return False
    lock = _lock(path)
    if lock is not None:
        os.close(lock)
    return lock is None


def check_private(path: Path) -> None:
    """Whether a socket there is, and stays, of this user.

    Raises:
        ConfigError: others could put theirs in its place.
    """
    try:
        status = path.parent.stat()
    except OSError as error:
        raise ConfigError(f"ipc://{path}: {path.parent} cannot be used: {error.strerror}") from error
    is_ours = status.st_uid in (0, os.geteuid())
    if not is_ours or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        whose = "can be written by others" if is_ours else "belongs to somebody else"
        raise ConfigError(
            f"ipc://{path}: {path.parent} {whose}, so who listens there is not certain; use one of mode 700"
        )
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(f"ipc://{path}: a path of more than {MAX_PATH_BYTES} bytes can be no socket's")


def _parent() -> Path:
    """Where this user's sockets may lie: others can neither rename what is there, nor is the path too long."""
    complaints = []
    named = (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp")
    for name in dict.fromkeys(one for one in named if one):
        path = Path(name).absolute()
        if (complaint := _complaint(path)) is None:
            return path
        complaints.append(f"{path} {complaint}")
    raise ConfigError(f"no place for the sockets of this instance: {'; '.join(complaints)}; set XDG_RUNTIME_DIR")


def _complaint(path: Path) -> str | None:
    if len(os.fsencode(path)) + 2 * (LONGEST_NAME + 1) > MAX_PATH_BYTES:
        return "is too long for the path of a socket"
    try:
        status = path.stat()
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    if not stat.S_ISDIR(status.st_mode):
        return "is no directory"
    if status.st_uid not in (0, os.geteuid()):
        return "belongs to somebody else"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
        return "is writable for others, who could put theirs in its place"
    return None if os.access(path, os.W_OK | os.X_OK) else "is not writable"


def _stale(parent: Path) -> Iterator[Path]:
    """Directories of this user's that nobody holds."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if not entry.name.startswith(PREFIX) or not entry.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                is_ours = status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700
                if is_ours and _holds_sockets(Path(entry.path)) and (lock := _lock(Path(entry.path))) is not None:
                    yield Path(entry.path)
                    os.close(lock)


def _holds_sockets(path: Path) -> bool:
    """And nothing else: what somebody keeps under such a name is not ours to remove."""
    return all(stat.S_ISSOCK(one.lstat().st_mode) for one in path.iterdir())


def _lock(path: Path) -> int | None:
    """A descriptor that holds the directory; None when somebody else does, or has removed it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), path.lstat()):
            return fd
    except OSError:
        pass
    os.close(fd)
    return None
