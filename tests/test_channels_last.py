"""Levels and heads that work on channels-last images in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_step_equals, brute_force
from row_lists import PLAIN, evaluator_of
from torch import nn

import lasem_fast as lf
from lasem_fast.backends import plain_torch
from lasem_fast.backends.operations import Layer
from lasem_fast.levels.fold import RowsFirst
from lasem_fast.levels.plan import Level
from lasem_fast.levels.relu_and_pool import Pool

_CHANNELS_LAST = PLAIN._replace(heads=(plain_torch.channels_last_head,))


def _net(*stages, features):
    net = lf.TransferNet(list(stages))
    net.add_task(
        "a", nn.Sequential(nn.Flatten(), nn.Linear(features, 4), nn.ReLU(), nn.Linear(4, 3))
    )
    return net.double()


@pytest.mark.parametrize(
    ("first", "second", "features"),
    [
        (
            nn.Sequential(nn.Conv2d(2, 3, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()),
            4 * 2 * 2,
        ),
        (
            nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.ReLU()),
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.Identity()),
            4,
        ),
        (
            nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()),
            nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 5), nn.ReLU()),
            5,
        ),
    ],
)
def test_steps_equal_brute_force(first, second, features):
    net = _net(first, second, features=features)
    em = lf.LASEM(net, backend="torch")
    em._search.everything = evaluator_of(em.space, _CHANNELS_LAST)
    x = torch.randn(5, 2, 8, 8, dtype=torch.float64)
    y = torch.randint(3, (5,))
    truth = brute_force(net, em.space.bits, x, y, "a")
    assert_step_equals(net, em(x, y, "a"), truth)


@pytest.mark.parametrize("pool", [Pool(1, 0, False), Pool(2, 0, False)])
@pytest.mark.parametrize("level", [Level((0, 0), (0, 1), 1), Level((0, 0, 1), (0, 1, 1), 2)])
def test_a_level_hands_on_images_as_the_next_one_reads_them(pool, level):
    conv = nn.Conv2d(3, 5, 7, padding=3)
    weights = [torch.randn_like(conv.weight) for _ in range(2)]
    layer = Layer(conv, weights, [torch.randn(5), torch.randn(5)], False, True, False, pool)
    rows = level.width
    x = torch.randn(rows * 4, 3, 8, 8).permute(0, 2, 3, 1).unflatten(0, (rows, 4))
    y = plain_torch.run_level(layer, x, level, None)
    assert y.shape[-1] == 5 and y.is_contiguous()


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(18, 3)),
        nn.Sequential(nn.Flatten(2), nn.Linear(9, 3)),
        nn.Sequential(nn.Linear(3, 3), nn.Flatten()),
        nn.Flatten(),
        nn.Sequential(nn.Flatten(), nn.Linear(18, 99)),
    ],
)
def test_other_heads_are_left_to_the_tree(head):
    leaves = RowsFirst(torch.randn(2, 4, 3, 3, 2))
    assert plain_torch.channels_last_head(head, leaves, 2) is None


def test_a_head_with_hooks_is_left_to_the_tree():
    leaves = RowsFirst(torch.randn(2, 4, 3, 3, 2))
    head = nn.Sequential(nn.Flatten(), nn.Linear(18, 3))
    assert plain_torch.channels_last_head(head, leaves, 2).shape == (8, 3)
    head[1].register_forward_hook(lambda module, inputs, output: output)
    assert plain_torch.channels_last_head(head, leaves, 2) is None
