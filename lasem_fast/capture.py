"""A whole training step as one CUDA graph replay: E-step, M-step, backward, optimiser and prior."""

from __future__ import annotations

import warnings
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lasem_fast._numbers import flag
from lasem_fast.backends import head_gradient
from lasem_fast.backends.early_copies import EarlyCopies, Wanted, noted
from lasem_fast.capture_holdings import Holdings
from lasem_fast.capture_trial import first_line, obstacles, rehearse, trial
from lasem_fast.em import LASEM
from lasem_fast.em_step import EMStep
from lasem_fast.networks import checks
from lasem_fast.networks.layers import is_patched

_grad = attrgetter("grad")
# a quantized tensor has a dtype of its own
_form = attrgetter("shape", "dtype", "device", "layout", "requires_grad")


def capture(
    em: LASEM, optimizer: Optimizer, x: Tensor, y: Tensor, task: str, *, strict: bool = False
) -> CapturedStep:
    """Makes the training step of a task one CUDA graph replay.

    ::

        step = lf.capture(em, optimizer, x, y, task="birds")
        for x, y in loader:
            result = step(x, y)  # optimizer.zero_grad(), em(x, y), backward and optimizer.step()

    Nothing is trained here and no state changes, whatever happens: the step is tried out on copies
    of ``em`` and ``optimizer``, which takes the memory of two of them for that while.

    Args:
        em: made without ``validate``; its net on a CUDA device.
        optimizer: one whose state is on the device alone, such as ``SGD``, ``Adam(...,
            capturable=True)`` or :class:`lasem_fast.optim.TFRMSprop`. A learning rate that changes
            should be a tensor on the device (``SGD`` then needs ``fused=True``); each change of a
            float costs a new capture.
        x: a mini-batch such as will come, ``[N, ...]``.
        y: its targets.
        task: a task that has not ended.
        strict: raise where the step cannot be captured, instead of running it eagerly.

    Returns:
        The step. Autocast is as it is here, in every later call too. There is no loss scale, so
        float16 autocast is for weights that need none.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: with ``strict``, the step cannot be captured; the message says why.

    Warns:
        RuntimeWarning: without ``strict``, the step will run eagerly, and why.
    """
    step = CapturedStep(em, optimizer, x, y, task, strict)
    reasons = obstacles(em, optimizer, x)
    why = "; ".join(reasons) if reasons else trial(step)
    if why:
        step._give_up(why)
    return step


class CapturedStep:
    """One training step of one task; :func:`capture` makes it.

    The first call, and the first one after something that the graph has taken in was changed (a
    float learning rate, the training mode, the probability of a dropout, tensors that were
    replaced), runs eagerly; the next records the graph. Tensors that are replaced one by one inside
    of the optimiser's state (instead of by ``load_state_dict``) or of the net's modules are noticed
    within 256 calls; other settings of a module are not.

    Attributes:
        why_eager: why there is no graph and every call runs eagerly, or None.
    """

    def __init__(
        self, em: LASEM, optimizer: Optimizer, x: Tensor, y: Tensor, task: str, strict: bool
    ) -> None:
        _check_arguments(em, optimizer, x, y, task)
        self.strict = flag(strict, "strict")
        self.em, self.optimizer, self.task = em, optimizer, task
        self.why_eager: str | None = None
        self._x, self._y = x.detach().clone(), y.detach().clone()
        self._forms = _form(self._x), _form(self._y)
        kind, self._index = x.device.type, x.device.index
        self._autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
            # a weight's cast that was cached outside the graph would be stale in it
            "cache_enabled": False,
        }
        self._holds = Holdings(em, optimizer)
        # once: nn.Module.__getattr__ costs as much as a check
        self._net, self._rollback = em.net, em._rollback
        self._stream: torch.cuda.Stream | None = None
        self._wanted: list[Wanted] = []  # copies that the last eager step asked for
        self._copies: EarlyCopies | None = None  # those that the graph has taken in
        self._warm: Any = None  # what the last eager step ran with
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: Any = None  # what the graph has taken in
        self._rehearsed = False  # whether the next recording is known to go well
        self._grads: tuple[list[Tensor], list[Tensor]] = [], []
        self._result: EMStep | None = None

    def __call__(self, x: Tensor, y: Tensor) -> EMStep:
        """Trains on one mini-batch.

        Args:
            x: of the shape, dtype and device that the step was captured with.
            y: likewise.

        Returns:
            What ``em(x, y, task)`` returns, its loss detached. The next call overwrites these
            tensors: :meth:`EMStep.clone` keeps them.

        Raises:
            TypeError, ValueError: a mini-batch that does not fit (:meth:`eager` takes it), or the
                task has ended.
        """
        if self.why_eager is not None:
            self._check_batch(x, y)
            return self.eager(x, y)
        fits = self._fits(x, y)
        if not fits:
            self._check_batch(x, y)
        # entering a device that is the current one already costs as much as the checks
        if self._index == torch.cuda.current_device():
            return self._run(x, y, fits)
        with torch.cuda.device(self._x.device):
            return self._run(x, y, fits)

    def eager(self, x: Tensor, y: Tensor) -> EMStep:
        """Trains on one mini-batch of any size without the graph; the results are new tensors."""
        checks.check_open_task(self.task, self.em.net)
        with torch.autocast(**self._autocast):
            step = self.em(x, y, self.task)
        self.optimizer.zero_grad()  # not before: a mini-batch that is refused changes nothing
        step.loss.backward(head_gradient.one(step.loss))
        self.optimizer.step()
        return step._replace(loss=step.loss.detach())

    def _run(self, x: Tensor, y: Tensor, detached: bool) -> EMStep:
        given = [x, y] if detached else [x.detach(), y.detach()]
        torch._foreach_copy_([self._x, self._y], given)
        if self._graph is None or not self._holds.seem_the_same():
            present = self._taken_in()
            if self._graph is None or present != self._recorded:
                self._graph = None
                if present != self._warm:
                    return self._warm_up()
                try:
                    if not self._rehearsed:
                        rehearse(self)
                    self._rehearsed = False
                    self._record()
                except Exception as error:
                    self._give_up(first_line(error))
                    return self.eager(x, y)
                self._recorded = present
            self._holds.remember()
        # on the host, so never inside the graph
        if self._rollback.active != self.task:
            self._begin()
        parameters, grads = self._grads
        if not all(map(is_, map(_grad, parameters), grads)):
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
        self._graph.replay()
        return self._result

    def _warm_up(self) -> EMStep:
        """An eager step on the stream of the capture: every lazy allocation is done there."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        self._wanted.clear()
        with torch.cuda.stream(self._stream), noted(self._wanted):
            step = self.eager(self._x, self._y)
        torch.cuda.current_stream().wait_stream(self._stream)
        self._warm = self._taken_in()
        return step

    def _record(self) -> None:
        """Captures the graph; no step is made on the device, so that a failure changes nothing."""
        stream = torch.cuda.current_stream()
        self._begin()
        grads = [(p, p.grad) for p in self.em.net.parameters()]
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        copies = EarlyCopies(_constant_weights(self.em), self._wanted)
        try:
            # a loader's thread that pins memory must not end the capture
            capture = torch.cuda.graph(
                graph, stream=self._stream, capture_error_mode="thread_local"
            )
            with capture, copies.running():
                result = self.eager(self._x, self._y)
        except Exception:
            for parameter, grad in grads:
                parameter.grad = grad
            raise
        finally:
            torch.cuda.set_stream(stream)  # a failed capture leaves its own stream current
        parameters = [p for p in self.em.net.parameters() if p.grad is not None]
        self._grads = parameters, [p.grad for p in parameters]
        self._graph, self._result, self._copies = graph, result, copies

    def _begin(self) -> None:
        """Tells the roll-back whose step comes, if it is one of training."""
        rollback = self._rollback
        if rollback.active == self.task or not self.em._keeps_state():
            return
        net = self._net
        rollback.begin(self.task, False, rollback.before(self.task, False, net.shared), net)

    def _give_up(self, why: str) -> None:
        message = f"capture: the step of task {self.task!r} cannot be captured: {why}"
        if self.strict:
            raise RuntimeError(message)
        warnings.warn(f"{message}; it runs eagerly", RuntimeWarning, stacklevel=3)
        self.why_eager = why

    def _taken_in(self) -> tuple:
        return self._holds.everything()

    def _fits(self, x: Any, y: Any) -> bool:
        """Quickly, whether :meth:`_check_batch` lets a mini-batch pass and it needs no gradients.

        False says nothing: :meth:`_check_batch` decides, with its messages.
        """
        if self._net._configs.get(self.task, ()) is not None:
            return False
        try:
            alike = _form(x) == self._forms[0] and _form(y) == self._forms[1]
        except (AttributeError, RuntimeError):  # no tensor, or a nested one, which has no shape
            return False
        return alike and isinstance(x, Tensor) and isinstance(y, Tensor)

    def _check_batch(self, x: Any, y: Any) -> None:
        checks.check_open_task(self.task, self._net)
        for name, got, like in (("x", x, self._x), ("y", y, self._y)):
            if not isinstance(got, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(got).__name__}")
            if not checks.is_plain(got):
                raise TypeError(f"{name}: expected a dense tensor, got a sparse or nested one")
            if (got.shape, got.dtype, got.device) != (like.shape, like.dtype, like.device):
                raise ValueError(
                    f"{name}: expected shape {list(like.shape)} of {like.dtype} on {like.device}, "
                    f"as captured, got {list(got.shape)} of {got.dtype} on {got.device}; "
                    f"captured.eager(x, y) takes a mini-batch of another size"
                )


def _check_arguments(em: Any, optimizer: Any, x: Any, y: Any, task: Any) -> None:
    if not isinstance(em, LASEM):
        raise TypeError(f"em: expected a LASEM, got {type(em).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    checks.check_batch(x)
    checks.check_target(y, x)
    checks.check_open_task(task, em.net)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in trained for p in em.net.task_parameters(task)):
        raise ValueError(
            f"optimizer: expected one that trains parameters of em.net for task {task!r}, got one "
            f"without any of them"
        )


def _constant_weights(em: LASEM) -> list[Tensor]:
    """The weights that nothing changes between a step's beginning and its forward."""
    # others' code may write past a weight's version counter, through .data
    others = type(em).forward is not LASEM.forward or any(map(is_patched, em.modules()))
    return [] if others else [*em.net.parameters()]
