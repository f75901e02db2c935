"""All data sets by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from lasem_fast.datasets.cifar_tasks import (
    cifar10,
    cifar100,
    describe_cifar10,
    describe_cifar100,
)
from lasem_fast.datasets.description import Description
from lasem_fast.datasets.mnist_tasks import describe_mnist, mnist
from lasem_fast.datasets.office_home_tasks import describe_office_home, office_home
from lasem_fast.datasets.option_checks import seeds
from lasem_fast.datasets.source import Root
from lasem_fast.datasets.stand_in_tasks import (
    describe_digits,
    describe_fashion_mnist,
    digits,
    fashion_mnist,
)
from lasem_fast.datasets.stl10_tasks import describe_stl10, stl10
from lasem_fast.lifelong import Task


class _DataSet(NamedTuple):
    tasks: Callable[..., list[Task]]
    describe: Callable[..., Description]

    def options(self) -> dict[str, Any]:
        """Options and their default values."""
        parameters = inspect.signature(self.tasks).parameters
        return {name: p.default for name, p in parameters.items() if name != "root"}

    def needs_files(self) -> bool:
        return "root" in inspect.signature(self.tasks).parameters


_DATA_SETS = {
    "cifar-100": _DataSet(cifar100, describe_cifar100),
    "cifar-10": _DataSet(cifar10, describe_cifar10),
    "mnist": _DataSet(mnist, describe_mnist),
    "office-home": _DataSet(office_home, describe_office_home),
    "stl-10": _DataSet(stl10, describe_stl10),
    "fashion-mnist": _DataSet(fashion_mnist, describe_fashion_mnist),
    "digits": _DataSet(digits, describe_digits),
}
NAMES = tuple(_DATA_SETS)


def load(name: str, root: Root | None = None, **options: Any) -> list[Task]:
    """The tasks of a data set, read from its published files; nothing is fetched.

    Args:
        name: one of :data:`NAMES`.
        root: the folder of the files, or the one above it; None for ``"digits"``.
        options: of the data set's own function, such as ``n_tasks``, ``percent`` and ``trial``.

    Returns:
        Tasks with channels-first float32 inputs and int64 labels.

    Raises:
        TypeError, ValueError: the name, an option or the root is not as described, or a file is
            damaged.
        FileNotFoundError: a file is missing; says where to get it and where to put it.
    """
    chosen, values = _bound(name, options)
    if chosen.needs_files():
        if root is None:
            raise TypeError(f"root: expected the folder of {name}'s files, got None")
        return chosen.tasks(root, **values)
    if root is not None:
        raise TypeError(f"root: expected None, since {name} has no files of its own, got {root!r}")
    return chosen.tasks(**values)


def describe(name: str, **options: Any) -> Description:
    """What :func:`load` would give; no file is read. Raises as it does."""
    chosen, values = _bound(name, options)
    return chosen.describe(**values)


def options(name: str) -> dict[str, Any]:
    """The options of a data set and their default values."""
    return _bound(name, {})[0].options()


def _bound(name: Any, given: dict[str, Any]) -> tuple[_DataSet, dict[str, Any]]:
    if not isinstance(name, str) or name not in _DATA_SETS:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    known = _DATA_SETS[name].options()
    for option in given:
        if option not in known:
            raise TypeError(f"{name} has no option {option!r}; it has {', '.join(known)}")
    values = known | given
    seeds(values["trial"], values.get("seed", 0))
    return _DATA_SETS[name], values
