"""What a command of msi does around its work: streams that are there, and an exit status with a sentence.

0  it is done, or was asked to end
1  a bug of msi: the traceback is in the log
2  it cannot work as it was asked to, and said why: starting it again the same way would not help
130, 143, 141  it was interrupted or terminated; nobody reads its output any more
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

from msi.errors import EngineError

from .free_memory import start_giving_back
from .logs import flush_errors, say_at_end

log = logging.getLogger(__name__)

EXIT_BUG = 1
EXIT_SENTENCE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_UNREAD = 128 + signal.SIGPIPE
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def run_command(name: str, work: Callable[[], int | None]) -> int:
    """Does the work; the exit status, which is the work's own where it gives one."""
    try:
        status = work()
        sys.stdout.flush()
    except EngineError as error:
        say_at_end(name, str(error))
        return EXIT_SENTENCE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _give_up_output()
        return EXIT_UNREAD
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM and error.filename is None:
            say_at_end(name, f"standard output cannot be written: {error.strerror}")
            _give_up_output()
            return EXIT_SENTENCE
        _report_bug(name, error)
        return EXIT_BUG
    finally:
        flush_errors()
    return status or 0


def requests_to_end() -> tuple[signal.Signals, ...]:
    """The signals that ask a process to end in order; a hang-up is none for one that is to outlive its terminal."""
    hung_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGTERM, *hung_up)


def settle() -> None:
    """For a process that is ready: the garbage collector leaves alone what is there now, most of it modules, and memory
    that is freed from now on goes back to the system.

    Else it walks through all of it every now and then, for 0.1 s in which no thread of the process does anything.
    """
    gc.collect()
    gc.freeze()
    start_giving_back()


def open_missing_streams() -> None:
    """Standard streams that were closed become /dev/null: else the next file or socket would be taken for them."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # characters that the locale does not have


def _give_up_output() -> None:
    """What is left in the buffer of standard output goes nowhere, also when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_bug(name: str, error: Exception) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"
    lines = "".join(traceback.format_exception(error))
    what = f"{type(error).__name__}: {error}"[:200]
    say_at_end(name, f"this is a bug of msi, at {where}: {what}; please report it with the lines above", lines)
