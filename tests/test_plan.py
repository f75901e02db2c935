"""Plans of drawn configurations against prefixes listed one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lasem_fast as lf
from lasem_fast.levels.plan import Level, Plan


@st.composite
def configurations(draw, branches=3):
    """Distinct configurations as branch numbers, in any order."""
    depth = draw(st.integers(1, 5))
    one = st.tuples(*[st.integers(0, draw(st.integers(0, branches - 1)))] * depth)
    return draw(st.lists(one, min_size=1, max_size=12, unique=True))


def _prefixes(configs, depth):
    """The rows of a level as prefixes, in nested-loop order."""
    return sorted({config[:depth] for config in configs})


def _spelled(plan, roots=((),)):
    """Every row of every level as its path from the roots, and every leaf."""
    rows, levels = list(roots), []
    for level in plan.levels:
        assert level.width == len(rows)
        pairs = zip(level.parents, level.branches, strict=True)
        rows = [(*rows[parent], branch) for parent, branch in pairs]
        levels.append(rows)
    return levels, [rows[leaf] for leaf in plan.leaves]


def _check_level(level):
    """What a level derives from its rows."""
    assert level.used_branches == tuple(sorted(set(level.branches)))
    assert tuple(level.used_branches[i] for i in level.positions) == level.branches
    every_pair = [(p, b) for p in range(level.width) for b in level.used_branches]
    pairs = list(zip(level.parents, level.branches, strict=True))
    assert level.is_full == (pairs == every_pair)
    used = level.used_branches
    in_turn = tuple(used[row % len(used)] for row in range(len(pairs)))
    assert level.takes_turns == (level.branches == in_turn and len(pairs) % len(used) == 0)
    stacked = [pair for b in level.used_branches for pair in pairs if pair[1] == b]
    assert [stacked[i] for i in level.merge_order()] == pairs
    for b in level.used_branches:
        assert [pairs[i] for i in level.rows_of(b)] == [pair for pair in pairs if pair[1] == b]
        assert level.parents_of(b) == tuple(p for p, branch in pairs if branch == b)


@given(configurations())
def test_a_plan_has_one_row_per_prefix(configs):
    plan = Plan.of([list(config) for config in configs])
    levels, leaves = _spelled(plan)
    assert levels == [_prefixes(configs, i + 1) for i in range(len(configs[0]))]
    assert leaves == configs
    assert plan.stage_evaluations == sum(map(len, levels)) and len(plan) == len(configs)
    assert plan.is_in_order == (levels[-1] == leaves)
    for level in plan.levels:
        _check_level(level)


@given(configurations())
def test_rows_going_on(configs):
    plan = Plan.of([list(config) for config in configs])
    for stage, level in enumerate(plan.levels):
        on = level.going_on()
        assert on.width == len(on) == len(level)
        for row in range(len(level)):
            assert (on.parents[row], on.branches[row]) == (row, level.branches[row])
        assert on.positions == level.positions
        _check_level(on)
        levels, leaves = _spelled(plan.split(stage))
        twice = [(*row, row[-1]) for row in _prefixes(configs, stage + 1)]
        assert levels[stage + 1] == twice
        assert leaves == [(*c[: stage + 1], c[stage], *c[stage + 1 :]) for c in configs]


@given(configurations())
def test_the_top_of_a_plan(configs):
    plan = Plan.of([list(config) for config in configs])
    for stage in range(1, len(configs[0]) + 1):
        top = plan.top(stage)
        levels, leaves = _spelled(top)
        assert levels == [_prefixes(configs, i + 1) for i in range(stage)]
        assert leaves == levels[-1]


@given(configurations(), st.data())
def test_only_some_configurations(configs, data):
    """The plan of a part is the one that the part alone would get, in the order asked for."""
    plan = Plan.of([list(config) for config in configs])
    rows = data.draw(st.lists(st.sampled_from(range(len(configs))), min_size=1, unique=True))
    assert plan.only(rows) == Plan.of([list(configs[row]) for row in rows])
    assert plan.only(range(len(configs))) == plan


@given(configurations(), st.data())
def test_below_some_rows(configs, data):
    plan = Plan.of([list(config) for config in configs])
    depth = len(configs[0])
    for stage in range(1, depth):
        above = _prefixes(configs, stage)
        first = data.draw(st.integers(0, len(above) - 1))
        stop = data.draw(st.integers(first + 1, len(above)))
        part = plan.below(stage, first, stop)
        hanging = [c for c, config in enumerate(configs) if config[:stage] in above[first:stop]]
        assert part.configs == tuple(hanging)
        levels, leaves = _spelled(part.plan, above[first:stop])
        kept = [configs[c] for c in hanging]
        assert levels == [_prefixes(kept, i + 1) for i in range(stage, depth)]
        assert leaves == kept
        for level in part.plan.levels:
            _check_level(level)


@given(configurations(), st.data())
def test_the_parts_below_are_all_of_a_plan(configs, data):
    plan = Plan.of([list(config) for config in configs])
    for stage in range(1, len(configs[0])):
        rows = len(plan.levels[stage - 1])
        size = data.draw(st.integers(1, rows))
        parts = [plan.below(stage, a, min(a + size, rows)) for a in range(0, rows, size)]
        assert sorted(c for part in parts for c in part.configs) == list(range(len(configs)))
        evaluations = sum(part.plan.stage_evaluations for part in parts)
        assert plan.top(stage).stage_evaluations + evaluations == plan.stage_evaluations


@pytest.mark.parametrize("groups", [None, (2, 2), (1, 3), (3, 1), (4,)])
def test_inside_a_group_every_row_goes_on(groups):
    plan = Plan.of_configs(lf.ConfigSpace(4, groups=groups).configs)
    first_of_group, at = set(), 0
    for size in groups or (1,) * 4:
        first_of_group.add(at)
        at += size
    assert [plan.continues(i) for i in range(4)] == [i not in first_of_group for i in range(4)]
    for stage in range(1, 4):
        if plan.continues(stage):
            assert plan.levels[stage] == plan.levels[stage - 1].going_on()


def test_branches_are_numbered_among_the_used_ones():
    level = Level((0, 0, 1), (0, 2, 2), 2)
    assert level.used_branches == (0, 2) and level.positions == (0, 1, 1)
    assert not level.is_full


@given(configurations(), st.data())
def test_rows_by_branch(configs, data):
    """The same paths and leaves in another order; what is left of them stays in that order."""
    plan = Plan.of([list(config) for config in configs])
    ordered = plan.by_branch()

    def paths(plan, stage):
        rows = [()]
        for level in plan.levels[: stage + 1]:
            pairs = zip(level.parents, level.branches, strict=True)
            rows = [(*rows[parent], branch) for parent, branch in pairs]
        return rows

    for stage, level in enumerate(ordered.levels):
        assert sorted(paths(ordered, stage)) == paths(plan, stage)
        rows = list(zip(level.branches, level.parents, strict=True))
        assert rows == sorted(rows)
    last = paths(ordered, len(plan.levels) - 1)
    assert [last[leaf] for leaf in ordered.leaves] == configs
    assert ordered.places == plan.leaves
    if ordered.order is not None:
        assert [last[row] for row in ordered.order] == sorted(configs)
    count = len(configs)
    kept = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True))
    assert ordered.only(kept).places == plan.only(kept).places


def test_rows_by_branch_of_a_grouped_tree():
    """Those of a branch are neighbours, as their parents are, in a group and between groups."""
    plan = Plan.of_configs(lf.ConfigSpace(4, groups=[2, 2]).configs).by_branch()
    parents = [(0, 0), (0, 1), (0, 1, 0, 1), (0, 1, 2, 3)]
    branches = [(0, 1), (0, 1), (0, 0, 1, 1), (0, 0, 1, 1)]
    assert [level.parents for level in plan.levels] == parents
    assert [level.branches for level in plan.levels] == branches
    assert [plan.continues(stage) for stage in range(4)] == [False, True, False, True]
    assert plan.order == (0, 2, 1, 3) and plan.places == (0, 1, 2, 3)
