"""Opening the device that a worker was told to use."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from msi.device.cpu import CpuDevice
from msi.device.cuda import CudaDevice, why_unavailable
from msi.device.cuda_driver import CudaDriver, prepare, why_no_streams
from msi.device.cuda_rows import CudaRows
from msi.device.stream_device import StreamDevice
from msi.errors import ConfigError
from msi.kernels import triton
from msi.kernels.kernels import Kernels
from msi.kernels.native.compiled import native_library
from msi.kernels.plain import PlainKernels
from msi.net.regions import Allocator
from msi.precision import AUTO, FP8, NONE, Precision

log = logging.getLogger(__name__)

OpenedDevice = CpuDevice | CudaDevice | StreamDevice


def check_device(name: str) -> None:
    """Raises ConfigError where this machine has no such device."""
    if name != "cpu" and (reason := why_unavailable()) is not None:
        raise ConfigError(f"`device` {name} cannot work: {reason}; without one, use `device=cpu`")


def prepare_device(name: str) -> None:
    """Makes and loads what its kernels need, which takes seconds the first time on a machine; in any thread."""
    if name == "cpu":
        native_library()


def precision_on(device: OpenedDevice, asked: Precision, checkpoint: torch.dtype, stored_as: str = NONE) -> Precision:
    """What was asked for, with what it leaves open as the device computes a checkpoint of that dtype fastest.

    A CPU without units for bfloat16 computes in float32, and reads such weights as they are where it can. Who asks for
    float32 gets float32 weights. Matrices that a checkpoint has quantised are unpacked, unless it was asked otherwise,
    where the device has no kernels for them.

    Args:
        stored_as: as `ModelConfig` has it.

    Raises:
        ConfigError: this device has no kernels for it, or it cannot be made of what is stored.
    """
    asked = replace(asked, quantization=_quantization_on(device.kernels, asked.quantization, stored_as))
    in_eight_bits = [name for name, is_so in asked.in_eight_bits.items() if is_so]
    if in_eight_bits and not device.kernels.has_e4m3:
        raise ConfigError(
            f"`{in_eight_bits[0]}` fp8 needs a GPU that has instructions for it, of compute capability 8.9 or more; "
            "leave it at auto, or give cuda_kernels=plain"
        )
    compute = device.compute_dtype(checkpoint)
    is_widened = asked.is_open and checkpoint is torch.bfloat16 and compute is torch.float32
    if is_widened and asked.weights == AUTO and isinstance(device, CpuDevice) and device.kernels.can_widen:
        asked = replace(asked, weights="bfloat16")
    return asked.resolved(str(compute).removeprefix("torch."))


def _quantization_on(kernels: Kernels, asked: str, stored_as: str) -> str:
    held = stored_as if asked == AUTO else asked
    if held == NONE or (held in kernels.quantisations and stored_as in (NONE, held)):
        return held
    if asked == AUTO:
        log.warning("matrices in %s are unpacked as they are loaded: this device has no kernels for them", held)
        return NONE
    if held not in kernels.quantisations:
        needs = (
            "Triton's kernels on a GPU of compute capability 8.9 or later" if held == FP8 else "`device` cpu"
        )  # fmt: skip
        raise ConfigError(f"`quantization` {held} needs {needs}; use quantization=none on this device")
    raise ConfigError(
        f"`quantization` {held} is not made of matrices that are in {stored_as} already; leave it at auto, and they "
        "are held as they are, or use none, and they are unpacked"
    )


def products_of(device: OpenedDevice, precision: Precision) -> str:
    """Whose products a CPU takes: they round differently in bfloat16, and where quantised matrices meet it. In float32,
    with bfloat16 matrices that are widened or held as float32, both differ by less than what decides a token.
    """
    if not isinstance(device, CpuDevice) or precision.compute != "bfloat16":
        return ""
    return "torch's products" if native_library() is None else "compiled products"


def open_device(
    name: str,
    num_threads: int,
    poll_s: float = 0.0,
    cuda_queues: str = "streams",
    cuda_kernels: str = "auto",
    enforce_eager: bool = True,
) -> OpenedDevice:
    """The device of this process: "cpu", "cuda:N", or "cuda": that of torchrun's LOCAL_RANK, else the first.

    Args:
        num_threads: torch's threads on a CPU; 0 leaves it to torch.
        poll_s: how long a CPU's compute thread looks for something to do before it sleeps.
        cuda_queues: of a GPU: "threads"; or "streams" or "gates", in whose place threads are taken where it has no
            such.
        cuda_kernels: of a GPU: "triton", "flashinfer", "deepgemm", "plain", or "auto", as `gpu_kernels` has them.
        enforce_eager: of a GPU with streams: nothing is captured but the experts' waves.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "cpu":
        return CpuDevice(num_threads=num_threads or torch.get_num_threads(), poll_s=poll_s)
    _, _, index = name.partition(":")
    number = int(index or os.environ.get("LOCAL_RANK", "0"))
    kernels = gpu_kernels(cuda_kernels, has_gates=cuda_queues == "gates")
    if cuda_queues != "threads":
        check_device(name)
        prepare()
        if (reason := why_no_streams(number)) is None:
            driver = CudaDriver(number)
            return StreamDevice(driver, kernels(driver.device), cuda_queues == "gates", not enforce_eager)
        log.warning("CUDA device %d has a thread for each lane in place of streams: %s", number, reason)
    return CudaDevice(index=number, kernels=kernels)


def rows_memory(device: OpenedDevice, cuda_rows: str) -> Allocator:
    """Where rows that are computed on it land: "host", memory of the host that it sees in place, or "device".

    Raises:
        ConfigError: its own memory cannot be had, or not by others.
    """
    if cuda_rows == "host":
        return device
    if not isinstance(device, StreamDevice) or device.has_gates or not isinstance(device.driver, CudaDriver):
        raise ConfigError("`cuda_rows` device is for `device` cuda with `cuda_queues` streams; use `cuda_rows=host`")
    driver = device.driver
    rows = CudaRows(driver.own_memory(), device, driver.tensor_at)
    device.at_end(rows.close)
    return rows


def gpu_kernels(wanted: str, has_gates: bool = False) -> Callable[[torch.device], Kernels]:
    """Makes the kernels for a GPU. Raises ConfigError where there are none.

    Args:
        wanted: "triton", "flashinfer" for attention and Triton for all else, "deepgemm" for products with matrices in
            float8 and Triton for all else, "plain", or "auto": Triton where it can work, and each of the libraries
            where it is installed, and then measured to be faster.
        has_gates: streams wait behind gates, where nobody may take memory, as both libraries do.
    """
    if wanted == "plain":
        return PlainKernels
    if (reason := triton.why_unavailable()) is not None:
        if wanted == "auto":
            log.warning("the GPU computes with torch's own operators: %s", reason)
            return PlainKernels
        raise ConfigError(f"`cuda_kernels` {wanted} cannot work: {reason}; without it, use `cuda_kernels=plain`")
    from msi.kernels import deepgemm, flashinfer
    from msi.kernels.triton.kernels import TritonKernels

    is_measured = wanted == "auto"
    attends = _is_taken("flashinfer", "attention is", wanted, has_gates, flashinfer.why_unavailable)
    multiplies = _is_taken("deepgemm", "products in float8 are", wanted, has_gates, deepgemm.why_unavailable)
    if not multiplies:
        return partial(flashinfer.FlashinferKernels, is_measured=is_measured) if attends else TritonKernels

    def made(device: torch.device) -> Kernels:
        why_not = partial(deepgemm.why_not_on, device)
        is_here = _is_taken("deepgemm", "products in float8 are", wanted, has_gates, why_not)
        library = deepgemm.DeepGemm(device, is_measured) if is_here else None
        return (
            flashinfer.FlashinferKernels(device, is_measured, library=library)
            if attends
            else TritonKernels(device, library)
        )

    return made


def _is_taken(library: str, what: str, wanted: str, has_gates: bool, why_unavailable: Callable[[], str | None]) -> bool:
    """Whether somebody asked for a library, or for all, and nothing speaks against it. Raises ConfigError."""
    if wanted not in ("auto", library):
        return False
    reason = "with `cuda_queues` gates nobody may take memory, as it does" if has_gates else why_unavailable()
    if reason is not None and wanted == library:
        raise ConfigError(f"`cuda_kernels` {wanted} cannot work: {reason}; without it, use `cuda_kernels=triton`")
    if reason is not None:
        log.info("%s by Triton's kernels alone: %s", what, reason)
    return reason is None
