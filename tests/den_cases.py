"""A small DEN in its phases, for the tests of DEN."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from comparator_cases import add, conv_stages, task
from torch import nn

from lasem_fast.comparators import DEN
from lasem_fast.lifelong.method import Phase


def den(tasks="a", stages=None, **options):
    """The tasks but the last have ended."""
    method = DEN(stages or conv_stages(), **{"expansion": 2, **options})
    method.module.double()
    for name in tasks:
        if method.module.tasks:
            method.end_task(task(method.module.tasks[-1]))
        add(method, task(name))
    return method


def begin(method, name, epoch, epochs=5):
    method.begin_epoch(task(name), Phase(epoch, epochs))


def sliced_logits(method, x, name, units):
    """From slices of the weights."""
    net, h = method.module, x
    m = 2
    for stage, n in zip(net.stages, units, strict=True):
        h = F.relu(F.conv2d(h, stage[0].weight[:n, :m], stage[0].bias[:n], padding=1))
        m = n
    linear = net.heads[name][-1]
    return F.linear(F.max_pool2d(h, 2).flatten(1), linear.weight, linear.bias)


def linear_stages(*sizes):
    return [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]


def retrained(method, loss):
    """The task b at the end of retraining with this mean loss."""
    for epoch in (1, 2):
        begin(method, "b", epoch)
    method.module.loss_sum += 3 * loss
    method.module.batches += 3
