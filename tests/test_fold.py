"""The forms in which a level's rows are held are the same rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import lasem_fast as lf
from lasem_fast.levels.fold import Carried, RowsFirst, Stacks, folded, rows_of, split_rows
from lasem_fast.levels.plan import Level, Plan

SAMPLES = 3


def _rows(width, channels=2):
    """``[N, P, C, H, W]``: the rows of a level, sample by sample."""
    return torch.randn(SAMPLES, width, channels, 2, 3)


def _rows_first(rows):
    return RowsFirst(rows.transpose(0, 1).permute(0, 1, 3, 4, 2))


def _carried(rows, skips, which):
    return Carried(_rows_first(rows), _rows_first(skips), which)


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_a_carried_skip_is_behind_each_rows_own_channels(width, skips, data):
    rows, behind = _rows(width), _rows(skips, channels=1)
    which = tuple(data.draw(st.lists(st.integers(0, skips - 1), min_size=width, max_size=width)))
    expected = torch.stack(
        [torch.cat([rows[:, r], behind[:, which[r]]], dim=1) for r in range(width)], dim=1
    )
    carried = _carried(rows, behind, which)
    assert torch.equal(carried.folded(), expected.flatten(0, 1))
    assert torch.equal(folded(carried), expected.flatten(0, 1))


@given(st.integers(1, 3), st.data())
def test_stacks_are_put_into_nested_loop_order(width, data):
    pairs = [(parent, branch) for parent in range(width) for branch in (0, 1, 2)]
    kept = sorted(data.draw(st.sets(st.sampled_from(pairs), min_size=1)))
    level = Level(tuple(p for p, _ in kept), tuple(b for _, b in kept), width)
    rows = _rows(len(kept))
    parts = [rows[:, list(level.rows_of(b))].flatten(0, 1) for b in level.used_branches]
    assert torch.equal(Stacks(parts, level).folded(), rows.flatten(0, 1))


class _Operations(TorchDispatchMode):
    """Collects the names of what is dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_rows_that_take_the_branches_in_turn_are_put_together_at_once(stage):
    """Where a group begins, and where its rows go on."""
    level = Plan.of_configs(lf.ConfigSpace(4, groups=(2, 2)).configs).levels[stage]
    rows = _rows(len(level))
    parts = [rows[:, list(level.rows_of(b))].flatten(0, 1) for b in level.used_branches]
    with _Operations() as ran:
        out = Stacks(parts, level).folded()
    assert torch.equal(out, rows.flatten(0, 1))
    assert ran.names == ["stack", "view"]


FORMS = {
    "folded": lambda rows: rows.flatten(0, 1),
    "rows first": _rows_first,
    "carried": lambda rows: _carried(
        rows, rows[:, :2] if rows.shape[1] > 1 else rows, tuple(i % 2 for i in range(rows.shape[1]))
    ),
    "stacks": lambda rows: Stacks(
        [rows[:, 0::2].flatten(0, 1), rows[:, 1::2].flatten(0, 1)],
        Level(tuple(range(rows.shape[1])), tuple(i % 2 for i in range(rows.shape[1])), 5),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(5,), (2, 3), (2, 2, 1), (1, 1, 1, 1, 1), (4, 1)])
def test_runs_of_rows(form, sizes):
    h = FORMS[form](_rows(5))
    whole = folded(h).unflatten(0, (SAMPLES, 5))
    at = 0
    parts = split_rows(h, 5, sizes)
    assert len(parts) == len(sizes)
    for part, size in zip(parts, sizes, strict=True):
        assert torch.equal(folded(part), whole[:, at : at + size].flatten(0, 1))
        at += size


def test_runs_of_rows_whose_skip_lies_elsewhere_share_it():
    h = FORMS["carried"](_rows(5))
    parts = split_rows(h, 5, (2, 3))
    assert all(part.skip.data.data_ptr() == h.skip.data.data_ptr() for part in parts)
    assert [part.rows for part in parts] == [(0, 1), (0, 1, 0)]


@given(st.integers(1, 6), st.data())
def test_some_rows_of_a_folded_batch(width, data):
    rows = _rows(width)
    some = tuple(data.draw(st.lists(st.integers(0, width - 1), min_size=1, max_size=8)))
    assert torch.equal(rows_of(rows.flatten(0, 1), width, some), rows[:, list(some)].flatten(0, 1))
