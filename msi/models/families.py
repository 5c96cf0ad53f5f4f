"""The supported model families, and reading a model directory's configuration with the right one.

To add a family, write a module with its `Family` and list it here. What a family needs and no other had so far
becomes a field of ModelConfig, and a function of `msi.kernels` that it selects.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from msi.errors import ConfigError, shown
from msi.kernels import MXFP4_GROUP as GROUP
from msi.models.config import ConfigReader, ModelConfig, check_config
from msi.models.dbrx import DBRX
from msi.models.family import Family, InterleavedExpertNames
from msi.models.files import read_json
from msi.models.glm4_moe import GLM4_MOE
from msi.models.gpt_oss import GPT_OSS
from msi.models.mixtral import MIXTRAL
from msi.models.olmoe import OLMOE
from msi.models.quantisation import MXFP4, read_quantization
from msi.models.qwen_moe import QWEN2_MOE, QWEN3_MOE
from msi.models.tensor_index import WEIGHTS, adapter_sentence, gguf_sentence, names_in, original_sentence
from msi.models.texts import tokenizers_end

FAMILIES = {family.architecture: family for family in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, DBRX, GLM4_MOE, GPT_OSS)}


def family_of(config: ModelConfig) -> Family:
    return FAMILIES[config.architecture]


def parse_config(values: dict[str, Any], source: str) -> ModelConfig:
    """Raises ConfigError: an architecture or a setting that is not supported; names it, and what is supported."""
    reader = ConfigReader(values, source)
    family = _family_in(reader)
    stored_as, remarks = read_quantization(reader)
    reader.require("transformers_weights", None, WEIGHTS)  # another file instead
    config = family.parse(reader)
    config = replace(config, remarks=config.remarks + remarks)
    if stored_as == MXFP4:
        _check_mxfp4(family, config, source)
        is_silent = values.get("dtype") is None and values.get("torch_dtype") is None
        config = replace(config, has_mxfp4_experts=True, dtype="bfloat16" if is_silent else config.dtype)
    else:
        config = replace(config, stored_as=stored_as)
    check_config(config, source)
    return config


def _check_mxfp4(family: Family, config: ModelConfig, source: str) -> None:
    if not isinstance(family.names.experts, InterleavedExpertNames):
        raise ConfigError(
            f"{source}: quant_method is 'mxfp4', which is supported for GptOssForCausalLM alone; give "
            f"{family.architecture} in bfloat16, float16, float32 or fp8"
        )
    for key in ("hidden_size", "intermediate_size"):
        if (size := getattr(config, key)) % GROUP:
            raise ConfigError(f"{source}: {key} is {size}; of experts in mxfp4 it must be a multiple of {GROUP}")


def _family_in(reader: ConfigReader) -> Family:
    """Named by its architecture, or as transformers does it, by its model_type."""
    supported = f"supported: {', '.join(FAMILIES)}"
    architectures, model_type = reader.texts("architectures"), reader.values.get("model_type")
    named = [FAMILIES[name] for name in architectures if name in FAMILIES]
    if not architectures:
        named = [family for family in FAMILIES.values() if family.model_type == model_type]
        if not named:
            raise ConfigError(f"{reader.source} names no architecture; {supported}")
    if not named:
        raise ConfigError(f"{reader.source}: architecture {shown(architectures[0])} is not supported; {supported}")
    if model_type is not None and model_type != named[0].model_type:
        raise ConfigError(
            f"{reader.source}: model_type is {shown(model_type)}, but {named[0].architecture} is "
            f"{named[0].model_type!r}; correct the one that is wrong"
        )
    return named[0]


def load_config(model_dir: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a directory, and its config.json as parsed.

    End-of-sequence tokens are generation_config.json's where it names some, as in transformers, and the tokenizer's.

    Raises:
        ConfigError: no such directory, no config.json, or a config that is not supported.
    """
    path, generation_path = model_dir / "config.json", model_dir / "generation_config.json"
    if not os.path.lexists(path):
        raise ConfigError(why_no_model(model_dir))
    if os.path.lexists(model_dir / "adapter_config.json"):  # transformers would load the model that it names
        raise ConfigError(adapter_sentence(model_dir / "adapter_config.json"))
    values = read_json(path)
    config = parse_config(values, str(path))
    if os.path.lexists(generation_path):
        reader = ConfigReader(read_json(generation_path), str(generation_path))
        ends, remarks = reader.token_ids("eos_token_id", config.vocab_size)
        config = replace(config, eos_token_ids=ends or config.eos_token_ids, remarks=config.remarks + remarks)
    end = tokenizers_end(model_dir)
    if end is not None and end < config.vocab_size and end not in config.eos_token_ids:
        config = replace(config, eos_token_ids=(*config.eos_token_ids, end))
    return config, values


def why_no_model(model_dir: Path) -> str:
    """What there is in place of a model's directory, and what to do about it."""
    wanted = "give a Hugging Face model directory with a config.json"
    if model_dir.suffix == ".gguf":
        return gguf_sentence(model_dir)
    if model_dir.is_symlink() and not model_dir.exists():
        return f"{model_dir} is a link to what does not exist; {wanted}"
    if not os.path.lexists(model_dir):
        is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+", str(model_dir)) is not None
        fetch = f"; if it is a repository of the Hugging Face hub: hf download {model_dir} --local-dir DIR, then DIR"
        return f"{model_dir} is not a directory; {wanted}{fetch if is_repository else ''}"
    if not os.path.isdir(model_dir):
        return f"{model_dir} is a file, not a directory; {wanted}"
    if not os.access(model_dir, os.R_OK | os.X_OK):
        return f"{model_dir} cannot be read: permission denied"
    for name in names_in(model_dir):
        if name.startswith("adapter_"):
            return adapter_sentence(model_dir / name)
        if name.endswith(".gguf"):
            return gguf_sentence(model_dir / name)
        if name == "params.json" or name.startswith("consolidated."):
            return original_sentence(model_dir / name)
    below = [
        path.parent for pattern in ("*/config.json", "snapshots/*/config.json") for path in model_dir.glob(pattern)
    ]
    return f"{model_dir} holds no config.json; {f'did you mean {min(below)}?' if below else wanted}"
