"""Which file of a model directory holds which tensor, of what shape and type: known from headers, before any is read.

Files are chosen as transformers chooses them: model.safetensors, else those that model.safetensors.index.json names.
Where transformers would guess (a tensor in two files, quantised weights without their scales, weights of a name that
it does not look for), this refuses. Nothing here needs torch, and nothing is ever unpickled.
"""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from msi.errors import CheckpointError, ConfigError, shown
from msi.kernels import NONE
from msi.kernels import SCALE_BLOCK as BLOCK
from msi.models.files import open_regular, parse_json, read_json

Shape = tuple[int, ...]

WEIGHTS = "model.safetensors"
WEIGHT_INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # of the format
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")  # what a weight may be stored as
# of GPTQ, AWQ, compressed-tensors, fp8 by blocks or tensors, bitsandbytes
QUANTISED_ENDINGS = (
    ".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv",
    ".weight_scale_2", ".weight_zero_point", ".input_scale", ".absmax", ".quant_map", ".SCB", "_scale_inv", "_scales",
)  # fmt: skip


FLOAT8 = "F8_E4M3"
SCALE_ENDINGS = (".weight_scale", ".weight_scale_inv", "_scale_inv", "_scale", ".input_scale")  # beside float8
SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0")
MXFP4_ENDINGS, MXFP4_DTYPES = ("_blocks", "_scales"), ("U8",)  # of experts' matrices


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor's place. `dtype` is safetensors' word."""

    file: Path
    dtype: str
    shape: Shape


class TensorIndex:
    """All tensors of a model directory, by name.

    Args:
        stored_as: what config.json says that matrices are stored as, "none" or "fp8": then they have scales.
        has_mxfp4: it says that experts are in MXFP4.

    Raises:
        CheckpointError: no weights that are served, or files that contradict their headers or each other.
    """

    def __init__(self, model_dir: Path, stored_as: str = NONE, has_mxfp4: bool = False) -> None:
        self.model_dir = model_dir
        self.stored_as = stored_as
        self._packed = MXFP4_ENDINGS if has_mxfp4 else ()
        self.tensors: dict[str, StoredTensor] = {}
        for path in chosen_files(model_dir):
            for name, stored in read_header(path):
                if name in self.tensors:
                    other = self.tensors[name].file
                    raise CheckpointError(f"{name} is in two files, {other} and {path.name}; remove the one not meant")
                self.tensors[name] = stored
        known = self._packed if stored_as == NONE else SCALE_ENDINGS
        for name in self.tensors:
            if name.endswith(QUANTISED_ENDINGS) and not name.endswith(known):
                raise CheckpointError(
                    f"{self.tensors[name].file} holds {shown(name)}: these weights are quantised, which is not "
                    f"supported; give the checkpoint in bfloat16, float16 or float32"
                )

    def has(self, name: str) -> bool:
        return name in self.tensors

    def first_of(self, *names: str) -> str:
        """The first of these names that exists, else the first of all: requiring it then says what is missing."""
        found = [name for name in names if name in self.tensors]
        if len(found) > 1:
            raise CheckpointError(f"{self.model_dir} holds both {found[0]} and {found[1]}; remove the one not meant")
        return found[0] if found else names[0]

    def require(self, name: str, shape: Shape) -> StoredTensor:
        """The tensor of this name, which is a weight of this shape. Raises CheckpointError; names it and its file."""
        stored = self.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{self.model_dir} has no tensor {name}; expected one of shape {list(shape)}")
        if stored.shape != shape:
            raise CheckpointError(f"{stored.file}: {name} is {list(stored.shape)}; expected {list(shape)}")
        allowed = MXFP4_DTYPES if name.endswith(self._packed) else WEIGHT_DTYPES
        if self.is_quantised(name):
            self.scales_of(name)
        elif stored.dtype not in allowed:
            raise CheckpointError(
                f"{stored.file}: {name} is stored as {stored.dtype}, which is not supported; "
                f"supported: {', '.join(allowed)}"
            )
        return stored

    def is_quantised(self, name: str) -> bool:
        """Whether a tensor that is there is float8 with scales."""
        return self.stored_as != NONE and self.tensors[name].dtype == FLOAT8

    def scales_of(self, name: str) -> tuple[str, StoredTensor]:
        """The scales of a quantised matrix, or of a stack of them, with their name: one, one for each row, or one for
        each block of 128 rows and columns. Raises CheckpointError: there are none, or of another shape.
        """
        scales_name = self.first_of(name + "_scale_inv", name + "_scale")
        stored, scales = self.tensors[name], self.tensors.get(scales_name)
        if scales is None:
            raise CheckpointError(f"{stored.file}: {name} is stored as {FLOAT8}, and there is no {scales_name}")
        *stack, num_rows, num_columns = stored.shape
        blocks = (-(-num_rows // BLOCK), -(-num_columns // BLOCK))
        each = [(), (1,), (1, 1), (num_rows,), (num_rows, 1), blocks]
        allowed = [(*stack, *shape) for shape in each] if stack else each
        if scales.shape not in allowed or scales.dtype not in SCALE_DTYPES:
            raise CheckpointError(
                f"{scales.file}: {scales_name} is {scales.dtype} {list(scales.shape)}; expected one number, one for "
                f"each of the {num_rows} rows of {name}, or {list(blocks)}: one for each {BLOCK} x {BLOCK}"
            )
        return scales_name, scales


# -- which files -----------------------------------------------------------------------------------------------------


def chosen_files(model_dir: Path) -> list[Path]:
    """The files that hold a model's weights. Raises CheckpointError: none that are served."""
    if os.path.lexists(model_dir / WEIGHTS):
        return [model_dir / WEIGHTS]
    index_path = model_dir / WEIGHT_INDEX
    if os.path.lexists(index_path):
        return [model_dir / file for file in _indexed_files(index_path)]
    raise CheckpointError(why_no_weights(model_dir))


def _indexed_files(index_path: Path) -> list[str]:
    """The shards, as transformers reads them: what the index says of single tensors does not matter."""
    weight_map = _checked(read_json, index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map, or an empty one; it must name the file of every tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index_path}: {shown(name)} is in {shown(file)}; it must be a safetensors file")
        if os.path.isabs(file) or ".." in Path(file).parts or "\0" in file:
            raise CheckpointError(f"{index_path}: {shown(name)} is in {shown(file)}, outside the model's directory")
    return sorted(set(weight_map.values()))


def why_no_weights(model_dir: Path) -> str:
    """What lies in a directory in place of weights, and what to do about it."""
    names = names_in(model_dir)

    def first(*patterns: str) -> str | None:
        return next((name for pattern in patterns for name in fnmatch.filter(names, pattern)), None)

    if name := first("adapter_model.*"):
        return adapter_sentence(model_dir / name)
    if name := first("model-*-of-*.safetensors"):
        return f"{model_dir} holds {name}, but no {WEIGHT_INDEX}; download that too: it says which files belong"
    if name := first("consolidated*.safetensors", "consolidated*.pth"):
        return original_sentence(model_dir / name)
    if name := first("*.safetensors.index.json"):
        return f"{model_dir / name} is not looked for, as in transformers; name it {WEIGHT_INDEX}"
    if name := first("*.safetensors"):
        return f"{model_dir / name} is not looked for, as in transformers; name it {WEIGHTS} if it is the whole model"
    if name := first("*.gguf"):
        return gguf_sentence(model_dir / name)
    if name := first("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"):
        return (
            f"{model_dir / name} is pickled, which may run anything when it is opened, so it never is; convert it "
            f"where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) writes safetensors"
        )
    return f"{model_dir} holds no safetensors weights; `load_format=dummy` invents some"


def names_in(model_dir: Path) -> list[str]:
    """What lies in a directory, sorted; nothing where it cannot be read."""
    try:
        return sorted(os.listdir(model_dir))
    except OSError:
        return []


def adapter_sentence(path: Path) -> str:
    return (
        f"{path} is an adapter to another model, which is not supported; merge it first: "
        f"PeftModel.from_pretrained(MODEL, DIR).merge_and_unload().save_pretrained(NEW_DIR)"
    )


def gguf_sentence(path: Path) -> str:
    return f"{path}: GGUF is not supported; give the directory of the safetensors checkpoint that it was made from"


def original_sentence(path: Path) -> str:
    return (
        f"{path} is in its maker's own format, which is not supported; give the checkpoint in Hugging Face format "
        f"(config.json and {WEIGHTS})"
    )


# -- headers ---------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a safetensors file, checked against its size and each other.

    Raises:
        CheckpointError: not such a file, or truncated, or its header lies; names the file, and the tensor if any.
    """
    fd = _checked(open_regular, path)
    with open(fd, "rb") as file:
        try:
            num_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if num_bytes < 8 or header_bytes > num_bytes - 8 or header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is truncated or not safetensors: {num_bytes} bytes, and a header of {header_bytes}"
                )
            header = file.read(header_bytes)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not header.startswith(b"{"):
        raise CheckpointError(f"{path} is not safetensors: its header is not a JSON object")
    entries = _checked(parse_json, header, f"{path}: its header")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not _is_text(metadata):
        raise CheckpointError(f"{path}: __metadata__ is {shown(metadata)}; it must hold texts only")
    places = sorted((_place(path, name, entry) for name, entry in entries.items()), key=lambda place: place[:2])
    _check_cover(path, places, num_bytes - 8 - header_bytes)
    return ((name, stored) for _, _, name, stored in places)


_Place = tuple[int, int, str, StoredTensor]  # from, to, name


def _place(path: Path, name: str, entry: Any) -> _Place:
    where = f"{path}: {shown(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is {shown(entry)} in the header; it must be an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where} has dtype {shown(dtype)}, which safetensors does not know")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where} has shape {shown(shape)}; it must be a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {shown(offsets)}; they must be where it begins and ends")
    start, end = offsets
    if math.prod(shape) * DTYPE_BITS[dtype] != 8 * (end - start):
        raise CheckpointError(f"{where} is {dtype} of shape {shown(shape)}, but takes {end - start} bytes")
    return start, end, name, StoredTensor(path, dtype, tuple(shape))


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _is_text(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _check_cover(path: Path, places: Iterable[_Place], num_bytes: int) -> None:
    """Tensors lie one after another from the first byte to the last."""
    at = 0
    for start, end, name, _ in places:
        if end > num_bytes:
            raise CheckpointError(f"{path} is truncated: {shown(name)} ends at byte {end} of {num_bytes}")
        if start != at:
            raise CheckpointError(f"{path}: {shown(name)} begins at byte {start}, but what precedes it ends at {at}")
        at = end
    if at != num_bytes:
        raise CheckpointError(f"{path} has {num_bytes - at} bytes after its last tensor; it is damaged")


def _checked(read: Any, *arguments: Any) -> Any:
    """What a reader of files gives; what it refuses is the checkpoint's fault."""
    try:
        return read(*arguments)
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
