"""The supported model families, and reading a model directory's configuration with the right one.

To add a family, write a module with its `Family` and list it here. What a family needs and no other had so far
becomes a field of ModelConfig, and a function of `msi.kernels` that it selects.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from msi.errors import ConfigError
from msi.models.config import ConfigReader, ModelConfig, check_config
from msi.models.dbrx import DBRX
from msi.models.family import Family
from msi.models.files import read_json
from msi.models.mixtral import MIXTRAL
from msi.models.olmoe import OLMOE
from msi.models.qwen_moe import QWEN2_MOE, QWEN3_MOE

FAMILIES = {family.architecture: family for family in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, DBRX)}


def family_of(config: ModelConfig) -> Family:
    return FAMILIES[config.architecture]


def parse_config(values: dict[str, Any], source: str) -> ModelConfig:
    """Raises ConfigError: an architecture or a setting that is not supported; names it, and what is supported."""
    reader = ConfigReader(values, source)
    architectures = values.get("architectures") or []
    supported = ", ".join(FAMILIES)
    if not isinstance(architectures, list) or not architectures:
        raise ConfigError(f"{source} names no architecture; supported: {supported}")
    family = FAMILIES.get(str(architectures[0]))
    if family is None:
        raise ConfigError(f"{source}: architecture {architectures[0]!r} is not supported; supported: {supported}")
    if values.get("quantization_config") is not None:
        raise ConfigError(f"{source}: quantization_config is set; quantised checkpoints are not supported")
    config = family.parse(reader)
    check_config(config, source)
    return config


def load_config(model_dir: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a directory, and its config.json as parsed.

    End-of-sequence tokens are generation_config.json's where it names some, as in transformers.

    Raises:
        ConfigError: no such directory, no config.json, or a config that is not supported.
    """
    if not model_dir.is_dir():
        raise ConfigError(f"{model_dir} is not a directory; give a Hugging Face model directory with a config.json")
    path = model_dir / "config.json"
    if not path.exists():
        raise ConfigError(f"{model_dir} holds no config.json; give a Hugging Face model directory")
    values = read_json(path)
    config = parse_config(values, str(path))
    generation_path = model_dir / "generation_config.json"
    if generation_path.exists():
        ids = ConfigReader(read_json(generation_path), str(generation_path)).integers("eos_token_id")
        config = replace(config, eos_token_ids=ids or config.eos_token_ids)
    return config, values
