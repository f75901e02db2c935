"""docs/networks.md: each block runs, and its net trains as the naive loop does in float64."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lasem_fast as lf

DOCS = Path(__file__).parent.parent / "docs" / "networks.md"
SECTIONS = dict(re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", DOCS.read_text(), re.M | re.S))
_IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64)
# what a section needs beside PyTorch, and its mini-batches; the rest has no net
NETS = {
    "A ResNet of torchvision": ("torchvision", _IMAGES),
    "Layers that take or give more than one tensor": ("transformers", None),
    "Parameters without a rule": ("timm", _IMAGES),
    "Adapters on a frozen net": ("peft", torch.randn(4, 8, dtype=torch.float64)),
    "BatchNorm of other libraries": ("timm", _IMAGES),
    "One head for all tasks": (None, torch.randn(4, 8, dtype=torch.float64)),
    "A label for every pixel or token, regression beside classification": (None, _IMAGES),
}
OTHERS = {"Dropout that is no layer": "torchvision", "Other training loops": "lightning"}


def _run(section, package):
    if package is not None:
        pytest.importorskip(package)
    torch.manual_seed(0)
    scope = {"__name__": "docs"}
    exec(compile(SECTIONS[section], str(DOCS), "exec"), scope)
    return scope


def _assert_trains_as_the_naive_loop(em, x, y, task):
    results = []
    for backend in ("reference", "auto"):
        twin = copy.deepcopy(em.net.double())
        torch.manual_seed(1)
        step = lf.LASEM(twin, em.space, em.likelihood, backend=backend)(x, y, task)
        step.loss.backward()
        results.append([*step, *(p.grad for p in twin.parameters()), *twin.buffers()])
    for (n, found), expected in zip(enumerate(results[1]), results[0], strict=True):
        torch.testing.assert_close(found, expected, msg=lambda m, n=n: f"{n}: {m}")


def test_every_section_is_run():
    assert list(SECTIONS) == sorted([*NETS, *OTHERS], key=list(SECTIONS).index)


@pytest.mark.parametrize("section", NETS)
def test_a_network_trains_as_the_naive_loop(section):
    package, x = NETS[section]
    scope = _run(section, package)
    em = scope["em"]
    if x is None:
        x = scope["x"]
        em.net.eval()  # masks of dropout are drawn in another order
        em.net.double()
    task, y = em.net.tasks[0], torch.tensor([0, 1, 1, 0])[: len(x)]
    if task == "streets":
        y = torch.randint(5, (3, 32, 32))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="net: ")
        _assert_trains_as_the_naive_loop(em, x, y, task)


def test_layers_that_say_so_are_off_in_the_e_step():
    scope = _run("Layers that take or give more than one tensor", "transformers")
    em, x, y = scope["em"], scope["x"], torch.tensor([0, 1, 1, 0])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="net: ")
        first = em(x, y, "reviews")
    em.net.eval()
    torch.testing.assert_close(first.nll, em(x, y, "reviews").nll)
    stages = _run("Dropout that is no layer", "torchvision")["stages"]
    assert [layer.stochastic for layer in stages[0] if hasattr(layer, "stochastic")] == [True]


def test_adapters_are_new_and_what_is_frozen_stays():
    net = _run("Adapters on a frozen net", "peft")["net"]
    for (name, ours), theirs in zip(
        net.specific["reviews"].named_parameters(), net.shared.parameters(), strict=True
    ):
        is_adapter = "lora" in name
        assert ours.requires_grad == theirs.requires_grad == is_adapter
        assert torch.equal(ours, theirs) == ("lora_A" not in name)
        assert ("lora_B" in name) == (not ours.any())


def test_a_likelihood_of_pixels_and_regression():
    em = _run("A label for every pixel or token, regression beside classification", None)["em"]
    net, x = em.net.double(), _IMAGES
    classes, depth = torch.randint(5, (3, 32, 32)), torch.randn(3, 1, 32, 32, dtype=torch.float64)
    outputs = em.evaluate(x, "streets")
    found = em(x, classes, "streets").log_likelihood
    expected = torch.stack([-F.cross_entropy(out, classes, reduction="sum") for out in outputs])
    torch.testing.assert_close(found, expected.detach())
    _assert_trains_as_the_naive_loop(em, x, depth, "depth")
    net.add_task("birds", nn.Sequential(nn.Flatten(), nn.Linear(8 * 1024, 4)).double())
    labels = torch.tensor([0, 3, 1])
    outputs, found = em.evaluate(x, "birds"), em(x, labels, "birds").nll
    expected = torch.stack([F.cross_entropy(out, labels) for out in outputs])
    torch.testing.assert_close(found, expected.detach())
    with pytest.raises(ValueError, match="y: expected classes below 4, got 4"):
        em(x, labels + 1, "birds")


@pytest.mark.filterwarnings("ignore")  # Lightning's, about loaders and devices
def test_a_loop_of_lightning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = _run("Other training loops", "lightning")["learn"]
    net = lf.TransferNet([nn.Linear(4, 4), nn.Linear(4, 4)])
    em = lf.LASEM(net)
    batches = DataLoader(TensorDataset(torch.randn(18, 4), torch.randint(3, (18,))), 5)
    for task in ("a", "b"):
        net.add_task(task, nn.Linear(4, 3))
        twin = copy.deepcopy(em)
        assert learn(em, task, batches) == net.config(task)
        optimizer = torch.optim.Adam(twin.net.task_parameters(task))
        for x, y in batches:
            optimizer.zero_grad()
            twin(x, y, task).loss.backward()
            optimizer.step()
        twin.end_task(task)
        for ours, theirs in zip(net.parameters(), twin.net.parameters(), strict=True):
            assert torch.equal(ours, theirs)
