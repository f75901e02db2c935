"""What one mini-batch gives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class EMStep(NamedTuple):
    """What one mini-batch gave. All but ``loss`` are detached; nothing waits for the device.

    Under ``DistributedDataParallel`` ``posterior`` and ``log_likelihood`` are those of the whole
    mini-batch in a step of training, ``loss`` and ``nll`` those of this process's part.

    Attributes:
        loss: scalar; its gradient is minus Eq. 3 and 4, averaged over the mini-batch.
        posterior: P(c | X, y) ``[C]``, or the frozen one that was passed.
        log_likelihood: L_c ``[C]``; -inf for a configuration that overflowed, NaN for one that an
            approximation has not evaluated on this mini-batch.
        nll: mean negative log-likelihood per sample and configuration ``[C]``; inf and NaN
            likewise.
        dropped_mass: scalar, the posterior mass that an approximation left out of ``loss``; 0 when
            exact.
    """

    loss: Tensor
    posterior: Tensor
    log_likelihood: Tensor
    nll: Tensor
    dropped_mass: Tensor

    def clone(self) -> EMStep:
        """Copies of all tensors, for results of a captured step that are to be kept."""
        return EMStep(*(tensor.clone() for tensor in self))
