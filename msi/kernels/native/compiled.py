"""Compiling the C++ beside this file for this processor, once, and loading it; None where that cannot be.

The file that is made is kept in the user's cache, under a name that changes with the source and the processor; of
several processes that want it at once, one compiles. Who has waited long enough goes on without it, while the compiler
works on for the next start. It runs on the threads that torch has: two pools of them would fight for the cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import mmap
import os
import shutil
import stat
import subprocess
import tempfile
import threading
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from msi.kernels.quantized import Quantized

log = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("products.cpp", "rows.cpp", "layers.cpp"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("vectors.h", "panels.h", "team.h", "steps.h"))
COMPILER = "g++"
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fPIC", "-fopenmp", "-w")
COMPILES_WITHIN_S = 240.0  # that a start waits, in all
COMMAND_TIMEOUT_S = 1800.0
LARGE_PAGE = 1 << 21  # bytes
WIDTH = 16  # of a panel: a matrix has a multiple of it of rows
FORMATS = {"bfloat16": 0, "int8": 1, "int4": 2, "fp8": 3}  # as `products.cpp` numbers them

_P, _N = ctypes.c_void_p, ctypes.c_int64
SIGNATURES = {
    "msi_has_bfloat16_rows": (_N, ()),
    "msi_packed_bytes": (_N, (_N, _N, _N)),
    "msi_pack": (None, (_N, _P, _P, _N, _N, _P)),
    "msi_linear": (None, (_N, _N, _N, _P, _N, _N, _P, _N, _P, _P)),
    "msi_work_values": (_N, (_N, _N, _N, _N)),
    "msi_decode": (None, (*[_N] * 6, _P, _N, _P, _P, _N, _P, _N, _P, _P)),
    "msi_experts": (_N, (*[_N] * 7, _P, _N, _P, _N, _P, _N, *[_P] * 8)),
    "msi_layers": (None, (_P, _P, _N)),
}


class Unusable(Exception):
    """Why there is no library."""


class TakesLonger(Exception):
    """It may be there at the next start."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [num_outputs, depth] in panels.

    Attributes:
        panels: uint8.
        format: of `FORMATS`.
    """

    panels: Tensor
    format: int
    num_outputs: int
    depth: int


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The functions of `products.cpp`; slow the first time on a machine. None is said once, with the reason."""
    try:
        library = _load()
        _check(library)
        return library
    except TakesLonger as error:
        log.warning("%s", error)
        return None
    except (Unusable, OSError, subprocess.SubprocessError, AttributeError) as error:
        log.info("the CPU computes with torch's products alone: %s", error)
        return None


def pack(library: ctypes.CDLL, weight: Tensor | Quantized) -> Packed:
    """Of bfloat16 [n, depth], or a quantised matrix; n is a multiple of `WIDTH`, and depth of 2."""
    num_outputs, depth = weight.shape
    assert num_outputs % WIDTH == depth % 2 == 0, weight.shape
    if isinstance(weight, Quantized):
        number, values, scales = FORMATS[weight.format], weight.values.contiguous(), weight.scales.contiguous()
    else:
        assert weight.dtype is torch.bfloat16, weight.dtype
        number, values, scales = FORMATS["bfloat16"], weight.contiguous(), None
    panels = _zeros(library.msi_packed_bytes(number, num_outputs, depth))
    library.msi_pack(
        number, values.data_ptr(), None if scales is None else scales.data_ptr(), num_outputs, depth, panels.data_ptr()
    )
    return Packed(panels, number, num_outputs, depth)


def _zeros(num_bytes: int) -> Tensor:
    """uint8, in large pages where there are such: looking small ones up costs a tenth of reading one row's weights."""
    if num_bytes < 2 * LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    values = torch.frombuffer(memory, dtype=torch.uint8)
    skipped = -values.data_ptr() % LARGE_PAGE
    return values[skipped : skipped + num_bytes]


@functools.cache
def _has_bfloat16_rows(library: ctypes.CDLL) -> bool:
    return bool(library.msi_has_bfloat16_rows())


def row_dtype(library: ctypes.CDLL, rows: Tensor) -> torch.dtype:
    """In which rows meet matrices: bfloat16 where they are that, and the processor multiplies it."""
    return torch.bfloat16 if rows.dtype is torch.bfloat16 and _has_bfloat16_rows(library) else torch.float32


def linear(library: ctypes.CDLL, rows: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """[num_rows, num_outputs] of rows [num_rows, depth], in their dtype.

    Args:
        bias: float32 [num_outputs].
    """
    dtype = row_dtype(library, rows)
    given = rows.to(dtype)
    if given.stride(1) != 1:
        given = given.contiguous()
    num_rows = given.shape[0]
    assert given.shape[1] == weight.depth, (given.shape, weight.depth)
    outputs = torch.empty(num_rows, weight.num_outputs, dtype=dtype)
    library.msi_linear(
        weight.format, dtype is torch.bfloat16, num_rows, given.data_ptr(), given.stride(0), weight.depth,
        weight.panels.data_ptr(), weight.num_outputs, None if bias is None else bias.data_ptr(), outputs.data_ptr(),
    )  # fmt: skip
    return outputs.to(rows.dtype)


@dataclass(frozen=True, slots=True)
class NativeLinear:
    """A product with a matrix [num_outputs, depth] of rows of any dtype, which the results are of.

    Attributes:
        packed: may have rows below those.
        bias: float32, of as many.
    """

    library: ctypes.CDLL
    packed: Packed
    bias: Tensor | None
    num_outputs: int

    def __call__(self, rows: Tensor) -> Tensor:
        outputs = linear(self.library, rows, self.packed, self.bias)
        return outputs if self.packed.num_outputs == self.num_outputs else outputs[:, : self.num_outputs]


def _load() -> ctypes.CDLL:
    ctypes.CDLL(str(_openmp_of_torch()), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(_compiled()))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _check(library: ctypes.CDLL) -> None:
    weight = torch.arange(-64.0, 64.0).reshape(WIDTH, -1)
    rows = torch.arange(24.0).reshape(3, -1)
    with torch.inference_mode():
        packed = pack(library, weight.to(torch.bfloat16))
        if not torch.equal(linear(library, rows, packed), rows @ weight.T):  # whole numbers: nothing is rounded
            raise Unusable("the compiled products are wrong")


def _openmp_of_torch() -> Path:
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.partition("/")[2])
        if path.name.startswith(("libgomp", "libiomp5")):
            return Path("/") / path
    raise Unusable("torch has no OpenMP whose threads could be used")


def _compiled() -> Path:
    source = [path.read_bytes() for path in (*SOURCES, *HEADERS)]
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")][:1]
    digest = hashlib.sha256(repr((source, FLAGS, processor)).encode()).hexdigest()[:24]
    folder = _own_folder()
    made = folder / f"products-{digest}.so"
    if not made.exists():
        if shutil.which(COMPILER) is None:
            raise Unusable(f"there is no {COMPILER}")
        making: Future[None] = Future()
        threading.Thread(target=_make, args=(made, making), name="compiler", daemon=True).start()
        if not wait([making], COMPILES_WITHIN_S).done:
            making.add_done_callback(_say_late)
            raise TakesLonger(
                f"compiling for this processor takes longer than {COMPILES_WITHIN_S:g} s, as where other work has the "
                "cores; so this process computes with torch's products alone, to its end: a token takes up to about "
                "twice the time, and bfloat16 weights twice the memory where they are not computed in. The compiler is "
                "at work still: once the log says that it is through, start again"
            )
        making.result()
    return made


def _own_folder() -> Path:
    """Where nobody else can put a library."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msi"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unusable(f"{folder} can be written by others")
    return folder


def _make(made: Path, making: Future[None]) -> None:
    """Once for all who want it, whether or not anybody waits any more."""
    try:
        with (made.parent / "products.lock").open("w") as alone:
            fcntl.flock(alone, fcntl.LOCK_EX)
            if not made.exists():
                _compile(made)
    except Exception as error:
        making.set_exception(error)
    else:
        making.set_result(None)


def _say_late(making: Future[None]) -> None:
    error = making.exception()
    if error is None:
        log.warning("the compiler is through: from the next start on the CPU computes with what it made")
    else:
        log.warning("the compiler failed, so the next start waits for it again: %s", error)


def _compile(made: Path) -> None:
    """Beside its place, and then moved there: who does not wait sees all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        linked, objects = Path(folder) / made.name, [Path(folder) / f"{source.stem}.o" for source in SOURCES]
        commands = [
            [*FLAGS, "-c", str(source), "-o", str(compiled)] for source, compiled in zip(SOURCES, objects, strict=True)
        ]
        for command in (*commands, ["-shared", *map(str, objects), "-o", str(linked)]):
            done = subprocess.run([COMPILER, *command], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
            if done.returncode:
                raise Unusable(f"{COMPILER} said {done.stderr.strip()[:300]!r}")
        os.replace(linked, made)
