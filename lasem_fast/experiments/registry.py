"""Methods by name, as `train_sequence` takes them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lasem_fast.em import LASEM
from lasem_fast.experiments import users_objects
from lasem_fast.experiments.config import ConfigError, check_options
from lasem_fast.experiments.network import Network
from lasem_fast.experiments.variants import Variant
from lasem_fast.lifelong import Method, Task
from lasem_fast.lifelong.methods import BruteForce, Search, SingleTask, Static
from lasem_fast.net import TransferNet

MakeNet = Callable[[], TransferNet]

# what takes stages in place of a net, by its name in lasem_fast.comparators
_COMPARATORS = {
    "fixed-probability": "FixedProbability",
    "darts": "DARTS",
    "prognn": "ProgNN",
    "apd-net": "APDNet",
    "den": "DEN",
}
_OF_A_VARIANT = ("method", "transfer", "preset")


@dataclass(frozen=True)
class Built:
    """A variant's parts for `train_sequence`; ``make`` makes the method, given ``make_net``.

    ``least_epochs``: of every task, where there are several.
    """

    name: str
    make: Callable[[MakeNet], Method]
    make_net: MakeNet
    make_head: Callable[[Task], nn.Module]
    least_epochs: int = 1

    def __call__(self, make_net: MakeNet) -> Method:
        return self.make(make_net)


def build(variant: Variant, network: Network) -> Built:
    """What trains a variant.

    Raises:
        ConfigError: a key is not an argument of the method's class, or its value not one that the
            class can take.
    """
    settings = variant.settings
    transfer = settings.get("transfer", "hps")
    built = Built(
        variant.slug,
        _maker(settings, network, transfer),
        lambda: network.net(transfer),
        lambda task: network.head(task, transfer),
    )
    if ":" in settings["method"]:  # what a user's class raises is its run's own failure
        return built
    try:
        method = built(built.make_net)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{settings['method']}: {error}") from error
    return replace(built, least_epochs=getattr(method, "least_epochs", 1))


def _maker(
    settings: dict[str, Any], network: Network, transfer: str
) -> Callable[[MakeNet], Method]:
    method = settings["method"]
    options = {k: v for k, v in settings.items() if k not in _OF_A_VARIANT}
    if method == "lasem":
        return lambda make_net: Search(LASEM(make_net(), network.space, **options))
    if method == "static":
        return lambda make_net: Static(make_net(), set(options["config"]))
    if method == "single-task":
        return SingleTask
    if method == "brute-force":
        return lambda make_net: BruteForce(make_net(), network.space)
    if method in _COMPARATORS:
        return _comparator(method, options, network, transfer)
    own = users_objects.load(method, "method")
    check_options(settings["options"], users_objects.options_of(own, without=1), "options")
    return lambda make_net: own(make_net(), **settings["options"])


def _comparator(
    method: str, options: dict[str, Any], network: Network, transfer: str
) -> Callable[[MakeNet], Method]:
    # imported here: a config without comparators does not need them
    kind = getattr(importlib.import_module("lasem_fast.comparators"), _COMPARATORS[method])
    known = inspect.signature(kind).parameters
    check_options(options, [name for name in known if name != "stages"], method)
    options = {k: set(v) if k == "config" else v for k, v in options.items()}
    if "init" in known:
        options.setdefault("init", network.init)
    if "space" in known:
        options["space"] = network.space
    if "transfer" in known:
        options["transfer"] = network.mechanism(transfer)
    return lambda make_net: kind(network.stages(), **options)
