"""The demo's runs: one method with one seed each, in this process or side by side in several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import joblib
import torch
from torch import nn

from lasem_fast import LASEM, TransferNet
from lasem_fast.demo import data, model
from lasem_fast.lifelong import METHODS, Progress, RunRecord, Task, train_sequence

LEARNING_RATE = 1e-3
BATCH_SIZE = 16
EVALUATE_EARLIER_EVERY = 10


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    data: str  # "digits" or "fashion-mnist"
    root: Path | None
    tasks: int
    epochs: int
    device: str
    backend: str
    threads: int


def check(settings: Settings, seed: int) -> None:
    """Raises ``OSError`` or ``ValueError`` for what no run could be made of; nothing is trained."""
    make_net, _ = factories(tasks(settings, seed))
    try:
        LASEM(make_net(), backend=settings.backend)  # its own words say what is wrong
    except RuntimeError as error:
        raise ValueError(str(error)) from error


@lru_cache(maxsize=1)  # the three methods of a seed mostly follow each other
def tasks(settings: Settings, seed: int) -> tuple[Task, ...]:
    """The sequence of one seed."""
    return tuple(data.make_tasks(_images(settings, seed), settings.tasks, seed=seed))


def factories(
    tasks: Sequence[Task],
) -> tuple[Callable[[], TransferNet], Callable[[Task], nn.Module]]:
    """What makes the demo's net, and its head for a task."""
    side = tasks[0].train[0].shape[-1]
    return (
        lambda: TransferNet(model.make_stages(side)),
        lambda task: model.make_head(task.n_classes, side),
    )


def run_all(
    settings: Settings,
    seeds: Sequence[int],
    workers: int,
    on_epoch: Callable[[int, Progress], None],
    on_task: Callable[[RunRecord], None],
) -> Iterator[RunRecord]:
    """Gives the record of every run as it ends: all methods of the first seed, and so on.

    With one worker the runs are made here, and ``on_epoch`` (with the seed) and ``on_task`` are
    called while they last. With several workers, each of them a process, runs end in any order
    and their records alone are told. The records, times aside, do not depend on the workers.
    """
    units = [(seed, method) for seed in seeds for method in METHODS]
    if workers == 1:
        for seed, method in units:
            yield train(settings, seed, method, on_epoch=partial(on_epoch, seed), on_task=on_task)
        return
    parallel = joblib.Parallel(workers, backend="loky", return_as="generator_unordered")
    yield from parallel(joblib.delayed(train)(settings, seed, method) for seed, method in units)


def train(
    settings: Settings,
    seed: int,
    method: str,
    on_epoch: Callable[[Progress], None] | None = None,
    on_task: Callable[[RunRecord], None] | None = None,
) -> RunRecord:
    """One run."""
    torch.set_num_threads(settings.threads)
    sequence = tasks(settings, seed)
    make_net, make_head = factories(sequence)
    return train_sequence(
        make_net,
        make_head,
        sequence,
        method=method,
        epochs=settings.epochs,
        batch_size=BATCH_SIZE,
        optimizer=partial(torch.optim.Adam, lr=LEARNING_RATE),
        seed=seed,
        evaluate_earlier_every=EVALUATE_EARLIER_EVERY,
        em_options={"backend": settings.backend},
        device=settings.device,
        on_epoch=on_epoch,
        on_task=on_task,
    )


def _images(settings: Settings, seed: int) -> data.Images:
    if settings.data == "digits":
        if settings.root is not None:
            raise ValueError("--root: expected only together with --data fashion-mnist")
        return data.digits(seed)
    if settings.root is None:
        raise ValueError("--data fashion-mnist needs --root, the folder of its four idx files")
    return data.fashion_mnist(settings.root, seed)
