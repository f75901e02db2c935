"""The comparators through the one loop: interrupted and resumed runs equal uninterrupted ones."""

from __future__ import annotations

import drawn_experiment
import pytest

pytest.importorskip("pydantic")
pytest.importorskip("lasem_fast.comparators")

from lasem_fast.experiments.config import ConfigError, tomllib
from lasem_fast.experiments.experiment import Experiment
from lasem_fast.lifelong import train_sequence

METHODS = {
    "prognn": "",
    "apd-net": "drift_active = true",
    "den": "zero = 0.01\nexpansion = 2\nloss_threshold = 0.1",
    "darts": "order = 2",
    "fixed-probability": 'transfer = "hps"\nconfig = "top-1"\nprobability = 0.6',
}
EPOCHS = 6


def arguments(method: str, optimizer: str) -> dict:
    text = drawn_experiment.config(f'[[methods]]\nmethod = "{method}"\n{METHODS[method]}\n')
    plain = tomllib.loads(text.replace("epochs = 3", f"epochs = {EPOCHS}"))
    plain["training"]["optimizer"] = optimizer
    experiment = Experiment.of(plain)
    return experiment.arguments(experiment.units()[0])


def without_times(record) -> dict:
    plain = record.to_dict()
    del plain["seconds"]
    return plain


class Stopped(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["tf-rmsprop", "adam"])
@pytest.mark.parametrize("method", METHODS)
def test_resumed_at_every_epoch_boundary(method, optimizer, tmp_path):
    whole = without_times(train_sequence(**arguments(method, optimizer)))

    def stop(now) -> None:
        raise Stopped

    for _ in range(3 * EPOCHS):
        with pytest.raises(Stopped):
            train_sequence(**arguments(method, optimizer), folder=tmp_path, on_epoch=stop)
    found = train_sequence(**arguments(method, optimizer), folder=tmp_path)
    assert without_times(found) == whole


def test_arguments_of_a_comparator_are_checked():
    for extra, message in (
        ("drift_activ = true", r"apd-net.drift_activ: unknown key; did you mean 'drift_active'\?"),
        ("sparsity = -1.0", "apd-net: sparsity: expected a finite number"),
    ):
        text = drawn_experiment.config(f'[[methods]]\nmethod = "apd-net"\n{extra}\n')
        with pytest.raises(ConfigError, match=message):
            Experiment.of(tomllib.loads(text))
