"""The paper's sequences of STL-10: few images, noise, and colour channels that change places."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lasem_fast._numbers import whole_number
from lasem_fast.datasets.class_sets import different_class_sets
from lasem_fast.datasets.description import Description
from lasem_fast.datasets.option_checks import one_of, seeds
from lasem_fast.datasets.published import Published, rows_by_class
from lasem_fast.datasets.source import Root
from lasem_fast.datasets.splits import labels_of, split_of, task_of
from lasem_fast.datasets.stl10_files import FILES, STL10, STL10_NAMES, read_stl10
from lasem_fast.datasets.streams import stream
from lasem_fast.lifelong import Task

NOISE_STEP = 0.025
_PER_CLASS = (500, 800)


class Form(NamedTuple):
    """A sequence's form: what a task has, and what it takes of the training images of a class."""

    classes: int
    percent: int  # of the images of a class
    valid_percent: int  # of those


FORMS = {20: Form(3, 25, 15), 15: Form(5, 10, 50)}


class Definition(NamedTuple):
    """What makes a task. Channel i of an image is channel ``channels[i]`` of the original."""

    classes: tuple[int, ...]
    noise_mean: float
    noise_sd: float
    channels: tuple[int, ...]


def stl10_definitions(n_tasks: int, seed: int) -> list[Definition]:
    """The definitions that the seed draws, for all trials.

    Different sets of classes; noise of mean 0.025 * {-2, -1, 0, 1} and standard deviation
    0.025 * {0, 1}, and a permutation of the channels, each drawn uniformly.
    """
    generator = stream("stl-10", seed)
    sets = different_class_sets(n_tasks, FORMS[n_tasks].classes, len(STL10_NAMES), generator)
    return [
        Definition(
            classes,
            NOISE_STEP * int(generator.integers(-2, 2)),
            NOISE_STEP * int(generator.integers(0, 2)),
            tuple(generator.permutation(3).tolist()),
        )
        for classes in sets
    ]


def stl10(
    root: Root,
    *,
    n_tasks: int = 20,
    test_per_class: int | None = None,
    trial: int = 0,
    seed: int = 0,
) -> list[Task]:
    """STL-10 in 20 tasks of 3 classes, or 15 of 5.

    Of the 500 training images of a class each task takes 125 anew (15 tasks: 50), 19 (25) of them
    for validation. Pixels in [-0.5, 0.5] get noise, are clipped to that range, and the channels
    change places; mean and deviation of the noise and the places are the task's. Inputs are
    float32 ``[N, 3, 96, 96]``; 20 tasks take 6.1 GB, nearly all of it for test.

    Args:
        root: the folder of the files, or the one above it.
        n_tasks: 20 or 15.
        test_per_class: how many test images of a class, the first of the file; None for all 800,
            as in the paper.
        trial: draws the images to train on and for validation, and the noise.
        seed: draws what the tasks are (:func:`stl10_definitions`), for all trials.

    Raises:
        TypeError, ValueError: an option is not as described, or a file is damaged.
        FileNotFoundError: a file is missing.
    """
    described = describe_stl10(n_tasks=n_tasks, test_per_class=test_per_class)
    trial, seed = seeds(trial, seed)
    n_tasks = described.n_tasks
    definitions = stl10_definitions(n_tasks, seed)
    published = read_stl10(root)
    return [
        _task(published, definition, FORMS[n_tasks], number, test_per_class, (seed, trial))
        for number, definition in enumerate(definitions)
    ]


def describe_stl10(*, n_tasks: Any, test_per_class: Any, **_: Any) -> Description:
    """What :func:`stl10` gives."""
    n_tasks = one_of(n_tasks, "n_tasks", tuple(FORMS))
    n_train, n_test = _PER_CLASS
    if test_per_class is not None:
        n_test = min(n_test, whole_number(test_per_class, "test_per_class"))
    form = FORMS[n_tasks]
    per_class = (*_train_and_valid(n_train, form), n_test)
    train, valid, test = (form.classes * n for n in per_class)
    return Description(
        name="stl-10",
        title=STL10.title,
        home=STL10.home,
        files=FILES,
        input_shape=(3, 96, 96),
        classes=(form.classes,) * n_tasks,
        sizes=(train, valid, test),
        batch_size=10,
        architecture="stl10",
        builtin_nets=("stl-6", "stl-9"),
    )


def _train_and_valid(n: int, form: Form) -> tuple[int, int]:
    """Of a class of n images; what is for validation is rounded up."""
    used = n * form.percent // 100
    valid = -(-used * form.valid_percent // 100)
    return used - valid, valid


def _task(
    published: Published,
    definition: Definition,
    form: Form,
    number: int,
    test_per_class: int | None,
    key: tuple[int, int],
) -> Task:
    train_rows = rows_by_class(published.train.y, len(STL10_NAMES))
    test_rows = rows_by_class(published.test.y, len(STL10_NAMES))
    generator = stream("images", *key, number)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for label in definition.classes:
        n_train, n_valid = _train_and_valid(len(train_rows[label]), form)
        drawn = generator.permutation(train_rows[label])
        parts[0].append(drawn[n_valid : n_valid + n_train])
        parts[1].append(drawn[:n_valid])
        parts[2].append(test_rows[label][:test_per_class])
    sources = (published.train, published.train, published.test)
    splits = []
    for which, (images, rows) in enumerate(zip(sources, parts, strict=True)):
        noise = stream("noise", *key, number, which)
        splits.append(
            split_of(
                images, np.concatenate(rows), labels_of(rows),
                lambda x, noise=noise: _altered(x, definition, noise),
            )
        )  # fmt: skip
    names = " ".join(published.class_names[label] for label in definition.classes)
    channels = "".join("RGB"[channel] for channel in definition.channels)
    note = f"{names}, {definition.noise_mean:+.3f}±{definition.noise_sd:.3f}, channels {channels}"
    return task_of(number + 1, splits, len(definition.classes), note)


def _altered(x: np.ndarray, definition: Definition, noise: np.random.Generator) -> np.ndarray:
    values = x.astype(np.float32) / 255 - np.float32(0.5)
    if definition.noise_mean or definition.noise_sd:
        if definition.noise_sd:
            drawn = noise.standard_normal(values.shape, dtype=np.float32)
            values += np.float32(definition.noise_sd) * drawn
        values += np.float32(definition.noise_mean)
        np.clip(values, -0.5, 0.5, out=values)
    return values[:, list(definition.channels)]
