"""What a bounded step is predicted to hold is what PyTorch's profiler measures."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_plan import configurations

import lasem_fast as lf
from lasem_fast.levels.plan import Plan
from lasem_fast.networks.network import Network
from lasem_fast.search import dispatch
from lasem_fast.tools.builtin import NETS
from lasem_fast.tools.memory import measured_peak
from lasem_fast.tree import budget
from lasem_fast.tree.budget import StepBytes, best_cut, cuts_of, least_of, peak_of, step_bytes


def _problem(name, samples):
    spec = NETS[name]
    net = lf.TransferNet(spec.stages())
    net.add_task("t", spec.head(10))
    space = lf.ConfigSpace(net.depth, groups=spec.groups)
    x = torch.randn(samples, *spec.sample)
    return net, space, x, torch.zeros(samples, dtype=torch.int64)


@pytest.mark.parametrize("samples", [2, 8])
def test_peaks_are_within_ten_percent_of_pytorchs_profile(samples):
    net, space, x, y = _problem("cifar-6", samples)
    network = Network(net.branches("t"), net.heads["t"], "t")
    costs = step_bytes(network, dispatch.operations("torch"), x)
    plan = Plan.of_configs(space.configs)
    chosen = [None, *cuts_of(plan, costs)[::4]]
    assert len({cut.stage for cut in chosen[1:]}) >= 3
    for cut in chosen:
        em = lf.LASEM(net, space, backend="torch", max_memory=10**12)
        em._search.everything._cut = lambda *_, cut=cut: cut

        def step(em=em):
            em(x, y, "t").loss.backward()

        step()  # makes gradients and prior, which are there before any later step
        predicted = peak_of(plan, costs) if cut is None else cut.peak
        assert predicted == pytest.approx(measured_peak(step, "cpu"), rel=0.1), cut


def test_measuring_leaves_no_trace():
    net, _, x, _ = _problem("cifar-4", 2)
    network = Network(net.branches("t"), net.heads["t"], "t")
    before = torch.get_rng_state()
    step_bytes(network, dispatch.operations("torch"), x)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in net.parameters()) and not x.requires_grad


def _costs(depth):
    numbers = [3 * i % 7 + 1 for i in range(depth + 1)]
    return StepBytes(*(numbers[i:] + numbers[:i] for i in range(5)))


@given(configurations())
def test_runs_are_counted_as_the_plans_of_their_rows(configs):
    """The rows of the largest run, against the plans that are really run."""
    plan, costs = Plan.of([list(config) for config in configs]), _costs(len(configs[0]))
    for cut in cuts_of(plan, costs):
        rows, k = len(plan.levels[cut.stage - 1]), cut.rows
        runs = [plan.below(cut.stage, a, min(a + k, rows)).plan for a in range(0, rows, k)]
        largest = [len(level) for level in max(runs, key=lambda p: p.stage_evaluations).levels]
        one = budget._peak([*largest, largest[-1]], costs, cut.stage)
        assert 1 <= k < rows and cut.peak >= one


@given(configurations(), st.data())
def test_the_cut_within_a_budget(configs, data):
    plan, costs = Plan.of([list(config) for config in configs]), _costs(len(configs[0]))
    whole, least = peak_of(plan, costs), least_of(plan, costs)
    assert best_cut(plan, costs, whole) is None and best_cut(plan, costs, math.inf) is None
    with pytest.raises(ValueError, match=f"max_memory: expected at least {least} bytes"):
        best_cut(plan, costs, least - 1)
    if least < whole:
        limit = data.draw(st.integers(least, whole - 1))
        cut = best_cut(plan, costs, limit)
        fitting = [other for other in cuts_of(plan, costs) if other.peak <= limit]
        assert cut in fitting

        def runs(cut):
            return -(-len(plan.levels[cut.stage - 1]) // cut.rows)

        assert runs(cut) == min(map(runs, fitting))
