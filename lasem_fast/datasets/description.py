"""What is known of a sequence before its files are read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Description:
    """A sequence of tasks, as :func:`lasem_fast.datasets.load` would give it.

    Attributes:
        name: under which it is loaded.
        title: of the data set.
        home: its public home page.
        files: what is read, relative to the folder that holds it.
        input_shape: channels, height, width.
        classes: number of classes of each task.
        sizes: images of a task to train on, for validation and for test; None where it depends
            on the files.
        batch_size: of the paper; that of CIFAR-100 for the stand-ins.
        architecture: the function in :mod:`lasem_fast.nets` that makes the paper's net, if any.
        builtin_nets: the same nets as the command-line tools name them.
    """

    name: str
    title: str
    home: str
    files: tuple[str, ...]
    input_shape: tuple[int, int, int]
    classes: tuple[int, ...]
    sizes: tuple[int, int, int] | None
    batch_size: int
    architecture: str | None = None
    builtin_nets: tuple[str, ...] = ()

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return len(self.classes)
