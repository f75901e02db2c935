"""How DEN selects units, adds them, takes useless ones away and splits those that have drifted."""

from __future__ import annotations

import torch
from torch import Tensor

from lasem_fast.comparators.den_net import GrowingNet


@torch.no_grad()
def select_units(net: GrowingNet, task: str, zero: float) -> list[list[int]]:
    """The units from which the task's head can be reached, breadth first from the top.

    A connection exists where a weight is larger than ``zero``. Algorithm 2 of the paper.
    """
    layers = [*net.layers[1:], net.entry(task)]
    above: Tensor | None = None
    selected: list[list[int]] = []
    for layer in reversed(layers):
        connected = (layer.weight.abs() > zero).any(dim=2)  # [out, in]
        above = (connected if above is None else connected[above]).any(dim=0)
        selected.insert(0, above.nonzero().flatten().tolist())
    return selected


def expand(net: GrowingNet, task: str, units: int) -> None:
    """Adds units to every stage, connected to all below and above, and to the task's head."""
    inputs = net.layers[0].weight.shape[1]
    for i, layer in enumerate(net.layers):
        net.units[i] += units
        layer.widen(net.units[i], inputs, net.draw)
        inputs = net.units[i]
    entry = net.entry(task)
    entry.widen(entry.layer.out_features, inputs, net.draw)


@torch.no_grad()
def remove_useless(net: GrowingNet, task: str, zero: float) -> None:
    """Takes away the task's new units none of whose incoming weights is larger than ``zero``.

    From the top stage down, as in the paper's Algorithm 3.
    """
    for i in reversed(range(len(net.layers))):
        useful = (net.layers[i].weight.abs() > zero).flatten(1).any(dim=1)
        useful[: net.before[i]] = True
        rows = useful.nonzero().flatten()
        net.layers[i].keep(rows, _all(net.layers[i].weight, 1))
        above = net.layers[i + 1] if i + 1 < len(net.layers) else net.entry(task)
        above.keep(_all(above.weight, 0), rows)
        net.units[i] = len(rows)


@torch.no_grad()
def split(net: GrowingNet, task: str, threshold: float, most: int) -> None:
    """Splits the old units whose incoming weights have moved by more than ``threshold``.

    The unit goes back to what it was before the task; a copy of it at the end of the stage goes on
    from its present weights and bias. Where the unit feeds what belongs to the task alone, its new
    units, copies and the head, the copy takes the connection over; an old unit that was not split
    gets one from the copy beside the one it has. At most ``most`` units of a stage are split, those
    that have moved most.
    """
    drifted = [_drifted(net, i, threshold, most) for i in range(len(net.layers))]
    below = torch.empty(0, dtype=torch.int64, device=drifted[0].device)
    for i, layer in enumerate(net.layers):
        old_weight, old_bias = net.previous_values()[i]
        own = drifted[i]
        weight, bias = layer.weight.detach(), layer.layer.bias
        # columns of the copies below: taken over by what is the task's own
        wide = torch.cat([weight, weight[:, below]], dim=1)
        taken = wide.clone()
        taken[:, below] = 0
        copies = taken[own]
        wide[net.before[i] :] = taken[net.before[i] :]
        wide[own] = 0
        wide[own, : old_weight.shape[1]] = old_weight[own]
        new_bias = None
        if bias is not None:
            kept = bias.detach().clone()
            kept[own] = old_bias[own]
            new_bias = torch.cat([kept, bias.detach()[own]])
        layer.write(torch.cat([wide, copies]), new_bias)
        net.units[i] += len(own)
        below = own
    entry = net.entry(task)
    weight = entry.weight.detach()
    wide = torch.cat([weight, weight[:, below]], dim=1)
    wide[:, below] = 0
    bias = entry.layer.bias
    entry.write(wide, None if bias is None else bias.detach())


def _drifted(net: GrowingNet, i: int, threshold: float, most: int) -> Tensor:
    """Which old units of a stage are split, ascending."""
    then, _ = net.previous_values()[i]
    now = net.layers[i].weight.detach()[: then.shape[0], : then.shape[1]]
    drift = (now - then).flatten(1).norm(dim=1)
    order = drift.argsort(descending=True, stable=True)[:most]
    return order[drift[order] > threshold].sort().values


def _all(weight: Tensor, dim: int) -> Tensor:
    return torch.arange(weight.shape[dim], device=weight.device)
