"""The animals: makers of layers and stages, by the shape of the sample that they are to take.

A maker draws freely; what cannot take the shape is drawn again (see cases.py), so that no maker
has to know the rules of sizes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lasem_fast as lf

Shape = tuple[int, ...]
Maker = Callable[[Random, Shape], nn.Module]


class Apply(nn.Module):
    """A function of the batch, with nothing of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


class Output(nn.Module):
    """The first output of a layer that returns several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h)[0]


class Attention(nn.Module):
    """Self-attention under a causal mask of -inf, or a bool one, kept as a buffer."""

    def __init__(self, length: int, width: int, heads: int, mask: str) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        causal = torch.full((length, length), -torch.inf).triu(1)
        self.register_buffer("mask", causal if mask == "float" else causal.isinf())

    def forward(self, h: Tensor) -> Tensor:
        return h + self.attention(h, h, h, attn_mask=self.mask, need_weights=False)[0]


class Encoder(nn.Module):
    """A transformer's encoder layer under a causal mask."""

    def __init__(self, length: int, width: int, heads: int, norm_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.register_buffer("mask", torch.full((length, length), -torch.inf).triu(1))

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h, src_mask=self.mask)


class Residual(nn.Module):
    """What goes around a layer that keeps the shape; ``inplace`` adds into the layer's output."""

    def __init__(self, inner: nn.Module, inplace: bool) -> None:
        super().__init__()
        self.inner = inner
        self.inplace_sum = inplace

    def forward(self, h: Tensor) -> Tensor:
        out = self.inner(h)
        return out.add_(h) if self.inplace_sum and out is not h else h + out


class Buffered(nn.Module):
    """Buffers of many dtypes that the forward reads and training leaves or (``ticks``) moves."""

    def __init__(self, shape: Shape, kinds: list[str]) -> None:
        super().__init__()
        values = {
            "bool": torch.rand(shape) > 0.3,
            "ticks": torch.zeros((), dtype=torch.int64),
            "uint8": torch.randint(0, 3, shape, dtype=torch.uint8),
            "infinite": torch.where(torch.rand(shape) > 0.3, 0.0, -torch.inf),
            "nan": torch.full((2,), torch.nan),
            "float16": torch.rand(2).half(),
            "complex": torch.rand(2, dtype=torch.complex64),
            "empty": torch.zeros(0, 3),
        }
        for kind in kinds:
            self.register_buffer(kind, values[kind])

    def forward(self, h: Tensor) -> Tensor:
        if hasattr(self, "bool"):
            h = torch.where(self.bool, h, 0.1 * h)
        if hasattr(self, "uint8"):
            h = h * (1 + self.uint8)
        if hasattr(self, "infinite"):
            h = h * self.infinite.exp()
        if hasattr(self, "ticks"):
            h = h / (1 + self.ticks)
        return h


class AddsInPlace(nn.Module):
    """Writes into its input, and no attribute says so."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(shape))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.b)

    def forward(self, h: Tensor) -> Tensor:
        return h.add_(self.b)


class MixesSamples(nn.Module):
    """What one sample becomes depends on the others."""

    def forward(self, h: Tensor) -> Tensor:
        return h - 0.5 * h.mean(0)


class FoldsSteps(nn.Module):
    """Puts the steps of a sequence into the batch, ``[N, T, C]`` to ``[N * T, C]``."""

    def forward(self, h: Tensor) -> Tensor:
        return h.flatten(0, 1)


class UnfoldsSteps(nn.Module):
    """The way back from :class:`FoldsSteps`."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, h: Tensor) -> Tensor:
        return h.unflatten(0, (-1, self.steps))


class Embed(nn.Module):
    """An embedding of token numbers, which may come as floats; ``bag`` sums them."""

    def __init__(self, tokens: int, width: int, bag: bool) -> None:
        super().__init__()
        self.table = (
            nn.EmbeddingBag(tokens, width, mode="sum") if bag else nn.Embedding(tokens, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.table(h.round().long() if h.is_floating_point() else h)


class Symmetric(nn.Module):
    """A parametrisation: the weight is its parameter plus the transposed one."""

    def forward(self, w: Tensor) -> Tensor:
        return w + w.transpose(0, 1)


def _tuple(pick: Random, n: int, values: list[int]) -> int | tuple[int, ...]:
    if pick.random() < 0.7:
        return pick.choice(values)
    return tuple(pick.choice(values) for _ in range(n))


def _convolution(dims: int, transposed: bool = False) -> Maker:
    kinds = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )

    def make(pick: Random, shape: Shape) -> nn.Module:
        groups = pick.choice([1, 1, 1, shape[0], 2])
        out = groups * pick.randint(1, 3)
        kernel = _tuple(pick, dims, [1, 2, 3, 3, 5, 7])
        stride = _tuple(pick, dims, [1, 1, 1, 2, 3])
        dilation = _tuple(pick, dims, [1, 1, 1, 2])
        bias = pick.random() < 0.7
        kind = kinds[dims - 1]
        if transposed:
            padding = pick.choice([0, 0, 1])
            return kind(shape[0], out, kernel, stride, padding, 0, groups, bias, dilation)
        padding = pick.choice([0, 1, 1, 2, "same", "valid"])
        mode = pick.choice(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
        return kind(shape[0], out, kernel, stride, padding, dilation, groups, bias, mode)

    return make


def _pool(dims: int) -> Maker:
    def make(pick: Random, shape: Shape) -> nn.Module:
        window, ceil = _tuple(pick, dims, [2, 2, 3]), pick.random() < 0.4
        stride = pick.choice([None, None, 1, 2, 3])
        padding = pick.choice([0, 0, 1])
        kind = pick.choice(["max", "max", "avg", "lp", "adaptive max", "adaptive avg"])
        name = {"max": "MaxPool", "avg": "AvgPool", "lp": "LPPool"}.get(kind)
        if kind == "max":
            options = (window, stride, padding, pick.choice([1, 1, 2]), False, ceil)
        elif kind == "avg":
            options = (window, stride, padding, ceil, pick.random() < 0.5)
        elif kind == "lp":
            options = (2.0, window, stride, ceil)
        else:
            name = "AdaptiveMaxPool" if kind == "adaptive max" else "AdaptiveAvgPool"
            options = (_tuple(pick, dims, [1, 2, 3]),)
        return getattr(nn, f"{name}{dims}d")(*options)

    return make


def _norm(dims: int) -> Maker:
    def make(pick: Random, shape: Shape) -> nn.Module:
        kind = pick.choice(["batch", "batch", "group", "instance", "layer", "rms"])
        affine = pick.random() < 0.7
        if kind == "batch":
            return getattr(nn, f"BatchNorm{max(dims, 1)}d")(shape[0], affine=affine)
        if kind == "group":
            return nn.GroupNorm(pick.choice([1, shape[0]]), shape[0], affine=affine)
        if kind == "instance":
            if dims == 0:
                raise ValueError("no instance norm of vectors")
            tracked = pick.random() < 0.5
            return getattr(nn, f"InstanceNorm{dims}d")(
                shape[0], affine=affine, track_running_stats=tracked
            )
        over = shape[pick.randrange(len(shape)) :]
        if kind == "layer":
            return nn.LayerNorm(over, elementwise_affine=affine)
        return nn.RMSNorm(over, elementwise_affine=affine)

    return make


def activation(pick: Random, shape: Shape) -> nn.Module:
    inplace = pick.random() < 0.4
    kind = pick.choice(
        [
            nn.ReLU, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Hardtanh,
            nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.GELU,
            nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.LogSigmoid, nn.PReLU,
            nn.Threshold, nn.GLU, nn.Softmax, nn.LogSoftmax, nn.Identity,
        ]
    )  # fmt: skip
    if kind in (nn.Tanh, nn.Sigmoid, nn.GELU, nn.Softplus, nn.Softsign, nn.Tanhshrink,
                nn.Softshrink, nn.LogSigmoid, nn.PReLU, nn.Identity):  # fmt: skip
        return kind()
    if kind is nn.Threshold:
        return kind(0.1, -0.2, inplace=inplace)
    if kind in (nn.GLU, nn.Softmax, nn.LogSoftmax):
        return kind(dim=1)
    return kind(inplace=inplace)


def _linear(pick: Random, shape: Shape) -> nn.Module:
    return nn.Linear(shape[-1], pick.randint(1, 6), bias=pick.random() < 0.8)


def _parametrised(pick: Random, shape: Shape) -> nn.Module:
    """A weighted layer under weight norm, orthogonality or a parametrisation by hand."""
    if len(shape) == 3:
        layer: nn.Module = nn.Conv2d(shape[0], pick.randint(1, 4), 3, padding=1)
    else:
        layer = nn.Linear(shape[-1], shape[-1])
    kind = pick.choice(["weight norm", "old weight norm", "orthogonal", "by hand"])
    if kind == "weight norm":
        return parametrizations.weight_norm(layer)
    if kind == "old weight norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.utils.weight_norm(layer)
    if kind == "orthogonal":
        return parametrizations.orthogonal(layer)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def _buffered(pick: Random, shape: Shape) -> nn.Module:
    kinds = ["bool", "ticks", "uint8", "infinite", "nan", "float16", "complex", "empty"]
    return Buffered(shape, pick.sample(kinds, pick.randint(1, 4)))


def _skip_layer(pick: Random, shape: Shape) -> nn.Module:
    """A skip that begins here; or that begins and ends here."""
    conv = nn.Conv2d(shape[0], shape[0], 3, padding=1)
    pool = lf.nets.same_pool(shape[1], pick.choice([1, 2, 3]))
    return lf.nets.SkipLayer(conv, pool, begins=True, ends=pick.random() < 0.5)


def _resize(pick: Random, shape: Shape) -> nn.Module:
    kind = pick.choice(["nearest", "bilinear", "shuffle", "unshuffle", "pad", "reflect"])
    if kind in ("nearest", "bilinear"):
        return nn.Upsample(scale_factor=2, mode=kind)
    if kind == "shuffle":
        return nn.PixelShuffle(2)
    if kind == "unshuffle":
        return nn.PixelUnshuffle(2)
    return (nn.ZeroPad2d if kind == "pad" else nn.ReflectionPad2d)(pick.choice([1, (0, 1, 1, 0)]))


def _local(pick: Random, shape: Shape) -> nn.Module:
    return pick.choice(
        [nn.LocalResponseNorm(2), nn.Softmax2d(), nn.ChannelShuffle(shape[0]), nn.Flatten(2)]
    )


def _recurrent(pick: Random, shape: Shape) -> nn.Module:
    kind = pick.choice([nn.GRU, nn.LSTM, nn.RNN])
    layers, both = pick.choice([1, 1, 2]), pick.random() < 0.3
    return Output(kind(shape[1], pick.randint(1, 4), layers, batch_first=True, bidirectional=both))


def _attention(pick: Random, shape: Shape) -> nn.Module:
    heads = pick.choice([1, 2])
    if pick.random() < 0.5:
        return Encoder(*shape, heads, pick.random() < 0.5)
    return Attention(*shape, heads, pick.choice(["float", "bool"]))


def _sequence_shape(pick: Random, shape: Shape) -> nn.Module:
    return pick.choice(
        [
            Apply(lambda h: h.transpose(1, 2)),
            Apply(lambda h: h.mean(1)),
            Apply(lambda h: h[:, -1]),
            nn.Flatten(),
            nn.Unflatten(1, (1, -1)),
            nn.Upsample(scale_factor=2, mode=pick.choice(["nearest", "linear"])),
        ]
    )


def _cell(pick: Random, shape: Shape) -> nn.Module:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(shape[0], shape[0])

        def forward(self, h: Tensor) -> Tensor:
            return self.cell(h, h.tanh())

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.product = nn.Bilinear(shape[0], shape[0], 3)

        def forward(self, h: Tensor) -> Tensor:
            return self.product(h, F.softsign(h))

    return pick.choice([Cell, Product])()


def _vector_shape(pick: Random, shape: Shape) -> nn.Module:
    return pick.choice([nn.Unflatten(1, (1, -1)), nn.Unflatten(1, (-1, 2)), nn.Flatten()])


def _flatten(pick: Random, shape: Shape) -> nn.Module:
    return nn.Flatten()


_ANY: list[Maker] = [activation, activation, _buffered]

MAKERS: dict[int, list[Maker]] = {
    1: [*_ANY, _linear, _linear, _linear, _norm(0), _parametrised, _cell, _vector_shape],
    2: [
        *_ANY, _linear, _convolution(1), _convolution(1, True), _pool(1), _norm(1), _recurrent,
        _attention, _attention, _parametrised, _sequence_shape,
    ],
    3: [
        *_ANY, *[_convolution(2)] * 5, _convolution(2, True), *[_pool(2)] * 3, _norm(2), _norm(2),
        _parametrised, _skip_layer, _resize, _local, _flatten,
    ],
    4: [*_ANY, *[_convolution(3)] * 3, _convolution(3, True), _pool(3), _norm(3), _flatten],
}  # fmt: skip
"""Makers by the number of dimensions of a sample."""
