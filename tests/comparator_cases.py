"""Small nets, tasks and loops for the tests of the comparators."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from lasem_fast.lifelong.method import Phase
from lasem_fast.lifelong.task_data import Task

CLASSES = 3


def conv_stages(channels=(2, 4, 4), *, pool=True):
    """Two convolutions of 6 x 6 images, the second with pooling, as `lasem_fast.nets` has them."""
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels)]
    stages = [nn.Sequential(conv, nn.ReLU()) for conv in layers]
    if pool:
        stages[-1].append(nn.MaxPool2d(2))
    return stages


def head(features=4 * 9, classes=CLASSES, *, dropout=0.0):
    layers = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(features, classes))


def task(name="a", seed=0, samples=8):
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for _ in range(3):
        x = torch.randn(samples, 2, 6, 6, generator=generator, dtype=torch.float64)
        splits.append((x, torch.randint(CLASSES, (samples,), generator=generator)))
    return Task(name, *splits, n_classes=CLASSES)


def add(method, t, **options):
    """Adds a task in float64."""
    return method.add_task(t, head(**options).double())


def train(method, t, optimizer, steps=3, *, epochs=1, samples=4):
    """Epochs of `steps` mini-batches each; gives the losses."""
    x, y = t.train
    losses = []
    for epoch in range(1, epochs + 1):
        method.begin_epoch(t, Phase(epoch, epochs))
        for i in range(steps):
            rows = (torch.arange(samples) + i) % len(x)
            losses.append(float(method.step(x[rows], y[rows], t.name, optimizer).loss))
    return losses


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
