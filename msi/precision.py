"""In which number formats a model is held, sent and computed. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields

from msi.errors import ConfigError, shown
from msi.parameters import check_parameters, parameter

AUTO = "auto"
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = (AUTO, *VALUE_BYTES)


@dataclass(frozen=True, slots=True)
class Precision:
    """Names of dtypes; "auto" for what follows: `compute` the checkpoint and the device, the others `compute`.

    Attributes:
        weights: matrices, as a device holds them; in bfloat16 beside a computation in float32 they are widened as
            they are read.
        kv_cache: keys and values.
        rows: hidden states on their way to the experts and back.
        compute: activations.

    Raises:
        ConfigError: one is no dtype that is known; names it.
    """

    weights: str = AUTO
    kv_cache: str = AUTO
    rows: str = AUTO
    compute: str = parameter(
        AUTO, "auto, float32, bfloat16 or float16", metavar="D", group="model and workers", name="dtype", choices=DTYPES
    )

    def __post_init__(self) -> None:
        check_parameters(self)
        for one in fields(self):
            if (value := getattr(self, one.name)) not in DTYPES:
                raise ConfigError(f"`{one.name}` {shown(value)} is not one; supported: {', '.join(DTYPES)}")

    @staticmethod
    def of(dtype: str) -> Precision:
        """Everything in one dtype."""
        return Precision(dtype, dtype, dtype, dtype)

    @property
    def is_open(self) -> bool:
        """Whether it is left to a checkpoint and a device."""
        return self.compute == AUTO

    def resolved(self, dtype: str) -> Precision:
        """Without "auto": what follows the checkpoint and the device becomes `dtype`."""
        compute = dtype if self.compute == AUTO else self.compute
        weights, kv_cache, rows = (compute if one == AUTO else one for one in (self.weights, self.kv_cache, self.rows))
        return Precision(weights, kv_cache, rows, compute)

    def check_is_built(self) -> None:
        """Raises ConfigError: the runtime does not have a dtype of its own for one of them yet; names it."""
        for one in fields(self):
            value = getattr(self, one.name)
            is_widened = one.name == "weights" and (value, self.compute) == ("bfloat16", "float32")
            if value not in (AUTO, self.compute) and not is_widened:
                raise ConfigError(
                    f"`{one.name}` in {value} beside `dtype` {self.compute} is not built yet; leave it at auto, and it "
                    "is what `dtype` says"
                )

    def __str__(self) -> str:
        if len({self.weights, self.kv_cache, self.rows, self.compute}) == 1:
            return self.compute
        return ", ".join(f"{one.name} {getattr(self, one.name)}" for one in fields(self))

    # -- bytes of one value; not while it is "auto" --------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        return VALUE_BYTES[self.weights]

    @property
    def kv_cache_bytes(self) -> int:
        return VALUE_BYTES[self.kv_cache]

    @property
    def row_bytes(self) -> int:
        return VALUE_BYTES[self.rows]

    @property
    def compute_bytes(self) -> int:
        return VALUE_BYTES[self.compute]
