"""Small nets on which every backend must agree with brute force in float64, and how it is judged.

The judge is the benchmark's gate: the error of a step may be k times that of the naive loop at the
same precision (k is the backend's slack in :mod:`bench.peers`), or what brute force itself is off
at inputs and weights that are k roundings away, where ties of ReLU and pool fall the other way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

import lasem_fast as lf
from bench.cases import TASK, Case, Problem
from bench.gate import Gate, answer_of
from bench.peers import library_column
from lasem_fast.tools.builtin import Skip, conv_layer
from lasem_fast.transfer import TensorFactorization, TransferMechanism


class SmallNet(NamedTuple):
    """A net, its input and the configurations that are searched.

    Attributes:
        stages: makes new stages.
        features: what the head's first linear layer takes.
        sample: shape of one sample.
        groups: sizes of the groups of stages, None for none.
        transfer: the transfer mechanism.
        hidden: sizes of the head's hidden layers.
    """

    stages: Callable[[], list[nn.Module]]
    features: int
    sample: tuple[int, ...]
    groups: tuple[int, ...] | None = None
    transfer: str | TransferMechanism = "hps"
    hidden: tuple[int, ...] = ()


def _conv(inputs: int, outputs: int, kernel: int = 3, pool: int = 1, **options) -> nn.Module:
    options = {"padding": kernel // 2, **options}
    layers = [nn.Conv2d(inputs, outputs, kernel, **options), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(pool, ceil_mode=True)] if pool > 1 else []))


def _normed(inputs: int, outputs: int, pool: int = 1) -> nn.Module:
    return nn.Sequential(*conv_layer(inputs, outputs, 3, pool, norm=True))


def _behind(inputs: int, outputs: int, *layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), *layers)


def _linear(inputs: int, outputs: int, *before: nn.Module) -> nn.Module:
    return nn.Sequential(*before, nn.Linear(inputs, outputs), nn.ReLU())


_TF = TensorFactorization(aux_weight=0.0)  # brute force knows no auxiliary loss

NETS = {
    "one stage": SmallNet(lambda: [_conv(2, 3)], 75, (2, 5, 5)),
    "pool 2": SmallNet(lambda: [_conv(3, 4), _conv(4, 5, pool=2)], 45, (3, 6, 6)),
    "pool 3": SmallNet(lambda: [_conv(1, 4, pool=3), _conv(4, 4, bias=False)], 36, (1, 7, 8)),
    "pool 2 thrice": SmallNet(
        lambda: [_conv(3, 8, pool=2), _conv(8, 4, pool=2), _conv(4, 6, pool=2)], 6, (3, 8, 8)
    ),
    "stride 2": SmallNet(lambda: [_conv(2, 4, stride=2), _conv(4, 3, 1)], 27, (2, 6, 5)),
    "5x5 and valid": SmallNet(lambda: [_conv(2, 4, 5), _conv(4, 3, padding=0)], 36, (2, 5, 6)),
    "11x11": SmallNet(lambda: [_conv(3, 4, 11, pool=3)], 64, (3, 12, 11)),
    "conv, linear": SmallNet(
        lambda: [_conv(2, 3, pool=2), _linear(27, 5, nn.Flatten()), _linear(5, 4)], 4, (2, 6, 6)
    ),
    "linear": SmallNet(lambda: [_linear(6, 5), _linear(5, 7), _linear(7, 3)], 3, (6,)),
    "hidden head": SmallNet(lambda: [_conv(2, 3), _conv(3, 4, pool=2)], 36, (2, 6, 6), hidden=(7,)),
    "groups": SmallNet(
        lambda: [_conv(2, 3), _conv(3, 3), _conv(3, 4, pool=2)], 36, (2, 5, 6), groups=(2, 1)
    ),
    "residual": SmallNet(
        lambda: [_conv(2, 4), Skip(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()), _conv(4, 3, pool=2)],
        27,
        (2, 6, 6),
    ),
    "batch norm": SmallNet(
        lambda: [_normed(2, 3), _normed(3, 4, pool=2), _normed(4, 4, pool=3)], 16, (2, 9, 8)
    ),
    "batch norm in blocks": SmallNet(
        lambda: [_conv(2, 4), Skip(*_normed(4, 4), *_normed(4, 4)), _normed(4, 3, pool=2)],
        27,
        (2, 6, 6),
        groups=(1, 2),
    ),
    "other activations": SmallNet(
        lambda: [
            _behind(2, 3, nn.GELU(), nn.MaxPool2d(2)),
            _behind(3, 4, nn.SiLU(inplace=True)),
            _behind(4, 3, nn.Tanh()),
        ],
        27,
        (2, 6, 6),
    ),
    "group norm": SmallNet(
        lambda: [
            _behind(2, 4, nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)),
            Skip(*_behind(4, 4, nn.GroupNorm(4, 4, affine=False), nn.GELU())),
            _behind(4, 3, nn.GroupNorm(1, 3), nn.ELU()),
        ],
        27,
        (2, 6, 6),
        groups=(1, 2),
    ),
    "runs of 8 channels": SmallNet(
        lambda: [_conv(3, 8), _conv(8, 16, pool=2), _conv(16, 8, pool=3)], 32, (3, 10, 9)
    ),
    "tf": SmallNet(lambda: [_conv(2, 3), _conv(3, 4, pool=2)], 36, (2, 6, 6), transfer=_TF),
    "dfcnn": SmallNet(lambda: [_conv(2, 3), _conv(3, 4, pool=2)], 36, (2, 6, 6), transfer="dfcnn"),
}

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "batch innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=1)[:, 0],
}

SAMPLES, CLASSES = 3, 4


def problem(
    name: str, dtype: str = "fp32", device: str = "cpu", layout: str = "contiguous"
) -> Problem:
    """A net of :data:`NETS` with weights and a mini-batch, always the same ones."""
    spec = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = lf.TransferNet(spec.stages(), transfer=spec.transfer)
        layers, width = [nn.Flatten()], spec.features
        for hidden in spec.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        net.add_task(TASK, nn.Sequential(*layers, nn.Linear(width, CLASSES)))
    generator = torch.Generator().manual_seed(1)
    x = LAYOUTS[layout](torch.randn(SAMPLES, *spec.sample, generator=generator))
    y = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    case = Case(name, SAMPLES, dtype, device, spec.groups)
    # copied to the device as it is: .to() would keep strides only of dense tensors
    x = x if device == "cpu" else torch.empty_strided(
        x.size(), x.stride(), device=device).copy_(x)  # fmt: skip
    return Problem(case, net.to(device), lf.ConfigSpace(net.depth, spec.groups), x, y.to(device))


def check(backend: str, drawn: Problem) -> dict[str, float]:
    """The errors of a backend's step; raises WrongResult where one is too large."""
    column = library_column(backend)
    runner = column.build(drawn)
    outcome = runner.step()
    gate = Gate(drawn, largest_slack=column.slack)
    return gate.check(column, answer_of(runner, outcome))
