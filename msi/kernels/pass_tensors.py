"""What the operations of a pass are told of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PassTensors:
    """Int32 tensors, views of one run of memory. Sequences lie behind one another.

    Attributes:
        token_ids: [num_tokens].
        positions: [num_tokens], of each token in its sequence.
        query_lens: [num_seqs], tokens of each sequence in this pass.
        context_lens: [num_seqs], tokens of each sequence in the KV cache once the pass is through.
        logit_rows: [num_logits], tokens whose next token is wanted.
        slot_mapping: [num_tokens], block * BLOCK_TOKENS + offset of each token's keys and values.
        sequence_of: [num_tokens], the sequence of each token.
        begun_blocks: [n], blocks that the pass begins and does not fill.
        block_tables: [num_seqs, max_blocks], of each sequence's context; 0 beyond its end.
    """

    token_ids: Tensor
    positions: Tensor
    query_lens: Tensor
    context_lens: Tensor
    logit_rows: Tensor
    slot_mapping: Tensor
    sequence_of: Tensor
    begun_blocks: Tensor
    block_tables: Tensor
