"""A look at a task's stages on its first mini-batch: do they mix samples, do they write to inputs?

A tree puts all rows of a level into one batch, which only a stage that treats every sample alone
may see. Stages made of PyTorch's layers that are known to do so are not looked at; of the others a
copy is run on two samples; where random numbers are drawn, also with the same numbers on four.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasem_fast._copied import copied
from lasem_fast.networks import checks
from lasem_fast.networks.batch_norm import frozen
from lasem_fast.networks.layers import active_random_layers, keeps_samples_apart
from lasem_fast.networks.network import Network
from lasem_fast.transfer import Branch
from lasem_fast.tree.forward_reading import is_torchs

# Half of the digits: less than any layer that mixes samples is off by, more than rounding.
_FAR = 0.5
# A batch of one may take another algorithm, in another precision inside the module than outside.
_COARSEST = torch.finfo(torch.bfloat16).eps
# A layer may do something on some mini-batches only; a large one is not tried as often.
_SEEDS, _FEW_SEEDS, _LARGE = range(16), range(4), 2**20


class _Run(NamedTuple):
    output: Tensor
    drew: bool  # random numbers
    wrote: bool  # to its input


@torch.no_grad()
def look(network: Network, x: Tensor) -> frozenset[int]:
    """Which stages write to their input, by position; the head's is the depth.

    Changes nothing: neither random state nor buffers, and no hook is called. Warns of a stage that
    draws random numbers and does not say so.

    Raises:
        TypeError, ValueError: a stage or the head mixes samples, does not keep their number or
            gives no tensor; the message names it.
    """
    depth = len(network.stages)
    places = [*network.stages, [Branch(network.head)]]
    unknown = [i for i, branches in enumerate(places) if not all(map(_is_known, branches))]
    writers = set()
    if not unknown:
        return frozenset(writers)
    devices = [x.device] if x.device.type == "cuda" else []
    state, numpys = random.getstate(), _numpys_random()
    numpys_state = None if numpys is None else numpys.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            # a single sample is looked at beside itself turned round, at half its size
            alone = len(x) == 1 and x.is_floating_point() and not _is_8_bits(x)
            other = 0.5 * x.flip(tuple(range(1, x.dim()))) if alone else x[-1:]
            h = torch.cat([x[:1], other])
            for i, branches in enumerate(places[: unknown[-1] + 1]):
                there = [branch for branch in branches if branch is not None]
                h, draws, tried = _told_apart(h), False, []
                for branch in there if i in unknown else ():
                    first = _run(branch, h)
                    if first.wrote:
                        writers.add(i)
                    if i < depth:
                        where = f"stage {i + 1}"
                        checks.check_stage_output(first.output, len(h), branch.module, where)
                    else:
                        where = f"the head of task {network.task!r}"
                        checks.check_logits(first.output, 1, len(h), network.task)
                    draws = draws or (first.drew and branch.module.training)
                    kinds = [type(layer) for layer in branch.module.modules()]
                    if len(x) > 1 or alone:
                        # the same code draws alike in both branches, and many runs take long
                        _check_independent(branch, h, first, where, at_random=kinds not in tried)
                    tried.append(kinds)
                if draws:
                    _warn_of_noise(there[0], h, where)
                if i < depth:
                    h = _run(there[0], h).output
    finally:
        random.setstate(state)
        if numpys is not None:
            numpys.set_state(numpys_state)
    return frozenset(writers)


def _told_apart(h: Tensor) -> Tensor:
    """Two samples that differ: of equal ones, behind a ReLU that is shut, nothing could be seen."""
    if not _eps(h) or _is_8_bits(h) or len(h) < 2 or not torch.equal(h[0], h[1]):
        return h
    _seed(0, h.device)
    return h + torch.rand_like(h)


def _is_8_bits(h: Tensor) -> bool:
    """Whether there is no arithmetic on a tensor, as on float8."""
    return h.itemsize == 1


def _is_known(branch: Branch | None) -> bool:
    return branch is None or keeps_samples_apart(branch.module)


def _check_independent(
    branch: Branch, h: Tensor, first: _Run, where: str, *, at_random: bool
) -> None:
    draws = first.drew or not all(map(_draws_for_each, active_random_layers(branch.module)))
    if (
        _depends_on_others(branch, h, first)
        or _depends_on_number(branch, h, first)
        or (at_random and draws and _depends_on_others_at_random(branch, h))
    ):
        raise ValueError(
            f"net: expected stages that treat the samples of a batch independently, got {where} "
            f"({checks.name_of(branch.module)}), whose output for one sample changes with the "
            f"others; the samples of all configurations are evaluated as one batch, so use "
            f"backend='reference' or a layer that looks at one sample at a time"
        )


def _draws_for_each(layer: nn.Module) -> bool:
    """Whether a random layer is PyTorch's own, which draws for every number or channel alone."""
    return is_torchs(layer) and not {"stochastic", "forward"} & vars(layer).keys()


def _warn_of_noise(branch: Branch, h: Tensor, where: str) -> None:
    drawing = _drawing(branch, h)
    if drawing:
        layers = ", ".join(drawing[:3]) + (", ..." if len(drawing) > 3 else "")
        drawn = f"in which {layers} {'draw' if len(drawing) > 1 else 'draws'} some"
        mend = "Set stochastic = True on what draws: it does so in training mode only, as it should"
    else:
        drawn = "which draws some"
        mend = (
            "Set stochastic = True on the module that draws, and let its forward draw only if "
            "self.training"
        )
    warnings.warn(
        f"net: expected stages that draw no random numbers while their random layers are off, got "
        f"{where} ({checks.name_of(branch.module)}), {drawn}; the E-step runs with this noise. "
        f"{mend}",
        UserWarning,
        stacklevel=2,
    )


def _drawing(branch: Branch, h: Tensor) -> list[str]:
    """Layers of a user's own that draw random numbers in training mode, and only then."""
    if _run(branch, h, awake=()).drew:
        return []
    return [
        f"{name!r} ({type(layer).__name__})" if name else type(layer).__name__
        for name, layer in branch.module.named_modules()
        if layer.training and not is_torchs(layer) and _run(branch, h, awake=(name,)).drew
    ]


def _depends_on_others(branch: Branch, h: Tensor, first: _Run) -> bool:
    """Whether a sample's output changes when another one takes the other's place."""
    tolerance = _eps(first.output)
    far = lambda out, row: _far(out[row], first.output[row], tolerance)  # noqa: E731
    again = _run(branch, h).output
    if any(far(again, row) for row in (0, 1)):
        return False  # it draws random numbers of its own: nothing can be said
    outputs = [_run(branch, _twice(h, row)).output for row in (0, 1)]
    return any(far(out, row) for row, out in enumerate(outputs))


def _twice(h: Tensor, row: int) -> Tensor:
    """One of two samples twice, laid out as both: other strides may mean another algorithm."""
    both = h.clone()
    both[1 - row] = h[row]
    return both


def _depends_on_others_at_random(branch: Branch, h: Tensor) -> bool:
    """Whether it does when random layers are on, and the same numbers are drawn every time."""
    if len(h) < 2:
        return False
    here, there = h[[0, 1, 1, 0]], h[[0, 0, 0, 1]]  # all but the first are another one
    is_large = sum(p.numel() for p in branch.module.parameters()) > _LARGE
    for seed in _FEW_SEEDS if is_large else _SEEDS:
        first = _run(branch, here, seed, calm=False).output
        eps = _eps(first)
        if seed == 0 and _far(_run(branch, here, seed, calm=False).output, first, eps):
            return False  # it has random numbers of its own: nothing can be said
        if _far(_run(branch, there, seed, calm=False).output[:1], first[:1], eps):
            return True
    return False


def _depends_on_number(branch: Branch, h: Tensor, first: _Run) -> bool:
    """Whether both samples' outputs are others for the sample alone."""
    if first.drew:
        return False  # other numbers are drawn for another number of samples
    try:
        alone = [_run(branch, h[row : row + 1]).output for row in (0, 1)]
    except Exception:
        return False  # it cannot take a batch of one
    return all(_far(out, first.output[row : row + 1], _COARSEST) for row, out in enumerate(alone))


def _eps(values: Tensor) -> float:
    """Of a dtype with rounding; 0 of whole numbers."""
    rounds = values.is_floating_point() or values.is_complex()
    return torch.finfo(values.dtype).eps if rounds else 0.0


def _far(a: Tensor, b: Tensor, eps: float) -> bool:
    """Whether finite values differ by more than half of the digits; False for other shapes."""
    if not isinstance(a, Tensor) or a.shape != b.shape:
        return False
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    error, size = float((a - b).abs().norm()), float(b.abs().norm())
    return error > eps**_FAR * size and error < float("inf")


def _run(
    branch: Branch,
    h: Tensor,
    seed: int = 0,
    *,
    calm: bool = True,
    awake: Sequence[str] | None = None,
) -> _Run:
    """A copy of the branch on a copy of ``h``, from one random state.

    Calm: random layers are off; ``awake`` names the only layers in training mode, if it is given.
    """
    try:
        module = copied(branch.module, branch.module.parameters())
    except ValueError as error:
        raise ValueError(f"net: {error}") from error
    for layer in active_random_layers(module) if calm else ():
        layer.training = False
    if awake is not None:
        module.eval()
        layers = dict(module.named_modules())  # a scripted module has no get_submodule
        for name in awake:
            layers[name].training = True
    for layer in module.modules():
        _forget_hooks(layer)
    given = h.clone()
    _seed(seed, h.device)
    random.seed(seed)
    if (numpys := _numpys_random()) is not None:
        numpys.seed(seed)
    before, version = _random_states(h.device), checks.version_of(given)
    with frozen([module]):
        output = Branch(module, branch.tensors)(given)
    drew = before != _random_states(h.device)
    # values as well: .data and inference mode count no changes
    wrote = checks.version_of(given) != version or not torch.equal(given, h)
    return _Run(output, drew, wrote)


def _seed(seed: int, device: torch.device) -> None:
    """Of the two generators that a layer may draw from; ``torch.manual_seed`` seeds all devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _numpys_random() -> Any:
    """``numpy.random``, where somebody has imported it."""
    return sys.modules.get("numpy.random")


def _random_states(device: torch.device) -> list[object]:
    """Of PyTorch, Python and NumPy, to be compared by ``==``."""
    states = [torch.get_rng_state().tolist(), random.getstate()]
    if (numpys := _numpys_random()) is not None:
        states.append(numpys.get_state(legacy=False)["state"]["pos"])
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).tolist())
    return states


def _forget_hooks(layer: nn.Module) -> None:
    if not isinstance(layer, torch.jit.ScriptModule):
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
