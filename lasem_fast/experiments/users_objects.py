"""Functions and classes of the user's own, named in a config as ``file.py:name``."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from lasem_fast.experiments.config import ConfigError


def load(name: str, where: str) -> Any:
    """What ``file.py:name`` or ``module:name`` names, from the current directory.

    Raises:
        ConfigError: there is no such thing, or it cannot be called.
    """
    source, _, attribute = name.rpartition(":")
    file = Path(source)
    folder, module_name = Path.cwd(), source
    if file.suffix == ".py":
        if not file.is_file():
            raise ConfigError(f"{where}: expected a Python file, got {source!r}: no such file")
        folder, module_name = file.resolve().parent, file.stem
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:  # what the user's own module imports in vain
            raise
        raise ConfigError(
            f"{where}: expected a module that can be imported, got {source!r}"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ConfigError(f"{where}: expected a function or class {attribute!r} in {source}")
    return found


def options_of(function: Any, without: int = 0) -> dict[str, Any]:
    """Names and defaults of the arguments that a config may give, first ``without`` left out.

    ``**rest`` among them is no option.
    """
    parameters = list(inspect.signature(function).parameters.values())[without:]
    anything = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p.default for p in parameters if p.kind not in anything}
