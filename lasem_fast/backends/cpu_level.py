"""The `cpp` backend's level: 3x3 and 5x5 convolutions with their epilogue as one C++ kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lasem_fast.backends import cpu_ops
from lasem_fast.backends.operations import Layer, Skip
from lasem_fast.levels.fold import index_tensor
from lasem_fast.levels.plan import Level
from lasem_fast.levels.row_liveness import Liveness


class CpuLevel:
    """The C++ level; see :class:`~lasem_fast.backends.operations.LevelOperation`."""

    carries = False

    def why_not(self, layer: Layer, x: Tensor) -> str:
        return _why_not(layer, x)

    def __call__(
        self,
        layer: Layer,
        x: Tensor,
        level: Level,
        skip: Skip | None,
        liveness: Liveness | None,
        carry: bool = False,
    ) -> Tensor | None:
        return _level(layer, x, level, skip, liveness)


def _why_not(layer: Layer, x: Tensor) -> str:
    conv = layer.core
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is left to PyTorch"
    if conv.kernel_size not in ((3, 3), (5, 5)):
        return f"kernel_size {conv.kernel_size}: the C++ kernels have 3x3 and 5x5"
    if conv.stride != (1, 1) or conv.dilation != (1, 1):
        return f"stride {conv.stride} and dilation {conv.dilation}: the C++ kernels have 1"
    if conv.padding_mode != "zeros" or _padding(conv) not in range(conv.kernel_size[0]):
        return f"padding {conv.padding} of {conv.padding_mode}"
    if conv.groups != 1:
        return f"groups {conv.groups}: the C++ kernels have 1"
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return "under autocast" if x.device.type == "cpu" else f"on {x.device}"
    dtypes = {x.dtype, *(t.dtype for t in (*layer.weights, *layer.biases))}
    if dtypes != {torch.float32}:
        return f"{next(iter(dtypes - {torch.float32}))}: the C++ kernels compute in float32"
    return ""


def _level(
    layer: Layer, x: Tensor, level: Level, skip: Skip | None, liveness: Liveness | None
) -> Tensor | None:
    if x.dim() != 5 or x.shape[-1] != layer.weights[0].shape[1]:
        return None
    filter_size, padding, pool = layer.core.kernel_size[0], _padding(layer.core), layer.pool
    conv_size = tuple(n + 2 * padding - filter_size + 1 for n in x.shape[2:4])
    size = tuple(pool.output(n) for n in conv_size)
    if min(*conv_size, *size) < 1:
        return None
    skip_data = skip_rows = None
    if skip is not None:
        expected = (x.shape[1], *conv_size, layer.weights[0].shape[0])
        if skip.data.shape[1:] != expected or skip.data.dtype != x.dtype:
            return None
        skip_data = skip.data.contiguous()
        skip_rows = None if skip.rows is None else index_tensor(skip.rows, x.device)
    return cpu_ops.winograd_level(
        x.contiguous(),
        [weight.contiguous() for weight in layer.weights],
        [bias.contiguous() for bias in layer.biases],
        parents=index_tensor(level.parents, x.device),
        branches=index_tensor(level.positions, x.device),
        padding=padding, pool=pool.size, pool_pad=pool.padding, out_size=size,
        relu=layer.relu, skip=skip_data, skip_rows=skip_rows, relu_after=layer.relu_after,
        liveness=liveness,
    )  # fmt: skip


def _padding(conv: nn.Conv2d) -> int | None:
    """The padding on every side, of odd filters; None where the sides differ."""
    if conv.padding in ("same", "valid"):
        return conv.kernel_size[0] // 2 if conv.padding == "same" else 0
    return conv.padding[0] if conv.padding[0] == conv.padding[1] else None
