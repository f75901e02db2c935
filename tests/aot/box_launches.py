"""Launches of the kernels that read boxes: every tile, on sm_90 alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bench.compiling import Launch, recorded
from lasem_fast.kernels import (
    box_dgrad,
    box_forward,
    box_gradient,
    box_wgrad,
    level_wgrad,
    many_copies,
    unfolded,
    weight_copies,
)
from lasem_fast.kernels.box_form import Filters, box_form
from lasem_fast.kernels.level_geometry import Geometry, arrivals_buffer
from lasem_fast.kernels.level_rows import Rows, tables_of
from lasem_fast.kernels.level_tiles import Tile

_PARENTS, _SAMPLES, _SIZE = 8, 10, 32


def launches() -> dict[str, Launch]:
    """By name: what each launcher would start for tensors of these shapes."""
    found = {}
    for tile in box_forward.TILES:
        for pool in (1, 2):
            found |= _forward(tile, f"pool{pool}", pool=pool)
    tile = box_forward.TILES[0]
    found |= _forward(tile, "fp16", pool=2, dtype=torch.float16)
    found |= _forward(tile, "pool1_skip", pool=1, skip=True)
    found |= _forward(tile, "pool2_skip", pool=2, skip=True)
    found |= _forward(tile, "pool3", pool=3)
    found |= _forward(tile, "one_branch_no_bias_no_relu", pool=1, branches=1, plain=True)
    for tile in box_dgrad.TILES:
        found |= _backward(tile, box_wgrad.TILES[1], "pool2")
    for tile in box_wgrad.TILES:
        found |= _backward(box_dgrad.TILES[0], tile, "pool2")
        found |= _backward(box_dgrad.TILES[0], tile, "pool2_live", live=True)
        found |= _backward(box_dgrad.TILES[0], tile, "one_part", parents=2, samples=1, size=4)
    tiles = box_dgrad.TILES[0], box_wgrad.TILES[1]
    found |= _backward(*tiles, "fp16", dtype=torch.float16)
    found |= _backward(*tiles, "pool1_skip", pool=1, skip=True)
    found |= _backward(*tiles, "pool2_skip_live", skip=True, live=True)
    found |= _backward(*tiles, "pool3", pool=3)
    found |= _backward(*tiles, "one_branch_no_bias_no_relu", pool=1, branches=1, plain=True)
    found |= _linear()
    # a pixel of many images in a box, which leaves taps out
    found |= _forward(box_forward.TILES[0], "small", pool=1, samples=128, size=2)
    found |= _backward(*tiles, "small", pool=1, samples=128, size=2)
    found |= _backward(*tiles, "small_live", pool=1, live=True, samples=128, size=2)
    return found | _unfolded() | _mended()


def _mended() -> dict[str, Launch]:
    """A sum that is made anew where one says that it is NaN."""
    x, weights, biases, geometry, rows = _problem(torch.bfloat16, 2, 2, False, False)
    dy = _meta(len(rows), _SAMPLES, geometry.out_h, geometry.out_w, 64, dtype=torch.bfloat16)
    code, spoilt = torch.empty_like(dy, dtype=torch.uint8), _meta(1, dtype=torch.int32)
    with recorded() as started:
        level_wgrad.mend_wgrad(
            spoilt, weights, biases, dy, code, x, tables_of(rows, 2, x.device), geometry
        )
    return {
        f"{launch.kernel.__name__.removesuffix('_kernel')}/mended": launch for launch in started
    }


def _linear() -> dict[str, Launch]:
    """Behind the flatten of a small mini-batch: a sum that is cut into parts."""
    x = _meta(1, 16 * _SAMPLES, 1, 1, 4096, dtype=torch.bfloat16)
    filters = Filters(_meta(64, 1, 4096, dtype=torch.bfloat16), arrivals_buffer(x), 1, (1, 1))
    geometry = Geometry(1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1)
    tables = tables_of(Rows.full(1, 1), 1, x.device)
    with recorded() as started:
        box_forward.box_forward(x, filters, [_meta(64)], None, tables, geometry)
    assert started[0].arguments["PARTS"] > 1
    return _named(started, "in_parts")


def _unfolded() -> dict[str, Launch]:
    geometry = Geometry(2, 2, 3, 3, 16, 16, 1, 0, 16, 16, 1)
    x = _meta(1, _SAMPLES, _SIZE, _SIZE, 3)
    form = box_form(x.shape, (64, 3, 7, 7), geometry)
    with recorded() as started:
        unfolded.unfolded(x, (7, 7), geometry, form, torch.bfloat16)
        weight_copies.weight_copies([_meta(64, 3, 7, 7)] * 2, torch.bfloat16, form)
        many_copies.ManyCopies([([_meta(64, 3, 7, 7)] * 2, form)] * 2, torch.bfloat16)()
    return _named(started, "unfolded")


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def _problem(
    dtype, pool, branches, plain, skip, parents=_PARENTS, samples=_SAMPLES, size=_SIZE
):  # fmt: skip
    x = _meta(parents, samples, size, size, 64, dtype=dtype)
    weights = [_meta(64, 64, 3, 3)] * branches
    biases = [] if plain else [_meta(64)] * branches
    out = size // pool
    geometry = Geometry(
        1, 1, 1, 1, size, size, pool, 0, out, out, int(not plain), int(skip and pool > 1)
    )
    rows = Rows.full(parents, branches)
    if skip:
        rows = replace(rows, skips=rows.parents, skip_width=parents)
    return x, weights, biases, geometry, rows


def _named(started: list[Launch], form: str) -> dict[str, Launch]:
    found = {}
    for launch in started:
        sizes = ("IMAGES", "BOX_H", "BOX_W", "ROWS", "COLUMNS", "DEPTH")
        size = "x".join(str(launch.arguments[s]) for s in sizes if s in launch.arguments)
        kernel = launch.kernel.__name__.removesuffix("_kernel")
        found[f"{kernel}/{size}/{form}"] = launch
    return found


def _forward(
    tile: Tile, form: str, *, pool: int, dtype=torch.bfloat16, branches=2, plain=False, skip=False,
    **sizes: int,
) -> dict[str, Launch]:  # fmt: skip
    x, weights, biases, geometry, rows = _problem(dtype, pool, branches, plain, skip, **sizes)
    added = _meta(_PARENTS, _SAMPLES, _SIZE, _SIZE, 64, dtype=dtype) if skip else None
    tables = tables_of(rows, branches, x.device)
    with recorded() as started:
        read = box_form(x.shape, weights[0].shape, geometry)
        filters = weight_copies.weight_copies(weights, dtype, read)
        box_forward.box_forward(x, filters, biases, added, tables, geometry, tile)
    return _named(started, form)


def _backward(
    dgrad: Tile, wgrad: Tile, form: str, *, pool=2, dtype=torch.bfloat16, branches=2, plain=False,
    skip=False, live=False, **sizes: int,
) -> dict[str, Launch]:  # fmt: skip
    """With sums that say whether they are NaN where those have one part."""
    x, weights, biases, geometry, rows = _problem(dtype, pool, branches, plain, skip, **sizes)
    tables = tables_of(rows, branches, x.device)
    dy = _meta(len(rows), x.shape[1], geometry.out_h, geometry.out_w, 64, dtype=dtype)
    code = torch.empty_like(dy, dtype=torch.uint8) if geometry.has_code else _meta(0).byte()
    lives = _meta(len(rows), dtype=torch.bool) if live else None
    data = _meta(branches * 64, 9, 64, dtype=dtype)
    filters = Filters(data, arrivals_buffer(x), branches, (3, 3))
    columns = min(wgrad.columns, box_gradient.MOST_COLUMNS)
    with recorded() as started:
        box = box_wgrad.box_of(wgrad, x.shape, geometry, (3, 3))
        gradient = box_gradient.box_gradient(
            dy, code, branches, tables, geometry, box, columns, live=lives
        )
        box_dgrad.box_dgrad(
            gradient.dz, filters, tables, x.shape, geometry, dtype, dy, code, live=lives,
            carried=x if skip else None, skip_dtype=dtype if skip else None, tile=dgrad,
        )  # fmt: skip
        box_wgrad.box_wgrad(
            gradient, x, filters, weights, biases, tables, geometry, wgrad, live=lives,
            spoilt=gradient.spoilt if form == "one_part" else None,
        )  # fmt: skip
    return _named(started, form)
