"""How layers get initial weights: by PyTorch's own rules, or as the authors' release draws them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lasem_fast._numbers import finite_number

_SD = 0.05
_BIAS = 0.2
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@torch.no_grad()
def redraw_(module: nn.Module) -> list[str]:
    """New weights by the layers' own rule, in place, for every layer inside ``module``.

    The rule is the layer's ``reset_parameters()`` (in ``nn.MultiheadAttention`` and
    ``nn.Transformer``: ``_reset_parameters()``), inner layers first, as when they were made.
    Parametrised weights (:mod:`torch.nn.utils.parametrize`) are drawn like plain ones and handed to
    the parametrisation. Buffers are left to the layers' rules, too.

    Returns:
        The names of the parameters that no rule has drawn; they keep their values. A parameter of a
        module without ``reset_parameters()`` is one of them.
    """
    _check_module(module)
    given = {n: p for n, p in module.named_parameters() if p.is_floating_point() or p.is_complex()}
    values = {name: p.clone() for name, p in given.items()}
    undrawn = {id(p) for layer in module.modules() for p in _parametrised(layer)}
    try:
        # what is still NaN afterwards was left alone, whatever a rule claims to do
        for parameter in given.values():
            if id(parameter) not in undrawn:
                parameter.fill_(torch.nan)
        for layer in _inner_first(module, set()):
            if (rule := _rule(layer)) is not None:
                undrawn -= _draw(layer, rule)
    except BaseException:
        for name, parameter in given.items():
            parameter.copy_(values[name])
        raise
    left = [
        name
        for name, parameter in module.named_parameters()
        if name in given and (id(parameter) in undrawn or bool(parameter.isnan().any()))
    ]
    for name in left:
        given[name].copy_(values[name])
    return left


def _inner_first(module: nn.Module, seen: set[nn.Module]) -> Iterator[nn.Module]:
    """Every layer once, behind the layers inside it."""
    if module not in seen:
        seen.add(module)
        for child in module.children():
            yield from _inner_first(child, seen)
        yield module


def _rule(layer: nn.Module) -> Callable[[], object] | None:
    """What draws a layer's own weights, or None."""
    for name in ("reset_parameters", "_reset_parameters"):
        rule = getattr(layer, name, None)
        if callable(rule) and _needs_no_arguments(rule):
            return rule
    return None


def _needs_no_arguments(rule: Callable[..., object]) -> bool:
    try:
        inspect.signature(rule).bind()
    except TypeError:
        return False
    except ValueError:  # there is no signature to be had
        return True
    return True


def _parametrised(layer: nn.Module) -> Iterator[Tensor]:
    """The tensors that a layer's parametrised weights are computed from."""
    if parametrize.is_parametrized(layer):
        for chain in layer.parametrizations.values():
            yield from _originals(chain)


def _originals(chain: parametrize.ParametrizationList) -> list[Tensor]:
    if chain.is_tensor:
        return [chain.original]
    return [getattr(chain, f"original{i}") for i in range(chain.ntensors)]


def _draw(layer: nn.Module, draw: Callable[[], object]) -> set[int]:
    """Runs ``draw``, which sets a layer's weights in place, also where they are parametrised.

    Returns the identities of the tensors behind parametrised weights that it has drawn.
    """
    if not parametrize.is_parametrized(layer):
        draw()
        return set()
    with parametrize.cached():  # the weights that ``draw`` sees are the ones that are read below
        for name in layer.parametrizations:
            getattr(layer, name).fill_(torch.nan)
        draw()
        weights = {name: getattr(layer, name).clone() for name in layer.parametrizations}
    drawn = set()
    for name, chain in layer.parametrizations.items():
        weight = weights[name]
        if bool(weight.isnan().any()):
            continue
        for step in reversed(chain):  # as register_parametrization does it
            if hasattr(step, "right_inverse"):
                with suppress(NotImplementedError):
                    weight = step.right_inverse(weight)
        originals = _originals(chain)
        for original, value in zip(originals, [weight] if chain.is_tensor else weight, strict=True):
            original.copy_(value)
        drawn |= set(map(id, originals))
    return drawn


@torch.no_grad()
def release_(module: nn.Module) -> None:
    """The release's weights for ordinary layers, in place, for every layer inside ``module``.

    Convolutions and linear layers get weights from a normal distribution of mean 0 and standard
    deviation 0.05, redrawn beyond 2 standard deviations (0.044 is left of it), and biases of 0.2.
    Other layers keep what they have.
    """
    _check_module(module)
    for name, parameter in module.named_parameters():
        if parameter.is_complex():
            raise TypeError(f"module: expected real parameters, got {parameter.dtype} in {name!r}")
    for layer in module.modules():
        if isinstance(layer, _WEIGHTED):
            _draw(layer, lambda layer=layer: _release(layer))


def _check_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"module: expected initialised parameters, got the lazy {name!r}; run the module "
                f"once on a batch first"
            )


def _release(layer: nn.Module) -> None:
    nn.init.trunc_normal_(layer.weight, std=_SD, a=-2 * _SD, b=2 * _SD)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, _BIAS)


@torch.no_grad()
def glorot_uniform_(tensor: Tensor, fan_in: int, fan_out: int) -> Tensor:
    """Uniform in +-sqrt(6 / (fan_in + fan_out)), in place (Glorot and Bengio, 2010).

    The release leaves the variables of tf and dfcnn, biases included, to TensorFlow's default,
    which is this one; a vector of n values counts as fan_in = fan_out = n.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"tensor: expected a floating-point tensor, got {got}")
    if tensor.is_nested or tensor.layout != torch.strided:
        got = "a nested one" if tensor.is_nested else f"one of layout {tensor.layout}"
        raise TypeError(f"tensor: expected a dense tensor, got {got}")
    # PyTorch would refuse only after it has drawn
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            "tensor: expected one that can be changed, got one made under torch.inference_mode()"
        )
    fan_in, fan_out = finite_number(fan_in, "fan_in"), finite_number(fan_out, "fan_out")
    limit = math.sqrt(6 / (fan_in + fan_out))
    return tensor.uniform_(-limit, limit)
