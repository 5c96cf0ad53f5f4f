"""In which number formats a model is held, sent and computed. Knows no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any

from msi.errors import ConfigError, shown
from msi.parameters import KEY, check_parameters, parameter

AUTO = "auto"
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = (AUTO, *VALUE_BYTES)
FP8 = "fp8"  # e4m3: a sign, four bits of exponent, three of mantissa
FP8_DTYPES = (*DTYPES, FP8)
FP8_FIELDS = {"kv_cache_dtype": "kv_cache", "rows_dtype": "rows", "answers_dtype": "answers"}  # that may be, by option
NONE = "none"
QUANTISED_BYTES = {"int8": 1 + 4 / 128, "int4": 0.5 + 4 / 128, FP8: 1 + 4 / 128}  # 128 values share a float32 scale
HEAD_FORMATS = {"int8": "int8", "int4": "int8"}  # of LM heads; others stay as they are
QUANTISATIONS = (AUTO, NONE, *QUANTISED_BYTES)


@dataclass(frozen=True, slots=True)
class Precision:
    """Names of dtypes; "auto" for what follows: `compute` the checkpoint and the device, the others `compute`.

    Attributes:
        weights: matrices, as a device holds them unless they are quantised; in bfloat16 beside a computation in
            float32 they are widened as they are read.
        kv_cache: keys and values; in "fp8" from -448 to 448, without scales.
        rows: hidden states on their way to the experts; in "fp8" with a float32 scale for each 128 values.
        compute: activations.
        quantization: how the matrices of attention, MLPs and experts are held: "none" in `weights`, "auto" as the
            checkpoint has them, else made when they are loaded; unpacked as they are read. Embedding, routers and norms
            stay as they are, and so does an LM head beside fp8; beside whole numbers it has eight bits.
        answers: what comes back, as `rows`.

    Raises:
        ConfigError: one is none that is known; names it.
    """

    weights: str = AUTO
    kv_cache: str = parameter(
        AUTO, "auto (as computed), or fp8: keys and values in eight bits", metavar="D", group="limits",
        name="kv_cache_dtype", choices=FP8_DTYPES,
    )  # fmt: skip
    rows: str = parameter(
        AUTO, "auto (as computed), or fp8: rows on their way to the experts in eight bits", metavar="D",
        group="model and workers", name="rows_dtype", choices=FP8_DTYPES,
    )  # fmt: skip
    compute: str = parameter(
        AUTO, "auto, float32, bfloat16 or float16", metavar="D", group="model and workers", name="dtype", choices=DTYPES
    )
    quantization: str = parameter(
        AUTO, "auto, as the checkpoint is; none; or fp8, and on CPUs int8 or int4: matrices in so many bits, made as "
        "they are loaded", metavar="Q", group="model and workers", choices=QUANTISATIONS,
    )  # fmt: skip
    answers: str = parameter(
        AUTO, "auto (as computed), or fp8: the experts' answers on their way back in eight bits", metavar="D",
        group="model and workers", name="answers_dtype", choices=FP8_DTYPES,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_parameters(self)
        name, value = "weights", self.weights  # which is no option
        if value not in DTYPES:
            raise ConfigError(f"`{name}` {shown(value)} is not one; supported: {', '.join(DTYPES)}")

    @staticmethod
    def of(dtype: str) -> Precision:
        """Everything in one dtype."""
        return Precision(dtype, dtype, dtype, dtype, NONE, dtype)

    @staticmethod
    def read(named: Mapping[str, str]) -> Precision:
        """Of a file, also of one that was written when answers were as `rows`, and none were quantised.

        Raises:
            ConfigError, KeyError, TypeError: it names other things.
        """
        return Precision(**{"quantization": NONE, "answers": named["rows"], **named})

    @property
    def is_open(self) -> bool:
        """Whether it is left to a checkpoint and a device."""
        return self.compute == AUTO

    def resolved(self, dtype: str, stored: str = NONE) -> Precision:
        """Without "auto": what follows the checkpoint and the device becomes `dtype`, and matrices stay as `stored`."""
        compute = dtype if self.compute == AUTO else self.compute
        weights, kv_cache, rows, answers = (
            compute if one == AUTO else one for one in (self.weights, self.kv_cache, self.rows, self.answers)
        )
        quantization = stored if self.quantization == AUTO else self.quantization
        return Precision(weights, kv_cache, rows, compute, quantization, answers)

    @property
    def in_eight_bits(self) -> dict[str, bool]:
        """Which of those are that may be, by the names of their options."""
        return {name: getattr(self, field) == FP8 for name, field in FP8_FIELDS.items()}

    def check_is_built(self) -> None:
        """Raises ConfigError: the runtime does not have a dtype of its own for one of them yet; names it."""
        for one in _dtypes():
            value = getattr(self, one.name)
            is_widened = one.name == "weights" and (value, self.compute) == ("bfloat16", "float32")
            if value not in (AUTO, FP8, self.compute) and not is_widened:
                name = one.metadata[KEY].name if one.metadata else one.name
                raise ConfigError(
                    f"`{name}` in {value} beside `dtype` {self.compute} is not built yet; leave it at auto, and it "
                    "is what `dtype` says"
                )

    def __str__(self) -> str:
        dtypes = _dtypes()
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
        return 1 if self.kv_cache == FP8 else VALUE_BYTES[self.kv_cache]

    @property
    def row_bytes(self) -> float:
        """On the way to the experts."""
        return QUANTISED_BYTES[FP8] if self.rows == FP8 else VALUE_BYTES[self.rows]

    @property
    def answer_bytes(self) -> float:
        """On the way back."""
        return QUANTISED_BYTES[FP8] if self.answers == FP8 else VALUE_BYTES[self.answers]

    @property
    def compute_bytes(self) -> int:
        return VALUE_BYTES[self.compute]


def _dtypes() -> tuple[Field[Any], ...]:
    return tuple(one for one in fields(Precision) if one.name != "quantization")
