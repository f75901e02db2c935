"""The host's own work in an eager step, beside the plain tree's, on a CPU with tiny nets.

    python -m bench.eager_host [--steps N] [--parts] [--triton]

Microseconds per step, forward and backward: the smallest of many in turns, because other processes
only add to it. The nets are so narrow that an operation costs its dispatch, and no values are read,
as on a GPU. With ``--parts``: the time of each part of the library without what it calls.

With ``--triton``: the host's work for the Triton kernels of a GPU's rows, whose launches do nothing
here. On a GPU a tensor map for every operand that is read in boxes and the driver's own work come
to it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import lasem_fast as lf
from bench import peers
from bench.cases import TASK, Case, Problem
from lasem_fast.configs import ConfigSpace
from lasem_fast.net import TransferNet
from lasem_fast.tools import builtin

_BATCH, _CLASSES, _WIDTH = 2, 10, 2
_ON_GPU = [Case("cifar-4", 10, "bf16"), Case("residual-17", 10, "bf16", groups=(1,) * 8)]
_PARTS = {
    "em:LASEM": "forward _checked_call _network _search_step _step_or_as_before _meet_ranks",
    "search.search:Search": "step _evaluate _infer",
    "search.search": "evidence posterior_of expected_nll",
    "search.untrained:Untrained": "look",
    "networks.checks": "check_independent_samples check_stage_output",
    "net:TransferNet": "branches auxiliary_losses",
    "tree.tree:Tree": "evaluate advance _branch_out _continue _call finish _samples_first_logits",
    "tree.tree": "first_random_stage folded rows_of",
    "backends.plain_torch": "wide_level _wide plain_stage core_like tensors_in_force _with_weights",
    "priors:Prior": "update",
    "priors:Count": "log_prob",
    "likelihoods:Joint": "log_prob check_target",
}


def _narrow(layers: list[nn.Module]) -> list[nn.Module]:
    """The same layers with few channels."""
    for layer in layers:
        for name, child in list(layer.named_modules()):
            if type(child) is not nn.Conv2d:
                continue
            inputs = child.in_channels if child.in_channels == 3 else _WIDTH
            conv = nn.Conv2d(inputs, _WIDTH, child.kernel_size, padding=child.padding)
            owner, _, leaf = name.rpartition(".")
            layer.get_submodule(owner)._modules[leaf] = conv
    return layers


def problems() -> dict[str, Problem]:
    """The rows: nets of the benchmark, and the residual net with a stage per layer, in groups."""
    torch.manual_seed(0)
    eight = (1,) * 8
    arch = replace(lf.nets.residual17(8, width=0.01), input_shape=(3, 16, 16))
    rows = {
        "cifar-4": (_narrow(builtin.NETS["cifar-4"].stages()), 8, 4 * _WIDTH, (1,) * 4),
        "residual-17 in 8 stages": (
            _narrow(builtin.NETS["residual-17"].stages()),
            8,
            _WIDTH,
            eight,
        ),
        "residual-17 in 8 groups": (arch.stages(), 16, arch.features, arch.groups),
    }
    found = {}
    for name, (stages, side, features, groups) in rows.items():
        net = TransferNet(stages)
        net.add_task(TASK, builtin.dense_head(features, (_WIDTH,), _CLASSES))
        x, y = torch.randn(_BATCH, 3, side, side), torch.randint(_CLASSES, (_BATCH,))
        case = Case(name, _BATCH, groups=tuple(groups))
        found[name] = Problem(case, net, ConfigSpace(net.depth, groups), x, y)
    return found


def _reads_nothing(em: lf.LASEM, x: Tensor) -> bool:
    """As on a device; a mock would be too slow."""
    return False


@contextmanager
def reading_nothing() -> Iterator[None]:
    """No values are read, and operations have one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.object(lf.LASEM, "_reads_values", _reads_nothing):
            yield
    finally:
        torch.set_num_threads(threads)


def microseconds(works: list[Callable[[], object]], steps: int) -> list[float]:
    """Of one call of each, in turns."""
    best = [float("inf")] * len(works)
    for _ in range(steps):
        for i, work in enumerate(works):
            start = time.perf_counter_ns()
            work()
            best[i] = min(best[i], time.perf_counter_ns() - start)
    return [1e-3 * ns for ns in best]


class Parts:
    """Times of functions without the functions among them that they call."""

    def __init__(self) -> None:
        self.inner: list[int] = []
        self.step: dict[str, int] = defaultdict(int)
        self.best: dict[str, int] = {}

    def timed(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0)
            start = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter_ns() - start
                self.step[name] += took - self.inner.pop()
                if self.inner:
                    self.inner[-1] += took

        return run

    def of(self, work: Callable[[], object], steps: int) -> dict[str, float]:
        """Microseconds of each part in a call of ``work``, the smallest of many."""
        with ExitStack() as patches:
            for place, names in _PARTS.items():
                module, _, kind = place.partition(":")
                owner = importlib.import_module(f"lasem_fast.{module}")
                owner = getattr(owner, kind) if kind else owner
                for name in names.split():
                    label = f"{kind or module.rpartition('.')[2]}.{name}"
                    part = self.timed(label, getattr(owner, name))
                    patches.enter_context(mock.patch.object(owner, name, part))
            for _ in range(steps):
                self.step.clear()
                work()
                for name, took in self.step.items():
                    self.best[name] = min(self.best.get(name, took), took)
        return {name: 1e-3 * ns for name, ns in self.best.items()}


def triton_host(case: Case, steps: int) -> float:
    """Microseconds of an eager step with the Triton kernels, of which none runs."""
    from bench.idle_driver import idle_driver  # and triton with it
    from bench.recording import as_on_a_device

    with ExitStack() as stack:
        stack.enter_context(idle_driver())
        em, problem = stack.enter_context(as_on_a_device(case, boxes=True))
        parameters = [*em.net.parameters()]

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            with case.precision():
                found = em(problem.x, problem.y, TASK)
            found.loss.backward()

        return microseconds([step], steps)[0]


def main(arguments: list[str] | None = None) -> None:
    """Prints a line per row."""
    parser = argparse.ArgumentParser(prog="python -m bench.eager_host", description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="steps of each (500)")
    parser.add_argument("--parts", action="store_true", help="the library's parts, too")
    parser.add_argument("--triton", action="store_true", help="the Triton kernels' rows, too")
    options = parser.parse_args(arguments)
    print(f"{'us per step':34} {'plain tree':>11} {'lasem_fast':>11} {'more':>7}")
    with reading_nothing():
        for name, problem in problems().items():
            runners = [peers.plain_tree(problem), peers.ours(problem, "torch")]
            plain, ours = microseconds([runner.step for runner in runners], options.steps)
            print(f"{name:34} {plain:11.0f} {ours:11.0f} {ours - plain:7.0f}")
            if options.parts:
                parts = Parts().of(runners[1].step, options.steps)
                for part, took in sorted(parts.items(), key=lambda pair: -pair[1]):
                    print(f"  {part:44} {took:11.1f}")
    for case in _ON_GPU if options.triton else []:
        print(f"{case.id + ', triton':46} {triton_host(case, options.steps):11.0f}")


if __name__ == "__main__":
    main(sys.argv[1:])
