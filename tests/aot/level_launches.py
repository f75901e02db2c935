"""Launches of the level kernels: every tile, and the forms in which a kernel is specialised."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor
from wide_offsets import wide_offsets

from bench.compiling import Launch, recorded
from lasem_fast.kernels import level_dgrad, level_forward, level_wgrad
from lasem_fast.kernels.level_geometry import Geometry, arrivals_buffer, output_shape
from lasem_fast.kernels.level_rows import Rows, tables_of
from lasem_fast.kernels.level_tiles import Tile

_MODULES = {"forward": level_forward, "dgrad": level_dgrad, "wgrad": level_wgrad}
_DTYPES = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}


def launches() -> dict[str, Launch]:
    """By name: what each launcher would start for tensors of these shapes."""
    found = {}
    for kind, module in _MODULES.items():
        for tile in module.TENSOR_CORE_TILES:
            pool = 1 if kind == "forward" and tile.accumulators > level_forward.MOST_POOLED else 2
            found |= _level(kind, "bf16", tile, f"pool{pool}", pool=pool)
        for tile in getattr(module, "TF32_TILES", module.TENSOR_CORE_TILES):
            pool = 1 if kind == "forward" and tile.accumulators > level_forward.MOST_POOLED else 2
            found |= _level(kind, "tf32", tile, f"pool{pool}", pool=pool)
        for tile in module.FMA_TILES:
            found |= _level(kind, "fp32", tile, "pool2")
        ragged = getattr(module, "RAGGED_TILES", module.TENSOR_CORE_TILES[1:2])
        for name, tiles in (
            ("bf16", ragged),
            ("tf32", getattr(module, "RAGGED_TF32_TILES", ragged)),
        ):
            for tile in tiles:
                found |= _level(kind, name, tile, "ragged", channels=37, out=19, gapped=True)
        for tile in ragged:
            if kind != "dgrad":
                found |= _level(kind, "bf16", tile, "11x11_3_channels_pool3", channels=3, kernel=11,
                                pool=3, images=True)  # fmt: skip
        tile = module.TENSOR_CORE_TILES[1]
        found |= _level(kind, "fp16", tile, "pool2")
        found |= _level(kind, "bf16", tile, "5x5_pool3", kernel=5, pool=3)
        found |= _level(kind, "bf16", tile, "stride2", stride=2, pool=1)
        found |= _level(kind, "bf16", tile, "gapped", gapped=True)
        found |= _level(kind, "bf16", tile, "one_branch_no_bias_no_relu", branches=1, pool=1,
                        relu=0, biased=False)  # fmt: skip
        found |= _level(kind, "bf16", tile, "int64", wide=True)
        found |= _level(kind, "bf16", None, "linear_8x8x64", size=8, kernel=8, pad=0, pool=1,
                        branches=1, gapped=True)  # fmt: skip
        for tile in module.TENSOR_CORE_TILES:
            if kind != "forward":
                found |= _level(kind, "bf16", tile, "pool2_live", live=True)
            if kind != "wgrad":
                found |= _level(kind, "bf16", tile, "pool1_skip", pool=1, skip="plain")
        if kind != "wgrad":
            tile = module.TENSOR_CORE_TILES[-1]
            found |= _level(kind, "bf16", tile, "pool2_skip", skip="relu after")
            found |= _level(kind, "tf32", tile, "pool1_skip", pool=1, skip="plain")
            found |= _level(kind, "fp32", module.FMA_TILES[0], "pool2_skip", skip="relu after")
    return found


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def _level(
    kind: str, dtype_name: str, tile: Tile | None, form: str, *, size=32, channels=64, out=64,
    kernel=3, stride=1, pad=None, pool=2, relu=1, branches=2, biased=True, gapped=False,
    images=False, wide=False, skip=None, live=False,
) -> dict[str, Launch]:  # fmt: skip
    """The launches of one launcher call on meta tensors, under names that tell them apart."""
    dtype, tf32 = _DTYPES[dtype_name]
    pad = kernel // 2 if pad is None else pad
    conv = (size + 2 * pad - kernel) // stride + 1
    pooled = conv // pool
    geometry = Geometry(
        stride, stride, pad, pad, conv, conv, pool, 0, pooled, pooled, relu, skip == "relu after"
    )
    if images:
        x = _meta(1, 10, channels, size, size).permute(0, 1, 3, 4, 2)
    else:
        x = _meta(8, 10, size, size, channels, dtype=dtype)
    layout = torch.contiguous_format if gapped else torch.channels_last
    weights = [_meta(out, channels, kernel, kernel).contiguous(memory_format=layout)] * branches
    biases = [_meta(out)] * branches if biased else []
    rows = Rows.full(len(x), branches)
    skipped = None
    if skip:
        rows = replace(rows, skips=rows.parents, skip_width=len(x))
        skipped = _meta(len(x), 10, conv, conv, out, dtype=dtype)
    tables = tables_of(rows, branches, x.device)
    y = _meta(*output_shape(len(rows), x, weights, geometry), dtype=dtype)
    code = torch.empty_like(y, dtype=torch.uint8) if geometry.has_code else _meta(0).byte()
    lives = _meta(len(rows), dtype=torch.bool) if live else None
    with ExitStack() as stack:
        if wide:
            stack.enter_context(wide_offsets())
        started = stack.enter_context(recorded())
        if kind == "forward":
            level_forward.level_forward(
                x, weights, biases, skipped, tables, geometry, dtype, tf32, tile
            )
        elif kind == "dgrad":
            level_dgrad.level_dgrad(
                y, code, weights, tables, x.shape, geometry, dtype, live=lives,
                carried=x if skip else None, skip_dtype=dtype if skip else None,
                tf32=tf32, tile=tile,
            )  # fmt: skip
        else:
            level_wgrad.level_wgrad(
                y, code, x, weights, biases, tables, geometry, arrivals_buffer(x),
                live=lives, tf32=tf32, tile=tile,
            )  # fmt: skip
    size_of = "x".join(map(str, tile)) if tile else "default"
    return {
        f"{launch.kernel.__name__.removesuffix('_kernel')}/{dtype_name}/{size_of}/{form}": launch
        for launch in started
    }
