"""A module container with one entry per task, for any task name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_PREFIX = "task_"


class TaskModules(nn.Module):
    """Modules by task name; ``nn.ModuleDict`` takes no names with dots or names like "keys".

    A name that is not there is a ValueError that lists those that are.
    """

    def __getitem__(self, task: str) -> nn.Module:
        return self._modules[self._key(task)]

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


def _check_name(task: Any) -> None:
    if not isinstance(task, str):
        raise TypeError(f"task: expected a name (str), got {type(task).__name__} {task!r}")


def _encoded(task: str) -> str:
    return _PREFIX + task.replace("%", "%25").replace(".", "%2E")


def _decoded(key: str) -> str:
    return key[len(_PREFIX) :].replace("%2E", ".").replace("%25", "%")
