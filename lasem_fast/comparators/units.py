"""Weighted layers whose units (channels, features) are added, removed and copied."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Units:
    """One weighted layer, seen as weights between units: ``[out, in, rest]`` and ``[out]``.

    ``rest`` are the kernel's places, or the places that a unit below takes up in the flattened
    input of a linear layer. The layer's parameters stay the same objects when they change shape,
    so that optimisers keep them.

    Args:
        layer: a convolution (groups=1) or a linear layer.
        rest: per pair of units; see above.
    """

    def __init__(self, layer: nn.Module, rest: int) -> None:
        self.layer = layer
        self.rest = rest
        self._kernel = tuple(layer.weight.shape[2:])

    @property
    def weight(self) -> Tensor:
        """``[out, in, rest]``, of the layer's own memory or with its graph."""
        return self.layer.weight.reshape(self.layer.weight.shape[0], -1, self.rest)

    def form(self, weight: Tensor) -> Tensor:
        """A weight ``[out, in, rest]`` in the layer's own form."""
        if self._kernel:
            return weight.reshape(*weight.shape[:2], *self._kernel)
        return weight.flatten(1)

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """New values ``[out, in, rest]`` and ``[out]``, of any number of units."""
        layer, formed = self.layer, self.form(weight).contiguous()
        _replace(layer.weight, formed)
        if layer.bias is not None:
            _replace(layer.bias, bias.contiguous())
        names = ("out_channels", "in_channels") if self._kernel else ("out_features", "in_features")
        for name, size in zip(names, formed.shape, strict=False):
            setattr(layer, name, size)

    @torch.no_grad()
    def resize(self, outputs: int, inputs: int) -> None:
        """Makes room for so many units; what is in it is undefined."""
        bias = self.layer.bias
        self.write(
            self.layer.weight.new_empty(outputs, inputs, self.rest),
            None if bias is None else bias.new_empty(outputs),
        )

    @torch.no_grad()
    def widen(self, outputs: int, inputs: int, draw: Callable[[nn.Module], object]) -> None:
        """Adds units at the end up to so many, their weights drawn by ``draw`` on a copy.

        What ``draw`` leaves alone is 0.
        """
        kept, old_bias = self.weight.detach().clone(), self.layer.bias
        wider = Units(copy.deepcopy(self.layer), self.rest)
        wider.resize(outputs, inputs)
        for parameter in wider.layer.parameters():
            parameter.zero_()
        draw(wider.layer)
        weight, bias = wider.weight.detach(), wider.layer.bias
        weight[: kept.shape[0], : kept.shape[1]] = kept
        if bias is not None:
            bias = bias.detach()
            bias[: kept.shape[0]] = old_bias
        self.write(weight, bias)

    @torch.no_grad()
    def keep(self, outputs: Tensor, inputs: Tensor) -> None:
        """Keeps the units at these rows and columns."""
        bias = self.layer.bias
        weight = self.weight.detach()[outputs][:, inputs]
        self.write(weight, None if bias is None else bias.detach()[outputs])


def _replace(parameter: nn.Parameter, values: Tensor) -> None:
    """Gives a parameter values of any shape, and no gradient."""
    parameter.grad = None
    # While a graph is alive, autograd remembers the shape; another dtype on the way makes it forget
    between = torch.float32 if values.dtype == torch.float16 else torch.float16
    parameter.data = torch.empty(0, dtype=between, device=values.device)
    parameter.data = values


def shrink(weight: Tensor, by: float) -> Tensor:
    """The proximal map of ``by ||w||_1``: towards 0 by ``by``, and 0 within."""
    return weight.sign() * (weight.abs() - by).clamp(min=0)


def shrink_groups(weight: Tensor, by: float) -> Tensor:
    """The proximal map of ``by sum_g ||w_g||_2``, a group per row ``[out, ...]``."""
    norms = weight.flatten(1).norm(dim=1)
    factors = torch.where(norms > by, 1 - by / norms, 0)
    return weight * factors.reshape(-1, *[1] * (weight.dim() - 1))
