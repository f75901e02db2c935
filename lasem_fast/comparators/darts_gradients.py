"""The gradient of a DARTS selection: of the mixture as it is, or one step of the weights ahead."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lasem_fast.comparators.darts_net import MixedNet

Difference = Literal["paper", "release"]
Batch = tuple[Tensor, Tensor]

_STEP = 0.01  # Liu et al. 2019, section 2.3: epsilon = 0.01 / norm of the gradient


def first_order(net: MixedNet, task: str, batch: Batch) -> Tensor:
    """The gradient ``[d, 2]`` of the mixture's loss with the weights as they are."""
    selection = net.selections[task].weight
    return torch.autograd.grad(net.loss(*batch, task, {}), selection)[0]


def second_order(
    net: MixedNet, task: str, train: Batch, batch: Batch, xi: float, difference: Difference
) -> Tensor:
    """The gradient ``[d, 2]`` of L(w - xi dL_train/dw, selection) on ``batch``.

    The term with second derivatives, ``-xi d2L_train/(d selection d w) g`` with g the gradient at
    the unrolled weights w', is a central difference along g. ``"paper"``: one difference over all
    weights around w, with the step 0.01 / ||g||. ``"release"``: every tensor i moves by
    0.01 / ||g_i|| times its own g_i around w', and stage l's difference is divided by the l-th
    tensor's step. A tensor without a gradient does not move, and what is paired with it gets no
    second term.
    """
    weights: dict[str, Tensor] = {name: p.detach() for name, p in net.weights(task).items()}
    unrolled = _moved(weights, _weight_gradient(net, task, train, weights), -xi)
    direct, ahead = _gradients(net, task, batch, unrolled)
    norms = torch.stack([g.norm() for g in ahead.values()])
    if difference == "paper":
        norms = norms.norm().expand(len(ahead))
    steps = torch.where(norms > 0, _STEP / norms, 0)
    around = weights if difference == "paper" else unrolled
    pushed = {n: s * g for (n, g), s in zip(ahead.items(), steps, strict=True)}
    upper = _selection_gradient(net, task, train, _moved(around, pushed, 1))
    lower = _selection_gradient(net, task, train, _moved(around, pushed, -1))
    paired = steps[:1] if difference == "paper" else steps[: len(direct)]
    divisor = 2 * paired.unsqueeze(1)
    return direct - xi * torch.where(divisor > 0, (upper - lower) / divisor, 0)


def _moved(weights: dict[str, Tensor], by: dict[str, Tensor], times: float) -> dict[str, Tensor]:
    return {name: weight + times * by[name] for name, weight in weights.items()}


def _weight_gradient(
    net: MixedNet, task: str, batch: Batch, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    loss = net.loss(*batch, task, leaves)
    return dict(zip(leaves, _grad(loss, list(leaves.values())), strict=True))


def _selection_gradient(
    net: MixedNet, task: str, batch: Batch, weights: dict[str, Tensor]
) -> Tensor:
    selection: nn.Parameter = net.selections[task].weight
    return torch.autograd.grad(net.loss(*batch, task, weights), selection)[0]


def _gradients(
    net: MixedNet, task: str, batch: Batch, weights: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """By the selection and by the weights."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    loss = net.loss(*batch, task, leaves)
    direct, *rest = _grad(loss, [net.selections[task].weight, *leaves.values()])
    return direct, dict(zip(leaves, rest, strict=True))


def _grad(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
