"""A module container with one entry per task, for any task name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_PREFIX = "task_"


class TaskModules(nn.Module):
    """Modules by task name; ``nn.ModuleDict`` takes no names with dots or names like "keys".

    A name that is not there is a ValueError that lists those that are.
    """

    def __getitem__(self, task: str) -> nn.Module:
        found = self._modules.get(_encoded(task)) if isinstance(task, str) else None
        return self._modules[self._key(task)] if found is None else found

    def __setitem__(self, task: str, module: nn.Module) -> None:
        _check_name(task)
        self.add_module(_encoded(task), module)

    def __delitem__(self, task: str) -> None:
        del self._modules[self._key(task)]

    def _key(self, task: str) -> str:
        _check_name(task)
        if _encoded(task) not in self._modules:
            raise ValueError(f"task: expected one of {list(self)}, got {task!r}")
        return _encoded(task)

    def __contains__(self, task: object) -> bool:
        return isinstance(task, str) and _encoded(task) in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter([_decoded(key) for key in self._modules])

    def __len__(self) -> int:
        return len(self._modules)

    def values(self) -> list[nn.Module]:
        """The modules, in the order in which the tasks were added."""
        return list(self._modules.values())


class Unlisted(nn.Module):
    """A module that an outer ``buffers()`` does not list what is inside of.

    What is made while training runs goes here. It moves, copies and saves with the outer module,
    but what goes through a module's buffers once and for all (``DistributedDataParallel``,
    ``AveragedModel``) must not find other ones later.
    """

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """Itself alone."""
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self

    def all_buffers(self) -> list[Tensor]:
        """Its buffers and those of all modules inside."""
        inside = [child.buffers() for child in self.children()]
        return [*self.buffers(), *(b for buffers in inside for b in buffers)]


class UnderWay(Unlisted):
    """One that a partial state dict either has all values for, or leaves nothing under way in."""

    def forget_all(self) -> None:
        """Leaves nothing under way."""
        raise NotImplementedError(f"{type(self).__name__} does not define forget_all")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        lost = [name for name in self.state_dict(prefix=prefix) if name not in state_dict]
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        if lost:
            missing += lost
            self.forget_all()


class UnlistedTaskModules(Unlisted, TaskModules):
    """Modules by task name that an outer ``buffers()`` does not list."""


def _check_name(task: Any) -> None:
    if not isinstance(task, str):
        raise TypeError(f"task: expected a name (str), got {type(task).__name__} {task!r}")


def _encoded(task: str) -> str:
    return _PREFIX + task.replace("%", "%25").replace(".", "%2E")


def _decoded(key: str) -> str:
    return key[len(_PREFIX) :].replace("%2E", ".").replace("%25", "%")
