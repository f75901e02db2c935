"""Curves for TensorBoard, where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lasem_fast.experiments.config import ConfigError
from lasem_fast.lifelong import Progress


def writer_class() -> type[Any]:
    """TensorBoard's writer.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard: expected false where TensorBoard is not installed (pip install "
            "tensorboard), got true"
        ) from error
    return SummaryWriter


@contextmanager
def curve_writer(folder: Path) -> Iterator[Callable[[Progress], None]]:
    """Writes loss and accuracies of the task under way, by epochs of the whole run.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    with writer_class()(folder) as writer:

        def tell(now: Progress) -> None:
            epoch = (now.task_number - 1) * now.epochs + now.epoch
            for name in ("loss", "valid", "test"):
                writer.add_scalar(f"{name}/{now.task}", getattr(now, name), epoch)

        yield tell
