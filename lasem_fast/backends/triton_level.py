"""The `triton` backend: stages and heads of convolutions and linear layers, a launch for each."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lasem_fast._triton_level import DTYPES, level
from lasem_fast.fold import Fold, RowsFirst, folded
from lasem_fast.kernels.level_geometry import Geometry
from lasem_fast.kernels.level_rows import Rows
from lasem_fast.layers import has_hooks, plain_stage, same_form
from lasem_fast.network import tensors_in_force
from lasem_fast.relu_and_pool import ReluAndPool, relu_and_pool
from lasem_fast.transfer import Branch

# Triton itself reads this once, when it is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_MOST_BRANCHES = 2
_LARGEST_KERNEL = 11
# A larger weight that is not channels last is put into that order first: a copy costs less than
# reading it with gaps in every program.
_LARGEST_GAPPED_WEIGHT = 2**16


def triton_level(branches: Sequence[Branch], h: Fold, rows: int) -> RowsFirst | None:
    """A level whose stage is a convolution or a linear layer, with ReLU and a max-pool or without.

    A convolution's weights are best in ``torch.channels_last``: then the level is one launch.

    Args:
        branches: the B branches of a stage.
        h: the level's input, P ``rows`` of images or vectors.
        rows: number of rows P.

    Returns:
        The output with ``P * B`` rows, branch innermost; None for any other stage or input.
    """
    stages = [plain_stage(branch.module) for branch in branches]
    first = stages[0]
    if len(branches) > _MOST_BRANCHES or first is None:
        return None
    if any(not same_form(first, stage) for stage in stages[1:]):
        return None
    behind = relu_and_pool(first.after)
    weights = tensors_in_force(branches, stages, "weight")
    biases = tensors_in_force(branches, stages, "bias")
    if behind is None or weights is None or biases is None:
        return None
    flat = all(_flattens(layer) for layer in first.before)
    if first.before and not (flat and type(first.core) is nn.Linear):
        return None
    biases = [] if biases[0] is None else biases
    return _layer(first.core, weights, biases, behind, h, rows, flat=bool(first.before))


def triton_head(head: nn.Module, h: Fold, rows: int) -> Tensor | None:
    """A head of linear layers with ReLU between them, behind a flatten or not.

    Args:
        head: a task's head.
        h: the leaves, P ``rows`` of images or vectors.
        rows: number of leaves P.

    Returns:
        The logits ``[P * N, K]``, rows outermost; None for any other head or input.
    """
    layers = list(head) if type(head) is nn.Sequential else [head]
    if any(has_hooks(layer) for layer in (head, *layers)):
        return None
    layers = [layer for layer in layers if type(layer) is not nn.Identity]
    flat = bool(layers) and _flattens(layers[0])
    steps = _linear_steps(layers[1:] if flat else layers)
    if not steps:
        return None
    for linear, behind in steps:
        biases = [] if linear.bias is None else [linear.bias]
        h = _layer(linear, [linear.weight], biases, behind, h, rows, flat=flat)
        if h is None:
            return None
    return h.data.flatten(0, 1)


def _flattens(layer: nn.Module) -> bool:
    return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)


def _linear_steps(layers: list[nn.Module]) -> list[tuple[nn.Linear, ReluAndPool]]:
    """Every linear layer with what follows it; empty where there are other layers."""
    starts = [i for i, layer in enumerate(layers) if type(layer) is nn.Linear]
    if not starts or starts[0] != 0:
        return []
    steps = []
    for start, stop in zip(starts, [*starts[1:], len(layers)], strict=True):
        behind = relu_and_pool(layers[start + 1 : stop])
        if behind is None or behind.pool.size > 1:
            return []
        steps.append((layers[start], behind))
    return steps


def _layer(
    core: nn.Module,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    behind: ReluAndPool,
    h: Fold,
    rows: int,
    *,
    flat: bool,
) -> RowsFirst | None:
    """One weighted layer of one or two branches; ``flat``: images are flattened before it."""
    dtype = _dtype(h, [*weights, *biases])
    if dtype is None:
        return None
    x = RowsFirst.of(h if isinstance(h, RowsFirst) else folded(h), rows).data
    if type(core) is nn.Linear:
        form = _linear_form(x, weights, behind, flat)
    elif type(core) is nn.Conv2d:
        form = _convolution_form(core, x, weights, behind)
    else:
        return None
    if form is None:
        return None
    x, weights, geometry = form
    every = Rows.full(rows, len(weights))
    y = level(x, weights, [bias.contiguous() for bias in biases], geometry, every, dtype=dtype)
    return RowsFirst(y.flatten(2) if type(core) is nn.Linear else y)


def _dtype(h: Fold, parameters: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype that PyTorch would compute the layer in; None where the kernels cannot."""
    data = h.data if isinstance(h, RowsFirst) else (h if isinstance(h, Tensor) else h.parts[0])
    if not (data.is_cuda or (_INTERPRETED and data.device.type == "cpu")):
        return None
    if data.dim() not in ((3, 5) if isinstance(h, RowsFirst) else (2, 4)):
        return None
    if any(tensor.device != data.device for tensor in parameters):
        return None
    dtypes = {data.dtype, *(tensor.dtype for tensor in parameters)}
    if not dtypes <= set(DTYPES):
        return None
    device = data.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return dtype if dtype in DTYPES else None
    return data.dtype if len(dtypes) == 1 else None


def _linear_form(
    x: Tensor, weights: Sequence[Tensor], behind: ReluAndPool, flat: bool
) -> tuple[Tensor, list[Tensor], Geometry] | None:
    """A linear layer as a convolution whose kernel is as large as its image."""
    if x.dim() == 3:
        x = x[:, :, None, None]
    elif not flat:
        return None
    height, width, channels = x.shape[2:]
    if weights[0].shape[1] != height * width * channels or 0 in x.shape:
        return None
    weights = [weight.unflatten(1, (channels, height, width)) for weight in weights]
    return x, weights, Geometry(1, 1, 0, 0, 1, 1, 1, 0, 1, 1, int(behind.relu))


def _convolution_form(
    conv: nn.Conv2d, x: Tensor, weights: Sequence[Tensor], behind: ReluAndPool
) -> tuple[Tensor, list[Tensor], Geometry] | None:
    """A convolution's sizes, and its weights in a layout that can be read quickly."""
    kernel = conv.kernel_size
    if conv.dilation != (1, 1) or conv.padding_mode != "zeros" or max(kernel) > _LARGEST_KERNEL:
        return None
    if x.dim() != 5 or x.shape[-1] != weights[0].shape[1] or 0 in x.shape:
        return None
    before, after = _padding(conv)
    sizes = [
        (n + a + b - k) // s + 1
        for n, a, b, k, s in zip(x.shape[2:4], before, after, kernel, conv.stride, strict=True)
    ]
    pooled = [behind.pool.output(size) for size in sizes]
    if min(*sizes, *pooled) < 1:
        return None
    geometry = Geometry(
        *conv.stride, *before, *sizes, behind.pool.size, behind.pool.padding, *pooled,
        int(behind.relu),
    )  # fmt: skip
    return x, [_readable(weight) for weight in weights], geometry


def _padding(conv: nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros before and behind the image, in both directions."""
    if conv.padding == "valid":
        return (0, 0), (0, 0)
    if conv.padding == "same":
        before = tuple((k - 1) // 2 for k in conv.kernel_size)
        return before, tuple(k - 1 - b for k, b in zip(conv.kernel_size, before, strict=True))
    return conv.padding, conv.padding


def _readable(weight: Tensor) -> Tensor:
    gapped = weight.stride(1) != 1 and weight.shape[1] > 1
    if gapped and weight.numel() > _LARGEST_GAPPED_WEIGHT:
        return weight.contiguous(memory_format=torch.channels_last)
    return weight
