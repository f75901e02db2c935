"""Levels that reach every tile and path of the compiled kernels, and runs of them on the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from host_runs import on_host
from levels import Case, Truth, integers
from torch import Tensor

from bench.compiling import Launch
from lasem_fast.backends.triton_level_op import Tiles, level
from lasem_fast.kernels.level_geometry import Geometry
from lasem_fast.kernels.level_rows import Rows
from lasem_fast.levels.row_liveness import Liveness

# Of GPUs: Ampere's products of a warp, and Hopper's of a warp group.
CAPABILITIES = (80, 90)
# dtype of the products, and whether they round to TF32
PRECISIONS = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}


class Shape(NamedTuple):
    """Sizes of a level; ``skip`` is the row of the skip that is added to each row."""

    channels: int
    out: int
    size: tuple[int, int]
    pool: int = 1
    rows: Rows = Rows((0, 0), (0, 1), 1)
    branches: int = 2
    kernel: int = 3
    stride: int = 1
    pad: int = 1
    pool_pad: int = 0
    relu: int = 1
    relu_after: int = 0
    samples: int = 2
    biased: bool = True
    channels_last: bool = True
    live: tuple[bool, ...] | None = None
    tiles: Tiles = Tiles()


_SOME = Rows((2, 0, 2), (1, 0, 0), 3)
_LARGE = Tiles((64, 64, 64, 4, 3), (64, 64, 64, 4, 3), (64, 64, 32, 4, 5))
_POOLED = Tiles((64, 32, 64, 4, 4), (64, 64, 32, 4, 3), (64, 128, 32, 4, 5))
SHAPES = {
    "3 channels, pool 2": Shape(3, 32, (9, 7), 2),
    "32 channels, pool 3": Shape(32, 24, (8, 10), 3, rows=_SOME, pool_pad=1),
    "64 channels, pool 1": Shape(64, 64, (5, 6), tiles=_LARGE),
    "64 channels, pool 2": Shape(64, 72, (6, 5), 2, tiles=_POOLED),
    "72 channels, skip": Shape(
        72, 64, (5, 4), 1, relu_after=1, live=(True, False, True),
        rows=Rows((2, 0, 2), (1, 0, 0), 3, (1, 0, 1), 2), tiles=_LARGE,
    ),
    "72 channels, skip, pool 2": Shape(
        72, 40, (4, 4), 2, rows=Rows((0, 1), (0, 1), 2, (0, 1), 2), live=(True, True)
    ),
    "17 channels with gaps": Shape(17, 9, (4, 5), 2, rows=_SOME, pool_pad=1, channels_last=False),
    "stride 2, one branch": Shape(32, 16, (9, 9), rows=Rows((1, 0), (0, 0), 2), branches=1,
                                  kernel=5, stride=2, pad=2, relu=0, biased=False),
    "linear": Shape(16, 24, (4, 4), rows=Rows((0, 1), (0, 0), 2), branches=1, kernel=4, pad=0,
                    samples=5, channels_last=False),
}  # fmt: skip


def drawn(shape: Shape, dtype: torch.dtype, values=integers) -> Case:
    """The level with values ``values(*sizes)``: small integers, whose sums are exact."""
    torch.manual_seed(0)
    conv = [(n + 2 * shape.pad - shape.kernel) // shape.stride + 1 for n in shape.size]
    pooled = [(n + 2 * shape.pool_pad - shape.pool) // shape.pool + 1 for n in conv]
    geometry = Geometry(
        shape.stride, shape.stride, shape.pad, shape.pad, *conv, shape.pool, shape.pool_pad,
        *pooled, shape.relu, shape.relu_after,
    )  # fmt: skip
    layout = torch.channels_last if shape.channels_last else torch.contiguous_format
    weights = [
        values(shape.out, shape.channels, shape.kernel, shape.kernel).contiguous(
            memory_format=layout
        )
        for _ in range(shape.branches)
    ]
    biases = [values(shape.out) for _ in range(shape.branches)] if shape.biased else []
    x = values(shape.rows.width, shape.samples, *shape.size, shape.channels)
    skip = None
    if shape.rows.skips:
        skip = values(shape.rows.skip_width, shape.samples, *conv, shape.out)
    live = None if shape.live is None else torch.tensor(shape.live)
    return Case(x, weights, biases, geometry, False, dtype, shape.rows, skip, live)


def run(
    case: Case, dy: Tensor, capability: int, tiles: Tiles, *, tf32: bool = False,
    boxes: bool = False, to_input: bool = True, launches: list[Launch] | None = None, **options,
) -> Truth:  # fmt: skip
    """Output and gradients by the library's operator, its launches run on the host.

    Parameters are float32, as under autocast. What must not be read is NaN: parents without a row,
    and ``dy`` of rows that are not live. The input's gradient is NaN where nobody asks for it.

    Args:
        boxes: whether operands are read in boxes.
        to_input: whether the input gets a gradient.
        launches: to which all of them are added.
        options: of :func:`host_runs.on_host`.
    """
    x = case.x.to(case.dtype, copy=True)
    x[[p for p in range(case.rows.width) if p not in case.rows.parents]] = torch.nan
    case = case._replace(x=x)
    dtypes = [x.dtype] + [torch.float32] * (len(case.leaves) - 1)
    if case.skip is not None:
        dtypes[-1] = case.dtype
    leaves = [
        leaf.detach().to(dtype).requires_grad_()
        for leaf, dtype in zip(case.leaves, dtypes, strict=True)
    ]
    leaves[0].requires_grad_(to_input)
    case, liveness = case.with_leaves(leaves), None
    dy = dy.to(case.dtype, copy=True).contiguous()
    if case.live is not None:
        dy[~case.live] = torch.nan
        liveness = Liveness()
        liveness.live = case.live
    settings = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32" if tf32 else "ieee"
        with on_host(capability, **options) as started:
            y = level(
                case.x, case.weights, case.biases, case.geometry, case.rows, dtype=case.dtype,
                skip=case.skip, liveness=liveness, tiles=tiles, boxes=boxes,
            )  # fmt: skip
            wanted = leaves if to_input else leaves[1:]
            rest = torch.autograd.grad(y, wanted, dy)
            dx, *rest = rest if to_input else (torch.full_like(case.x, torch.nan), *rest)
        if launches is not None:
            launches += started
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
    branches = len(case.weights)
    ends = branches, branches + len(case.biases)
    return Truth(y.detach(), dx, tuple(rest[: ends[0]]), tuple(rest[ends[0] : ends[1]]),
                 tuple(rest[ends[1] :]))  # fmt: skip


def results(truth: Truth) -> dict[str, Tensor]:
    """Output and gradients by name."""
    found = {}
    for name, value in truth._asdict().items():
        several = value if isinstance(value, tuple) else (value,)
        found |= {f"{name}[{i}]": tensor for i, tensor in enumerate(several)}
    return found


def exact(got: Truth, want: Truth) -> None:
    """Every sum is exact, so that only one result is right, rounded once to the dtype at hand."""
    right = results(want)
    for key, value in results(got).items():
        assert torch.equal(value, right[key].to(value.dtype)), key
