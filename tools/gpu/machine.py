"""What the machine says of itself: versions, and those attributes of the GPU that the engine's design rests on."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import torch

from tools.gpu.report import Add, Row
from tools.gpu.runner import NotHere, Place

ATTRIBUTES = {
    "CAN_USE_64_BIT_STREAM_MEM_OPS": "streams wait for words in memory, and write them",
    "CAN_FLUSH_REMOTE_WRITES": "a stream can flush what cards wrote into device memory",
    "GPU_DIRECT_RDMA_SUPPORTED": "",
    "GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS": "1: by the host, 2: by a stream",
    "GPU_DIRECT_RDMA_WRITES_ORDERING": "100: writes of cards are in order for the owner, 200: for all devices",
    "GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED": "",
    "DMA_BUF_SUPPORTED": "cards can register device memory without a kernel module",
    "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED": "device memory goes to other processes as a descriptor",
    "MULTIPROCESSOR_COUNT": "",
    "L2_CACHE_SIZE": "bytes",
}
PACKAGES = ("triton", "cuda-bindings", "transformers")


def run(place: Place, add: Add) -> None:
    add(Row("torch", torch.__version__))
    for package in PACKAGES:
        try:
            add(Row(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            add(Row(package, "not installed"))
    if place.is_dry:
        return
    add(Row("memory", round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1), "GiB"))
    try:
        driver: Any = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise NotHere("cuda-bindings is not installed") from error
    torch.zeros(1, device="cuda")  # makes a context
    for name, meaning in ATTRIBUTES.items():
        attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}", None)
        value = "unknown to these bindings" if attribute is None else int(driver.cuDeviceGetAttribute(attribute, 0)[1])
        add(Row(name, value, note=meaning))
