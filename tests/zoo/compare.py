"""Runs a case on a backend and on the reference side by side; every difference is an error.

In float64 all numbers have to agree to 1e-10 of the largest. After each step both sides get the
weights and the prior of the reference, so that no difference grows and no tie falls two ways.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from oracle import brute_force
from torch import Tensor, nn

import lasem_fast as lf
from bench.cases import TASK, Problem
from bench.cases import Case as BenchCase
from bench.gate import Answer, Gate, WrongResult, answer_of
from bench.peers import library_column

from .cases import Case

BOUND = 1e-10
REFUSALS = (TypeError, ValueError, RuntimeError)
# How a message names what it refuses.
NAMES = re.compile(r"\b(stages?|shared|specific|adapters|heads?|net|x|y)\b[\w\[\]'.() ]*.*expected")


class Disagreement(AssertionError):
    """A backend's answer is not that of the reference."""


class Refused(Exception):
    """Both sides refused, or the backend did by name: there is nothing more to compare."""


def _attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return error


def _agree(got: Any, expected: Any, case: Case, what: str) -> None:
    """Raises where one side refused: Refused if that is in order, else Disagreement."""
    if not isinstance(got, Exception) and not isinstance(expected, Exception):
        return
    if isinstance(got, Exception):
        shown = f"{type(got).__name__}: {str(got)[:300]}"
        if not isinstance(got, REFUSALS) or isinstance(got, RecursionError):
            raise Disagreement(f"{what}: raw {shown}") from got
        if isinstance(expected, Exception) and ": expected" in str(got):
            raise Refused(f"both: {shown}")
        if NAMES.search(str(got)):
            raise Refused(f"by name: {shown}")
        if "modified by an inplace operation" in str(got) + str(expected):
            raise Refused("PyTorch itself: a layer writes to what another one's gradient needs")
        if "Expected more than 1 value per channel" in str(got) and str(got) == str(expected):
            raise Refused("PyTorch itself: a norm of one value")
        raise Disagreement(f"{what}: refused without a name: {shown}") from got
    if "modified by an inplace operation" in str(expected):
        raise Refused("PyTorch itself: a layer writes to what another one's gradient needs")
    if "Expected more than 1 value per channel" in str(expected):  # of many rows there are more
        raise Refused("PyTorch itself: a norm of one value")
    raise Disagreement(f"{what}: the reference refused: {expected!r:.300}") from expected


def equal(got: Tensor | None, expected: Tensor | None, what: str, bound: float = BOUND) -> None:
    """Equal to ``bound``, relative to the largest expected value where that is above 1."""
    if got is None or expected is None:
        other = expected if got is None else got
        if other is not None and not bool((other.abs() <= bound).all()):
            raise Disagreement(f"{what}: {got} is not {expected}")
        return
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise Disagreement(
            f"{what}: {got.shape} {got.dtype} is not {expected.shape} {expected.dtype}"
        )
    if not (expected.is_floating_point() or expected.is_complex()):
        if not torch.equal(got, expected):
            raise Disagreement(f"{what}: {got} is not {expected}")
        return
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(got), finite) or not _same_infinities(got, expected, finite):
        raise Disagreement(f"{what}: {got.flatten()[:8]} is not {expected.flatten()[:8]}")
    if not bool(finite.any()):
        return
    scale = max(1.0, float(expected[finite].abs().max()))
    error = float((got[finite] - expected[finite]).abs().max()) / scale
    if not error <= bound:
        raise Disagreement(f"{what}: off by {error:.3g} of {scale:.3g}")


def _same_infinities(got: Tensor, expected: Tensor, finite: Tensor) -> bool:
    got, expected = got[~finite], expected[~finite]
    return torch.equal(torch.nan_to_num(got), torch.nan_to_num(expected))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return dense.flatten().view(torch.uint8)


def tensors_of(em: lf.LASEM) -> dict[str, Tensor]:
    """Copies of all tensors of a LASEM."""
    return {name: tensor.clone() for name, tensor in _state(em).items()}


def _state(em: lf.LASEM) -> dict[str, Tensor]:
    """All tensors by name; ``named_buffers`` does not list those that training makes."""
    return {n: t for n, t in em.state_dict().items() if isinstance(t, Tensor)}


def _prior(case: Case, rows: int) -> Any:
    if case.prior != "tensor":
        return case.prior
    generator = torch.Generator().manual_seed(rows)
    return torch.rand(rows, generator=generator, dtype=torch.float64) + 0.01


class History:
    """One side of the comparison: a LASEM and what it did to the shared stages."""

    def __init__(self, case: Case, backend: str) -> None:
        self.em = lf.LASEM(
            case.make(),
            case.space,
            case.likelihood_object(),
            _prior(case, len(case.space)),
            backend,
        )
        self.net = self.em.net
        _same_modes(self.net)
        # what each open task did to each tensor of the shared stages
        self.changes: dict[str, list[list[Tensor]]] = {}

    def shared(self) -> list[list[Tensor]]:
        return [[t.detach() for t in (*s.parameters(), *s.buffers())] for s in self.net.shared]


def _sides(case: Case, backend: str) -> tuple[Any, Any]:
    """The case on the backend and on the reference, or the errors of making them."""
    sides = [_attempt(lambda b=b: History(case, b)) for b in (backend, "reference")]
    for side in sides:
        if isinstance(side, Disagreement):
            raise side
    return sides[0], sides[1]


def _same_modes(net: lf.TransferNet) -> None:
    """A specific branch is in the modes of the stage that it is a copy of, layer by layer."""
    for task in net.tasks:
        for i, (own, shared) in enumerate(zip(net.specific[task], net.shared, strict=True)):
            modes = dict((name, m.training) for name, m in shared.named_modules())
            for name, layer in own.named_modules():
                if modes.get(name, layer.training) != layer.training:
                    raise Disagreement(
                        f"specific branch of stage {i + 1}: {type(layer).__name__} {name!r} is in "
                        f"training mode {layer.training}, the shared one is not"
                    )


class Comparison:
    """A case on one backend against the reference."""

    def __init__(self, case: Case, backend: str) -> None:
        self.case = case
        self.subject, self.spec = _sides(case, backend)
        self.last_posterior: dict[str, Tensor] = {}
        self.trained: set[str] = set()
        self.compared = 0

    def run(self) -> int:
        """The number of events that agreed.

        Raises:
            Disagreement: one did not.
        """
        try:
            if isinstance(self.subject, Exception):
                _agree(self.subject, self.spec, self.case, "the net")
            for number, (kind, task) in enumerate(self.case.events):
                x, y = self.case.batches[number % len(self.case.batches)]
                what = f"{kind} {task} (event {number + 1})"
                getattr(self, "_" + kind.replace(" ", "_"))(task, x, y, what)
                self.compared += 1
        except Refused as refused:
            self.case.notes["refused"] = str(refused)
        return self.compared

    def _both(self, call: Callable[[History], Any], what: str) -> tuple[Any, Any]:
        got, expected = (_attempt(lambda side=side: call(side)) for side in self._sides())
        _agree(got, expected, self.case, what)
        return got, expected

    def _sides(self) -> tuple[History, History]:
        return self.subject, self.spec

    def _step(
        self, task: str, x: Tensor, y: Tensor, what: str, frozen: Tensor | None = None
    ) -> None:
        before = x.clone(), y.clone()
        for side in self._sides():
            side.before = [[t.clone() for t in stage] for stage in side.shared()]
        leaves = {}
        if x.is_floating_point():
            leaves = {id(side): x.detach().requires_grad_() for side in self._sides()}

        def call(side: History) -> Any:
            side.net.zero_grad()
            step = side.em(leaves.get(id(side), x), y, task, posterior=frozen)
            step.loss.backward()
            return step

        for leaf in leaves.values():
            assert leaf.data_ptr() == x.data_ptr()
        if self._writes_first():
            leaves.clear()
        got, expected = self._both(call, what)
        if not (same_bits(x, before[0]) and same_bits(y, before[1])):
            raise Disagreement(f"{what}: x or y was written to")
        for name in ("loss", "posterior", "log_likelihood", "nll", "dropped_mass"):
            equal(getattr(got, name).detach(), getattr(expected, name).detach(), f"{what}: {name}")
        named = dict(self.spec.net.named_parameters())
        for name, parameter in self.subject.net.named_parameters():
            equal(parameter.grad, named[name].grad, f"{what}: gradient of {name}")
        if leaves:
            ours, theirs = (leaves[id(side)].grad for side in self._sides())
            equal(ours, theirs, f"{what}: gradient of x")
        self._same_buffers(what)
        self.last_posterior[task] = expected.posterior
        if self.subject.net.config(task) is None and frozen is None:
            self._same_prior(task, expected.posterior, what)
        self._learn(task)

    def _writes_first(self) -> bool:
        """Whether the first stage starts in place, which autograd refuses for a leaf."""
        first = next(self.spec.net.shared[0].modules())
        return any(getattr(m, "inplace", False) for m in first.modules()) or bool(self.case.odd)

    def _frozen(self, task: str, x: Tensor, y: Tensor, what: str) -> None:
        posterior = self.last_posterior.get(task)
        if posterior is None or self.subject.net.config(task) is not None:
            posterior = None
        self._step(task, x, y, what, posterior)

    def _evaluate(self, task: str, x: Tensor, y: Tensor, what: str) -> None:
        got, expected = self._both(lambda side: side.em.evaluate(x, task), what)
        equal(got.detach(), expected.detach(), what)

    def _validate(self, task: str, x: Tensor, y: Tensor, what: str) -> None:
        """A call in evaluation mode without gradients changes nothing."""
        before = tensors_of(self.subject.em)

        def call(side: History) -> Any:
            side.em.eval()
            with torch.no_grad():
                return side.em(x, y, task)

        all_modes = [{m: m.training for m in side.em.modules()} for side in self._sides()]
        try:
            got, expected = self._both(call, what)
        finally:
            for saved in all_modes:
                for module, mode in saved.items():
                    module.training = mode
        equal(got.loss, expected.loss, f"{what}: loss")
        equal(got.posterior, expected.posterior, f"{what}: posterior")
        after = tensors_of(self.subject.em)
        changed = [n for n in {*before, *after} if n not in before or n not in after
                   or not same_bits(before[n], after[n])]  # fmt: skip
        if changed:
            raise Disagreement(f"{what}: a call in evaluation mode changed {sorted(changed)[:4]}")

    def _second_order(self, task: str, x: Tensor, y: Tensor, what: str) -> None:
        """A gradient of a gradient's norm; a backend may say that it has none."""
        if not x.is_floating_point() or self._writes_first():
            return

        def call(side: History) -> list[Tensor | None]:
            side.net.zero_grad()
            leaf = x.detach().requires_grad_()
            loss = side.em(leaf, y, task).loss
            (first,) = torch.autograd.grad(loss, leaf, create_graph=True, allow_unused=True)
            if first is None or not first.requires_grad:
                return [first]
            first.square().sum().backward()
            return [first.detach(), *(p.grad for p in side.net.parameters())]

        for side in self._sides():
            side.before = [[t.clone() for t in stage] for stage in side.shared()]
        got, expected = (_attempt(lambda side=side: call(side)) for side in self._sides())
        for side in self._sides():
            side.net.zero_grad()
            if side.net.config(task) is None:
                _take_in(side, task)
        self.trained.add(task)
        if isinstance(got, RuntimeError) and re.search(
            "second|double|twice|create_graph|derivative", str(got)
        ):
            got = None
        else:
            _agree(got, expected, self.case, what)
            for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
                # two derivatives of activations of size 10 and more leave fewer digits
                equal(ours, theirs, f"{what}: gradient {i}", 1e-8)
        self._synchronise()

    def _plain(self, task: str, x: Tensor, y: Tensor, what: str) -> None:
        """A plain forward is the row of ``evaluate``."""
        config = None if self.subject.net.config(task) is not None else self.case.space[0]
        saved = [[(b, b.clone()) for b in side.net.buffers()] for side in self._sides()]
        got, expected = self._both(lambda side: side.net(x.clone(), task, config), what)
        equal(got.detach(), expected.detach(), what)
        for buffer, value in (pair for of_side in saved for pair in of_side):
            buffer.copy_(value)  # no task's doing

    def _end_with(self, task: str, x: Tensor, y: Tensor, what: str) -> None:
        self._end(task, x, y, what, len(self.case.space) - 1)

    def _end(self, task: str, x: Tensor, y: Tensor, what: str, config: Any = None) -> None:
        before = [[t.clone() for t in stage] for stage in self.subject.shared()]
        stepped = task in self.subject.changes
        alone = stepped and len(self.subject.changes) == 1
        got, expected = self._both(lambda side: side.em.end_task(task, config), what)
        if got != expected:
            raise Disagreement(f"{what}: kept {got}, the reference {expected}")
        weights = [len(list(stage.parameters())) for stage in self.subject.net.shared]
        own = self.subject.changes.pop(task, None)
        self.spec.changes.pop(task, None)
        for i, (stage, then) in enumerate(zip(self.subject.shared(), before, strict=True)):
            for j, (now, value) in enumerate(zip(stage, then, strict=True)):
                where = f"{what}: shared stage {i + 1}, tensor {j}"
                if got[i] or not stepped:
                    if not same_bits(now, value):
                        raise Disagreement(f"{where}: changed though the task shares it")
                    continue
                if j >= weights[i] and now.is_floating_point() and len(self.trained) > 1:
                    continue  # of statistics the last writer's stay: the reference has them too
                _taken_back(now, value, own[i][j], where, alone)
        self._same_buffers(what)
        self._synchronise()
        if (got_state := self.subject.em.state_dict().keys()) != self.spec.em.state_dict().keys():
            raise Disagreement(f"{what}: the state dict has the keys {list(got_state)[:5]}...")

    def _same_buffers(self, what: str) -> None:
        theirs = dict(self.spec.net.named_buffers())
        for name, buffer in self.subject.net.named_buffers():
            equal(buffer, theirs[name], f"{what}: buffer {name}")

    def _same_prior(self, task: str, posterior: Tensor, what: str) -> None:
        """The prior of both sides, where no tie may have been counted either way."""
        top = posterior.topk(min(2, len(posterior))).values
        if len(top) == 1 or float(top[0] - top[1]) > 1e-8:
            ours, theirs = (side.em.prior(task) for side in self._sides())
            equal(ours, theirs, f"{what}: prior")

    def _learn(self, task: str) -> None:
        """One step of gradient descent by the reference's gradients on both sides."""
        self.trained.add(task)
        theirs = dict(self.spec.net.named_parameters())
        trained = {id(p) for p in self.spec.net.task_parameters(task)}
        with torch.no_grad():
            for name, parameter in self.subject.net.named_parameters():
                other = theirs[name]
                if other.grad is None or id(other) not in trained:
                    continue
                if bool(torch.isfinite(other.grad).all()):
                    other -= 0.05 * other.grad.clamp(-1, 1)
                    parameter.copy_(other)
            for side in self._sides():
                for name, buffer in side.net.named_buffers():
                    if name.startswith("shared.") and name.endswith("ticks"):
                        buffer += 1
        for side in self._sides():
            if self.subject.net.config(task) is None:
                _take_in(side, task)
        self._synchronise()

    def _synchronise(self) -> None:
        """The reference's prior and weights for both sides."""
        theirs = _state(self.spec.em)
        with torch.no_grad():
            for name, buffer in _state(self.subject.em).items():
                if name.startswith("_prior.") and name in theirs and "_extra" not in name:
                    buffer.copy_(theirs[name])
            ours = dict(self.subject.net.named_parameters())
            for name, parameter in self.spec.net.named_parameters():
                if not same_bits(ours[name], parameter):
                    parameter.copy_(ours[name])


def _take_in(side: History, task: str) -> None:
    change = [
        [_difference(now, then) for now, then in zip(stage, before, strict=True)]
        for stage, before in zip(side.shared(), side.before, strict=True)
    ]
    if task in side.changes:
        for kept, new in zip(side.changes[task], change, strict=True):
            for i, value in enumerate(new):
                kept[i] = kept[i] + value
    else:
        side.changes[task] = change


def _difference(now: Tensor, then: Tensor) -> Tensor:
    """What a task did to a tensor; 0 where the bits are equal, whatever they mean."""
    if not now.is_floating_point() and now.dtype is not torch.int64:
        return torch.zeros(())
    same = (now == then) | (now.isnan() & then.isnan())
    return torch.where(same, torch.zeros_like(now), now - then)


def _taken_back(now: Tensor, value: Tensor, own: Tensor, where: str, alone: bool) -> None:
    """``now`` is ``value`` without the task's own change, bit for bit where that is 0."""
    if not value.is_floating_point() and value.dtype is not torch.int64:
        if not same_bits(now, value):
            raise Disagreement(f"{where}: {value.dtype} changed")
        return
    untouched = own == 0
    # what another task did and takes back may round; what nobody touched may not
    if not alone:
        equal(now, torch.where(untouched, value, value - own), where)
        if bool(untouched.all()) and not same_bits(now, value):
            equal(now, value, where)
    else:
        equal(now, torch.where(untouched, value, value - own), where)


def check(case: Case, backend: str) -> int:
    """Compares a whole history; the number of events that agreed."""
    return Comparison(case, backend).run()


def check_without_dropout(case: Case, backend: str) -> None:
    """With dropout: the E-step, which runs without it, is the reference's."""
    x, y = case.batches[0]
    subject, spec = _sides(case, backend)
    got, expected = (_attempt(lambda s=s: s.em(x, y, "a")) for s in (subject, spec))
    if isinstance(subject, Exception):
        got, expected = subject, spec
    try:
        _agree(got, expected, case, "step with dropout")
    except Refused as refused:
        case.notes["refused"] = str(refused)
        return
    for name in ("posterior", "log_likelihood", "nll"):
        equal(getattr(got, name), getattr(expected, name), f"with dropout: {name}")


def check_reference(case: Case) -> None:
    """The reference itself against brute force that uses nothing of the library."""
    x, y = case.batches[0]
    side = _attempt(lambda: History(case, "reference"))
    step = _attempt(lambda: side.em(x, y, "a"))
    if isinstance(side, Exception):
        return
    if isinstance(step, Exception) or case.likelihood == "gaussian":
        return
    log_prior = side.em._prior.log_prob("a") if case.prior == "tensor" else None
    with torch.no_grad():
        truth = brute_force(
            side.net, case.space.bits, x, y, "a", log_prior=log_prior, likelihood=case.likelihood,
            gradients=False,
        )  # fmt: skip
    for name in ("posterior", "log_likelihood", "nll"):
        equal(getattr(step, name), getattr(truth, name), f"reference: {name}")


def check_compiled(case: Case, backend: str, compiler: str) -> None:
    """A step inside ``torch.compile`` against the reference, gradients included."""
    x, y = case.batches[0]
    subject, spec = _sides(case, backend)
    if isinstance(subject, Exception):
        return
    torch.compiler.reset()
    compiled = torch.compile(subject.em, backend=compiler)
    results = []
    for call in (compiled, spec.em):
        step = _attempt(lambda call=call: call(x, y, "a"))
        if not isinstance(step, Exception):
            step.loss.backward()
        results.append(step)
    try:
        _agree(*results, case, "compiled step")
    except Refused as refused:
        case.notes["refused"] = str(refused)
        return
    got, expected = results
    for name in ("posterior", "log_likelihood", "nll", "loss"):
        equal(getattr(got, name), getattr(expected, name), f"compiled: {name}")
    named = dict(spec.net.named_parameters())
    for name, parameter in subject.net.named_parameters():
        equal(parameter.grad, named[name].grad, f"compiled: gradient of {name}")


class WholeNetGate(Gate):
    """The gate with the gradients of all parameters as one vector.

    A drawn net has parameters whose gradient is 0 but for rounding.
    """

    def errors(self, answer: Answer) -> dict[str, float]:
        errors = super().errors(answer)
        names = [n for n in self.truth.values if n not in errors]
        if math.isfinite(errors["gradients"]):
            off = math.hypot(*(float((answer.values[n] - self.truth.values[n]).norm())
                               for n in names))  # fmt: skip
            norm = math.hypot(*(float(self.truth.values[n].norm()) for n in names))
            errors["gradients"] = off / (norm or 1.0)
        return errors


def _crashes(layer: nn.Module) -> bool:
    """Whether oneDNN's gradient of this layer corrupts memory (PyTorch 2.13, float32)."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    return set(layer.kernel_size) == {1} and set(layer.stride) != {1}


def check_rounded(case: Case, backend: str, precision: str) -> None:
    """One step in float32, or under bfloat16 autocast, by the benchmark's gate."""
    x, y = case.batches[0]
    net = _attempt(case.make)
    if isinstance(net, ValueError) and ": expected" in str(net):
        case.notes["refused"] = str(net)[:90]
        return
    if any(getattr(m, "inplace", False) for m in net.shared[0].modules()):
        return  # the gate's brute force gives every configuration the same x
    if any(map(_crashes, net.modules())):
        case.notes["refused"] = "PyTorch itself: strided 1x1 convolutions write where they may not"
        return
    drawn = Problem(BenchCase("zoo", len(x), precision), net, case.space, x, y)
    column = library_column(backend)
    try:
        with drawn.case.precision():  # plain PyTorch has to take it, backward too
            drawn.net(x.clone(), TASK, case.space[0]).sum().backward()
    except (RuntimeError, ValueError) as error:
        if case.notes["transfer"] != "hps" and "modified by an inplace" not in str(error):
            raise Disagreement(f"{precision}: a plain forward fails: {error}") from error
        case.notes["refused"] = f"PyTorch itself, {precision}: {str(error)[:60]}"
        return
    try:
        runner = column.build(drawn)
        outcome = runner.step()
        WholeNetGate(drawn, largest_slack=column.slack).check(column, answer_of(runner, outcome))
    except WrongResult as error:
        raise Disagreement(f"{precision}: {error}") from error
    except REFUSALS as error:
        if ": expected" not in str(error):
            raise Disagreement(f"{precision}: {type(error).__name__}: {error}") from error
        case.notes["refused"] = f"{precision}: {str(error)[:90]}"
