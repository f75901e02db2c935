"""Reading a config: TOML, checked against the schema, with errors in words."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lasem_fast.experiments import schema

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(Exception):
    """A config is not as it should be; the text says all that is wrong, a line each."""


@dataclass(frozen=True)
class Checked:
    """A config whose keys and types are right; ``methods`` in place of the config's own."""

    config: schema.Config
    methods: list[schema.Method]

    @property
    def out(self) -> Path:
        return Path(self.config.out or Path("runs") / self.config.name)


def read(path: Path) -> dict[str, Any]:
    """A TOML file as a dict.

    Raises:
        ConfigError: there is no such file, or it is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected TOML ({error})") from error


def check(plain: dict[str, Any]) -> Checked:
    """Checks keys and types.

    Raises:
        ConfigError: with a line for everything that is wrong.
    """
    wrong: list[str] = []
    config = _validated(schema.Config, plain, "", wrong)
    methods = []
    entries = plain.get("methods", [])
    for number, entry in enumerate(entries if isinstance(entries, list) else []):
        where = f"methods[{number}]"
        if isinstance(entry, dict):
            model = _model_of(entry, where, wrong)
            if model is not None:
                methods.append(_validated(model, entry, where + ".", wrong))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return Checked(config, methods)


def _model_of(entry: dict[str, Any], where: str, wrong: list[str]) -> type[schema.Method] | None:
    name = entry.get("method")
    if not isinstance(name, str):
        got = "none" if name is None else repr(name)
        wrong.append(f"{where}.method: expected the name of a method, got {got}")
        return None
    if ":" in name:
        return schema.Own
    if name not in schema.METHODS:
        known = ", ".join(schema.METHODS)
        wrong.append(
            f"{where}.method: expected one of {known}, or a class of your own as file.py:Class, "
            f"got {name!r}{suggestion(name, schema.METHODS)}"
        )
        return None
    return schema.METHODS[name]


def _validated(model: type[BaseModel], plain: dict[str, Any], prefix: str, wrong: list[str]) -> Any:
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        told = {_told(model, plain, found, prefix) for found in error.errors()}
        wrong += sorted(told)
        return None


def _told(model: type[BaseModel], plain: dict[str, Any], found: Any, prefix: str) -> str:
    place = found["loc"]
    path = prefix + ".".join(map(str, place))
    for i, key in enumerate(place):
        field = model.model_fields.get(key)
        if field is None or found["type"] == "missing":
            break
        plain = plain[key]
        if field.description is not None:  # one line, whichever of its types was tried in vain
            path = prefix + ".".join(place[: i + 1])
            return f"{path}: expected {field.description}, got {plain!r}"
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    if found["type"] == "extra_forbidden":
        return f"{path}: unknown key{suggestion(place[-1], model.model_fields)}"
    if found["type"] == "missing":
        return f"{path}: missing"
    message = found["msg"]  # only its first letter: a pattern is in it as it stands
    return f"{path}: {message[0].lower()}{message[1:]}, got {found['input']!r}"


def suggestion(key: str, known: Iterable[str]) -> str:
    """What to say after an unknown key."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(known)}"


def check_options(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuses options that a function or class does not have.

    Raises:
        ConfigError: names them, with the nearest that is known.
    """
    known = list(known)
    wrong = [
        f"{where}.{key}: unknown key{suggestion(key, known)}" for key in given if key not in known
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
