"""What every comparator has to be for a training run: one loop drives all of them."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from comparator_cases import same_bits, values
from safetensors.torch import save
from torch import nn

from lasem_fast import nets
from lasem_fast.comparators import DARTS, DEN, APDNet, FixedProbability, ProgNN
from lasem_fast.initialisers import release_
from lasem_fast.lifelong.method import Method, Phase
from lasem_fast.lifelong.task_data import Task
from lasem_fast.optim import TFRMSprop


def _arch(transfer="hps"):
    """The paper's four layers, narrow, for small images."""
    return nets.Architecture(
        transfer, (3, 8, 8), kernels=(3,) * 4, channels=(8, 8, 16, 16), pools=(1, 2, 1, 2),
        hidden=(16,), batch_size=4,
    )  # fmt: skip


ARCH = _arch()
DOCS = Path(__file__).parent.parent / "docs" / "comparators.md"
METHODS = {
    "prognn": partial(ProgNN, scale=2.0, init=release_),
    "apd": APDNet,
    "apd_drift": partial(APDNet, drift_active=True),
    "darts_hps": partial(DARTS, transfer=ARCH.mechanism()),
    "darts_dfcnn": partial(DARTS, transfer=_arch("dfcnn").mechanism()),
    "darts_second": partial(DARTS, order=2, difference="paper", selection_batch="valid"),
    "den": partial(DEN, expansion=2, init=release_),
    "fixed": partial(FixedProbability, config={3, 4}, probability=0.8),
}


def _stages(arch=ARCH):
    stages = arch.stages()
    for stage in stages:
        release_(stage)
    return stages


def _task(number):
    generator = torch.Generator().manual_seed(number)
    means = torch.randn(3, 3, 1, 1, generator=generator)
    splits = []
    for _ in range(3):
        y = torch.arange(12) % 3
        noise = torch.randn(12, 3, 8, 8, generator=generator)
        splits.append((means[y] + 0.1 * noise, y))
    return Task(f"task {number}", *splits, n_classes=3)


def _run(method: Method, numbers=(0, 1), epochs=10, dropout=0.0):
    """Mean losses by task and epoch, as a training run makes them."""
    losses = []
    for number in numbers:
        task = _task(number)
        head = ARCH.head(task.n_classes)
        head[1].p = dropout
        parameters = method.add_task(task, head)
        assert len({id(p) for p in parameters}) == len(parameters)
        assert all(p.requires_grad for p in parameters)
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        for epoch in range(1, epochs + 1):
            method.begin_epoch(task, Phase(epoch, epochs))
            method.module.train()
            x, y = task.train
            found = [
                method.step(x[r], y[r], task.name, optimizer) for r in torch.arange(12).split(4)
            ]
            losses.append(sum(float(step.loss) for step in found) / len(found))
            assert all(not step.loss.requires_grad for step in found)
            method.module.eval()
            with torch.no_grad():
                assert method.logits(task.valid[0], task.name).shape == (12, 3)
            config, prior = method.config(task.name), method.prior(task.name)
            assert config is None or len(config) == 4
            assert len(prior) == len(method.labels)
        assert method.end_task(task) == method.config(task.name)
        assert method.kept_parameters() > 0
    return [losses[i : i + epochs] for i in range(0, len(losses), epochs)]


def _change_by_roundings(method: Method, x, task: str, logits) -> float:
    """How far logits move with all weights some roundings of float32 away, at most of four times.

    16 of them: each of a logit's sums has tens of terms, whose roundings add up like a random walk.
    """
    moved = []
    for seed in range(4):
        near = copy.deepcopy(method)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in near.module.parameters():
                noise = 2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1
                p *= 1 + 16 * 2**-24 * noise
            moved.append(float((near.logits(x, task) - logits).norm()))
    return max(moved)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_learns_and_what_it_leaves_can_be_saved_copied_and_moved(name):
    torch.manual_seed(0)
    method = METHODS[name](_stages())
    for losses in _run(method):
        assert min(losses) < 0.75 * losses[0], losses
    state = method.module.state_dict()
    assert len(save(state)) > 0  # tensors alone, none of them twice
    x = _task(0).test[0]
    twin = copy.deepcopy(method)
    twin.module.double()
    for number in (0, 1):
        ours, theirs = (m.logits(x.to(d), f"task {number}")
                        for m, d in ((method, torch.float32), (twin, torch.float64)))  # fmt: skip
        assert theirs.dtype == torch.float64
        allowed = _change_by_roundings(twin, x.double(), f"task {number}", theirs)
        assert (ours.double() - theirs).norm() <= allowed
    torch.manual_seed(1)
    _run(method, (2,), epochs=5)
    twin.module.load_state_dict(state)  # back to float32's values
    assert all(p.dtype == torch.float64 for p in twin.module.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_run(name):
    def run():
        torch.manual_seed(5)
        method = METHODS[name](_stages())
        return _run(method, epochs=5, dropout=0.5), values(method.module)

    (losses, weights), (again, weights_again) = run(), run()
    assert losses == again and same_bits(weights, weights_again)


def test_hidden_layers_may_be_den_s_stages():
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(ARCH.features, 16), nn.ReLU())
    with pytest.raises(ValueError, match=r"stages\[4\]: expected one convolution"):
        DEN([*_stages(), hidden])
    del hidden[1]
    method = DEN([*_stages(), hidden], expansion=2, init=release_)
    x = torch.randn(2, 3, 8, 8)
    for name in "ab":
        method.add_task(Task(name, *_task(0).splits(), n_classes=3), nn.Linear(16, 3))
    assert method.logits(x, "b").shape == (2, 3)


@pytest.mark.parametrize("kind", [APDNet, DARTS])
def test_layers_with_skips(kind):
    torch.manual_seed(0)
    arch = nets.Architecture(
        "hps", (3, 8, 8), kernels=(3,) * 3, channels=(8,) * 3, pools=(1, 2, 1), hidden=(16,),
        batch_size=4, skips=((1, 2),),
    )  # fmt: skip
    method = kind(_stages(arch))
    task = Task("a", *(split for _, split in _task(0).splits()), n_classes=3)
    optimizer = TFRMSprop(method.add_task(task, arch.head(3)), lr=1e-3)
    loss = method.step(task.train[0], task.train[1], "a", optimizer).loss
    assert bool(torch.isfinite(loss))
    with pytest.raises(ValueError, match=r"stages\[1\]: expected one convolution"):
        ProgNN(_stages(arch))


def test_the_docs_example_runs_for_every_method_that_it_names(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    made = re.findall(r"^# or (.*)$", block, re.MULTILINE)
    assert len(made) == 4
    for call in (None, *made):
        lines = block if call is None else re.sub(r"method = .*", f"method = {call}", block)
        if call and "DEN" in call:
            lines = lines.replace("(1, 2)", "range(1, 6)").replace("epoch, 2", "epoch, 5")
        exec(lines, {})
    assert capsys.readouterr().out.count("tensor(") == 5
