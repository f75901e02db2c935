"""Configuration spaces: order, labels, every accepted form, every refusal."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch

import lasem_fast as lf
from lasem_fast.levels.plan import Plan


def test_rows_are_in_nested_loop_order_shared_first():
    space = lf.ConfigSpace(3)
    assert [tuple(r) for r in space.bits.tolist()] == list(
        itertools.product((True, False), repeat=3)
    )
    assert space.bits.dtype == torch.bool
    assert (len(space), space.label(0), space.label(7), space.label(2)) == (
        8,
        "{1,2,3}",
        "{}",
        "{1,3}",
    )


@pytest.mark.parametrize("depth", range(1, 7))
def test_every_form_of_a_configuration_names_the_same_row(depth):
    space = lf.ConfigSpace(depth)
    for row, bits in enumerate(space.bits):
        shared = {i + 1 for i, bit in enumerate(bits.tolist()) if bit}
        forms = (row, np.int64(row), torch.tensor(row), bits, bits.numpy(), bits.tolist(),
                 tuple(int(b) for b in bits), shared, frozenset(shared))  # fmt: skip
        assert [space.index(form) for form in forms] == [row] * len(forms)
        assert space[row] == tuple(bits.tolist())


def test_numbers_of_stages_may_be_tensors_and_arrays():
    space = lf.ConfigSpace(3)
    for number in (torch.tensor, np.int64):
        assert space.index({number(2)}) == space.index({2})


def test_a_space_keeps_its_bits():
    space = lf.ConfigSpace(2)
    space.bits.fill_(False)
    assert space.bits.tolist() == [list(config) for config in space]


def test_groups_bind_consecutive_stages():
    space = lf.ConfigSpace(17, groups=[5, 4, 4, 4])
    assert space.bits.shape == (16, 17)
    assert [space.label(i) for i in (0, 1)] == [
        "{" + ",".join(map(str, range(1, n))) + "}" for n in (18, 14)
    ]
    for size, start in ((5, 0), (4, 5), (4, 9), (4, 13)):
        block = space.bits[:, start : start + size]
        assert torch.equal(block.any(dim=1), block.all(dim=1))


def test_a_list_is_put_into_nested_loop_order():
    space = lf.ConfigSpace.from_configs([set(), {2}, (True, False, True)])
    assert space.bits.tolist() == [[True, False, True], [False, True, False], [False] * 3]
    assert space.index({2}) == 1
    assert {1, 2} not in space


def test_a_space_is_a_sequence_of_its_configurations():
    space = lf.ConfigSpace(2)
    assert list(space) == space.configs == [space[i] for i in range(len(space))]


def test_static_configurations():
    space = lf.ConfigSpace(4)
    named = [space.all, space.top(1), space.top(3), space.bottom(2), space.bottom(0)]
    labels = [space.label(space.index(c)) for c in (*named, space.alternating)]
    assert labels == ["{1,2,3,4}", "{4}", "{2,3,4}", "{1,2}", "{}", "{2,4}"]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: lf.ConfigSpace(0), ValueError, "depth: expected at least 1"),
        (lambda: lf.ConfigSpace("4"), TypeError, "depth: expected a number"),
        (lambda: lf.ConfigSpace(21), ValueError, "groups"),
        (lambda: lf.ConfigSpace(17, groups=[5, 4, 4]), ValueError, "add up to depth=17, got .*13"),
        (lambda: lf.ConfigSpace(3, groups=[3, 0]), ValueError, "groups: expected positive"),
        (lambda: lf.ConfigSpace(3, groups=3), TypeError, "groups: expected a sequence"),
        (lambda: lf.ConfigSpace(3).index(8), ValueError, "expected a row in 0..7, got 8"),
        (lambda: lf.ConfigSpace(3).index(-1), ValueError, "expected a row in 0..7, got -1"),
        (lambda: lf.ConfigSpace(3).index({0}), ValueError, "stages in 1..3"),
        (lambda: lf.ConfigSpace(3).index({4}), ValueError, "stages in 1..3"),
        (lambda: lf.ConfigSpace(3).index([1, 0]), ValueError, "expected 3 booleans"),
        (lambda: lf.ConfigSpace(3).index([1, 0, 2]), ValueError, "expected 3 booleans"),
        (lambda: lf.ConfigSpace(3).index("all"), TypeError, "got str"),
        (lambda: lf.ConfigSpace(3).index(True), TypeError, "got bool"),
        (lambda: lf.ConfigSpace(3).index(1.0), TypeError, "got float"),
        (lambda: lf.ConfigSpace(4, groups=[2, 2]).index({1}), ValueError, "outside it"),
        (lambda: lf.ConfigSpace(3)[8], ValueError, "row: expected a row in 0..7, got 8"),
        (lambda: lf.ConfigSpace(3)["a"], TypeError, "row: expected a row in 0..7, got str"),
        (lambda: lf.ConfigSpace(3).label(8), ValueError, "row: expected a row in 0..7, got 8"),
        (lambda: lf.ConfigSpace(3).label(None), TypeError, "row: expected a row"),
        (lambda: lf.ConfigSpace(2).index(torch.empty(2, device="meta")), TypeError, "config: exp"),
        (lambda: lf.ConfigSpace(2).index([torch.ones(2), 1]), ValueError, "expected 2 booleans"),
        (lambda: lf.ConfigSpace.from_configs(3), TypeError, "configs: expected a sequence"),
        (lambda: lf.ConfigSpace.from_configs("abc"), TypeError, "configs: .* got str 'abc'"),
        (lambda: lf.ConfigSpace.from_configs({1: 2}), TypeError, "configs: .* got dict"),
        (lambda: lf.ConfigSpace(3).top(4), ValueError, "k: expected"),
        (lambda: lf.ConfigSpace.from_configs([]), ValueError, "configs: expected at least one"),
        (lambda: lf.ConfigSpace.from_configs([{1}]), ValueError, "depth: expected"),
        (lambda: lf.ConfigSpace.from_configs([{1}, [1, 0]]), ValueError, "twice"),
        (lambda: lf.ConfigSpace.from_configs([[1], [1, 0]]), ValueError, "same number of bits"),
    ],
)
def test_bad_configurations_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_plan_of_a_full_tree():
    plan = Plan.of_configs(lf.ConfigSpace(4).configs)
    assert [len(level) for level in plan.levels] == [2, 4, 8, 16]
    assert plan.stage_evaluations == 2**5 - 2
    assert plan.leaves == tuple(range(16))
    assert all(level.is_full for level in plan.levels)
    assert plan.levels[1].parents == (0, 0, 1, 1)
    assert plan.levels[1].branches == (0, 1, 0, 1)


def test_plan_of_groups_continues_inside_a_group():
    plan = Plan.of_configs(lf.ConfigSpace(5, groups=[2, 3]).configs)
    assert [len(level) for level in plan.levels] == [2, 2, 4, 4, 4]
    assert [plan.continues(i) for i in range(5)] == [False, True, False, True, True]


def test_plan_takes_any_set_of_prefixes_and_more_than_two_branches():
    plan = Plan.of([[0, 2], [1, 1], [0, 0], [2, 1]])
    assert plan.levels[0].branches == (0, 1, 2)
    assert list(zip(plan.levels[1].parents, plan.levels[1].branches, strict=True)) == [
        (0, 0),
        (0, 2),
        (1, 1),
        (2, 1),
    ]
    assert plan.leaves == (1, 2, 0, 3)
    assert plan.levels[1].rows_of(1) == (2, 3) and plan.levels[1].parents_of(1) == (1, 2)
    assert plan.levels[1].merge_order() == (0, 3, 1, 2)
    assert not plan.levels[1].is_full


def test_a_plan_of_many_configurations_takes_no_time_that_counts():
    configs = lf.ConfigSpace(15).configs
    del configs[12345]
    start = time.process_time()
    plan = Plan.of_configs(configs)
    order = plan.levels[-1].merge_order()
    assert time.process_time() - start < 2  # 0.3 s; 10 s where the time is quadratic
    assert plan.leaves == tuple(range(2**15 - 1)) and len(plan.levels[13]) == 2**14
    shared = plan.levels[-1].rows_of(0)
    assert [order[row] for row in shared] == list(range(len(shared)))
    assert sorted(order) == list(range(2**15 - 1))
