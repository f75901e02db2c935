"""Copies of several levels' weights in one launch, against those of one level each."""

from __future__ import annotations

import pytest
import torch
from sanitiser import reached

from lasem_fast.kernels.box_form import box_form
from lasem_fast.kernels.level_geometry import Geometry
from lasem_fast.kernels.many_copies import ManyCopies
from lasem_fast.kernels.weight_copies import weight_copies

# [N, H, W, C] and [Co, C, KH, KW]: as they are, unfolded with zeros behind a filter, and linear.
LEVELS = [
    ((2, 5, 6, 8), (24, 8, 3, 2)),
    ((2, 5, 6, 3), (16, 3, 3, 3)),
    ((2, 4, 4, 8), (8, 8, 4, 4)),
]


def levels(layouts):
    found = []
    for i, (x, shape) in enumerate(LEVELS):
        weights = [
            torch.randn(shape).contiguous(memory_format=layouts[i % 2]) for _ in range(1 + i % 2)
        ]
        conv = [1, 1] if x[1:3] == shape[2:] else [x[1], x[2]]
        pad = [0, 0] if conv == [1, 1] else [1, 1]
        geometry = Geometry(1, 1, *pad, *conv, 1, 0, *conv, 1)
        found.append((weights, box_form((1, *x), shape, geometry)))
    assert [form.unfolds for _, form in found] == [False, True, False]
    return found


def check(levels, dtype, copies):
    for (weights, form), made in zip(levels, copies.filters, strict=True):
        want = weight_copies(weights, dtype, form)
        assert torch.equal(made.data, want.data) and made[2:] == want[2:]
        assert not made.arrivals.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_they_are_those_of_each_level(dtype, turned):
    layouts = [torch.contiguous_format, torch.channels_last]
    given = levels(layouts[::-1] if turned else layouts)
    copies = ManyCopies(given, dtype)
    weights = [weight for weights, _ in given for weight in weights]
    with reached(*weights, *(t for made in copies.filters for t in (made.data, made.arrivals))):
        copies()
    check(given, dtype, copies)
    for weight in weights:
        weight.neg_()
    with reached(*weights, *(t for made in copies.filters for t in (made.data, made.arrivals))):
        copies()  # of what the weights are now
    check(given, dtype, copies)
