"""Others with random weights of the same shapes, where they are installed: transformers' `generate` of a static batch
and its continuous batching, and vLLM's engine.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tools.bench_decode import Transformers
from tools.gpu.batches import WARM_TOKENS, prompts_of, sizes
from tools.gpu.report import Add, Row
from tools.gpu.runner import NotHere, Place
from tools.gpu.shapes import Shape


def generate(shape: Shape, small: Shape, place: Place, add: Add) -> None:
    """As `tools/bench_decode.py` compares with: eager, its default attention and cache."""
    shape = small if place.is_dry else shape
    batches, input_len, output_len = sizes(place)
    model, how = _model(shape, place)
    peer = Transformers(model)
    for batch in batches:
        prompts = prompts_of(shape, batch, input_len)
        peer.run(prompts, WARM_TOKENS)
        found = peer.run(prompts, output_len)
        name = f"{shape.label}, transformers' generate, {batch} sequences: decoding"
        note = f"{found['tpot_s'] * 1e3:.2f} ms a pass; {how}"
        add(Row(name, found["decode_tokens_per_s"], "tokens/s", note=note))


def generate_batch(shape: Shape, small: Shape, place: Place, add: Add) -> None:
    """Counted while all sequences of a batch decode, as for ours."""
    shape = small if place.is_dry else shape
    batches, input_len, output_len = sizes(place)
    model, how = _model(shape, place)
    import transformers

    options = transformers.GenerationConfig(max_new_tokens=output_len, do_sample=False, eos_token_id=-1, pad_token_id=0)
    more: dict[str, Any] = {}
    if place.is_dry:  # else its cache fills a CPU's memory, for a minute
        more["continuous_batching_config"] = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    for batch in batches:
        prompts = [list(prompt) for prompt in prompts_of(shape, batch, input_len)]
        answers = model.generate_batch(
            prompts, generation_config=options, record_timestamps=True, progress_bar=False, **more
        ).values()
        seen = [list(answer.timestamps or ()) for answer in answers]
        if len(seen) < batch or not all(seen):
            raise NotHere("continuous batching of this transformers tells no times")
        begin, end = max(times[0] for times in seen), min(times[-1] for times in seen)
        counted = sum(begin < at <= end for times in seen for at in times)
        name = f"{shape.label}, transformers' continuous batching, {batch} sequences: decoding"
        if counted and end > begin:
            add(Row(name, counted / (end - begin), "tokens/s", note=how))
        else:
            add(Row(name, "the batch never decoded as a whole", note=how))


def vllm(shape: Shape, small: Shape, place: Place, add: Add) -> None:
    """As it comes: its own graphs and kernels. What longer answers of a batch take beyond short ones."""
    shape = small if place.is_dry else shape
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # what it starts would outlive this section's time
    try:
        engine: Any = importlib.import_module("vllm")
    except ImportError as error:
        raise NotHere("vLLM is not installed") from error
    batches, input_len, output_len = sizes(place)
    with tempfile.TemporaryDirectory(prefix="msi-gpu-") as folder:
        llm = engine.LLM(
            model=str(shape.save(Path(folder))), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            max_model_len=2 * (input_len + output_len), max_num_seqs=max(batches), enable_prefix_caching=False,
        )  # fmt: skip

        def took_s(prompts: list[tuple[int, ...]], num_tokens: int) -> float:
            params = engine.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
            started = time.perf_counter()
            answers = llm.generate([{"prompt_token_ids": list(one)} for one in prompts], params, use_tqdm=False)
            spent_s = time.perf_counter() - started
            assert all(len(answer.outputs[0].token_ids) == num_tokens for answer in answers), "answers that ended early"
            return spent_s

        for batch in batches:
            prompts = prompts_of(shape, batch, input_len)
            took_s(prompts, WARM_TOKENS)
            short_s, long_s = took_s(prompts, WARM_TOKENS), took_s(prompts, output_len)
            per_pass_s = (long_s - short_s) / (output_len - WARM_TOKENS)
            name = f"{shape.label}, vLLM, {batch} sequences: decoding"
            note = f"{per_pass_s * 1e3:.2f} ms a pass; {engine.__version__}"
            add(Row(name, batch / per_pass_s, "tokens/s", note=note))


def _model(shape: Shape, place: Place) -> tuple[Any, str]:
    """With random weights that are made on the device, and what is said of it in notes."""
    try:
        import transformers
    except ImportError as error:
        raise NotHere("transformers is not installed") from error
    with tempfile.TemporaryDirectory(prefix="msi-gpu-") as folder:
        config: Any = transformers.AutoConfig.from_pretrained(shape.save(Path(folder)))
    config.eos_token_id = None
    with torch.device(place.device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model, f"{transformers.__version__}, experts: {getattr(config, '_experts_implementation', None)}"
