"""Levels and heads in plain PyTorch, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasem_fast._host_values import is_transformed
from lasem_fast.backends.head_front import head_front
from lasem_fast.backends.operations import Layer, Normed, Skip
from lasem_fast.backends.wide_core import Wide, is_taken, wide_core
from lasem_fast.levels.fold import Fold, folded, in_order, index_tensor
from lasem_fast.levels.plan import Level
from lasem_fast.levels.row_liveness import Liveness, passed_over
from lasem_fast.networks.batch_norm import normalised
from lasem_fast.networks.layers import PlainStage, core_like, plain_stage
from lasem_fast.networks.network import tensors_in_force
from lasem_fast.transfer import Branch

# Measured with PyTorch 2.13 and oneDNN on two cores.
_MANY_PIXELS, _MANY_VALUES = 256, 2**15
# Multiplications whose half takes no longer than to find out that it may be left out.
_FEW_PRODUCTS = 2**25


def wide_level(
    branches: Sequence[Branch], h: Fold, rows: int, liveness: Liveness | None = None
) -> Tensor | None:
    """A level on which every row goes through every branch, as one wide layer.

    Args:
        branches: the B branches of a stage.
        h: the level's input, folded ``[N * P, ...]``.
        rows: number of rows P.
        liveness: which rows a later backward has to look at; None: all.

    Returns:
        The output ``[N * P * B, ...]``, branch innermost; None unless every branch is one
        convolution or linear layer between parameter-free layers, of the same form.
    """
    wide = _wide(branches)
    if wide is None:
        return None
    stage, weights = wide
    h, after = folded(h), stage.after
    for layer in stage.before:
        h = layer(h)
    if isinstance(stage.core, nn.Linear) and h.dim() != 2:
        return None
    relu = len(after) > 0 and type(after[0]) is nn.ReLU
    leaves_out = liveness is not None and torch.is_grad_enabled()
    # a compiler, for which nothing is taken, is not to depend on sizes
    turned = not torch.compiler.is_compiling() and _gains_by_turning(stage, h, rows)
    taken = (turned or leaves_out) and is_taken(stage.core, h)
    turned = turned and taken
    if leaves_out and taken and not turned and _saves_little(h, weights["weight"]):
        h = _with_weights(stage.core, weights, h)
    elif turned or (taken and leaves_out):
        how = Wide(
            stage.core,
            rows=range(rows * len(branches)),
            branches=len(branches),
            relu=relu and turned,
            rows_first=turned,
            turned=turned,
        )
        h = wide_core(how, h, weights["weight"], weights.get("bias"), liveness)
    else:
        h = _with_weights(stage.core, weights, h)
        passed_over(liveness)
    if relu and not turned:
        h = h.relu_()
    for layer in after[1:] if relu else after:
        h = layer(h)
    if turned:
        return _turned_back(h, rows, len(branches))
    return _branches_into_batch(h, len(branches))


def _saves_little(h: Tensor, weight: Tensor) -> bool:
    """Whether a layer on the net's input is so small that its backward need not leave rows out."""
    return not h.requires_grad and h.numel() * (weight.numel() // weight.shape[1]) < _FEW_PRODUCTS


def _gains_by_turning(stage: PlainStage, h: Tensor, rows: int) -> bool:
    """Whether a CPU is faster at the stage's images with rows outermost and channels last.

    Max-pools are; the batch has to be put into that order and back for it, and over small images
    convolutions take longer. Dropout draws its masks in the batch's order.
    """
    if type(stage.core) is not nn.Conv2d or h.dim() != 4:
        return False
    # by row: one tells how much memory all take
    if h.numel() < rows * _MANY_VALUES or h.shape[2] * h.shape[3] < _MANY_PIXELS:
        return False
    kinds = set(map(type, stage.after))
    return nn.MaxPool2d in kinds and kinds <= {nn.ReLU, nn.MaxPool2d, nn.Identity}


def _turned_back(h: Tensor, rows: int, branches: int) -> Tensor:
    """``[P * N, B * K, H, W]``, channels last, as ``[N * P * B, K, H, W]``."""
    split = _GradientLast.apply(h).unflatten(0, (rows, -1)).unflatten(2, (branches, -1))
    return split.transpose(0, 1).flatten(0, 2)


class _GradientLast(torch.autograd.Function):
    """The same values, whose gradient has its channels last."""

    @staticmethod
    def forward(ctx, h):
        return h.view_as(h)

    @staticmethod
    def backward(ctx, dh):
        return dh.contiguous(memory_format=torch.channels_last)


class TorchLevel:
    """Any layer in PyTorch; see :class:`~lasem_fast.backends.operations.LevelOperation`."""

    carries = False

    def why_not(self, layer: Layer, x: Tensor) -> str:
        return ""

    def __call__(
        self,
        layer: Layer,
        x: Tensor,
        level: Level,
        skip: Skip | None,
        liveness: Liveness | None,
        carry: bool = False,
    ) -> Tensor:
        return run_level(layer, x, level, skip, liveness)


def run_level(
    layer: Layer, x: Tensor, level: Level, skip: Skip | None, liveness: Liveness | None = None
) -> Tensor:
    """Any layer on any list of rows, rows outermost and channels last.

    Args:
        layer: the layer in all its branches.
        x: the parents, images ``[P, N, H, W, C]`` or vectors ``[P, N, F]``.
        level: the rows.
        skip: what is added behind the layer's first ReLU, or None.
        liveness: which rows a later backward has to look at; None: all.

    Returns:
        The R rows, ``[R, N, H', W', C']`` or ``[R, N, F']``.
    """
    samples = x.shape[1]
    # side by side, grouped convolutions would read each other's channels
    if level.is_full and getattr(layer.core, "groups", 1) == 1:
        wide = {"weight": torch.cat(layer.weights)}
        if layer.biases:
            wide["bias"] = torch.cat(layer.biases)
        y = _core(layer, x, wide, liveness, tuple(range(len(level))))
        y = _branches_into_rows(_end(layer, y, skip), level.width, len(layer.weights))
    else:
        parts = []
        for b, branch in enumerate(level.used_branches):
            own = {"weight": layer.weights[b]}
            if layer.biases:
                own["bias"] = layer.biases[b]
            numbers, parents = level.parents_of(branch), x
            if numbers != tuple(range(level.width)):
                parents = x.index_select(0, index_tensor(numbers, x.device))
            y = _core(layer, parents, own, liveness, level.rows_of(branch))
            parts.append(_end(layer, y, skip))
        y = in_order(torch.cat(parts), len(level), level.merge_order())
    if skip is not None:
        y = _pooled(layer, y + _channels_first(_added(skip)))
    if y.dim() == 4:
        y = y.permute(0, 2, 3, 1)
    return y.unflatten(0, (len(level), samples))


def run_norm(
    layer: Layer, y: Tensor, level: Level, skip: Skip | None, liveness: Liveness | None = None
) -> Normed:
    """What follows the core of a layer with a batch norm, each row by itself.

    See :class:`~lasem_fast.backends.operations.NormOperation`.
    """
    rows, samples = y.shape[:2]
    norm, positions = layer.norm, index_tensor(level.positions, y.device)
    apart = y.permute(1, 0, 4, 2, 3).flatten(1, 2)  # [N, R * C, H, W]
    scale, shift = (torch.stack(of)[positions].flatten() if of else None
                    for of in (norm.weights, norm.biases))  # fmt: skip
    out, statistics = normalised(norm.layers[0], apart, rows, scale, shift)
    out = out.unflatten(1, (rows, -1)).transpose(0, 1).flatten(0, 1)  # [R * N, C, H, W]
    out = out.permute(0, 2, 3, 1).unflatten(0, (rows, samples))
    return Normed(run_rest(layer, out, skip, liveness), statistics)


def run_group_norm(layer: Layer, y: Tensor, level: Level) -> Tensor:
    """The group norm of a layer alone, of ``[R, N, H, W, C]``, each sample's own."""
    norm, positions = layer.norm, index_tensor(level.positions, y.device)
    images = F.group_norm(y.flatten(0, 1).permute(0, 3, 1, 2), norm.groups, eps=norm.eps)
    out = images.permute(0, 2, 3, 1).unflatten(0, y.shape[:2])
    if not norm.weights:
        return out
    scale, shift = (torch.stack(of)[positions][:, None, None, None]
                    for of in (norm.weights, norm.biases))  # fmt: skip
    return torch.addcmul(shift, out, scale)


def run_rest(
    layer: Layer, y: Tensor, skip: Skip | None, liveness: Liveness | None = None
) -> Tensor:
    """What follows core and norm of a layer, of ``[R, N, H, W, C]`` or ``[R, N, F]``."""
    passed_over(liveness)
    if layer.activation is not None:
        # what another operation made may be a view, which is not to be written to
        y = layer.activation(y.clone() if getattr(layer.activation, "inplace", False) else y)
    elif layer.relu:
        y = y.relu()
    if skip is not None:
        y = y + _added(skip)
    if layer.pool.size == 1:
        return y.relu() if layer.relu_after else y
    pooled = _pooled(layer, y.flatten(0, 1).permute(0, 3, 1, 2))
    return pooled.permute(0, 2, 3, 1).unflatten(0, y.shape[:2])


def _added(skip: Skip) -> Tensor:
    """What each row adds, ``[R, N, H, W, C]``."""
    if skip.rows is None:
        return skip.data
    return skip.data.index_select(0, index_tensor(skip.rows, skip.data.device))


def _end(layer: Layer, y: Tensor, skip: Skip | None) -> Tensor:
    """What follows the core and needs no skip: before rows are put in order, which moves less."""
    if layer.relu:
        y = y.relu()
    return _pooled(layer, y) if skip is None else y


def _pooled(layer: Layer, y: Tensor) -> Tensor:
    """The end of the epilogue: second ReLU and max-pool."""
    if layer.relu_after:
        y = y.relu()
    if layer.pool.size > 1:
        y = F.max_pool2d(y, layer.pool.size, padding=layer.pool.padding, ceil_mode=layer.pool.ceil)
    return y


def _core(
    layer: Layer,
    x: Tensor,
    weights: dict[str, Tensor],
    liveness: Liveness | None,
    rows: tuple[int, ...],
) -> Tensor:
    """The convolution or linear layer on all rows of ``x``, channels first, rows outermost.

    ``rows``: for each row of ``x`` and each branch whose weights these are, branch innermost, the
    level's row.
    """
    parents = x.shape[0]
    x = _channels_first(x)
    if layer.flatten:
        x = x.flatten(1)
    if weights["weight"].dim() == 4:  # pool and next level want its outputs channels-last, too
        x = x.contiguous(memory_format=torch.channels_last)
        if x.device.type != "cpu":
            weights["weight"] = weights["weight"].contiguous(memory_format=torch.channels_last)
    if liveness is not None and torch.is_grad_enabled() and is_taken(layer.core, x):
        how = Wide(layer.core, rows, len(rows) // parents, rows_first=True)
        return wide_core(how, x, weights["weight"], weights.get("bias"), liveness)
    passed_over(liveness)
    return _with_weights(layer.core, weights, x)


def _with_weights(core: nn.Module, weights: dict[str, Tensor], h: Tensor) -> Tensor:
    """A plain layer with other weights; it is not touched, because other threads may run it."""
    weight, bias = weights["weight"], weights.get("bias")
    if type(core) is nn.Linear:
        return F.linear(h, weight, bias)
    return core._conv_forward(h, weight, bias)


def _channels_first(x: Tensor) -> Tensor:
    x = x.flatten(0, 1)
    return x.permute(0, 3, 1, 2) if x.dim() == 4 else x


def _branches_into_rows(y: Tensor, rows: int, branches: int) -> Tensor:
    """``[P * N, B * K, ...]`` as ``[P * B * N, K, ...]``, images with their channels last."""
    if branches == 1:
        return y
    if y.dim() != 4:
        return y.unflatten(1, (branches, -1)).unflatten(0, (rows, -1)).transpose(1, 2).flatten(0, 2)
    split = y.permute(0, 2, 3, 1).unflatten(3, (branches, -1)).unflatten(0, (rows, -1))
    return split.permute(0, 4, 1, 2, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


def _wide(branches: Sequence[Branch]) -> tuple[PlainStage, dict[str, Tensor]] | None:
    """A stage's layers, and its branches' weights as those of one wide layer; None if not plain."""
    if len(branches) == 1:
        return None
    first = plain_stage(branches[0].module)
    if first is None:
        return None
    layers = [(first.name, first.core)]
    for branch in branches[1:]:
        layer = core_like(first, branch.module)
        if layer is None:
            return None
        layers.append(layer)
    wide = {}
    for name in ("weight", "bias"):
        tensors = tensors_in_force(branches, layers, name)
        if tensors is None:
            return None
        if tensors[0] is not None:
            wide[name] = torch.cat(tensors)
    return first, wide


def _branches_into_batch(h: Tensor, branches: int) -> Tensor:
    """``[N, B * K, ...]`` as ``[N * B, K, ...]``: a view, but for channels-last activations."""
    if (
        h.dim() == 4
        and not h.is_contiguous()
        and not is_transformed()  # vmap does not know of memory formats
        and h.is_contiguous(memory_format=torch.channels_last)
    ):
        split = h.unflatten(1, (branches, -1)).permute(0, 1, 3, 4, 2)
        return split.flatten(0, 1).permute(0, 3, 1, 2)
    samples, channels, *pixels = h.shape
    return h.reshape(samples * branches, channels // branches, *pixels)


def channels_last_head(
    head: nn.Module, h: Fold, rows: int, order: Sequence[int] | None = None
) -> Tensor | None:
    """A head that flattens images and goes on with a linear layer, on channels-last images.

    The linear layer's weight is put into the images' order instead of the images into its own,
    which moves less memory.

    Args:
        head: a task's head.
        h: the leaves, images with rows outermost and channels last.
        rows: number of leaves P.
        order: for each row of the result, its leaf, in the order that masks are drawn in; None: as
            they are.

    Returns:
        The logits ``[P * N, K]``, rows outermost; None for any other head or form, and where the
        weight is the larger one.
    """
    front = head_front(head, h, rows)
    if front is None:
        return None
    images = front.images()
    pixels, channels = images.shape[1:]
    weight = front.weight().unflatten(1, (channels, pixels)).transpose(1, 2).flatten(1)
    out = front.go_on(F.linear(images.flatten(1), weight, front.linear.bias))
    return in_order(out, rows, order)
