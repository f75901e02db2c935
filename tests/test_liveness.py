"""Which rows are live: those that a configuration which counts goes through."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_plan import configurations

from lasem_fast.levels.liveness import TreeLiveness
from lasem_fast.levels.plan import Plan


@given(configurations(), st.data())
def test_a_row_is_live_if_a_configuration_that_counts_goes_through_it(configs, data):
    plan = Plan.of([list(config) for config in configs])
    weighs = data.draw(st.lists(st.booleans(), min_size=len(configs), max_size=len(configs)))
    liveness = TreeLiveness(plan)
    assert all(level.live is None for level in liveness.levels)
    liveness.keep(torch.tensor(weighs))
    count = [config for config, counts in zip(configs, weighs, strict=True) if counts]
    for depth, level in enumerate(liveness.levels, start=1):
        prefixes = sorted({config[:depth] for config in configs})
        through = {config[:depth] for config in count}
        assert level.live is None or level.live.dtype == torch.bool
        live = [True] * len(prefixes) if level.live is None else level.live.tolist()
        assert live == [prefix in through for prefix in prefixes]


@given(configurations())
def test_each_mini_batch_decides_anew(configs):
    liveness = TreeLiveness(Plan.of([list(config) for config in configs]))
    liveness.keep(torch.zeros(len(configs), dtype=torch.bool))
    assert not any(level.live.any() for level in liveness.levels)
    liveness.keep(torch.ones(len(configs), dtype=torch.bool))
    assert all(level.live is None for level in liveness.levels), "all are"


@given(configurations(), st.data())
def test_the_share_is_that_of_the_prefixes_used(configs, data):
    plan = Plan.of([list(config) for config in configs])
    rows = data.draw(st.sets(st.sampled_from(range(len(configs))), min_size=1))
    weighs = torch.tensor([c in rows for c in range(len(configs))])
    liveness = TreeLiveness(plan)
    assert liveness.share_of(weighs) is None, "a backward that looks at it leaves the rest out"
    liveness.levels[0].followed = False

    def prefixes(some):
        return {config[: i + 1] for config in some for i in range(len(config))}

    used = prefixes(configs[row] for row in rows)
    assert liveness.share_of(weighs) == len(used) / len(prefixes(configs))
