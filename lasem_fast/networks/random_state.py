"""PyTorch's random state, as it was before a call that fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def random_state_kept_on_error(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Puts the random state, of the tensors' devices too, back if an error comes."""
    cuda = {t.device.index for t in tensors if t.device.type == "cuda"}
    if cuda and torch.cuda.is_current_stream_capturing():
        cuda = set()  # a graph keeps its own
    states = {index: torch.cuda.get_rng_state(index) for index in cuda}
    state = torch.get_rng_state()
    try:
        yield
    except BaseException:
        torch.set_rng_state(state)
        for index, kept in states.items():
            torch.cuda.set_rng_state(kept, index)
        raise
