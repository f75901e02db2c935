"""Counts what a step would cost, without running it."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Count(TorchDispatchMode):
    """Counts FLOPs, and the bytes of the storages made inside it that are alive.

    Works on the meta device, where nothing is allocated: the count is what a real device would
    hold, without an operator's private workspace.

    Attributes:
        flops: by PyTorch's own formulas, those of ``torch.utils.flop_counter.FlopCounterMode``.
            (That mode also tracks modules, which fails on views made without gradients.)
        alive: bytes alive now.
        peak: the largest ``alive`` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.alive = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def ignore(self, *tensors: Tensor) -> None:
        """Leaves out storages that were there before."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # imports triton where it is installed, so not with the package
        from torch.utils.flop_counter import flop_registry

        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.alive -= size
