"""PyTorch's random state, as it was before a call that fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class RandomState(NamedTuple):
    """PyTorch's random state, on the host and on some CUDA devices.

    Attributes:
        host: the state of the CPU's generator.
        devices: by CUDA device its generator's.
    """

    host: Tensor
    devices: dict[int, Tensor]

    @classmethod
    def now(cls, tensors: Iterable[Tensor]) -> RandomState:
        """The present one, of the tensors' devices too."""
        cuda = {t.device.index for t in tensors if t.is_cuda}
        if cuda and torch.cuda.is_current_stream_capturing():
            cuda = set()  # a graph keeps its own
        devices = {index: torch.cuda.get_rng_state(index) for index in cuda}
        return cls(torch.get_rng_state(), devices)

    def restore(self) -> None:
        """Brings it back."""
        torch.set_rng_state(self.host)
        for index, kept in self.devices.items():
            torch.cuda.set_rng_state(kept, index)


@contextmanager
def random_state_kept_on_error(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Puts the random state, of the tensors' devices too, back if an error comes."""
    state = RandomState.now(tensors)
    try:
        yield
    except BaseException:
        state.restore()
        raise
