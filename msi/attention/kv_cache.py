"""The paged KV cache of an attention worker: its shape, its memory, and what is written to it.

A layer's is [num_blocks, 2, BLOCK_TOKENS, num_kv_heads, head_dim], a block's keys before its values. Block 0 belongs to
no sequence: it pads block tables, and stays zero. In eight bits, keys and values are as `msi.kernels.fp8` has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msi.device.device import Device
from msi.errors import ConfigError
from msi.kernels import BLOCK_TOKENS, fp8
from msi.models.config import ModelConfig


class KvCache:
    """Starts as zeros, on memory that costs nothing until it is written where the device has such.

    Attributes:
        dtype: of keys and values.
        layers: views of the layers.

    Raises:
        ConfigError: there is no such memory.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, device: Device, dtype: torch.dtype) -> None:
        shape = (config.num_layers, num_blocks, 2, BLOCK_TOKENS, config.num_kv_heads, config.head_dim)
        try:
            memory = device.zeros(shape, torch.uint8 if dtype is fp8.E4M3 else dtype)
        except (OSError, OverflowError, MemoryError, RuntimeError) as error:
            raise ConfigError(
                f"there is no memory for {num_blocks} KV blocks ({error}); give a smaller "
                "`num_gpu_blocks_override` or `gpu_memory_utilization`"
            ) from error
        self.dtype = dtype
        self.layers: tuple[Tensor, ...] = tuple(memory.view(dtype).unbind(0))
        self._memory = memory  # of eight bits as bytes, which more operators take

    @staticmethod
    def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Of one block in all layers."""
        return config.kv_values_per_token * BLOCK_TOKENS * dtype.itemsize

    def clear(self, blocks: Tensor) -> None:
        """Zeroes these blocks [n] in all layers: what lies in the rest of a block may be a NaN of whoever had it
        before, which no mask of attention hides.
        """
        if len(blocks):
            self._memory.index_fill_(1, blocks.to(torch.int64), 0)

    def as_bytes(self) -> BlockBytes:
        """Its blocks for another worker's cache. Of memory that the host reaches."""
        return BlockBytes(self._memory)

    def fill(self, value: float) -> None:
        """All of it but the padding, as if sequences had been there before."""
        for layer in self.layers:
            layer[1:].fill_(value)


class BlockBytes:
    """Blocks as bytes, all layers of one after another. Implements `msi.worker.host.BlockMemory`.

    Args:
        memory: [num_layers, num_blocks, 2, BLOCK_TOKENS, num_kv_heads, head_dim], on the host.
    """

    def __init__(self, memory: Tensor) -> None:
        self._blocks = memory.view(torch.uint8).flatten(2)  # [num_layers, num_blocks, bytes of a layer's]
        num_layers, _, layer_bytes = self._blocks.shape
        self.block_bytes = num_layers * layer_bytes
        self.shape = f"{memory.dtype} {num_layers} {list(memory.shape[2:])}"

    def read(self, block: int, into: memoryview) -> None:
        """Copies a block that nothing is written to any more."""
        self._as_block(into).copy_(self._blocks[:, block])

    def write(self, block: int, content: memoryview) -> None:
        """Into a block that no sequence has."""
        self._blocks[:, block].copy_(self._as_block(content))

    def _as_block(self, content: memoryview) -> Tensor:
        return torch.frombuffer(content, dtype=torch.uint8).view(len(self._blocks), -1)
