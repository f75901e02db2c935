"""What each open task did to the shared stages, so that the end of a task can take it back.

While one task at a time is trained this is one snapshot: the shared stages before the task, weights
and buffers. What the task does not share gets exactly these values back, bit for bit, whatever
their dtype.

When mini-batches of several tasks alternate, what each of them did is kept apart, and only a task's
own doing is taken back. A tensor of a shared stage follows one of two rules:

- *Sums*, for weights (floating-point or complex parameters) and for integer tensors (counters): the
  difference that each task made is kept, and subtracted again. Elements that no other open task
  changed get the very values back; integers are exact in any case.
- *Last writer*, for all else (floating-point, complex and bool buffers: masks, statistics) and for
  what changed its shape: a difference would be no valid value, so the tensor is put back whole, to
  what the last of those who stay has left: another open task, a task that has ended, or nobody.

A task that has ended keeps what it learns when it comes back. Where its loss goes into one step of
the optimiser together with that of an open task, as in rehearsal, the weights' change counts as the
open task's, whichever was called last: the open task's head has changed meanwhile, too. What
several open tasks did in one step counts as that of one of them, mostly the last.

A constant is a tensor that nobody writes: it stays as it is under both rules, infinities and NaN
included. A buffer that changed its shape, or that was made in training, is put back whole too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lasem_fast.configs import Configuration
from lasem_fast.networks.saved import lasting
from lasem_fast.networks.task_modules import TaskModules, UnderWay

_FLOATING = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip
_INTEGER = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# turns of a last writer's value; those of tasks count from 1
_FROM_THE_START, _NOT_WRITTEN = 0, -1

Name = tuple[int, str]  # the stage, and the tensor's name in it


class OwnParts(Protocol):
    """What the roll-back asks of a net beside its shared stages."""

    heads: Mapping[str, nn.Module]
    specific: Mapping[str, nn.ModuleList]


class Snapshot(NamedTuple):
    """All tensors of the shared stages; a buffer may be None. ``weights``: the parameters."""

    tensors: dict[Name, Tensor | None]
    weights: frozenset[Name]

    def copied(self) -> Snapshot:
        """The same with tensors of its own, which later calls may write to."""
        with lasting():
            return self._replace(
                tensors={n: None if t is None else t.clone() for n, t in self.tensors.items()}
            )

    @property
    def device(self) -> torch.device:
        """Where the first of the tensors is."""
        return next((t.device for t in self.tensors.values() if t is not None), torch.device("cpu"))


class _Values(nn.Module):
    """Tensors by stage and name, as buffers; for a last writer's value also the turn it is of."""

    def __init__(self, tensors: dict[Name, Tensor | None] | None = None) -> None:
        super().__init__()
        self.names: dict[Name, int] = {}
        for name, tensor in (tensors or {}).items():
            self[name] = tensor

    def __contains__(self, name: Name) -> bool:
        return name in self.names

    def __getitem__(self, name: Name) -> Tensor | None:
        return self._buffers[f"s{name[0]}_{self.names[name]}"]

    def __setitem__(self, name: Name, tensor: Tensor | None) -> None:
        number = self.names.setdefault(name, sum(n[0] == name[0] for n in self.names))
        self.register_buffer(f"s{name[0]}_{number}", tensor)

    def turn(self, name: Name) -> Tensor | None:
        """When the value was written; None for a sum, and for what has been there from the start"""
        return self._buffers.get(f"t{name[0]}_{self.names[name]}") if name in self.names else None

    def last(self, name: Name) -> int:
        """The turn as a number."""
        turn = self.turn(name)
        if turn is None:
            return _FROM_THE_START if name in self.names else _NOT_WRITTEN
        return int(turn)

    def has_left(self, name: Name) -> bool:
        """Whether there is a value that was there from the start or was written."""
        return self.last(name) != _NOT_WRITTEN

    def write(self, name: Name, tensor: Tensor | None, turn: Tensor) -> None:
        """Keeps a last writer's value."""
        self[name] = tensor
        self.register_buffer(f"t{name[0]}_{self.names[name]}", turn)

    def add(self, name: Name, change: Tensor) -> None:
        """Adds to a sum."""
        self[name] = self[name] + change if name in self else change

    def is_sum(self, name: Name) -> bool:
        """Whether a sum of differences is kept under this name."""
        return name in self.names and self.turn(name) is None

    def structure(self) -> list[list[Any]]:
        """Names, shapes and dtypes, JSON-able."""
        found = []
        for name in self.names:
            value, turned = self[name], self.turn(name) is not None
            form = (None, None) if value is None else (list(value.shape), str(value.dtype)[6:])
            found.append([*name, *form, turned])
        return found

    @classmethod
    def blank(cls, structure: Any, present: Snapshot, *, changes: bool = False) -> _Values | None:
        """Values to be loaded: where none come, those of now, or no changes.

        Former versions saved whether there are any, and no names.
        """
        if structure is True:
            like = {n: t for n, t in present.tensors.items() if t is not None}
            made = torch.zeros_like if changes else torch.clone
            return cls({n: made(t) for n, t in like.items()})
        if structure is False or structure is None:
            return None
        values = cls()
        for stage, name, shape, dtype, turned in structure:
            key, tensor = (stage, name), None
            if shape is not None:
                dtype = getattr(torch, dtype)
                like = present.tensors.get(key)
                if like is not None and like.is_floating_point() and dtype.is_floating_point:
                    dtype = like.dtype  # the net was cast since
                device = present.device if like is None else like.device
                tensor = torch.zeros(shape, dtype=dtype, device=device)
                if not changes and like is not None and like.shape == tensor.shape:
                    tensor.copy_(like)
            values[key] = tensor
            if turned:
                turn = torch.zeros((), dtype=torch.int64, device=present.device)
                values.write(key, tensor, turn)
        return values


class Rollback(UnderWay):
    """Keeps the shared stages' last settled values and the changes of the open tasks.

    Invariant, for sums: shared = settled + the open tasks' changes + what the active task did since
    `anchor`.
    """

    settled: _Values | None
    anchor: _Values | None

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None
        self.weights: frozenset[Name] = frozenset()  # of what was settled, the parameters
        # torch.compile cannot trace in every PyTorch (2.11) how a plain attribute becomes a module
        self.register_module("settled", None)
        self.register_module("anchor", None)
        self.changes = TaskModules()
        # of each open task what is its own, from when a task that has ended became active
        self.witnesses = TaskModules()
        # a tensor: a number would be compiled into every step
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def is_idle(self) -> bool:
        """Whether no open task has made a step."""
        return self.settled is None

    def before(self, task: str, ended: bool, shared: nn.ModuleList) -> Snapshot | None:
        """What :meth:`begin` needs from before the forward, which may write to buffers."""
        if task == self.active or (self.settled is None and ended):
            return None
        return _present(shared).copied()

    def begin(
        self, task: str, ended: bool, before: Snapshot | None, net: OwnParts | None = None
    ) -> None:
        """Says whose step this is; must be called before the optimiser changes anything.

        Without a ``net``, steps of several tasks count as the last one's.
        """
        if before is None:
            return
        with lasting():
            self._begin(task, ended, before, net)

    def _begin(self, task: str, ended: bool, before: Snapshot, net: OwnParts | None) -> None:
        if self.settled is None:
            self.settled, self.weights = _Values(before.tensors), before.weights
            self.turn = torch.zeros_like(self.turn, device=before.device)
            self.active = task
            return
        self._attribute(before, net)
        self.anchor = _Values(before.tensors)
        self.active = task
        for known in self.witnesses:
            del self.witnesses[known]
        if not ended and task not in self.changes:
            self.changes[task] = _Values()
        if ended and net is not None:
            for other in self.changes:
                own = {name: tensor.clone() for name, tensor in _own(net, other).items()}
                self.witnesses[other] = _Values(own)

    @torch.no_grad()
    def _attribute(self, now: Snapshot, net: OwnParts | None) -> None:
        """Adds what the active task did since `anchor` to that task's change."""
        if self.anchor is None:
            self.changes[self.active] = _Values()
        anchor = self.settled if self.anchor is None else self.anchor
        # A task that has ended keeps what it learns when it comes back.
        open_task = self.active in self.changes
        target = self.changes[self.active] if open_task else self.settled
        self.turn = self.turn + 1
        trained = {} if open_task or net is None else self._trained_meanwhile(net)
        for name, tensor in now.tensors.items():
            then = anchor[name] if name in anchor else None
            if not self._has_sums(name, then, tensor, name in now.weights):
                self._write(target, name, then, tensor)
                continue
            change = (tensor - then).masked_fill_(tensor == then, 0)  # infinities are constants
            if open_task:
                target.add(name, change)
                continue
            if name in now.weights:
                for other, too in trained.items():
                    self.changes[other].add(name, change.masked_fill(~too, 0))
                    change = change.masked_fill(too, 0)
            self._settle(name, tensor, change, self.changes.values())

    def _trained_meanwhile(self, net: OwnParts) -> dict[str, Tensor]:
        """For open tasks whether the active one's steps were theirs as well, each a bool tensor."""
        trained = {}
        for task in self.witnesses:
            then, now = self.witnesses[task], _own(net, task)
            names = [n for n in then.names if _same_form(now.get(n), then[n])]
            if names and task in self.changes:
                trained[task] = torch.stack([(now[n] != then[n]).any() for n in names]).any()
        return trained

    def _has_sums(self, name: Name, then: Tensor | None, now: Tensor | None, weight: bool) -> bool:
        """Which of the two rules a tensor follows."""
        if now is None:
            return False
        values = [self.settled, *self.changes.values()]
        kept = [v[name] if name in v else None for v in values[:1]]
        kept += [v[name] for v in values[1:] if name in v]
        if any(t is None or (t.shape, t.dtype) != (now.shape, now.dtype) for t in (then, *kept)):
            return False
        if any(v.turn(name) is not None for v in values):
            return False
        return now.dtype in _INTEGER or (weight and now.dtype in _FLOATING)

    def _write(self, target: _Values, name: Name, then: Tensor | None, now: Tensor | None) -> None:
        """Keeps `now` as the target's last value if it is another one than `then`."""
        if not _same_form(now, then):
            target.write(name, None if now is None else now.clone(), self.turn.clone())
            return
        if now is None:
            return
        known, turn = name in target, target.turn(name)
        last = target[name] if known else now
        written = (_bits(now) != _bits(then)).any()
        if not _same_form(now, last):
            if bool(written):
                target.write(name, now.clone(), self.turn.clone())
            return
        if turn is None:
            turn = torch.full_like(self.turn, _FROM_THE_START if known else _NOT_WRITTEN)
        value = torch.where(written, _bits(now), _bits(last)).view(now.dtype).reshape(now.shape)
        target.write(name, value, torch.where(written, self.turn, turn))

    def _settle(self, name: Name, now: Tensor, change: Tensor, others: Iterable[_Values]) -> None:
        """Takes a change over for good; where no other made one, exactly the present value."""
        settled = self.settled[name]
        changed = torch.where(_untouched(name, others, now), now, settled + change)
        self.settled[name] = torch.where(change == 0, settled, changed)

    @torch.no_grad()
    def end(
        self,
        task: str,
        config: Configuration,
        shared: nn.ModuleList,
        net: OwnParts | None = None,
    ) -> None:
        """Takes back what a task did to the shared weights of the stages that it does not share.

        Raises:
            RuntimeError: a stage has lost parameters that would have to be put back. Nothing has
                changed then.
        """
        if task != self.active and task not in self.changes:
            return  # it made no step
        now = _present(shared)
        names = [n for n in {**now.tensors, **self.settled.names} if not config[n[0]]]
        # nobody can have written since `anchor` to what is gone
        lost = [n for n in names if n not in (now.weights if n in self.weights else now.tensors)]
        _check_can_be_put_back(self._without(task, lost, now)[0], self.weights, shared)
        if self.anchor is not None:
            self._attribute(now, net)
            self.anchor, self.active = _Values(now.copied().tensors), None
        back, gone = self._without(task, names, now)
        for name, value in back.items():
            _put_back(name, value, now, shared)
        for name in gone:
            _put_away(name, shared)
        others = self._others(task)
        if not others:
            self.forget_all()
            return
        own = self.changes[task]
        for name in now.tensors:
            if config[name[0]] and name in own:
                self._keep(name, now.tensors[name], own, others)
        del self.changes[task]
        self.anchor = _Values(_present(shared).copied().tensors)

    def _others(self, task: str) -> list[_Values]:
        """What the other open tasks did."""
        return [self.changes[other] for other in self.changes if other != task]

    def _without(
        self, task: str, names: list[Name], now: Snapshot
    ) -> tuple[dict[Name, Tensor | None], list[Name]]:
        """The values of tensors without what the task did, and the buffers that it has made."""
        back: dict[Name, Tensor | None] = {}
        gone: list[Name] = []
        if others := self._others(task):
            own = self.changes[task]
            for name in names:
                self._take_back(name, now.tensors.get(name), own, others, back, gone)
        else:
            back = {n: self.settled[n] for n in names if self.settled.has_left(n)}
            gone = [n for n in names if n not in back and n not in now.weights]
        return back, [n for n in gone if n in now.tensors]

    def _take_back(
        self, name: Name, now: Tensor | None, own: _Values, others: list[_Values],
        back: dict[Name, Tensor | None], gone: list[Name],
    ) -> None:  # fmt: skip
        """Finds one tensor's value without what the task did, if it did anything."""
        if self._is_summed(name, now, own):
            change, settled = own[name], self.settled[name]
            exact = _untouched(name, others, now) | ~torch.isfinite(change)
            without = torch.where(exact, settled, now - change)
            back[name] = torch.where(change == 0, now, without)
            return
        if name in own and not own.has_left(name):
            return
        left = [v for v in others if v.has_left(name) and not v.is_sum(name)]
        left += [self.settled] if self.settled.has_left(name) else []
        if left:
            back[name] = max(left, key=lambda values: values.last(name))[name]
        else:
            gone.append(name)

    def _keep(self, name: Name, now: Tensor | None, own: _Values, others: list[_Values]) -> None:
        """Settles one tensor of a stage that the task shares."""
        if self._is_summed(name, now, own):
            self._settle(name, now, own[name], others)
        elif not own.is_sum(name) and own.last(name) > self.settled.last(name):
            self.settled.write(name, own[name], own.turn(name))

    def _is_summed(self, name: Name, now: Tensor | None, own: _Values) -> bool:
        """Whether a sum is kept that fits: since then another task may have changed the shape."""
        settled = self.settled[name] if name in self.settled else None
        return own.is_sum(name) and _same_form(now, own[name]) and _same_form(settled, own[name])

    def forget_all(self) -> None:
        """Takes the shared stages as they are for settled."""
        self.active = self.settled = self.anchor = None
        self.weights = frozenset()
        self.changes, self.witnesses = TaskModules(), TaskModules()
        self.turn = torch.zeros_like(self.turn)

    def structure(self) -> dict[str, Any]:
        """Which copies exist; their values are in the buffers."""
        return {
            "active": self.active,
            "turn": int(self.turn) if self.changes or self.anchor is not None else 0,
            "settled": None if self.settled is None else self.settled.structure(),
            "weights": sorted(map(list, self.weights)),
            "anchor": None if self.anchor is None else self.anchor.structure(),
            "changes": {task: self.changes[task].structure() for task in self.changes},
            "witnesses": {task: self.witnesses[task].structure() for task in self.witnesses},
        }

    def restore_structure(
        self, state: dict[str, Any], shared: nn.ModuleList, net: OwnParts | None = None
    ) -> None:
        """Makes the buffers that a saved state has values for."""
        present = _present(shared)
        changes = state["changes"]
        if isinstance(changes, list):  # as former versions saved them
            changes = dict.fromkeys(changes, True)
        self.forget_all()
        self.active = state["active"]
        self.turn = torch.full_like(self.turn, state.get("turn", 0), device=present.device)
        self.settled = _Values.blank(state["settled"], present)
        if self.settled is not None:
            self.weights = frozenset(map(tuple, state.get("weights", present.weights)))
        self.anchor = _Values.blank(state["anchor"], present)
        for task, structure in changes.items():
            self.changes[task] = _Values.blank(structure, present, changes=True)
        for task, structure in state.get("witnesses", {}).items():
            own = Snapshot({} if net is None else _own(net, task), frozenset())
            self.witnesses[task] = _Values.blank(structure, own)


def _present(shared: nn.ModuleList) -> Snapshot:
    """The shared stages' tensors themselves."""
    tensors: dict[Name, Tensor | None] = {}
    weights = set()
    for i, stage in enumerate(shared):
        for name, parameter in stage.named_parameters():
            tensors[i, name] = parameter.detach()
            weights.add((i, name))
        for path, module in stage.named_modules():
            for leaf, buffer in module._buffers.items():  # those that are None, too
                name = f"{path}.{leaf}" if path else leaf
                tensors[i, name] = None if buffer is None else buffer.detach()
    return Snapshot(tensors, frozenset(weights))


def _own(net: OwnParts, task: str) -> dict[Name, Tensor]:
    """What every step of an open task trains: its head, or without one its own branches."""
    parts = [net.heads[task]], net.specific[task]
    head, branches = (
        {(i, name): p.detach() for i, module in enumerate(modules)
         for name, p in module.named_parameters() if p.requires_grad}
        for modules in parts
    )  # fmt: skip
    return head or branches


def _untouched(name: Name, others: Iterable[_Values], like: Tensor) -> Tensor:
    """Which elements no other open task has changed."""
    untouched = torch.ones_like(like, dtype=torch.bool)
    for other in others:
        if other.is_sum(name) and _same_form(other[name], like):
            untouched = untouched & (other[name] == 0)
    return untouched


def _same_form(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.shape, a.dtype) == (b.shape, b.dtype)


def _bits(tensor: Tensor) -> Tensor:
    """The bytes: equal for equal NaN, and there is a choice by ``where`` for every dtype."""
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def _check_can_be_put_back(
    lost: dict[Name, Tensor | None], weights: frozenset[Name], shared: nn.ModuleList
) -> None:
    """Raises RuntimeError for one that is no buffer of a layer that is still there."""
    for (stage, name), value in lost.items():
        path, _, leaf = name.rpartition(".")
        try:
            owner = shared[stage].get_submodule(path)
        except AttributeError:
            owner = None
        weight = (stage, name) in weights
        if not weight and owner is not None and leaf in owner._buffers:
            continue
        if weight or owner is None or value is None or hasattr(owner, leaf):
            kind = " as a parameter" if weight else ""
            raise RuntimeError(
                f"net: expected the shared stage {stage + 1} to have {name!r}{kind}, as it had "
                f"when the task began; got one without it, so that it cannot be put back"
            )


def _put_back(name: Name, value: Tensor | None, now: Snapshot, shared: nn.ModuleList) -> None:
    present = now.tensors.get(name)
    if value is not None and present is not None and value.shape == present.shape:
        present.copy_(value)
        return
    path, _, leaf = name[1].rpartition(".")
    owner = shared[name[0]].get_submodule(path)
    value = None if value is None else value.clone()
    if name in now.weights:
        owner.get_parameter(leaf).data = value
    elif leaf in owner._buffers:
        setattr(owner, leaf, value)
    else:
        owner.register_buffer(leaf, value)


def _put_away(name: Name, shared: nn.ModuleList) -> None:
    """Removes a buffer that was not there before the task."""
    path, _, leaf = name[1].rpartition(".")
    delattr(shared[name[0]].get_submodule(path), leaf)
