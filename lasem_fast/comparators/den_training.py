"""What each phase of DEN's training may change, what it adds to the loss, what it shrinks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lasem_fast.comparators.den_net import GrowingNet
from lasem_fast.comparators.units import Units, shrink, shrink_groups

# for a parameter: None, all of it is trained; a bool tensor, these elements; absent, nothing
Trained = dict[nn.Parameter, Tensor | None]


@dataclass(frozen=True)
class Weights:
    """The weights of DEN's penalties, see :class:`~lasem_fast.comparators.den.DEN`."""

    l1: float
    l2: float
    group_lasso: float
    regularization: float


def trained(net: GrowingNet, task: str) -> Trained:
    """What the present phase trains."""
    head = list(net.heads[task].parameters())
    if net.phase == "select":
        return dict.fromkeys(head)
    if net.phase not in ("retrain", "expand"):
        return dict.fromkeys([*net.stages.parameters(), *head])
    entry, found = net.entry(task), Trained()
    below: Tensor | None = None  # the image: all of it
    for i, layer in enumerate(net.layers):
        rows = _rows(net, i, layer.weight.device)
        found[layer.layer.weight] = _elements(net, layer, rows, below)
        if layer.layer.bias is not None:
            found[layer.layer.bias] = rows
        below = rows
    if net.phase == "retrain":
        found.update(dict.fromkeys(head))
    found[entry.layer.weight] = _elements(net, entry, None, below)
    return found


def _rows(net: GrowingNet, i: int, device: torch.device) -> Tensor:
    """The units of a stage that a phase of selected or new units trains, bool ``[out]``."""
    rows = torch.zeros(net.units[i], dtype=torch.bool, device=device)
    if net.phase == "expand":
        rows[net.before[i] :] = True
    else:
        rows[net.selected[i]] = True
    return rows


def _elements(net: GrowingNet, layer: Units, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Selected units: weights between two of them. New units: weights from or to one."""
    weight = layer.weight
    both = net.phase == "retrain"
    nothing = weight.new_full((1,), both, dtype=torch.bool)
    rows = nothing if rows is None else rows
    columns = nothing if columns is None else columns
    a, b = rows.reshape(-1, 1, 1), columns.reshape(1, -1, 1)
    return layer.form((a & b if both else a | b).expand(weight.shape))


def penalty(net: GrowingNet, weights: Weights, mask: Trained) -> Tensor | float:
    """What the present phase adds to the cross-entropy.

    Retraining: half ``l2`` times the squares of the selected weights (Eq. 4). Drift and settling:
    half ``regularization`` times the squared distance of all weights and biases that there were
    before the task from their values then (Eq. 6).
    """
    if net.phase == "retrain":
        squares = [
            (p if where is None else p * where).square().sum()
            for p, where in mask.items()
            if p.dim() > 1
        ]
        return weights.l2 / 2 * torch.stack(squares).sum()
    if net.phase not in ("drift", "settle"):
        return 0.0
    moved = []
    for layer, (old, old_bias) in zip(net.layers, net.previous_values(), strict=True):
        moved.append((layer.weight[: old.shape[0], : old.shape[1]] - old).square().sum())
        if old_bias is not None:
            moved.append((layer.layer.bias[: len(old_bias)] - old_bias).square().sum())
    return weights.regularization / 2 * torch.stack(moved).sum()


@torch.no_grad()
def shrink_weights(
    net: GrowingNet, task: str, weights: Weights, mask: Trained, scale: float
) -> None:
    """The proximal steps of the present phase, ``scale`` times the penalties' weights.

    l1: on all weights in the first task (Eq. 2), on the head's first layer where units are
    selected (Eq. 3), on new weights where the net expands, there with the group lasso on the
    incoming weights of every new unit (Eq. 5).
    """
    if net.phase == "first":
        shrunk: Iterable[nn.Parameter] = [p for p in mask if p.dim() > 1]
    elif net.phase == "select":
        shrunk = [net.entry(task).layer.weight]
    elif net.phase == "expand":
        shrunk = [p for p in mask if p.dim() > 1]
    else:
        return
    for p in shrunk:
        smaller = shrink(p, scale * weights.l1)
        where = mask[p]
        p.copy_(smaller if where is None else torch.where(where, smaller, p))
    if net.phase == "expand":
        for layer, before in zip(net.layers, net.before, strict=True):
            new = layer.layer.weight[before:]
            new.copy_(shrink_groups(new, scale * weights.group_lasso))
