"""How the authors' release draws initial weights, in TensorFlow 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_SD = 0.05
_BIAS = 0.2
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def release_(module: nn.Module) -> None:
    """The release's weights for ordinary layers, in place, for every layer inside ``module``.

    Convolutions and linear layers get weights from a normal distribution of mean 0 and standard
    deviation 0.05, redrawn beyond 2 standard deviations (0.044 is left of it), and biases of 0.2.
    """
    for layer in module.modules():
        if isinstance(layer, _WEIGHTED):
            nn.init.trunc_normal_(layer.weight, std=_SD, a=-2 * _SD, b=2 * _SD)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, _BIAS)


@torch.no_grad()
def glorot_uniform_(tensor: Tensor, fan_in: int, fan_out: int) -> Tensor:
    """Uniform in +-sqrt(6 / (fan_in + fan_out)), in place (Glorot and Bengio, 2010).

    The release leaves the variables of tf and dfcnn, biases included, to TensorFlow's default,
    which is this one; a vector of n values counts as fan_in = fan_out = n.
    """
    limit = math.sqrt(6 / (fan_in + fan_out))
    return tensor.uniform_(-limit, limit)
