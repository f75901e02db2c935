"""The tasks of an experiment: of a published data set by name, or from a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from lasem_fast import datasets
from lasem_fast.experiments import schema, users_objects
from lasem_fast.experiments.config import ConfigError, check_options, suggestion
from lasem_fast.lifelong import Task
from lasem_fast.lifelong.task_data import check_tasks


def check(data: schema.Data) -> None:
    """Looks at the name and the options, at no files.

    Raises:
        ConfigError: there is no such data set, function or option.
    """
    if ":" in data.name:
        _function(data)
    else:
        _checked(data)


def load(data: schema.Data, seed: int) -> list[Task]:
    """The tasks of the run with this seed.

    A data set's option ``trial``, which draws the order of its images, is the seed unless the
    config says otherwise.

    Raises:
        ConfigError: there is no such data set or option, or its files are missing or damaged.
    """
    if ":" in data.name:
        return _own(data, seed)
    options = _with_trial(_checked(data), datasets.options(data.name), seed)
    try:
        return datasets.load(data.name, data.root, **options)
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError(f"data: {error}") from error


def load_stand_ins(data: schema.Data, seed: int) -> list[Task]:
    """Tasks of the same form without a look at the files: what costs the same to train.

    Where the form depends on the files, or the tasks come from the user's function, the tasks
    themselves. Raises as `load` does.
    """
    if ":" in data.name:
        return _own(data, seed)
    try:
        found = datasets.describe(data.name, **_checked(data))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data: {error}") from error
    if found.sizes is None:
        return load(data, seed)
    image = torch.randn(found.input_shape, generator=torch.Generator().manual_seed(0))
    tasks = []
    for number, classes in enumerate(found.classes):
        # one image for all: without memory of its own, whatever the number
        splits = [
            (image.expand(n, *found.input_shape), torch.arange(n) % classes) for n in found.sizes
        ]
        tasks.append(Task(f"task{number + 1}", *splits, n_classes=classes))
    return tasks


def _checked(data: schema.Data) -> dict[str, Any]:
    """The options of a published data set."""
    if data.name not in datasets.NAMES:
        raise ConfigError(
            f"data.name: expected one of {', '.join(datasets.NAMES)}, or a function of your own as "
            f"file.py:function, got {data.name!r}{suggestion(data.name, datasets.NAMES)}"
        )
    check_options(data.options(), datasets.options(data.name), "data")
    return data.options()


def _function(data: schema.Data) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]:
    """The user's function, the options that it has and those that it is given."""
    function = users_objects.load(data.name, "data.name")
    known = users_objects.options_of(function)
    options = data.options()
    if data.root is not None:
        options["root"] = data.root
    check_options(options, known, "data")
    return function, known, options


def _own(data: schema.Data, seed: int) -> list[Task]:
    function, known, options = _function(data)
    found = function(**_with_trial(options, known, seed))
    listed = list(found) if isinstance(found, Iterable) else found
    try:
        return check_tasks(listed)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.name: what {data.name!r} returned: {error}") from error


def _with_trial(options: dict[str, Any], known: dict[str, Any], seed: int) -> dict[str, Any]:
    return {"trial": seed, **options} if "trial" in known else options
