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

    def together(self, own: Tensor, left_out: set[int] | None) -> tuple[Tensor, set[int]]:
        """What the parts say of the whole mini-batch.

        Args:
            own: this part's log-likelihoods ``[C]``.
            left_out: the configurations that this process leaves out; None: those whose
                log-likelihood is -inf, which nobody looks at.

        Returns:
            The whole mini-batch's log-likelihoods ``[C]``, -inf where a process leaves one out; and
            the configurations that some process does, none where nobody looks.
        """
        mine = own == -torch.inf if left_out is None else self._mask(left_out)
        size = own.new_full((1,), self._samples)
        found = self._ranks.of_all(torch.cat([own, mine.to(own), size]))
        parts, masks, sizes = found.split([self._configs, self._configs, 1], dim=1)
        everywhere = masks.any(dim=0)
        whole = self._likelihood.combine(parts, sizes[:, 0])
        whole = torch.where(everywhere, -torch.inf, whole)
        return whole, set() if left_out is None else _numbers(everywhere)

    def left_out(self, configs: set[int]) -> set[int]:
        """The configurations that some process leaves out; waits for the others."""
        return _numbers(self._ranks.of_all(self._mask(configs).to(torch.uint8)).any(dim=0))

    def as_first(self, drawn: Tensor) -> None:
        """Overwrites what was drawn at random by what the first process has drawn."""
        self._ranks.take_from_first([drawn])

    def _mask(self, configs: set[int]) -> Tensor:
        mask = torch.zeros(self._configs, dtype=torch.bool)
        mask[list(configs)] = True
        return mask.to(self._device)


def _numbers(mask: Tensor) -> set[int]:
    return set(mask.nonzero().flatten().tolist())
