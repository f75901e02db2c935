"""What a config may hold; the types of values and their defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# What may be of several types has a description: it is what the message then says was expected.
Positive = Annotated[int, Field(ge=1)]
Transfer = Literal["hps", "tf", "dfcnn"]
Transfers = Annotated[
    Transfer | Annotated[list[Transfer], Field(min_length=1)],
    Field(description="'hps', 'tf' or 'dfcnn', or a list of some of them"),
]
# a name such as "all" or "top-2", or a list of names and of lists of 1-based shared stages
Configs = Annotated[
    str | Annotated[list[str | list[Positive]], Field(min_length=1)],
    Field(
        description="a name such as 'all' or 'top-2', or a list of names and of lists of stages "
        "such as [[1, 3]]"
    ),
]
Probability = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """A table of a config; keys that it does not know are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Data(Part):
    """``[data]``: further keys are options of the data set."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    root: str | None = None

    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Net(Part):
    """``[net]``"""

    name: str
    width: Annotated[float, Field(gt=0)] = 1.0
    groups: list[Positive] | None = None


class Training(Part):
    """``[training]``: what is not given comes from the preset."""

    preset: str | None = None
    epochs: Positive | None = None
    batch_size: Positive | None = None
    optimizer: Literal["tf-rmsprop", "adam", "sgd"] | None = None
    lr: Annotated[float, Field(gt=0)] | None = None
    lr_decay: Annotated[float, Field(ge=0)] | None = None
    drop_last: bool | None = None
    evaluate_every: Positive = 1
    evaluate_earlier_every: Annotated[
        Positive | Literal["never"], Field(description="a whole number of at least 1, or 'never'")
    ] = "never"
    test_samples: Positive | None = None  # of every task, spread over its test split; None: all


class Method(Part):
    """An entry of ``[[methods]]``: keys that all methods have."""

    method: str
    label: Annotated[str, Field(min_length=1)] | None = None
    tasks: Positive | None = None  # the first so many only


class Lasem(Method):
    transfer: Transfers = "hps"
    preset: Literal["paper", "release"] = "paper"
    likelihood: Literal["joint", "mean"] | None = None
    prior: Literal["count", "mean_posterior", "uniform", "historic"] | None = None
    redraw_unclaimed: bool | None = None
    backend: str = "auto"
    max_memory: Annotated[
        Positive | Annotated[float, Field(gt=0, le=1)] | None,
        Field(
            description="bytes (a whole number of at least 1) or a fraction above 0 and of at "
            "most 1.0 of the device's memory"
        ),
    ] = None
    prune: Annotated[float, Field(ge=0, lt=1)] = 0.0
    m_step_draws: Positive | None = None
    e_step_every: Positive = 1


class Static(Method):
    transfer: Transfers = "hps"
    config: Configs = "all"


class SingleTask(Method):
    pass


class BruteForce(Method):
    transfer: Transfers = "hps"


class Comparator(Method):
    """Further keys are arguments of the comparator's class."""

    model_config = ConfigDict(extra="allow", strict=True)


class Darts(Comparator):
    transfer: Transfers = "hps"
    order: Annotated[
        Literal[1, 2] | Annotated[list[Literal[1, 2]], Field(min_length=1)],
        Field(description="1, 2 or [1, 2]"),
    ] = 1


class FixedProbability(Comparator):
    transfer: Transfers = "dfcnn"
    config: Configs = "top-2"
    probability: Annotated[
        Probability | Annotated[list[Probability], Field(min_length=1)],
        Field(description="a number from 0 to 1, or a list of them"),
    ]


class Own(Method):
    """A method of the user's own, ``method = "file.py:Class"``."""

    transfer: Transfers = "hps"
    options: dict[str, Any] = {}


METHODS: dict[str, type[Method]] = {
    "lasem": Lasem,
    "static": Static,
    "single-task": SingleTask,
    "brute-force": BruteForce,
    "fixed-probability": FixedProbability,
    "darts": Darts,
    "prognn": Comparator,
    "apd-net": Comparator,
    "den": Comparator,
}


class Config(Part):
    """A config as a whole."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    out: str | None = None  # default runs/NAME
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    workers: Positive = 1
    threads: Positive = 1
    device: str = "cpu"
    joblib_backend: str = "loky"
    save_every: Annotated[float, Field(ge=0)] = 0.0  # seconds between two savings of a run's state
    tensorboard: bool = False
    data: Data
    net: Net
    training: Training = Training()
    methods: Annotated[list[dict[str, Any]], Field(min_length=1)]
