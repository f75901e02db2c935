"""Calling a module with other tensors in the place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def called_with(module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...]) -> Any:
    """``functional_call(module, tensors, args)``, for a module that uses a layer twice as well.

    PyTorch's own (2.13) puts a tensor into such a layer once for each of its names, and back only
    once: the layer has lost its parameter then.
    """
    names: dict[int, list[str]] = {}
    for layer_name, layer in module.named_modules():  # which gives a layer by one name
        for leaf, own in chain(layer._parameters.items(), layer._buffers.items()):
            names.setdefault(id(own), []).append(f"{layer_name}.{leaf}" if layer_name else leaf)
    given: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        own = getattr(module.get_submodule(owner), leaf)
        for place in [name] if own is None else names[id(own)]:
            given.setdefault(place, tensor)
    return functional_call(module, given, args, tie_weights=False)
