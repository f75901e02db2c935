"""The sequences that `bench.sequences` tries, and one run of one of them: all methods, one seed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from lasem_fast.demo import data
from lasem_fast.demo.training import BATCH_SIZE, LEARNING_RATE, factories
from lasem_fast.lifelong import METHODS, train_sequence

TASKS = 6
EPOCHS = 30
WAYS = {
    "every way": tuple(data.TRANSFORMS), "as is": ("as is",), "late alike": ("as is", "inverted"),
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A sequence to try; the seed says which classes, images and noise its tasks have."""

    data: str  # "digits" or "fashion"
    classes: int  # of a task
    images: int  # for training, of a class
    transformed: str  # one of WAYS

    @property
    def name(self) -> str:
        return f"{self.data} {self.classes} x {self.images}, {self.transformed}"


CANDIDATES = (
    Candidate("digits", 4, 10, "every way"),
    Candidate("digits", 4, 10, "as is"),
    Candidate("digits", 4, 10, "late alike"),
    Candidate("digits", 4, 20, "late alike"),
    Candidate("digits", 4, 5, "as is"),
    Candidate("digits", 8, 4, "as is"),
    Candidate("fashion", 4, 8, "every way"),
    Candidate("fashion", 4, 8, "as is"),
    Candidate("fashion", 4, 8, "late alike"),
    Candidate("fashion", 2, 16, "as is"),
    Candidate("fashion", 8, 4, "as is"),
)


def run(
    candidate: Candidate, seed: int, root: Path | None
) -> tuple[Candidate, int, dict[str, Any]]:
    """All three methods on one sequence: accuracies, what was kept, and how long it took."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    tasks = data.make_tasks(
        images(candidate.data, root, seed), TASKS, seed=seed,
        classes_per_task=candidate.classes, train_per_class=candidate.images,
        transforms=WAYS[candidate.transformed],
    )  # fmt: skip
    make_net, make_head = factories(tasks)
    methods = {}
    for method in METHODS:
        record = train_sequence(
            make_net, make_head, tasks,
            method=method, epochs=EPOCHS, batch_size=BATCH_SIZE, seed=seed,
            optimizer=partial(torch.optim.Adam, lr=LEARNING_RATE),
            # what the rule asks for is measured after a task's end
            evaluate_every=EPOCHS, evaluate_earlier_every=None,
        )  # fmt: skip
        summary = record.summary()
        methods[method] = {
            "average_accuracy": summary["average_accuracy"],
            "own_accuracy": float(record.accuracy_matrix().diagonal().mean()),
            "forgetting": summary["forgetting"],
            "parameters": record.parameters,
            "kept": [task.label for task in record.tasks],
        }
    return candidate, seed, {**methods, "seconds": time.perf_counter() - start}


@lru_cache(maxsize=1)  # the sequences of a seed follow each other
def images(name: str, root: Path | None, seed: int) -> data.Images:
    return data.digits(seed) if name == "digits" else data.fashion_mnist(root, seed)
