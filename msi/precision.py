"""In which number formats a model is held, sent and computed. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields

from msi.errors import ConfigError, shown
from msi.parameters import check_parameters, parameter

AUTO = "auto"
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = (AUTO, *VALUE_BYTES)
NONE = "none"
FP8 = "fp8"
QUANTISED_BYTES = {"int8": 1 + 4 / 128, "int4": 0.5 + 4 / 128, FP8: 1 + 4 / 128}  # 128 values share a float32 scale
HEAD_FORMATS = {"int8": "int8", "int4": "int8"}  # of LM heads; others stay as they are
QUANTISATIONS = (AUTO, NONE, *QUANTISED_BYTES)


@dataclass(frozen=True, slots=True)
class Precision:
    """Names of dtypes; "auto" for what follows: `compute` the checkpoint and the device, the others `compute`.

    Attributes:
        weights: matrices, as a device holds them unless they are quantised; in bfloat16 beside a computation in
            float32 they are widened as they are read.
        kv_cache: keys and values.
        rows: hidden states on their way to the experts and back.
        compute: activations.
        quantization: how the matrices of attention, MLPs and experts are held: "none" in `weights`, "auto" as the
            checkpoint has them, else made when they are loaded; unpacked as they are read. Embedding, routers and norms
            stay as they are, and so does an LM head beside fp8; beside whole numbers it has eight bits.

    Raises:
        ConfigError: one is none that is known; names it.
    """

    weights: str = AUTO
    kv_cache: str = AUTO
    rows: str = AUTO
    compute: str = parameter(
        AUTO, "auto, float32, bfloat16 or float16", metavar="D", group="model and workers", name="dtype", choices=DTYPES
    )
    quantization: str = parameter(
        AUTO, "auto, as the checkpoint is; none; or fp8, and on CPUs int8 or int4: matrices in so many bits, made as "
        "they are loaded", metavar="Q", group="model and workers", choices=QUANTISATIONS,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_parameters(self)
        for one in fields(self):
            known = QUANTISATIONS if one.name == "quantization" else DTYPES
            if (value := getattr(self, one.name)) not in known:
                raise ConfigError(f"`{one.name}` {shown(value)} is not one; supported: {', '.join(known)}")

    @staticmethod
    def of(dtype: str) -> Precision:
        """Everything in one dtype."""
        return Precision(dtype, dtype, dtype, dtype, NONE)

    @property
    def is_open(self) -> bool:
        """Whether it is left to a checkpoint and a device."""
        return self.compute == AUTO

    def resolved(self, dtype: str, stored: str = NONE) -> Precision:
        """Without "auto": what follows the checkpoint and the device becomes `dtype`, and matrices stay as `stored`."""
        compute = dtype if self.compute == AUTO else self.compute
        weights, kv_cache, rows = (compute if one == AUTO else one for one in (self.weights, self.kv_cache, self.rows))
        quantization = stored if self.quantization == AUTO else self.quantization
        return Precision(weights, kv_cache, rows, compute, quantization)

    def check_is_built(self) -> None:
        """Raises ConfigError: the runtime does not have a dtype of its own for one of them yet; names it."""
        for one in fields(self)[:4]:
            value = getattr(self, one.name)
            is_widened = one.name == "weights" and (value, self.compute) == ("bfloat16", "float32")
            if value not in (AUTO, self.compute) and not is_widened:
                raise ConfigError(
                    f"`{one.name}` in {value} beside `dtype` {self.compute} is not built yet; leave it at auto, and it "
                    "is what `dtype` says"
                )

    def __str__(self) -> str:
        dtypes = fields(self)[:4]
        if len({getattr(self, one.name) for one in dtypes}) == 1:
            shown_dtypes = self.compute
        else:
            shown_dtypes = ", ".join(f"{one.name} {getattr(self, one.name)}" for one in dtypes)
        return shown_dtypes if self.quantization in (AUTO, NONE) else f"{shown_dtypes}, matrices {self.quantization}"

    # -- bytes of one value; not while it is "auto" --------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        return VALUE_BYTES[self.weights]

    @property
    def matrix_bytes(self) -> float:
        """Of a matrix that may be quantised, with its share of a scale."""
        return QUANTISED_BYTES.get(self.quantization, self.weight_bytes)

    @property
    def held_as(self) -> str:
        """What matrices are."""
        return self.quantization if self.quantization in QUANTISED_BYTES else self.weights

    @property
    def head_format(self) -> str:
        """How the LM head is quantised."""
        return HEAD_FORMATS.get(self.quantization, NONE)

    @property
    def head_bytes(self) -> float:
        return QUANTISED_BYTES.get(self.head_format, self.weight_bytes)

    @property
    def kv_cache_bytes(self) -> int:
        return VALUE_BYTES[self.kv_cache]

    @property
    def row_bytes(self) -> int:
        return VALUE_BYTES[self.rows]

    @property
    def compute_bytes(self) -> int:
        return VALUE_BYTES[self.compute]
