"""What a config asks for, one by one: an entry with lists stands for several variants."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from lasem_fast.experiments import presets, schema
from lasem_fast.experiments.config import ConfigError
from lasem_fast.experiments.network import Network

_LISTS = ("transfer", "config", "order", "probability")


@dataclass(frozen=True)
class Variant:
    """One method with all its settings.

    Attributes:
        label: for tables and figures.
        slug: for folders.
        settings: by name, JSON-able; ``method`` among them.
        tasks: how many tasks of the sequence; None for all.
    """

    label: str
    slug: str
    settings: dict[str, Any]
    tasks: int | None


def expand(methods: list[schema.Method], network: Network) -> list[Variant]:
    """All variants of a config.

    Raises:
        ConfigError: two of them have the same label, or a configuration does not fit the net.
    """
    found = []
    for number, entry in enumerate(methods):
        found += _of_entry(entry, network, f"methods[{number}]")
    for i, variant in enumerate(found):
        for other in found[:i]:
            if other.slug == variant.slug:
                raise ConfigError(
                    f"methods: expected different labels, got {other.label!r} and "
                    f"{variant.label!r}; give one of them another with label = "
                )
    return found


def _of_entry(entry: schema.Method, network: Network, where: str) -> list[Variant]:
    settings = entry.model_dump(exclude={"label", "tasks"})
    if settings.get("config") == "release":
        first = 3 if network.is_office_home_6 else 1
        try:
            settings["config"] = presets.static_configurations(network.depth, first)
        except ValueError as error:
            raise ConfigError(f"{where}.{error}") from error
    lists = {k: v if isinstance(v, list) else [v] for k, v in settings.items() if k in _LISTS}
    several = [key for key, values in lists.items() if len(values) > 1]
    variants = []
    for chosen in itertools.product(*lists.values()):
        one = {**settings, **dict(zip(lists, chosen, strict=True))}
        if "config" in one:
            one["config"] = configuration(one["config"], network, where)
        if isinstance(entry, schema.Lasem):
            given = {k: one[k] for k in presets.LASEM[entry.preset] if one[k] is not None}
            one = {**one, **presets.LASEM[entry.preset], **given}
        label = _label(one, network.depth)
        if entry.label is not None:
            parts = [_part(key, one, network.depth) for key in several]
            label = " ".join([entry.label, *parts])
        slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
        variants.append(Variant(label, slug, one, entry.tasks))
    return variants


def configuration(given: str | list[int], network: Network, where: str) -> list[int]:
    """The 1-based shared stages of a configuration.

    Raises:
        ConfigError: it is none of the net's.
    """
    space, depth = network.space, network.depth
    if isinstance(given, list):
        if not all(1 <= stage <= depth for stage in given) or len(set(given)) != len(given):
            raise ConfigError(
                f"{where}.config: expected different stages in 1..{depth}, got {given}"
            )
        return sorted(given)
    name, _, count = given.partition("-")
    if name in ("top", "bottom") and count.isdigit() and int(count) <= depth:
        bits = getattr(space, name)(int(count))
    elif given in ("all", "alternating"):
        bits = getattr(space, given)
    elif given == "none":
        bits = space.bottom(0)
    else:
        raise ConfigError(
            f"{where}.config: expected 'all', 'none', 'alternating', 'top-K', 'bottom-K' (K up to "
            f"{depth}), 'release' or a list of stages such as [[1, 3]], got {given!r}"
        )
    return [stage + 1 for stage, shared in enumerate(bits) if shared]


def configuration_name(shared: list[int], depth: int) -> str:
    """The paper's name of a configuration: All, Top k, Bottom k, Alternating or its stages."""
    k = len(shared)
    if k == depth:
        return "All"
    if k == 0:
        return "None"
    if shared == list(range(depth - k + 1, depth + 1)):
        return f"Top {k}"
    if shared == list(range(1, k + 1)):
        return f"Bottom {k}"
    if shared == list(range(2, depth + 1, 2)):
        return "Alternating"
    return "{" + ",".join(map(str, shared)) + "}"


_NAMES = {
    "lasem": "LASEM",
    "single-task": "Single task",
    "brute-force": "Brute force",
    "darts": "DARTS",
    "prognn": "ProgNN",
    "apd-net": "APD-Net",
    "den": "DEN",
}


def _label(settings: dict[str, Any], depth: int) -> str:
    method = settings["method"]
    name = _NAMES.get(method, method.rpartition(":")[2])
    parts = [name]
    if method == "static":
        parts = [_part("config", settings, depth)]
    elif method == "fixed-probability":
        parts = [_part("probability", settings, depth), _part("config", settings, depth)]
    if "transfer" in settings:
        parts.append(settings["transfer"])
    if settings.get("order") == 2:
        parts.append("second order")
    return " ".join(parts)


def _part(key: str, settings: dict[str, Any], depth: int) -> str:
    value = settings[key]
    if key == "config":
        return configuration_name(value, depth)
    if key == "probability":
        return f"P={value:g}"
    return f"order {value}" if key == "order" else str(value)
