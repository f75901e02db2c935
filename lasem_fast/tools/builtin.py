"""The paper's nets by name, as stages and a head (PROTOCOL: SAME pooling, no norm, no dropout).

Dropout is left out so that the E-step's and the M-step's forward are one and the same, and so that
results can be compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn


class Builtin(NamedTuple):
    """A net as the tools need it.

    Attributes:
        stages: makes new stages.
        head: makes a new head, given the number of classes.
        sample: shape of one sample, without the batch dimension.
        batch: the paper's mini-batch.
        groups: sizes of the paper's groups of stages, None where every stage is its own.
    """

    stages: Callable[[], list[nn.Module]]
    head: Callable[[int], nn.Module]
    sample: tuple[int, ...]
    batch: int
    groups: tuple[int, ...] | None = None


class Skip(nn.Module):
    """Layers whose input is added to their output."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.layers(h)


Behind = Callable[[int], list[nn.Module]]
"""Makes what stands between a convolution of so many outputs and its pool."""


def conv_layer(
    inputs: int,
    outputs: int,
    kernel: int,
    pool: int = 1,
    norm: bool = False,
    behind: Behind = lambda _: [nn.ReLU()],
) -> list[nn.Module]:
    """The paper's layer: SAME convolution, ReLU, and SAME max-pool where ``pool`` > 1.

    With ``norm`` a batch norm stands between the first two, in place of the bias.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm),
        *([nn.BatchNorm2d(outputs)] if norm else []),
        *behind(outputs),
    ]
    if pool > 1:
        layers.append(nn.MaxPool2d(pool, ceil_mode=True))
    return layers


def conv_stages(
    inputs: int,
    channels: Sequence[int],
    kernels: Sequence[int],
    pools: Sequence[int],
    **options: Any,
) -> list[nn.Module]:
    """One stage per layer; ``options`` are those of :func:`conv_layer`."""
    before = [inputs, *channels[:-1]]
    return [
        nn.Sequential(*conv_layer(*layer, **options))
        for layer in zip(before, channels, kernels, pools, strict=True)
    ]


def residual_stages(norm: bool = False) -> list[nn.Module]:
    """The 17-layer residual net as 8 stages of 3, 2, 2, ... layers; no skip crosses a stage."""
    layer = partial(conv_layer, norm=norm)
    stages: list[nn.Module] = [
        nn.Sequential(*layer(3, 64, 7, pool=2), _skip(64, norm)),
        _skip(64, norm),
    ]
    for inputs in (64, 128, 256):
        outputs = 2 * inputs
        down = [*layer(inputs, outputs, 3, pool=2), *layer(outputs, outputs, 3)]
        stages += [nn.Sequential(*down), _skip(outputs, norm)]
    return stages


def _skip(channels: int, norm: bool) -> nn.Module:
    return Skip(
        *conv_layer(channels, channels, 3, norm=norm), *conv_layer(channels, channels, 3, norm=norm)
    )


def dense_head(inputs: int, hidden: Sequence[int], classes: int) -> nn.Module:
    """Flatten, hidden layers with ReLU, linear output."""
    layers: list[nn.Module] = [nn.Flatten()]
    for outputs in hidden:
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def _cifar_4(**options: Any) -> Builtin:
    return Builtin(
        lambda: conv_stages(3, (32, 32, 64, 64), (3,) * 4, (1, 2) * 2, **options),
        lambda classes: dense_head(4096, (64,), classes),
        (3, 32, 32),
        10,
    )


# The residual net serves CIFAR-100: its input is 32 x 32. Those with a norm or GELU are ours.
NETS = {
    "cifar-4": _cifar_4(),
    "cifar-4-norm": _cifar_4(norm=True),
    "cifar-4-group-norm": _cifar_4(behind=lambda n: [nn.GroupNorm(8, n), nn.ReLU()]),
    "cifar-4-gelu": _cifar_4(behind=lambda _: [nn.GELU()]),
    "cifar-6": Builtin(
        lambda: conv_stages(3, (32, 32, 64, 64, 128, 128), (3,) * 6, (1, 2) * 3),
        lambda classes: dense_head(2048, (64,), classes),
        (3, 32, 32),
        10,
    ),
    "cifar-8": Builtin(
        lambda: conv_stages(3, (32, 32, 64, 64, 128, 128, 128, 128), (3,) * 8, (1, 2) * 4),
        lambda classes: dense_head(512, (64,), classes),
        (3, 32, 32),
        10,
    ),
    "stl-6": Builtin(
        lambda: conv_stages(3, (32, 32, 64, 64, 128, 128), (3,) * 6, (1, 3) * 3),
        lambda classes: dense_head(2048, (128, 16), classes),
        (3, 96, 96),
        10,
    ),
    "stl-9": Builtin(
        lambda: conv_stages(3, (32,) * 3 + (64,) * 3 + (128,) * 3, (3,) * 9, (1, 1, 3) * 3),
        lambda classes: dense_head(2048, (128, 16), classes),
        (3, 96, 96),
        10,
        groups=(3, 3, 3),
    ),
    "office-home-4": Builtin(
        lambda: conv_stages(3, (64, 256, 256, 256), (11, 5, 3, 3), (3, 3, 2, 2)),
        lambda classes: dense_head(4096, (256, 64), classes),
        (3, 128, 128),
        16,
    ),
    "residual-17": Builtin(
        residual_stages,
        lambda classes: dense_head(2048, (1000,), classes),
        (3, 32, 32),
        10,
        groups=(2, 2, 2, 2),
    ),
    "residual-17-norm": Builtin(
        partial(residual_stages, norm=True),
        lambda classes: dense_head(2048, (1000,), classes),
        (3, 32, 32),
        10,
        groups=(2, 2, 2, 2),
    ),
}
