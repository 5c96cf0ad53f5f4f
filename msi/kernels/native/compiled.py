"""Compiling `products.cpp` for this processor, once, and loading it; None where that cannot be.

The file that is made is kept in the user's cache, under a name that changes with the source and the processor. It runs
on the threads that torch has: two pools of them would fight for the cores.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("products.cpp")
COMPILER = "g++"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-w")
COMPILES_WITHIN_S = 120.0
WIDTH = 16  # of a panel: a matrix has a multiple of it of rows

_P, _N = ctypes.c_void_p, ctypes.c_int64
SIGNATURES = {
    "msi_pack": (None, (_P, _N, _N, _P)),
    "msi_linear": (None, (_N, _P, _N, _P, _N, _P)),
    "msi_experts": (_N, (*[_N] * 5, _P, _N, _P, _N, _P, _N, *[_P] * 5)),
}


class Unusable(Exception):
    """Why there is no library."""


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The functions of `products.cpp`; slow the first time on a machine. None is said once, with the reason."""
    try:
        library = _load()
        _check(library)
        return library
    except (Unusable, OSError, subprocess.SubprocessError, AttributeError) as error:
        log.info("bfloat16 weights are held as float32: %s", error)
        return None


def pack(library: ctypes.CDLL, weight: Tensor) -> Tensor:
    """bfloat16 [n, depth] as panels, of as many bytes; n is a multiple of `WIDTH`."""
    weight = weight.contiguous()
    assert weight.dtype is torch.bfloat16 and weight.shape[0] % WIDTH == 0, (weight.dtype, weight.shape)  # noqa: PT018
    panels = torch.empty_like(weight)
    library.msi_pack(weight.data_ptr(), *weight.shape, panels.data_ptr())
    return panels


def linear(library: ctypes.CDLL, rows: Tensor, panels: Tensor) -> Tensor:
    """float32 [num_rows, n] of rows [num_rows, depth] and the panels of [n, depth]."""
    rows = rows.to(torch.float32).contiguous()
    num_outputs, depth = panels.shape
    assert rows.shape[-1] == depth, (rows.shape, panels.shape)
    outputs = torch.empty(rows.shape[0], num_outputs, dtype=torch.float32)
    library.msi_linear(rows.shape[0], rows.data_ptr(), depth, panels.data_ptr(), num_outputs, outputs.data_ptr())
    return outputs


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
        panels = pack(library, weight.to(torch.bfloat16))
        if not torch.equal(linear(library, rows, panels), rows @ weight.T):  # whole numbers: nothing is rounded
            raise Unusable("the compiled products are wrong")


def _openmp_of_torch() -> Path:
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.partition("/")[2])
        if path.name.startswith(("libgomp", "libiomp5")):
            return Path("/") / path
    raise Unusable("torch has no OpenMP whose threads could be used")


def _compiled() -> Path:
    source = SOURCE.read_bytes()
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")][:1]
    digest = hashlib.sha256(repr((source, FLAGS, processor)).encode()).hexdigest()[:24]
    made = _own_folder() / f"products-{digest}.so"
    if not made.exists():
        _compile(made)
    return made


def _own_folder() -> Path:
    """Where nobody else can put a library."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msi"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unusable(f"{folder} can be written by others")
    return folder


def _compile(made: Path) -> None:
    """Beside its place, and then moved there: several processes may do this at once."""
    if shutil.which(COMPILER) is None:
        raise Unusable(f"there is no {COMPILER}")
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        compiled, linked = Path(folder) / "products.o", Path(folder) / made.name
        for command in (
            [*FLAGS, "-c", str(SOURCE), "-o", str(compiled)],
            ["-shared", str(compiled), "-o", str(linked)],
        ):
            done = subprocess.run([COMPILER, *command], capture_output=True, text=True, timeout=COMPILES_WITHIN_S)
            if done.returncode:
                raise Unusable(f"{COMPILER} said {done.stderr.strip()[:300]!r}")
        os.replace(linked, made)
