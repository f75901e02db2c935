"""A stage's level as a run of fused layers, each of them one operation on all rows.

The rows of a level are pairs (parent row, branch). The stage's first layer takes them from their
parents; what follows goes on in the branch that each row came from. A skip from the stage's input
is read where it lies, by parent row; one on its way from an earlier stage lies where that stage
left it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor, nn

from lasem_fast.backends import plain_torch
from lasem_fast.backends.operations import (
    Layer,
    LevelOperation,
    Norm,
    Normed,
    NormOperation,
    Skip,
)
from lasem_fast.levels.fold import Carried, Fold, RowsFirst, folded
from lasem_fast.levels.plan import Level
from lasem_fast.levels.row_liveness import Liveness
from lasem_fast.networks.batch_norm import check_values
from lasem_fast.networks.layers import is_batch_norm, is_group_norm, uses_batch_statistics
from lasem_fast.transfer import Branch
from lasem_fast.tree.lowering import FusedLayer, Program, common_program, layers_of


class Lowered(NamedTuple):
    """A stage as layers with the weights of some branches.

    Attributes:
        program: the stage's.
        layers: the program's, in all the branches.
        operations: for each layer those that take it, best first.
        norms: those of batch norms, best first.
    """

    program: Program
    layers: list[Layer]
    operations: list[list[LevelOperation]]
    norms: Sequence[NormOperation]


NormSeen = Callable[[list[nn.Module], Level, int, Normed], None]
"""``(layers, level, number, normed)``: is told what a batch norm of these branches, used for the
``number``-th time in its stage, saw of a level's rows."""


def lowered(
    operations: Sequence[LevelOperation],
    branches: Sequence[Branch],
    h: Fold,
    norms: Sequence[NormOperation] = (),
) -> Lowered | None:
    """A stage's layers; None where no operation takes any of them.

    Args:
        operations: a backend's, best first.
        branches: the branches that a level uses, in the order of its ``used_branches``.
        h: the level before, or one like it (dtype, device).
        norms: a backend's for batch norm in training mode.
    """
    if not operations:
        return None
    program = common_program([branch.module for branch in branches])
    if isinstance(program, str):
        return None
    layers = _with_tensors(program, branches)
    if layers is None or (not norms and any(map(_is_normed, layers))):
        return None
    like = _some_tensor(h)
    takers = [[op for op in operations if not op.why_not(layer, like)] for layer in layers]
    return Lowered(program, layers, takers, norms) if any(takers) else None


def run(
    stage: Lowered,
    h: Fold,
    level: Level,
    liveness: Liveness | None = None,
    seen: NormSeen | None = None,
) -> Fold | None:
    """The stage's output on a level's rows.

    Args:
        stage: the stage, with the branches that the level uses.
        h: the level before.
        level: the rows.
        liveness: which rows a later backward has to look at; None: all.
        seen: is told what batch norms saw; None where the stage has none in training mode.

    Returns:
        The output, or None where the stage does not fit what comes in.
    """
    program, layers = stage.program, stage.layers
    values = _inputs(program, layers, h, level.width)
    if values is None or not _fits(program, values[0][0]):
        return None
    going_on = _going_on(level) if len(layers) > 1 else level
    for i, (fused, layer) in enumerate(zip(program.layers, layers, strict=True)):
        x, x_rows = values[fused.source]
        rows = level if fused.source < program.inputs else going_on
        skip = None if fused.skip is None else _skip(values, fused.skip, program.inputs, level)
        carry = _is_read_later(program, fused.source, i)
        if layer.norm is not None and layer.norm.frozen:
            # not once and for all: a checkpointed level does the same again
            layer = layer.with_norm_folded_in()
        is_apart = layer.activation is not None or _is_group_normed(layer)
        alone = is_apart or layer.norm is not None
        own, own_skip = (layer.core_alone(), None) if alone else (layer, skip)
        y, x = _first(stage.operations[i], own, x, rows, own_skip, liveness, carry)
        if _is_group_normed(layer):
            y = plain_torch.run_group_norm(layer, y, rows)
        elif layer.norm is not None:
            own, own_skip = (layer.up_to_norm(), None) if is_apart else (layer, skip)
            normed = _normed(stage.norms, own, y, rows, own_skip, liveness)
            y = normed.output
            if seen is not None:
                before = [other.norm for other in program.layers[:i]]
                seen(layer.norm.layers, rows, before.count(fused.norm), normed)
        if is_apart:
            y = plain_torch.run_rest(layer, y, skip, liveness)
        values[fused.source] = (x, x_rows)
        values.append((y, None))
    return _outputs(values, program, level)


@lru_cache(2**12)
def _going_on(level: Level) -> Level:
    """The same one at every step."""
    return level.going_on()


def why_not(
    operations: Sequence[LevelOperation],
    branches: Sequence[Branch],
    h: Tensor,
    norms: Sequence[NormOperation] = (),
) -> list[tuple[str, str]] | str:
    """How a stage reaches the operations, for people: a reason why it does not, or its layers.

    Args:
        operations: a backend's.
        branches: the stage's branches.
        h: an input ``[N, ...]`` of the stage.
        norms: a backend's for batch norm in training mode.

    Returns:
        For each layer its name in the stage and "" or why no operation takes it; or the reason why
        the stage is not looked into.
    """
    program = common_program([branch.module for branch in branches])
    if isinstance(program, str):
        return program
    layers = _with_tensors(program, branches)
    if layers is None:
        return "its branches have weights of different shapes"
    found = []
    for fused, layer in zip(program.layers, layers, strict=True):
        reasons = [operation.why_not(layer, h) for operation in operations]
        found.append((fused.name, "" if "" in reasons else "; ".join(reasons)))
        apart = [layer.norm.layers[0]] if _is_group_normed(layer) else []
        for module in [*apart, *filter(None, [layer.activation])]:
            found.append((fused.name, f"{type(module).__name__} runs in PyTorch"))
        if _is_normed(layer) and not norms:
            return "it has BatchNorm in training mode, which no kernel of the backend has"
    return found


def _some_tensor(h: Fold) -> Tensor:
    if isinstance(h, Tensor):
        return h
    if isinstance(h, Carried):
        return h.main.data
    return h.data if isinstance(h, RowsFirst) else h.parts[0]


def _with_tensors(program: Program, branches: Sequence[Branch]) -> list[Layer] | None:
    """The layers with their branches' weights; None where those cannot be put side by side."""
    cores = zip(*(layers_of(program, branch.module) for branch in branches), strict=True)
    layers = []
    for fused, of_branches in zip(program.layers, cores, strict=True):
        tensors = [
            [
                branch.parameter(core, fused.name, name)
                for branch, core in zip(branches, of_branches, strict=True)
            ]
            for name in ("weight", "bias")
        ]
        if any(len({None if t is None else t.shape for t in of}) != 1 for of in tensors):
            return None
        layer = _layer(fused, *tensors)
        if fused.norm is not None:
            layer = _with_norm(layer, fused.norm, branches)
        if layer is None:
            return None
        layers.append(layer)
    return layers


def _with_norm(layer: Layer, name: str, branches: Sequence[Branch]) -> Layer | None:
    """The layer with its branches' norms; None where those are not of one form."""
    norms = [branch.module.get_submodule(name) for branch in branches]
    in_groups = all(map(is_group_norm, norms))
    if not in_groups and not all(map(is_batch_norm, norms)):
        return None
    if in_groups:
        forms = {(n.eps, n.affine, n.num_channels, n.num_groups) for n in norms}
    else:
        forms = {(n.eps, n.affine, n.num_features, uses_batch_statistics(n)) for n in norms}
    if len(forms) > 1:
        return None
    tensors = [
        [branch.parameter(n, name, key) for branch, n in zip(branches, norms, strict=True)]
        for key in ("weight", "bias")
    ]
    scales, shifts = ([t for t in of if t is not None] for of in tensors)
    if any(len(of) not in (0, len(norms)) for of in (scales, shifts)):
        return None
    if len(scales) != len(shifts):
        return None
    groups = norms[0].num_groups if in_groups else 0
    frozen = not in_groups and not uses_batch_statistics(norms[0])
    return layer._replace(norm=Norm(norms, scales, shifts, norms[0].eps, frozen, groups))


def _is_normed(layer: Layer) -> bool:
    """Whether a layer has a batch norm in training mode."""
    return layer.norm is not None and not layer.norm.frozen and not layer.norm.groups


def _is_group_normed(layer: Layer) -> bool:
    return layer.norm is not None and layer.norm.groups > 0


def _layer(fused: FusedLayer, weights: list[Tensor], biases: list[Tensor | None]) -> Layer:
    return Layer(
        core=fused.core,
        weights=weights,
        biases=[] if biases[0] is None else biases,
        flatten=fused.flatten,
        relu=fused.relu,
        relu_after=fused.relu_after,
        pool=fused.pool,
        activation=fused.activation,
    )


Value = tuple[Tensor, "tuple[int, ...] | None"]
"""Rows outermost and channels last, and which of its rows each row of the level reads (None: as
they are)."""


def _inputs(program: Program, layers: list[Layer], h: Fold, width: int) -> list[Value] | None:
    """The stage's inputs; None for what is neither images nor vectors."""
    if program.inputs == 2 and isinstance(h, Carried):
        return [(h.main.data, None), (h.skip.data, h.rows)]
    if not isinstance(h, RowsFirst):
        h = folded(h)
        if h.dim() not in (2, 4):
            return None
        h = RowsFirst.of(h, width)
    if program.inputs == 1:
        return [(h.data, None)]
    own = layers[0].weights[0].shape[1]
    return [(h.data[..., :own], None), (h.data[..., own:], None)]


def _fits(program: Program, x: Tensor) -> bool:
    """Whether the layers that read the input take images, or vectors, as it has."""
    images = x.dim() == 5
    return all(
        images == (type(layer.core) is not nn.Linear or layer.flatten)
        for layer in program.layers
        if layer.source == 0
    )


def _skip(values: list[Value], number: int, inputs: int, level: Level) -> Skip:
    data, rows = values[number]
    if number < inputs:
        rows = level.parents if rows is None else tuple(rows[parent] for parent in level.parents)
        if rows == tuple(range(data.shape[0])):
            rows = None
    return Skip(data, rows)


def _is_read_later(program: Program, value: int, layer: int) -> bool:
    """Whether a value that this layer reads is a skip of a later one, or leaves the stage."""
    return value in program.outputs or any(
        value in (later.source, later.skip) for later in program.layers[layer + 1 :]
    )


def _first(
    operations: Sequence[LevelOperation],
    layer: Layer,
    x: Tensor,
    level: Level,
    skip: Skip | None,
    liveness: Liveness | None,
    carry: bool,
) -> tuple[Tensor, Tensor]:
    """The output of the first operation that takes the sizes, or PyTorch's; and ``x`` to go on."""
    for operation in operations:
        out = operation(layer, x, level, skip, liveness, carry and operation.carries)
        if out is not None:
            return out if isinstance(out, tuple) else (out, x)
    return plain_torch.run_level(layer, x, level, skip, liveness), x


def _normed(
    operations: Sequence[NormOperation],
    layer: Layer,
    y: Tensor,
    level: Level,
    skip: Skip | None,
    liveness: Liveness | None,
) -> Normed:
    """What the first operation gives that takes the rows, or PyTorch."""
    check_values(layer.norm.layers[0], y[0, ..., 0].numel())
    for operation in operations:
        normed = operation(layer, y, level, skip, liveness)
        if normed is not None:
            return normed
    return plain_torch.run_norm(layer, y, level, skip, liveness)


def _outputs(values: list[Value], program: Program, level: Level) -> Fold:
    main, *rest = program.outputs
    data = RowsFirst(values[main][0])
    if not rest:
        return data
    skip = _skip(values, rest[0], program.inputs, level)
    rows = tuple(range(len(level))) if skip.rows is None else skip.rows
    return Carried(data, RowsFirst(skip.data), rows)
