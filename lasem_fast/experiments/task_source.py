"""The tasks of an experiment: of a published data set by name, or from a function of the user's."""

from __future__ import annotations

from typing import Any

from lasem_fast.experiments import schema, users_objects
from lasem_fast.experiments.config import ConfigError, check_options, suggestion
from lasem_fast.lifelong import Task


def load(data: schema.Data, seed: int) -> list[Task]:
    """The tasks of the run with this seed.

    A data set's option ``trial``, which draws the order of its images, is the seed unless the
    config says otherwise.

    Raises:
        ConfigError: there is no such data set or option, or its files are missing or damaged.
    """
    if ":" in data.name:
        return _own(data, seed)
    from lasem_fast import datasets

    if data.name not in datasets.NAMES:
        raise ConfigError(
            f"data.name: expected one of {', '.join(datasets.NAMES)}, or a function of your own as "
            f"file.py:function, got {data.name!r}{suggestion(data.name, datasets.NAMES)}"
        )
    known = datasets.options(data.name)
    options = data.options()
    check_options(options, known, "data")
    options = _with_trial(options, known, seed)
    try:
        return datasets.load(data.name, data.root, **options)
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError(f"data: {error}") from error


def _own(data: schema.Data, seed: int) -> list[Task]:
    function = users_objects.load(data.name, "data.name")
    known = users_objects.options_of(function)
    options = data.options()
    if data.root is not None:
        options["root"] = data.root
    check_options(options, known, "data")
    options = _with_trial(options, known, seed)
    return list(function(**options))


def _with_trial(options: dict[str, Any], known: dict[str, Any], seed: int) -> dict[str, Any]:
    return {"trial": seed, **options} if "trial" in known else options
