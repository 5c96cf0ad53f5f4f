"""How config.json says that a checkpoint's matrices are quantised, and which of it is served: float8 with scales, and
experts in MXFP4, which are unpacked.

What each scale is of, its shape says (`msi.models.tensor_index`). Activations are never rounded to float8 here, so
scales of theirs are not read, and a remark says so.
"""

from __future__ import annotations

from msi.errors import ConfigError, shown
from msi.kernels import SCALE_BLOCK
from msi.models.config import ConfigReader
from msi.precision import FP8, NONE

KEYS = ("quantization_config", "compression_config")
SERVED = (
    "of quantised checkpoints those in fp8 are supported (quant_method 'fp8', or 'compressed-tensors' in the format "
    "'float-quantized'), and gpt-oss in mxfp4; give such a one, or one in bfloat16, float16 or float32"
)
MXFP4 = "mxfp4"
STRATEGIES = ("tensor", "channel", "block")  # of scales, in the words of compressed-tensors


def read_quantization(reader: ConfigReader) -> tuple[str, tuple[str, ...]]:
    """What matrices are stored as, "none", "fp8" or (experts alone) "mxfp4", and remarks about what is not done.

    Raises:
        ConfigError: another method, or what would change the result and is not done.
    """
    key = next((key for key in KEYS if reader.values.get(key) is not None), None)
    if key is None:
        return NONE, ()
    value = reader.values[key]
    method = value.get("quant_method") if isinstance(value, dict) else None
    if method == MXFP4:
        said = "experts in mxfp4 are unpacked to `dtype` as they are loaded, and take the room of that"
        return MXFP4, (f"{reader.source}: {said}",)
    if method not in ("fp8", "compressed-tensors"):
        raise ConfigError(f"{reader.source}: {key} is set{f' ({shown(method)})' if method else ''}; {SERVED}")
    section = reader.section(key)
    rounds = _read_fp8(section) if method == "fp8" else _read_compressed(section)
    remarks = []
    if rounds:
        remarks.append(
            f"{section.source} has activations rounded to fp8 ({rounds}), which is not done: they stay in `dtype`"
        )
    if section.values.get("kv_cache_scheme") is not None:
        remarks.append(f"{section.source}: kv_cache_scheme is set; scales of the KV cache are not read")
    return FP8, tuple(remarks)


def _read_fp8(section: ConfigReader) -> str:
    """DeepSeek's, by blocks, and vLLM's, by tensors or rows. Returns what it says of activations."""
    section.require("fmt", None, "e4m3", "float8_e4m3fn")
    section.require("weight_block_size", None, [SCALE_BLOCK, SCALE_BLOCK])
    section.require("activation_scheme", None, "dynamic", "static")
    section.require("scale_fmt", None, "float", "ue8m0")
    section.require("expert_dtype", None, "fp8")
    section.require("is_checkpoint_fp8_serialized", None, True)
    return f"activation_scheme {section.values.get('activation_scheme') or 'dynamic'}"


def _read_compressed(section: ConfigReader) -> str:
    """Returns what it says of activations, "" where nothing."""
    section.require("format", "float-quantized")
    section.require("quantization_status", "compressed")
    section.require("sparsity_config", None, {})
    section.require("transform_config", None, {})
    groups = section.section("config_groups")
    if not groups.values:
        raise ConfigError(f"{section.source} has no config_groups; they must say how weights are quantised")
    rounds = ""
    for name in groups.values:
        group = groups.section(name)
        group.require("format", None, "float-quantized")
        group.require("output_activations", None)
        weights = group.section("weights")
        if not weights.values:
            raise ConfigError(f"{group.source} says nothing of weights; such groups are not supported")
        weights.require("num_bits", 8)
        weights.require("type", "float")
        weights.require("strategy", *STRATEGIES)
        weights.require("block_structure", None, [SCALE_BLOCK, SCALE_BLOCK])
        weights.require("symmetric", True)
        weights.require("dynamic", False)
        activations = group.section("input_activations").values
        if activations:
            rounds = f"input_activations {'dynamic' if activations.get('dynamic') else 'static'}"
    return rounds
