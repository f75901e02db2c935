"""The `triton` backend: stages of convolutions and linear layers, in one of two kernel families."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from lasem_fast.backends.operations import Layer, Skip
from lasem_fast.backends.triton_level_op import DTYPES
from lasem_fast.backends.triton_level_op import level as run_level
from lasem_fast.kernels.box_form import BOX_ALIGNMENT, box_form
from lasem_fast.kernels.kept import kept
from lasem_fast.kernels.level_geometry import Geometry
from lasem_fast.kernels.level_rows import Rows
from lasem_fast.levels.plan import Level
from lasem_fast.levels.relu_and_pool import Pool
from lasem_fast.levels.row_liveness import Liveness

# Triton itself reads this once, when it is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# It takes the bits of such numbers for the numbers; the tests' sanitiser mends that.
_INTERPRETS_BFLOAT16 = False
_MOST_BRANCHES = 2
_LARGEST_KERNEL = 11
# A larger weight that is not channels last is put into that order first: a copy costs less than
# reading it with gaps in every program.
_LARGEST_GAPPED_WEIGHT = 2**16
# Floating-point operations of a branch with all parents, and pixels.
_MOST_TF32, _MOST_FP32, _SMALL_IMAGE = 2e9, 1e8, 64
# Bytes of an unfolded input.
_MOST_UNFOLDED = 2**30
# Where launches take longer than what they do, the fewest are best: output pixels of a branch, and
# values of a filter, of a convolution that would be unfolded; and rows of a product that is summed
# in a few steps. By bench.model.
_FEW_PIXELS, _FEW_VALUES, _FEW_ROWS = 2**14, 32, 256


class GatherLevel:
    """A convolution or linear layer with its epilogue; a launch forward, at most two backward.

    Its kernels read their operands element by element, whatever they are. A convolution's weights
    are best in ``torch.channels_last``: then nothing is copied. See
    :class:`~lasem_fast.backends.operations.LevelOperation`.
    """

    carries = True

    def why_not(self, layer: Layer, x: Tensor) -> str:
        if len(layer.weights) > _MOST_BRANCHES:
            return f"{len(layer.weights)} branches: the Triton kernels have {_MOST_BRANCHES}"
        if not (x.is_cuda or (_INTERPRETED and x.device.type == "cpu")):
            return f"on {x.device}: the Triton kernels run on CUDA devices"
        dtype = computed_in(x, [*layer.weights, *layer.biases])
        if dtype is None:
            return f"{x.dtype} inputs and {layer.weights[0].dtype} weights"
        if dtype == torch.bfloat16 and not (x.is_cuda or _INTERPRETS_BFLOAT16):
            return "bfloat16: Triton's interpreter cannot compute with it"
        conv = layer.core
        if type(conv) is nn.Conv2d:
            if max(conv.kernel_size) > _LARGEST_KERNEL:
                return f"kernel_size {conv.kernel_size}: the Triton kernels go to {_LARGEST_KERNEL}"
            if conv.dilation != (1, 1) or conv.padding_mode != "zeros":
                return f"dilation {conv.dilation}, padding of {conv.padding_mode}"
        return ""

    def __call__(
        self,
        layer: Layer,
        x: Tensor,
        level: Level,
        skip: Skip | None,
        liveness: Liveness | None,
        carry: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor] | None:
        form = _form(layer.core, x, layer.weights, layer.flatten, layer)
        if form is None:
            return None
        images, weights, geometry = form
        dtype = computed_in(x, [*layer.weights, *layer.biases])
        skips, width, data = (), 0, None
        if skip is not None:
            data = skip.data
            expected = (x.shape[1], geometry.conv_h, geometry.conv_w, weights[0].shape[0])
            if data.shape[1:] != expected or data.dtype not in DTYPES:
                return None
            width = data.shape[0]
            skips = tuple(range(width)) if skip.rows is None else skip.rows
        rows = _rows(level, skips, width)
        carry = carry and images is x
        boxes = self._in_boxes(images, weights, geometry, dtype, skip)
        if boxes is None:
            return None
        if not boxes:
            weights = [_readable(weight) for weight in weights]
        biases = [bias.contiguous() for bias in layer.biases]
        out = run_level(
            images, _of_one_dtype(weights, dtype), _of_one_dtype(biases, dtype), geometry, rows,
            dtype=dtype, skip=data, liveness=liveness, carry=carry, boxes=boxes,
            gathers_back=boxes and _sums_little(images, weights, geometry, rows),
        )  # fmt: skip
        y, carried = out if carry else (out, x)
        y = y.flatten(2) if type(layer.core) is nn.Linear else y
        return (y, carried) if carry else y

    def _in_boxes(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        geometry: Geometry,
        dtype: torch.dtype | None,
        skip: Skip | None,
    ) -> bool | None:
        """Whether operands are read in boxes; None: the level is not for these kernels."""
        return False


class BoxLevel(GatherLevel):
    """The same with operands that are read in boxes (TMA): on sm_90, for products of 16 bits.

    Two launches forward, one more each for a pool of 3 and a stride; at most three backward, four
    over rows that are put together. It does not take what cannot be read so.
    """

    def why_not(self, layer: Layer, x: Tensor) -> str:
        if why := super().why_not(layer, x):
            return why
        if x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0):
            return f"on {x.device}: boxes need a device of compute capability 9.0"
        return ""

    def _in_boxes(self, x, weights, geometry, dtype, skip):
        return _can_be_boxes(x, weights, geometry, dtype, skip) or None


class TritonLevel(GatherLevel):
    """In boxes where device and level allow it, else gathering.

    Of levels whose operands have 32 bits some are left to PyTorch, see :func:`is_for_pytorch`.
    """

    def _in_boxes(self, x, weights, geometry, dtype, skip):
        if x.is_cuda and dtype == torch.float32:
            return None if is_for_pytorch(x.shape, weights[0].shape, geometry) else False
        # where a tensor lies is not known while it is traced
        if not x.is_cuda or torch.compiler.is_compiling():
            return False
        # later devices have other matrix units, with which boxes were never run
        if torch.cuda.get_device_capability(x.device)[0] != 9:
            return False
        return _can_be_boxes(x, weights, geometry, dtype, skip)


def is_for_pytorch(x_shape: Sequence[int], weight_shape: Sequence[int], geometry: Geometry) -> bool:
    """Whether cuDNN should be faster at a product of 32 bits than the gathering kernels.

    At convolutions: in TF32 at all that are not small, in float32 where images are large too. From
    whole steps on an H100 (bench/results).
    """
    if geometry.covers(x_shape, weight_shape):
        return False
    operations = 2 * prod((*x_shape[:2], geometry.conv_h, geometry.conv_w, *weight_shape))
    if torch.backends.cudnn.conv.fp32_precision == "tf32":
        return operations > _MOST_TF32
    return operations > _MOST_FP32 and geometry.conv_h * geometry.conv_w > _SMALL_IMAGE


def _can_be_boxes(
    x: Tensor,
    weights: Sequence[Tensor],
    geometry: Geometry,
    dtype: torch.dtype | None,
    skip: Skip | None,
) -> bool:
    """Whether a level's operands can be read in boxes."""
    unfolds = _unfolds_to_boxes(
        tuple(x.shape), x.stride(), x.dtype, tuple(weights[0].shape), geometry, dtype,
        skip is not None,
    )  # fmt: skip
    if unfolds is None:
        return False
    # its gradient would have to be folded again
    return not x.requires_grad if unfolds else x.data_ptr() % BOX_ALIGNMENT == 0


@kept
def _unfolds_to_boxes(
    x: tuple[int, ...], strides: tuple[int, ...], x_dtype: torch.dtype, weight: tuple[int, ...],
    geometry: Geometry, dtype: torch.dtype | None, has_skip: bool,
) -> bool | None:  # fmt: skip
    """Whether a level that can be read in boxes has to be unfolded for it; None: it cannot be."""
    from lasem_fast.kernels import boxes  # and triton with it

    if 0 in x:
        return None
    form = box_form(x, weight, geometry)
    if boxes.why_not(form.geometry, form.channels, weight[0], dtype, has_skip):
        return None
    if form.unfolds:
        # columns are many times as large as the input
        small = x[0] == 1 and prod(form.x_shape) * dtype.itemsize <= _MOST_UNFOLDED
        few = prod(form.x_shape[:4]) <= _FEW_PIXELS and prod(weight[1:]) <= _FEW_VALUES
        return True if small and not few and not has_skip else None
    if x_dtype != dtype:
        return None
    like = torch.empty_strided(x, strides, dtype=x_dtype, device="meta")
    if form.x_shape[2:4] != x[2:4] and not like[0, 0].is_contiguous():
        return None
    return False if boxes.can_read(like.view(form.x_shape)) else None


def _sums_little(x: Tensor, weights: Sequence[Tensor], geometry: Geometry, rows: Rows) -> bool:
    """Whether the backward of a level in boxes has so little to sum that gathering is best."""
    if not geometry.covers(x.shape, weights[0].shape):
        return False
    return max(map(rows.branches.count, range(len(weights)))) * x.shape[1] <= _FEW_ROWS


def computed_in(x: Tensor, parameters: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype that PyTorch would compute the layer in; None where the kernels cannot."""
    if any(tensor.device != x.device for tensor in parameters):
        return None
    dtypes = {x.dtype, *(tensor.dtype for tensor in parameters)}
    if not dtypes <= set(DTYPES):
        return None
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return dtype if dtype in DTYPES else None
    return x.dtype if len(dtypes) == 1 else None


@kept
def _rows(level: Level, skips: tuple[int, ...], skip_width: int) -> Rows:
    return Rows(level.parents, level.positions, level.width, skips, skip_width)


def _form(
    core: nn.Module, x: Tensor, weights: Sequence[Tensor], flat: bool, layer: Layer
) -> tuple[Tensor, list[Tensor], Geometry] | None:
    """A layer as the kernels take it; None where sizes do not fit."""
    if type(core) is nn.Linear:
        return _linear_form(x, weights, layer, flat)
    return _convolution_form(core, x, weights, layer)


def _linear_form(
    x: Tensor, weights: Sequence[Tensor], layer: Layer, flat: bool
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
    relus = int(layer.relu), int(layer.relu_after)
    return x, weights, Geometry(1, 1, 0, 0, 1, 1, 1, 0, 1, 1, *relus)


def _convolution_form(
    conv: nn.Conv2d, x: Tensor, weights: Sequence[Tensor], layer: Layer
) -> tuple[Tensor, list[Tensor], Geometry] | None:
    """A convolution's sizes."""
    if x.dim() != 5 or x.shape[-1] != weights[0].shape[1] or 0 in x.shape:
        return None
    geometry = _geometry(
        tuple(x.shape[2:4]), conv.kernel_size, conv.stride, conv.padding, layer.pool,
        bool(layer.relu), bool(layer.relu_after),
    )  # fmt: skip
    return None if geometry is None else (x, weights, geometry)


@kept
def _geometry(
    image: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int] | str, pool: Pool, relu: bool, relu_after: bool,
) -> Geometry | None:  # fmt: skip
    """A convolution's sizes; None where nothing would come out."""
    before, after = _zeros(kernel, padding)
    sizes = [
        (n + a + b - k) // s + 1
        for n, a, b, k, s in zip(image, before, after, kernel, stride, strict=True)
    ]
    pooled = [pool.output(size) for size in sizes]
    if min(*sizes, *pooled) < 1:
        return None
    return Geometry(
        *stride, *before, *sizes, pool.size, pool.padding, *pooled, int(relu), int(relu_after)
    )


def _zeros(
    kernel: tuple[int, int], padding: tuple[int, int] | str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many before and behind the image, in both directions."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        before = tuple((k - 1) // 2 for k in kernel)
        return before, tuple(k - 1 - b for k, b in zip(kernel, before, strict=True))
    return padding, padding


def _of_one_dtype(parameters: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """As they are, or in the product's dtype where they differ: a branch may be computed."""
    if len({parameter.dtype for parameter in parameters}) < 2:
        return parameters
    return [parameter.to(dtype) for parameter in parameters]


def _readable(weight: Tensor) -> Tensor:
    gapped = weight.stride(1) != 1 and weight.shape[1] > 1
    if gapped and weight.numel() > _LARGEST_GAPPED_WEIGHT:
        return weight.contiguous(memory_format=torch.channels_last)
    return weight
