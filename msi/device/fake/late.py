"""torch on a CPU, as late as on a GPU: operators return at once, and compute when their stream comes to them.

What an operator returns is memory that holds nothing yet; views of it can be taken, and given to other operators.
Whatever would make a host wait for a device's values (`item`, `tolist`, `nonzero`, an index of booleans) is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only


class WouldWait(RuntimeError):
    """A value of the device's was asked for where none is there yet."""


class Late(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it all operators of torch are late.

    Args:
        later: takes what is to be done when the stream comes to it.
        is_repeated: what it takes is done any number of times: memory that was filled is filled again.
    """

    def __init__(self, later: Callable[[Callable[[], object]], None], is_repeated: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._later = later
        self._is_repeated = is_repeated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        returns = func._schema.returns
        if any(one.alias_info is not None and not one.alias_info.is_write for one in returns):
            return self._view(func, args, kwargs)
        if any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments):
            return self._in_place(func, args, kwargs)
        if not _has_tensors((args, kwargs)):
            made = func(*args, **kwargs)  # of numbers that the host knows
            if self._is_repeated and isinstance(made, Tensor) and func.overloadpacket is not torch.ops.aten.empty:
                first = made.clone()
                self._later(lambda: made.copy_(first))
            return made
        results = _empty_results(func, args, kwargs)

        def compute() -> None:
            values = func(*args, **kwargs)
            for result, value in zip(_tensors(results), _tensors(values), strict=True):
                result.copy_(value)

        self._later(compute)
        return results

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A view, or what is one only at times: then what it is made of says so."""
        with self:
            made_of = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if made_of is NotImplemented else made_of

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._later(lambda: func(*args, **kwargs))
        changed = []
        for index, one in enumerate(func._schema.arguments):
            if one.alias_info is not None and one.alias_info.is_write:
                changed.append(kwargs[one.name] if one.name in kwargs else args[index])
        if not func._schema.returns:
            return None
        return changed[0] if len(changed) == 1 else tuple(changed)


def _empty_results(func: Any, args: Any, kwargs: Any) -> Any:
    """Memory for what it returns, by shapes alone."""

    def meta(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    def without_device(value: Any) -> Any:
        return torch.device("meta") if isinstance(value, torch.device) else value

    try:
        shapes = func(
            *tree_map_only(Tensor, meta, args), **tree_map(without_device, tree_map_only(Tensor, meta, kwargs))
        )
    except (RuntimeError, NotImplementedError) as error:
        raise WouldWait(f"{func} needs values that a device would have to be waited for: {error}") from error
    if any(not isinstance(one, Tensor) for one in _leaves(shapes)):
        raise WouldWait(f"{func} is a value that a device would have to be waited for")
    return tree_map_only(
        Tensor, lambda one: torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cpu"), shapes
    )


def _leaves(value: Any) -> list[Any]:
    return [one for part in value for one in _leaves(part)] if isinstance(value, tuple | list) else [value]


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in _leaves(value) if isinstance(one, Tensor)]


def _has_tensors(value: tuple[Any, dict[str, Any]]) -> bool:
    args, kwargs = value
    return bool(_tensors(args) or _tensors(list(kwargs.values())))
