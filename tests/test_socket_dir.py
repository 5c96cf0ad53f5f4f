"""The directory of an instance's sockets: for one user alone, and never left behind for good."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile

import pytest

from msi.errors import ConfigError
from msi.net.socket_dir import MAX_PATH_BYTES, PREFIX, SocketDir


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path_factory, monkeypatch):
    path = tmp_path_factory.getbasetemp() / "run"
    path.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


def test_it_is_for_this_user_alone_and_gone_at_the_end(runtime_dir):
    sockets = SocketDir()
    status = sockets.path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, os.geteuid())
    assert sockets.path.parent == runtime_dir
    assert len(sockets.address("coordinator").removeprefix("ipc://")) <= MAX_PATH_BYTES
    sockets.close()
    sockets.close()
    assert not sockets.path.exists()


def test_what_a_killed_process_left_is_swept_by_the_next_and_what_others_hold_stays(runtime_dir):
    held = SocketDir()
    code = (
        "import socket, time; from msi.net.socket_dir import SocketDir; there = SocketDir().path;"
        "socket.socket(socket.AF_UNIX).bind(str(there / 'coordinator')); print(there, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        left = child.stdout.readline().strip()
        SocketDir().close()
        assert os.path.exists(left), "its process lives"
        child.send_signal(signal.SIGKILL)
        child.wait()
    someones = runtime_dir / f"{PREFIX}notes"
    someones.mkdir(mode=0o700)
    (someones / "todo").write_text("no socket of ours")
    open_one = runtime_dir / f"{PREFIX}open"
    open_one.mkdir(mode=0o755)
    SocketDir().close()
    assert not os.path.exists(left)
    assert (someones / "todo").exists()
    assert open_one.exists()
    assert held.path.exists()
    held.close()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_place_where_others_could_put_theirs_is_not_taken(runtime_dir, monkeypatch, mode):
    shared = runtime_dir / "shared"
    shared.mkdir(exist_ok=True)
    shared.chmod(mode)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(shared))
    sockets = SocketDir()
    assert sockets.path.parent == runtime_dir
    sockets.close()
    shared.chmod(0o1777)
    sockets = SocketDir()
    assert sockets.path.parent == shared
    sockets.close()


def test_a_path_too_long_for_a_socket_is_passed_over_and_none_at_all_is_a_sentence(runtime_dir, monkeypatch):
    deep = runtime_dir / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    sockets = SocketDir()
    assert sockets.path.parent == runtime_dir
    sockets.close()
    monkeypatch.setattr("msi.net.socket_dir._complaint", lambda path: "is full")
    with pytest.raises(
        ConfigError, match=r"no place for the sockets of this instance: .*d{60}.* is full; .*XDG_RUNTIME"
    ):
        SocketDir()


def test_instances_that_start_at_the_same_moment_do_not_sweep_each_others_away(runtime_dir):
    code = (
        "import faulthandler; faulthandler.dump_traceback_later(60, exit=True)\n"
        "from msi.net.socket_dir import SocketDir\n"
        "for _ in range(150): SocketDir().close()"
    )
    before = set(runtime_dir.iterdir())
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(4)]
    assert [one.communicate()[1].decode() for one in running] == [""] * 4
    assert set(runtime_dir.iterdir()) == before


def test_a_place_without_room_is_a_sentence(runtime_dir, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(ConfigError, match="No space left on device; set XDG_RUNTIME_DIR"):
        SocketDir()
