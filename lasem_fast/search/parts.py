"""One mini-batch in parts, one in each process: what they know of it together.

The posterior belongs to the whole mini-batch, so the parts' log-likelihoods are put together before
it is inferred. A configuration that overflows on one part is left out of all of them. All processes
take the same decisions from the same numbers, so that each of them asks the others as often.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasem_fast.likelihoods import Likelihood, check_combines
from lasem_fast.search.ranks import Ranks


class Parts:
    """The parts of the present mini-batch.

    Args:
        ranks: the processes.
        likelihood: how outputs are scored.
        samples: in this process's part.
        configs: number of configurations C.
        device: where the part is.

    Raises:
        TypeError: the likelihood cannot put parts together.
    """

    def __init__(
        self,
        ranks: Ranks,
        likelihood: Likelihood,
        samples: int,
        configs: int,
        device: torch.device,
    ) -> None:
        check_combines(likelihood)
        self._ranks = ranks
        self._likelihood = likelihood
        self._samples = samples
        self._configs = configs
        self._device = device

    def log_likelihood(self, own: Tensor) -> Tensor:
        """Of the whole mini-batch, ``[C]``, from that of this part; -inf where one of them is."""
        size = own.new_full((1,), self._samples)
        parts, sizes = self._ranks.of_all(torch.cat([own, size])).split([self._configs, 1], dim=1)
        whole = self._likelihood.combine(parts, sizes[:, 0])
        return torch.where((parts == -torch.inf).any(dim=0), -torch.inf, whole)

    def left_out(self, configs: set[int]) -> set[int]:
        """The configurations that some process leaves out; waits for the others."""
        mask = torch.zeros(self._configs, dtype=torch.int64)
        mask[list(configs)] = 1
        found = self._ranks.of_all(mask.to(self._device)).any(dim=0)
        return set(found.nonzero().flatten().tolist())

    def as_first(self, drawn: Tensor) -> None:
        """Overwrites what was drawn at random by what the first process has drawn."""
        self._ranks.take_from_first([drawn])
