#!/usr/bin/env python3
"""Decode attention of sequences with a common prefix on one thread of this CPU: what reading it once could bring.

    tools/bench_shared_prefix.py [--sequences 32] [--context 1024] [--heads 16] [--kv-heads 4] [--head-dim 64]

Three calls in turns: each sequence with blocks of its own; all with the same blocks, of which each is read for every
sequence, as it is served; and half as many sequences with twice the query heads for a KV head: the same products, but
each key and value is read half as often, which is what a kernel for two sequences at a time could reach at best. Times
are processor time of this thread; medians, and the medians of the ratios of a turn. Without a common prefix the caches
are those of eight layers that take turns.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from msi.kernels import BLOCK_TOKENS
from msi.kernels.native.compiled import native_library
from msi.kernels.native.rows import DecodePlan, decode
from msi_launch.command_line import ScriptLine, integer, one_of

NUM_LAYERS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = ScriptLine(__doc__)
    parser.add_argument("--sequences", type=integer(2, 4096), default=32, metavar="N")
    parser.add_argument("--context", type=integer(1, 100_000), default=1024, metavar="N")
    parser.add_argument("--heads", type=integer(1, 1024), default=16, metavar="N")
    parser.add_argument("--kv-heads", type=integer(1, 1024), default=4, metavar="N")
    parser.add_argument("--head-dim", type=integer(1, 1024), default=64, metavar="N")
    parser.add_argument("--dtype", type=one_of(*DTYPES), default="float32", metavar="D")
    parser.add_argument("--turns", type=integer(1, 10_000), default=24, metavar="N")
    arguments = parser.parse_args()
    if native_library() is None:
        raise SystemExit("the kernels cannot be compiled here")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype, num_seqs, heads = DTYPES[arguments.dtype], arguments.sequences, arguments.heads
    width = -(-arguments.context // BLOCK_TOKENS)
    shape = (1 + num_seqs * width, 2, BLOCK_TOKENS, arguments.kv_heads, arguments.head_dim)
    caches = [torch.randn(shape).to(dtype) for _ in range(NUM_LAYERS)]
    own = 1 + torch.arange(num_seqs * width, dtype=torch.int32).view(num_seqs, width)
    same = own[:1].expand(num_seqs, width).contiguous()
    calls = {
        "own": (own, heads), "same": (same, heads), "same, read half as often": (same[: num_seqs // 2], 2 * heads),
    }  # fmt: skip
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, arguments.turns):
        for name, (tables, num_heads) in calls.items():
            contexts = torch.full((len(tables),), arguments.context, dtype=torch.int32)
            plan = DecodePlan(torch.empty(0, 2, dtype=torch.int64), tables, contexts, 0)
            query = torch.randn(len(tables), num_heads, arguments.head_dim).to(dtype)
            started = time.thread_time()
            decode(query, caches[turn % NUM_LAYERS], plan)
            if turn >= 0:
                took[name].append(time.thread_time() - started)
    ratios = {
        f"own over {name}": median(a / b for a, b in zip(took["own"], times, strict=True))
        for name, times in took.items() if name != "own"
    }  # fmt: skip
    ratios["same over read half as often"] = median(
        a / b for a, b in zip(took["same"], took["same, read half as often"], strict=True)
    )
    print(json.dumps({"ms": {name: round(1000 * median(times), 3) for name, times in took.items()},
                      "ratios": {name: round(one, 3) for name, one in ratios.items()}}))  # fmt: skip


if __name__ == "__main__":
    main()
