"""transformers with random weights of the same shapes: `generate` of a static batch, and its continuous batching."""

from __future__ import annotations

import tempfile
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
