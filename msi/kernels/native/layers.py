"""All layers of a decode pass in one call of `layers.cpp`, where every layer is of one kind; None where they are not.

The numbers are those of the layers' parts, called one by one: see `msi.kernels.native.rows` and
`msi.kernels.native.compiled`. Knows no requests, and no families of models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msi.kernels import fp8
from msi.kernels.kernels import Linear
from msi.kernels.native.bank import Addresses, NativeExpertBank
from msi.kernels.native.compiled import WIDTH, NativeLinear, Packed, native_library, row_dtype
from msi.kernels.native.rows import DTYPES, DecodePlan
from msi.kernels.norm import HeadNorm, Norm, rms_norm
from msi.kernels.paged_attention import AttentionShape
from msi.kernels.plain import RopeTable

MOST_ROWS = 32  # above, what lies between products is better shared among threads
ALONE_BYTES = 2 << 20  # of a layer's weights, once for each row, up to which one thread is best

_P, _N, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Matrix(ctypes.Structure):
    _fields_ = [("panels", _P), ("bias", _P), ("format", _N), ("outputs", _N), ("depth", _N)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("attention_norm", "head_norm", "mlp_norm", "sinks", "cache", "num_rows")),
        *((name, _Matrix) for name in ("qkv", "output", "router")),
        *((name, _P) for name in ("gate_up", "down", "gate_up_bias", "down_bias")),
        ("view", _N),
        *((name, _D) for name in ("attention_eps", "head_eps", "mlp_eps")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", _P),
        ("activation", _P),
        *((name, _N) for name in ("num_layers", "is_bfloat16", "is_e4m3", "hidden", "num_q", "num_kv", "head_dim")),
        *((name, _N) for name in ("rotated", "num_choices", "k", "is_renormalised", "format", "num_experts", "inner")),
    ]


class _View(ctypes.Structure):
    _fields_ = [("cos", _P), ("sin", _P), ("window", _N)]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("views", "hidden", "answers", "kv_rows", "tables", "contexts", "local_ids")),
        *((name, _N) for name in ("rows", "tables_stride", "answers_stride")),
        ("attention_s", _D),
        ("experts_s", _D),
        ("num_active", _N),
    ]


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What one layer is made of: attention of query heads that share keys and values, and a softmax router's experts.

    Attributes:
        qkv, output, head_norm, sinks: as `msi.models.attend.GroupedQueryAttention` has them.
        router: [n, h] -> [n, num_experts].
        cache: of the layer's keys and values.
        view: whose plan of a pass it reads.
    """

    attention_norm: Norm
    mlp_norm: Norm
    qkv: Linear
    output: Linear
    router: Linear
    cache: Tensor
    head_norm: HeadNorm | None = None
    sinks: Tensor | None = None
    view: int = 0


class NativeLayers:
    """Layers that are all computed in one call.

    Args:
        shape: of their heads, whatever they see.
        rotated: numbers of a head that are rotated.
        top_k, renormalise: as `msi.kernels.kernels.Kernels.topk_softmax` says.

    Attributes:
        dense_bytes: of all their weights but the experts'.
    """

    @staticmethod
    def of(
        layers: Sequence[LayerParts], shape: AttentionShape, *, rotated: int, top_k: int, renormalise: bool
    ) -> NativeLayers | None:
        """None where one is of another kind, or nothing can be compiled."""
        dtype = layers[0].mlp_norm.weight.dtype
        library = native_library()
        if library is None or dtype not in DTYPES or row_dtype(library, layers[0].mlp_norm.weight) is not dtype:
            return None
        if shape.head_dim % WIDTH or rotated % (2 * WIDTH):
            return None
        if not all(_is_of_this_kind(layer, dtype) for layer in layers):
            return None
        return NativeLayers(library, layers, shape, rotated, top_k, renormalise)

    def __init__(
        self,
        library: ctypes.CDLL,
        layers: Sequence[LayerParts],
        shape: AttentionShape,
        rotated: int,
        top_k: int,
        renormalise: bool,
    ) -> None:
        self._library = library
        self._parts = tuple(layers)
        self._layers = (_Layer * len(layers))(*map(_as_layer, layers))
        self._addresses: list[Addresses | None] = [None] * len(layers)  # of the experts, as the layers have them
        dense = [part for layer in layers for part in (layer.qkv, layer.output, layer.router)]
        self.dense_bytes = sum(_packed(part).panels.numel() for part in dense)
        first, router = layers[0], _native(layers[0].router)
        self._dtype = first.mlp_norm.weight.dtype
        self._hidden_size = len(first.mlp_norm.weight)
        self._model = _Model(
            layers=ctypes.addressof(self._layers), num_layers=len(layers), is_bfloat16=self._dtype is torch.bfloat16,
            is_e4m3=first.cache.dtype is fp8.E4M3, hidden=self._hidden_size, num_q=shape.num_heads,
            num_kv=shape.num_kv_heads, head_dim=shape.head_dim, rotated=rotated, num_choices=router.num_outputs,
            k=top_k, is_renormalised=renormalise,
        )  # fmt: skip

    def run(
        self,
        hidden: Tensor,
        plans: Sequence[tuple[RopeTable, DecodePlan]],
        local_ids: Tensor,
        bank: NativeExpertBank,
        answers: Tensor,
    ) -> tuple[float, float]:
        """A token of each of at most `MOST_ROWS` sequences, through all layers.

        Args:
            hidden: the residual stream [n, h]; changed, all but for what the last layer's experts add.
            plans: of each view, the rotary table and attention's plan.
            local_ids: int32 [num_experts], where `bank` has them.
            answers: [at least n, h], to which that goes.

        Returns:
            Seconds in attention and routers, and in experts.
        """
        num_rows, width = hidden.shape
        assert hidden.dtype is answers.dtype is self._dtype, (hidden.dtype, answers.dtype)
        assert hidden.is_contiguous(), hidden.stride()
        assert width == self._hidden_size, width
        assert num_rows <= len(answers), (num_rows, answers.shape)
        assert answers.stride(1) == 1, answers.stride()
        model, plan = self._model, plans[0][1]
        self._use(bank)
        views = (_View * len(plans))()
        for view, (rope, attention) in zip(views, plans, strict=True):
            cos, sin = rope
            assert cos.dtype is sin.dtype is self._dtype, cos.dtype
            assert all(table.is_contiguous() for table in rope), cos.stride()
            view.cos, view.sin, view.window = cos.data_ptr(), sin.data_ptr(), attention.window
        pass_ = _Pass(
            ctypes.addressof(views), hidden.data_ptr(), answers.data_ptr(), plan.kv_rows.data_ptr(),
            plan.tables.data_ptr(), plan.contexts.data_ptr(), local_ids.data_ptr(), num_rows, plan.tables.stride(0),
            answers.stride(0),
        )  # fmt: skip
        layer_bytes = self.dense_bytes // model.num_layers + model.k * bank.expert_bytes
        is_alone = num_rows * layer_bytes <= ALONE_BYTES
        self._library.msi_layers(ctypes.byref(model), ctypes.byref(pass_), is_alone)
        assert pass_.num_active >= 0, "an expert has no weights here"
        bank.weight_bytes_read += pass_.num_active * bank.expert_bytes
        return pass_.attention_s, pass_.experts_s

    def _use(self, bank: NativeExpertBank) -> None:
        """Has the layers read the experts' weights where they lie now."""
        model = self._model
        model.format, model.num_experts, model.inner = bank.number, bank.num_experts, bank.inner_size
        model.activation = None if bank.activation is None else ctypes.addressof(bank.activation)
        num_rows, stride = bank.num_rows.data_ptr(), bank.num_rows.stride(0) * bank.num_rows.element_size()
        for index, seen in enumerate(self._addresses):
            layer, addresses = self._layers[index], bank.addresses(index)
            layer.num_rows = num_rows + index * stride
            if addresses is not seen:
                self._addresses[index] = addresses
                layer.gate_up, layer.down, layer.gate_up_bias, layer.down_bias = (
                    None if one is None else ctypes.addressof(one) for one in addresses
                )


def _is_of_this_kind(layer: LayerParts, dtype: torch.dtype) -> bool:
    if not all(isinstance(part, NativeLinear) for part in (layer.qkv, layer.output, layer.router)):
        return False
    norms = (layer.attention_norm, layer.mlp_norm)
    if any(norm.apply is not rms_norm or norm.weight.dtype is not dtype for norm in norms):
        return False
    vectors = [norm.weight for norm in norms] + [one for one in (layer.sinks,) if one is not None]
    if layer.head_norm is not None:
        vectors.append(layer.head_norm.weights)
        if layer.head_norm.weights.dtype is not dtype:
            return False
    is_whole = _packed(layer.qkv).num_outputs == _native(layer.qkv).num_outputs
    is_whole = is_whole and _packed(layer.output).num_outputs == _native(layer.output).num_outputs
    return is_whole and all(one.is_contiguous() for one in vectors) and layer.cache.dtype in (dtype, fp8.E4M3)


def _native(linear: Linear) -> NativeLinear:
    assert isinstance(linear, NativeLinear), linear
    return linear


def _packed(linear: Linear) -> Packed:
    return _native(linear).packed


def _as_matrix(linear: Linear) -> _Matrix:
    native = _native(linear)
    packed, bias = native.packed, native.bias
    address = None if bias is None else bias.data_ptr()
    return _Matrix(packed.panels.data_ptr(), address, packed.format, packed.num_outputs, packed.depth)


def _as_layer(parts: LayerParts) -> _Layer:
    norm = parts.head_norm
    return _Layer(
        attention_norm=parts.attention_norm.weight.data_ptr(), attention_eps=parts.attention_norm.eps,
        head_norm=None if norm is None else norm.weights.data_ptr(), head_eps=0.0 if norm is None else norm.eps,
        mlp_norm=parts.mlp_norm.weight.data_ptr(), mlp_eps=parts.mlp_norm.eps,
        sinks=None if parts.sinks is None else parts.sinks.data_ptr(), cache=parts.cache.data_ptr(),
        qkv=_as_matrix(parts.qkv), output=_as_matrix(parts.output), router=_as_matrix(parts.router), view=parts.view,
    )  # fmt: skip
