"""The optimiser of the authors' release, for reproduction runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lasem_fast._numbers import finite_number


class TFRMSprop(Optimizer):
    """RMSProp as TensorFlow 1 computes it.

    ``ms <- decay ms + (1 - decay) g^2``, from ms = 1; ``w <- w - lr g / sqrt(ms + eps)``. Two
    things differ from :class:`torch.optim.RMSprop`: ms starts at 1 rather than 0, so a new task
    warms up for about a hundred steps, and eps is inside the square root. Parameters without a
    gradient are left alone. The release makes a new optimiser for every task and lets the learning
    rate fall with the epochs e of the whole run as lr / (1 + e rate)::

        optimizer = lf.optim.TFRMSprop(net.task_parameters(task), lr=1e-4)
        scheduler = LambdaLR(optimizer, lambda e: 1 / (1 + (epochs_before + e) / 4000))

    Args:
        params: parameters or parameter groups.
        lr: learning rate, at least 0; a float or a tensor of one element.
        decay: of the mean square, in 0..1.
        eps: above 0.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: in ``step``, a gradient is sparse.
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-4, decay: float = 0.9, eps: float = 1e-10
    ) -> None:
        if not isinstance(params, Iterable) or isinstance(params, Tensor):
            raise TypeError(
                f"params: expected parameters or parameter groups, got {type(params).__name__}"
            )
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, with settings of their own where the group has any.

        Raises:
            TypeError, ValueError: a setting is not as described.
        """
        if isinstance(param_group, dict):
            _check_settings(**{k: {**self.defaults, **param_group}[k] for k in self.defaults})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient.

        Args:
            closure: evaluates the loss again with gradients and returns it.

        Returns:
            What the closure returned, or None.
        """
        if closure is not None and not callable(closure):
            raise TypeError(f"closure: expected a function or None, got {type(closure).__name__}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params]
        if any(g.is_sparse for g in grads):
            raise RuntimeError("TFRMSprop: expected dense gradients, got a sparse one")
        for p in params:
            if not self.state[p]:
                self.state[p]["mean_square"] = torch.ones_like(p)
        mean_squares = [self.state[p]["mean_square"] for p in params]
        torch._foreach_mul_(mean_squares, group["decay"])
        torch._foreach_addcmul_(mean_squares, grads, grads, 1 - group["decay"])
        roots = torch._foreach_add(mean_squares, group["eps"])
        torch._foreach_sqrt_(roots)
        updates = torch._foreach_div(grads, roots)
        torch._foreach_mul_(updates, group["lr"])
        torch._foreach_sub_(params, updates)


def _check_settings(lr: Any, decay: Any, eps: Any) -> None:
    one = isinstance(lr, Tensor) and lr.numel() == 1 and not lr.is_meta
    finite_number(lr.item() if one else lr, "lr", zero=True)
    if finite_number(decay, "decay", zero=True) > 1:
        raise ValueError(f"decay: expected a number in 0..1, got {decay!r}")
    finite_number(eps, "eps")
