"""One walk through a task's modules per step, and what it tells of them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from lasem_fast.networks.layers import (
    Method,
    active_random,
    any_mixes_samples,
    any_uses_batch_statistics,
    are_watched,
    is_kind_of_random,
    may_mix_samples,
    modules_in,
    torchs_methods,
)


class Walk(NamedTuple):
    """All modules inside some, and what holds for at least one of them as they are now.

    Nothing of it is kept for another step: modes, settings and hooks change in between.

    Attributes:
        layers: the modules; none where nobody has looked.
        may_draw: whether one draws random numbers; True where nobody has looked.
        may_write: whether one says that it changes its input; True likewise.
        is_normed: whether one is a batch norm that takes the mini-batch's statistics.
        mixes: whether one mixes samples, counts tokens or iterates.
        watched: whether every module has to be called as itself, see
            :func:`~lasem_fast.networks.layers.are_watched`; False where nobody has looked.
    """

    layers: list[nn.Module]
    may_draw: bool
    may_write: bool
    is_normed: bool
    mixes: bool
    watched: bool = False

    @classmethod
    def through(cls, *modules: nn.Module) -> Walk:
        """A walk through these modules; inside ``torch.compile`` for the independence alone."""
        layers = modules_in(*modules)
        if torch.compiler.is_compiling():
            normed, mixes = any_uses_batch_statistics(layers), any_mixes_samples(layers)
            return cls([], True, True, normed, mixes)
        kinds = frozenset(map(type, layers))
        nature = _nature(kinds)
        # what a class is never changes, what it or a layer says of itself may
        says = [own for layer in layers if "inplace" in (own := layer.__dict__)
                or own["_forward_pre_hooks"] or "stochastic" in own]  # fmt: skip
        draws = any(["stochastic" in own for own in says]) or any(
            [hasattr(kind, "stochastic") for kind in kinds]
        )
        writes = any([own.get("inplace") for own in says])
        mixes = nature.mixes or any([own["_forward_pre_hooks"] for own in says])
        return cls(
            layers,
            may_draw=(draws or nature.random) and bool(active_random(layers)),
            may_write=writes or any([getattr(kind, "inplace", False) for kind in kinds]),
            is_normed=mixes and any_uses_batch_statistics(layers),
            mixes=mixes and any_mixes_samples(layers),
            watched=are_watched(nature.methods),
        )

    def covers(self, modules: Iterable[nn.Module]) -> bool:
        """Whether all of these modules were met."""
        return set(self.layers).issuperset(modules)


class _Nature(NamedTuple):
    random: bool
    mixes: bool
    methods: list[Method]


@lru_cache(2**8)
def _nature(kinds: frozenset[type[nn.Module]]) -> _Nature:
    """What one of some classes is by its base classes, and what calls of them run through."""
    methods = dict.fromkeys(method for kind in kinds for method in torchs_methods(kind))
    random, mixes = any(map(is_kind_of_random, kinds)), any(map(may_mix_samples, kinds))
    return _Nature(random, mixes, [*methods])
