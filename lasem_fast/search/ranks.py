"""The processes that ``DistributedDataParallel`` trains one LASEM with: what they hold in common.

DDP keeps equal what it found when it wrapped the module. The prior and the copies for the roll-back
come later, and the choice at the end of a task belongs to no forward; those are kept equal here,
by what the first process has. :mod:`lasem_fast.search.parts` has what a mini-batch asks for.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Ranks:
    """What a LASEM knows of the other processes; nothing until DDP has called it."""

    def __init__(self) -> None:
        self._ddp: Any = lambda: None  # a weak reference: a LASEM may be wrapped anew
        self._group: dist.ProcessGroup | None = None
        self._known: set[int] = set()

    def __reduce__(self) -> Any:
        return Ranks, ()  # a copy is wrapped by nobody

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        return self._group is not None and dist.is_initialized()

    def note_call(self, task: str, trained: Iterable[nn.Parameter]) -> bool:
        """Looks who calls; True if it is a DDP that has not called before.

        Raises:
            RuntimeError: DDP calls, and some of the parameters are not among those that it found,
                or processes may run out of mini-batches earlier than others.
        """
        ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if ddp is None or dist.get_world_size(ddp.process_group) == 1:
            return False
        if ddp._join_config.enable:
            raise RuntimeError(
                "x: expected a part of every mini-batch in every process, because the posterior is "
                "that of all parts, got a call inside DistributedDataParallel.join(), which is for "
                "processes that run out of them; leave join() out, and let the sampler give all "
                "processes as many (drop_last=True)"
            )
        new = ddp is not self._ddp()
        known = {id(p) for p in ddp._module_parameters} if new else self._known
        unknown = sum(p.requires_grad and id(p) not in known for p in trained)
        if unknown:
            raise RuntimeError(
                f"task: expected one whose branches and head were there when "
                f"DistributedDataParallel wrapped the LASEM, because it averages the gradients of "
                f"no others; got {task!r} with {unknown} other parameters: after add_task, wrap "
                f"the LASEM anew"
            )
        self._ddp, self._group, self._known = weakref.ref(ddp), ddp.process_group, known
        return new

    def check_alike(self, what: dict[str, Any]) -> None:
        """All processes have to hold the same tasks, prior and roll-back.

        Raises:
            RuntimeError: in all of them, if they do not.
        """
        mine = json.dumps(what)
        all_of_them: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(all_of_them, mine, group=self._group)
        other = [rank for rank, theirs in enumerate(all_of_them) if theirs != all_of_them[0]]
        if other:
            self.__init__()
            raise RuntimeError(
                f"net: expected the same tasks under way in all processes, got others in those of "
                f"rank {other} than in rank 0; load the same state_dict in all of them"
            )

    @torch.no_grad()
    def agree(self, what: Any, device: torch.device) -> Tensor:
        """Whether all processes ask with the same, a bool scalar; does not wait for a device."""
        digest = hashlib.blake2b(repr(what).encode(), digest_size=7).digest()
        number = int.from_bytes(digest, "big")
        ends = torch.tensor([number, -number], device=device)
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._group)
        return ends[0] == -ends[1]

    @torch.no_grad()
    def of_all(self, values: Tensor) -> Tensor:
        """``[W, ...]``: what all W processes have, in their order; does not wait for a device."""
        found = [torch.empty_like(values) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(found, values.contiguous(), group=self._group)
        return torch.stack(found)

    @torch.no_grad()
    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites the tensors by those of the first process."""
        first = dist.get_global_rank(self._group, 0)
        for tensor in tensors:
            value = tensor.contiguous()
            dist.broadcast(value, first, group=self._group)
            if value is not tensor:
                tensor.copy_(value)

    def of_first(self, number: int, device: torch.device) -> int:
        """A number as the first process has it."""
        if not self.several:
            return number
        tensor = torch.tensor(number, device=device)
        self.take_from_first([tensor])
        return int(tensor)


def check_is_whole(*modules: nn.Module) -> None:
    """The modules are held as a whole, in this process alone or in every one of several.

    Raises:
        RuntimeError: they are not.
    """
    for module in modules:
        attributes = vars(module)
        if attributes.get("_is_replica"):
            got = "a replica of nn.DataParallel, which forgets what the prior counts"
        elif attributes.get("_is_fsdp_managed_module"):
            got = "one that FSDP has sharded, which the roll-back at a task's end cannot read"
        else:
            continue
        raise RuntimeError(
            f"net: expected a LASEM that every process has as a whole, got {got}; "
            f"use DistributedDataParallel"
        )
