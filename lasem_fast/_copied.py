"""Deep copies of modules, of those too that hold tensors which were computed from others."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


def copied(module: nn.Module, kept: Iterable[Tensor] = ()) -> nn.Module:
    """``copy.deepcopy(module)``, for a module with computed tensors as well.

    Such are the last attention map that a block keeps, or a weight that a hook computes before
    every call (``torch.nn.utils.prune``, the old ``weight_norm``). PyTorch does not copy them; here
    the copy gets their values.

    Args:
        module: what to copy.
        kept: tensors that the copy has in common with the module.

    Raises:
        ValueError: the module cannot be copied.
    """
    memo = {**memo_of_computed(module), **{id(tensor): tensor for tensor in kept}}
    try:
        return copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"expected a module that copy.deepcopy can copy, got {type(module).__name__} "
            f"({str(error).splitlines()[0]})"
        ) from error


def memo_of_computed(module: nn.Module) -> dict[int, Any]:
    """What lets ``copy.deepcopy`` copy a module's computed tensors, as its second argument."""
    return {id(tensor): tensor.detach().clone() for tensor in _computed(module)}


def _computed(module: nn.Module) -> Iterator[Tensor]:
    """The tensors with a graph behind them that a module's layers hold."""
    seen: set[int] = set()  # of containers, which may hold themselves
    for layer in module.modules():
        for name, value in vars(layer).items():
            if name != "_modules":
                yield from _computed_in(value, seen)


def _computed_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, list | tuple | dict) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _computed_in(item, seen)
