"""Laying out what the host knows of a pass: once, by numpy, into one buffer that is used again and uploaded whole."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from msi.kernels import BLOCK_TOKENS
from msi.kernels.pass_tensors import PassTensors
from msi.types import MicroBatch


class PassInputs:
    """The buffer of one lane: what was laid out last is valid until the next pass of the lane.

    Args:
        upload: the tensor in the device's memory.
    """

    def __init__(self, upload: Callable[[Tensor], Tensor]) -> None:
        self._upload = upload
        self._buffer = np.empty(1024, np.int32)
        self._block = torch.from_numpy(self._buffer)

    def lay_out(self, batch: MicroBatch, num_blocks: int = 0) -> tuple[PassTensors, PassTensors]:
        """The device's, and the same in host memory; block tables are at least so wide."""
        tables = batch.block_tables
        fields = (batch.token_ids, batch.positions, batch.query_lens, batch.context_lens, batch.logit_rows)
        given = np.frombuffer(array("i", chain(*fields)), np.int32)
        num_tokens, num_seqs = len(batch.token_ids), len(tables)
        positions, rest = given[num_tokens : 2 * num_tokens], given[2 * num_tokens :]
        query_lens, context_lens = rest[:num_seqs], rest[num_seqs : 2 * num_seqs]
        block_tables = _padded(tables, -(-context_lens // BLOCK_TOKENS))
        if num_blocks > block_tables.shape[1]:
            block_tables = np.pad(block_tables, ((0, 0), (0, num_blocks - block_tables.shape[1])))
        sequence_of = np.arange(num_seqs, dtype=np.int32)
        if num_tokens > num_seqs:
            sequence_of = sequence_of.repeat(query_lens)
        slot_mapping = block_tables[sequence_of, positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
        filled = context_lens % BLOCK_TOKENS
        begun = ((filled > 0) & (filled <= query_lens)).nonzero()[0]
        begun_blocks = block_tables[begun, context_lens[begun] // BLOCK_TOKENS]

        derived = (slot_mapping, sequence_of, begun_blocks, block_tables.ravel())
        sizes = [*map(len, fields), *map(len, derived)]
        self._fit(sum(sizes))
        np.concatenate((given, *derived), out=self._buffer[: sum(sizes)])
        block = self._block[: sum(sizes)]
        on_device = self._upload(block)
        host = _views(block, sizes, block_tables.shape)
        return host if on_device is block else _views(on_device, sizes, block_tables.shape), host

    def _fit(self, size: int) -> None:
        if size > len(self._buffer):
            self._buffer = np.empty(2 * size, np.int32)
            self._block = torch.from_numpy(self._buffer)


def _views(block: Tensor, sizes: list[int], table_shape: tuple[int, ...]) -> PassTensors:
    views = [*torch.split(block, sizes)]
    views[-1] = views[-1].view(table_shape)
    return PassTensors(*views)


def _padded(tables: Sequence[Sequence[int]], num_used: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """[num_seqs, the most blocks used] of the blocks that each sequence uses, and 0 beyond."""
    lens = [*map(len, tables)]
    flat = np.frombuffer(array("i", chain(*tables)), np.int32)
    width = max(lens)
    columns = np.arange(width)
    if len(flat) == len(tables) * width:
        padded = flat.reshape(-1, width)
    else:
        padded = np.zeros((len(tables), width), np.int32)
        padded[columns < np.array(lens)[:, None]] = flat
    return np.where(columns < num_used[:, None], padded, 0)[:, : num_used.max()]
