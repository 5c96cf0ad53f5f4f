"""A pass that nobody asked for, before the first: so that what passes need is compiled and loaded by then.

A device may load code where it is first launched, and may wait for all of its streams to do so: behind the closed gate
of a lane that would be for ever.
"""

from __future__ import annotations

import torch

from msi.attention.forward import Forward
from msi.attention.kv_cache import KvCache
from msi.attention.pass_inputs import PassInputs
from msi.device.device import Device
from msi.kernels import BLOCK_TOKENS
from msi.kernels.kernels import Outboxes
from msi.kernels.routing import PackedRows, RowDtypes, answer_row_bytes, hidden_rows, row_bytes
from msi.models.config import ModelConfig
from msi.types import MicroBatch, TokenSampling

CHUNK = 2 * BLOCK_TOKENS  # tokens of a prompt, beside a sequence that decodes
SAMPLING = (TokenSampling(0.0, 1.0, 0, 0, 0), TokenSampling(0.7, 0.9, 5, 0, 0))


def warm(
    forward: Forward, config: ModelConfig, kv_cache: KvCache, num_nodes: int, device: Device, row_dtypes: RowDtypes
) -> None:
    """Through all layers, to outboxes of its own; the KV blocks that it writes are zero again. Waits for the device.

    A cache of fewer than three blocks is left alone, and so is the device.
    """
    if len(kv_cache.layers[0]) < 3:
        return
    num_tokens = 1 + CHUNK
    batch = MicroBatch(
        token_ids=(0,) * num_tokens,
        positions=(0, *range(CHUNK)),
        query_lens=(1, CHUNK),
        context_lens=(1, CHUNK),
        block_tables=((1,), (1, 2)),
        logit_rows=(0, CHUNK),
        sampling=SAMPLING,
    )
    run_alone(forward, config, batch, num_nodes, device, row_dtypes)
    at = device.kernels.device
    kv_cache.clear(torch.tensor([1, 2], device=at))
    if at.type == "cuda":
        torch.cuda.current_stream(at).synchronize()


def run_alone(
    forward: Forward, config: ModelConfig, batch: MicroBatch, num_nodes: int, device: Device, row_dtypes: RowDtypes
) -> None:
    """A pass through all layers whose rows go to outboxes of its own, and whose answers are zeros."""
    at, num_tokens = device.kernels.device, batch.num_tokens
    hidden_size, k = config.hidden_size, config.top_k
    shape = (num_nodes, num_tokens, row_bytes(hidden_size, k, row_dtypes.sent))
    memory = torch.zeros(shape, dtype=torch.uint8, device=at)
    counts = torch.zeros(num_nodes, dtype=torch.int32, pin_memory=at.type == "cuda")
    outboxes = Outboxes([PackedRows.view(one, hidden_size, k, row_dtypes.sent) for one in memory], counts)
    shape = (num_nodes, num_tokens, answer_row_bytes(hidden_size, row_dtypes.answered))
    answers = hidden_rows(torch.zeros(shape, dtype=torch.uint8, device=at), hidden_size, row_dtypes.answered)
    with torch.inference_mode():
        state = forward.begin(batch, *PassInputs(device.upload).lay_out(batch))
        for turn in range(forward.num_turns):
            forward.route_and_pack(state, turn, answers, outboxes)
            if forward.has_shared:
                forward.shared_experts(state, turn)
        forward.sample(state, answers)
