"""The kernels that one training step of a row launches, recorded on a machine without a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import TASK, Case, Problem
from bench.compiling import Launch, recorded
from lasem_fast.backends import (
    early_copies,
    head_gradient,
    triton_level,
    triton_linear_head,
    triton_scores,
)
from lasem_fast.em import LASEM
from lasem_fast.search import dispatch


def step_launches(
    case: Case, boxes: bool = False, captured: bool = False
) -> tuple[list[Launch], Counter[str]]:
    """What a forward and a backward of a row start on a device.

    Args:
        case: the row.
        boxes: whether levels read boxes wherever they can, see
            :class:`lasem_fast.backends.triton_level.BoxLevel`.
        captured: as :func:`lasem_fast.capture` takes it in, which copies weights before all else.

    Returns:
        The launches of the project's kernels, in order, and how often each of PyTorch's own
        operators that would start a kernel ran beside them. Values are whatever memory holds.
    """
    with ExitStack() as stack:
        em, problem = stack.enter_context(as_on_a_device(case, boxes))
        stack.enter_context(tf32(case.dtype == "tf32"))
        launches = stack.enter_context(recorded())
        others = stack.enter_context(_Others())
        wanted: list[early_copies.Wanted] = []
        for _ in range(2):  # the first step makes what is kept
            copies = early_copies.EarlyCopies(em.net.parameters(), wanted)
            launches.clear()
            others.counts.clear()
            early = _copied_early(copies, wanted) if captured else nullcontext()
            with replace(case, device="cpu").precision(), early:
                step = em(problem.x, problem.y, TASK)
            # not backward(), which would copy gradients because the recording holds them too
            parameters, one = [*em.net.parameters()], None
            if captured:
                one = head_gradient.one(step.loss)
            torch.autograd.grad(step.loss, parameters, one, allow_unused=True)
    return launches, others.counts


@contextmanager
def _copied_early(
    copies: early_copies.EarlyCopies, wanted: list[early_copies.Wanted]
) -> Iterator[None]:
    """Copies are made as in a capture, and what a step asks for is noted."""
    stream = mock.Mock(device=torch.device("cpu"), cuda_stream=0)
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(torch.cuda, "current_stream", return_value=stream))
        enter(mock.patch.object(torch.cuda, "stream", return_value=nullcontext()))
        enter(mock.patch.object(early_copies, "captured_stream", return_value=stream))
        enter(mock.patch.object(early_copies, "beside", return_value=stream))
        wanted.clear()
        enter(early_copies.noted(wanted))
        enter(copies.running())
        yield


@contextmanager
def as_on_a_device(case: Case, boxes: bool) -> Iterator[tuple[LASEM, Problem]]:
    """A row's LASEM and problem for tensors of the CPU, which go the way of those on a device.

    Args:
        case: the row.
        boxes: as in :func:`step_launches`.
    """
    problem = replace(case, device="cpu").problem()
    net = problem.net.to(memory_format=torch.channels_last)
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(dispatch, "_why_no_triton", return_value=""))
        enter(mock.patch.object(triton_level, "_INTERPRETED", True))
        enter(mock.patch.object(triton_level, "_INTERPRETS_BFLOAT16", True))
        enter(mock.patch.object(triton_scores, "_INTERPRETED", True))
        # functions, because a mock takes long to be called
        enter(mock.patch.object(triton_scores, "_looked_at_first", _no))
        if boxes:
            levels = (_Boxes(),)
            enter(mock.patch.object(dispatch, "_WITHOUT_DEVICE", levels))
            enter(mock.patch.object(triton_linear_head, "_OPERATION", *levels))
        em = LASEM(net, problem.space, backend="triton")
        # on a device nothing waits for a value
        enter(mock.patch.object(em, "_reads_values", _no))
        yield em, problem


def _no(_: Any) -> bool:
    return False


class _Boxes(triton_level.TritonLevel):
    """As on a device of compute capability 9.0."""

    def _in_boxes(self, *level: Any) -> bool:
        return triton_level._can_be_boxes(*level)


class tf32:
    """Lets float32 products round to TF32, or not, as on a device."""

    def __init__(self, wanted: bool) -> None:
        self.precision = "tf32" if wanted else "ieee"

    def __enter__(self) -> None:
        settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
        self._before = [(setting, setting.fp32_precision) for setting in settings]
        for setting in settings:
            setting.fp32_precision = self.precision

    def __exit__(self, *_: Any) -> None:
        for setting, precision in self._before:
            setting.fp32_precision = precision


class _Others(TorchDispatchMode):
    """Counts PyTorch's operators that start a kernel: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        free = func.is_view or func.namespace != "aten" or "empty" in func.__name__
        if not free and func.overloadpacket is not torch.ops.aten.detach:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
