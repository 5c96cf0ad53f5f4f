"""vLLM's engine as `tools/bench_decode.py --compare vllm` drives it: a JSON line of prompts in, a line of figures out.

PYTHON tools/clients/vllm_decode.py MODEL DTYPE MAX_NUM_SEQS
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    model, dtype, max_num_seqs = sys.argv[1:4]
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever it prints is no answer
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its steps are called from here
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, dtype=dtype, enforce_eager=True, skip_tokenizer_init=True, max_num_seqs=int(max_num_seqs),
        max_model_len=2048, enable_prefix_caching=False,
    )  # fmt: skip
    print("ready", file=answers, flush=True)
    number = 0
    for line in sys.stdin:
        asked = json.loads(line)
        params = SamplingParams(
            max_tokens=asked["output_len"], min_tokens=asked["output_len"], temperature=0, ignore_eos=True,
            detokenize=False,
        )  # fmt: skip
        started = time.monotonic()
        seen: dict[str, list[float]] = {}
        for prompt in asked["prompts"]:
            number += 1
            seen[str(number)] = []
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        while llm.llm_engine.has_unfinished_requests():
            outputs = llm.llm_engine.step()
            now = time.monotonic()
            for output in outputs:
                times = seen[output.request_id]
                times += [now] * (len(output.outputs[0].token_ids) - len(times))
        begin, end = max(times[0] for times in seen.values()), min(times[-1] for times in seen.values())
        counted = sum(1 for times in seen.values() for at in times if begin < at <= end)
        rate = counted / (end - begin)
        firsts = sorted(times[0] - started for times in seen.values())
        figures = {"decode_tokens_per_s": rate, "tpot_s": len(seen) / rate, "ttft_s": firsts[len(firsts) // 2]}
        print(json.dumps(figures), file=answers, flush=True)


if __name__ == "__main__":
    main()
