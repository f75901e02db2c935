"""What the layers inside a stage are, as far as evaluating many configurations at once needs it.

Which stages are one convolution or linear layer between parameter-free layers (both branches'
weights can be concatenated), which layers draw random numbers, mix samples or write to their input.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

_MAY_BE_RANDOM = (_DropoutNd, nn.MultiheadAttention, nn.RNNBase, nn.RReLU)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_MAY_MIX_SAMPLES = (_BatchNorm, _InstanceNorm, _SpectralNorm, *_EMBEDDINGS)

_DROPOUTS = frozenset(
    {
        nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
        nn.FeatureAlphaDropout,
    }
)  # fmt: skip
_CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_BATCH_NORMS = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})

_ELEMENTWISE = frozenset(
    {
        nn.CELU, nn.Dropout, nn.AlphaDropout, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid,
        nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU,
        nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh,
        nn.Tanhshrink, nn.Threshold,
    }
)  # fmt: skip

ACTIVATIONS = _ELEMENTWISE - {nn.AlphaDropout, nn.Dropout, nn.Identity, nn.ReLU}
"""Functions of one value, other than the ReLU."""

# Layers that treat every channel alone, by the number of spatial dimensions they work on.
_CHANNELWISE = {
    1: frozenset(
        {nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.Dropout1d}
    ),
    2: frozenset(
        {nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout2d}
    ),
    3: frozenset(
        {nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d, nn.Dropout3d}
    ),
}
# What may stand behind a layer, and ahead of one.
_BEHIND = {0: _ELEMENTWISE} | {n: _ELEMENTWISE | pools for n, pools in _CHANNELWISE.items()}
_AHEAD = frozenset().union(*_BEHIND.values(), {nn.Flatten, nn.Unflatten})


def _settings_of(kind: type[nn.Module]) -> tuple[str, ...]:
    """The attributes that tell layers of one type apart: its constructors' arguments, by name."""
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    names = {name for base in own for name in inspect.signature(base).parameters}
    # what is no weight, and a forward that somebody put in the place of the type's
    return "forward", *sorted(names - {"bias", "device", "dtype"})


# torch.compile cannot trace a walk through a module's attributes in every PyTorch (2.11)
_SETTINGS = {kind: _settings_of(kind) for kind in (*_AHEAD, *_CONVOLUTIONS, nn.Linear)}
# as they are before anybody replaces them
_METHODS = {
    kind: [(kind, name, getattr(kind, name))
           for name in ("__call__", "forward", "_conv_forward") if name in vars(kind)]
    for kind in (nn.Module, *_SETTINGS, *_BATCH_NORMS, nn.Sequential)
}  # fmt: skip


def modules_in(*modules: nn.Module) -> list[nn.Module]:
    """What ``modules()`` of each gives, in another order; several times as fast, without names."""
    found = list(dict.fromkeys(modules))
    if torch.compiler.is_compiling():
        return [inside for module in found for inside in module.modules()]
    known = {None, *found}
    for module in found:  # which grows meanwhile
        if module._modules:
            for child in module._modules.values():
                if child not in known:
                    known.add(child)
                    found.append(child)
    if any([_hides(kind) for kind in set(map(type, found))]):
        return list(dict.fromkeys(m for outer in modules for m in outer.modules()))
    return found


def _hides(kind: type[nn.Module]) -> bool:
    """Whether a type of module has its own idea of what is inside."""
    return kind.named_modules is not nn.Module.named_modules


def parameters_in(*modules: nn.Module) -> list[nn.Parameter]:
    """What ``parameters()`` of each gives; a parameter that two modules share comes twice."""
    if any([type(m).named_parameters is not nn.Module.named_parameters for m in modules]):
        return [parameter for module in modules for parameter in module.parameters()]
    return [p for m in modules_in(*modules) for p in m._parameters.values() if p is not None]


def has_tensors(module: nn.Module) -> bool:
    """Whether a module has a parameter or a buffer."""
    if torch.compiler.is_compiling():
        return any([_has_tensor(inside) for inside in modules_in(module)])
    waiting = [module]
    for inside in waiting:  # which grows meanwhile; mostly the first layer has one
        if _hides(type(inside)):
            return any([_has_tensor(each) for each in modules_in(module)])
        if _has_tensor(inside):
            return True
        waiting += [child for child in inside._modules.values() if child is not None]
    return False


def _has_tensor(layer: nn.Module) -> bool:
    """Whether a module itself, its children aside, has one."""
    for tensors in (layer._parameters, layer._buffers):
        if any([tensor is not None for tensor in tensors.values()]):
            return True
    return False


class PlainStage(NamedTuple):
    """A stage that is one weighted layer between parameter-free ones.

    Attributes:
        before: layers ahead of the weighted layer; they treat samples independently.
        name: the weighted layer's name inside the stage ("" if it is the stage).
        core: the convolution or linear layer.
        after: elementwise and channelwise layers behind it.
        norm: name of the batch or group norm between the two; None: there is none.
    """

    before: tuple[nn.Module, ...]
    name: str
    core: nn.Module
    after: tuple[nn.Module, ...]
    norm: str | None = None


def plain_stage(module: nn.Module, *, with_norm: bool = False) -> PlainStage | None:
    """The parts of a plain stage, or None where the stage is anything else.

    ``with_norm``: a batch norm or a group norm may follow the weighted layer.
    """
    if type(module) is nn.Sequential:
        children = list(module._modules.items())  # named_children leaves out a layer's second use
    else:
        children = [("", module)]
    at, norm = -1, None
    for i, (child_name, child) in enumerate(children):
        if type(child) in _AHEAD:
            pass
        elif _is_core(child) and at < 0:
            at = i
        elif with_norm and (is_batch_norm(child) or is_group_norm(child)) and 0 <= at == i - 1:
            norm = child_name
        else:
            return None
        if is_patched(child):
            return None
    if at < 0 or is_patched(module):
        return None
    name, core = children[at]
    layers = [child for _, child in children]
    before, after = tuple(layers[:at]), tuple(layers[at + (1 if norm is None else 2) :])
    for child in before:
        if not _may_go_before(child):
            return None
    spatial = _CONVOLUTIONS.get(type(core), 0)
    for child in after:
        kind = type(child)
        if kind is nn.Flatten and flattens_samples(child):
            spatial = 0  # what was one channel is one run of features from here on
        elif kind not in _BEHIND[spatial] or _setting(child, "return_indices", False):
            return None
    return PlainStage(before, name, core, after, norm)


def flattens_samples(layer: nn.Module) -> bool:
    """Whether a layer makes one vector of every sample; hooks are not looked at."""
    return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)


def does_nothing(layer: nn.Module) -> bool:
    """Whether a layer is the identity in its present mode; hooks are not looked at."""
    off = type(layer) in _DROPOUTS and not (layer.training and is_random(layer))
    return off or type(layer) is nn.Identity


def core_like(stage: PlainStage, module: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and weighted layer of a plain stage that differs from another in its weights alone.

    Whatever the weights' shapes. None where ``module`` is anything else.
    """
    named = [*module._modules.items()] if type(module) is nn.Sequential else [("", module)]
    models, at = (*stage.before, stage.core, *stage.after), len(stage.before)
    if len(named) != len(models) or is_patched(module):
        return None
    for i, (_, layer) in enumerate(named):
        model = models[i]
        if layer is not model and (is_patched(layer) or not same_settings(model, layer)):
            return None
        if i < at and not _may_go_before(layer):
            return None
    return named[at]


def same_settings(a: nn.Module, b: nn.Module) -> bool:
    """Whether two layers of a plain stage or a program have the same type, stride, slope and so on.

    What ``forward`` does not read, like a user's own attribute, is not looked at.
    """
    if type(a) is not type(b):
        return False
    if a.training != b.training and isinstance(a, _MAY_BE_RANDOM):
        return False
    ours, theirs = a.__dict__, b.__dict__
    for name in _SETTINGS[type(a)]:
        mine, others = ours.get(name), theirs.get(name)
        if mine is not others and mine != others:
            return False
    return True


def _setting(module: nn.Module, name: str, default: Any) -> Any:
    """A plain attribute of a module or its class: an nn.Module that lacks one takes long to say."""
    own = module.__dict__
    return own[name] if name in own else getattr(type(module), name, default)


def _is_core(module: nn.Module) -> bool:
    if type(module) in _CONVOLUTIONS:
        return module.groups == 1
    return type(module) is nn.Linear


def _may_go_before(module: nn.Module) -> bool:
    known = type(module) in _AHEAD
    indices = _setting(module, "return_indices", False)
    first = _setting(module, "start_dim", _setting(module, "dim", 1))
    keeps_batch = isinstance(first, int) and first >= 1
    in_place = _setting(module, "inplace", False)
    return known and keeps_batch and not in_place and not indices and not is_random(module)


def is_patched(module: nn.Module) -> bool:
    """Whether calling the module runs anything but its type's forward: hooks, or another one."""
    own = module.__dict__
    return bool(
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "_conv_forward" in own
    )


Method = tuple[type[nn.Module], str, Any]
"""A method of one of PyTorch's types, as it was before anybody could replace it: type, name, it."""


def torchs_methods(kind: type[nn.Module]) -> list[Method]:
    """Those that a call of a module of some type runs through."""
    return [method for base in kind.__mro__ for method in _METHODS.get(base, ())]


def are_watched(methods: Iterable[Method]) -> bool:
    """Whether somebody steps into calls of modules: by global hooks, or in PyTorch's types.

    Then every module of a network has to be called as itself. ``methods``: what those calls run
    through.
    """
    return _has_any_global_hook() or any(
        [getattr(kind, name) is not own for kind, name, own in methods]
    )


def one_function(modules: Sequence[nn.Module]) -> bool:
    """Whether modules without tensors are one and the same function of their input."""
    first, *others = modules
    return all(module is first or _are_alike(first, module) for module in others)


def _are_alike(a: nn.Module, b: nn.Module) -> bool:
    if is_patched(a) or is_patched(b):
        return False
    if type(a) is type(b) is nn.Sequential:
        ours, theirs = a._modules.values(), b._modules.values()
        return len(ours) == len(theirs) and all(map(_are_alike, ours, theirs))
    return type(a) in _AHEAD and same_settings(a, b)


def is_random(module: nn.Module) -> bool:
    """Whether this module itself, its children aside, draws random numbers in training mode.

    Known are PyTorch's dropout layers, RReLU, attention and recurrent layers with dropout, and any
    module that sets ``stochastic = True``.
    """
    if not isinstance(module, _MAY_BE_RANDOM):
        return bool(_setting(module, "stochastic", False))
    if isinstance(module, _DropoutNd):
        return module.p > 0
    return isinstance(module, nn.RReLU) or module.dropout > 0


def is_kind_of_random(kind: type[nn.Module]) -> bool:
    """Whether a type is one of PyTorch's that may draw random numbers, or made from it."""
    return issubclass(kind, _MAY_BE_RANDOM)


def active_random_layers(module: nn.Module) -> list[nn.Module]:
    """The layers inside ``module`` that draw random numbers in their present mode."""
    return active_random(modules_in(module))


def active_random(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that draw random numbers in their present mode."""
    kinds = {
        kind
        for kind in set(map(type, layers))
        if is_kind_of_random(kind) or hasattr(kind, "stochastic")
    }
    return [
        layer
        for layer in layers
        if (type(layer) in kinds or "stochastic" in layer.__dict__)
        and layer.training
        and is_random(layer)
    ]


def is_batch_norm(layer: nn.Module) -> bool:
    """Whether a layer is one of PyTorch's own batch norms, as it is."""
    return type(layer) in _BATCH_NORMS and "forward" not in layer.__dict__


def is_group_norm(layer: nn.Module) -> bool:
    """Whether a layer is PyTorch's own group norm, as it is."""
    return type(layer) is nn.GroupNorm and "forward" not in layer.__dict__


def uses_batch_statistics(layer: nn.Module, *, patched: bool = False) -> bool:
    """Whether a layer is a batch norm that normalises by the mini-batch's own statistics.

    ``patched``: its forward is known to be another one for a while.
    """
    is_known = patched or is_batch_norm(layer)
    return is_known and (layer.training or layer.running_mean is None)


def moves_statistics(layer: nn.Module) -> bool:
    """Whether a layer has running statistics, which move in training mode."""
    return isinstance(layer, _BatchNorm | _InstanceNorm) and layer.running_mean is not None


def any_uses_batch_statistics(layers: Sequence[nn.Module]) -> bool:
    """Whether one of the layers is such a batch norm."""
    # a list: torch.compile's isdisjoint of a map says yes to anything (2.13)
    norms = [layer for layer in layers if type(layer) in _BATCH_NORMS]
    return any([uses_batch_statistics(norm) for norm in norms])


def mixes_samples(layer: nn.Module) -> bool:
    """Whether a layer's output for one sample depends on the rest of the folded batch.

    Of a plain batch norm it does not: it sees every configuration's samples apart.
    """
    if isinstance(layer, _BatchNorm):
        batch = layer.training or layer.running_mean is None
        return batch and not uses_batch_statistics(layer)
    return isinstance(layer, _InstanceNorm) and layer.training and layer.track_running_stats


def counts_tokens(layer: nn.Module) -> bool:
    """Whether a layer's gradient depends on how often its batch has a token."""
    return isinstance(layer, _EMBEDDINGS) and layer.scale_grad_by_freq


def may_mix_samples(kind: type[nn.Module]) -> bool:
    """Whether a type is one of PyTorch's whose layers may mix samples, or made from it."""
    return issubclass(kind, _MAY_MIX_SAMPLES)


def any_mixes_samples(layers: Sequence[nn.Module]) -> bool:
    """Whether one of the layers mixes samples, in its gradient too, or iterates."""
    kinds = {kind for kind in set(map(type, layers)) if may_mix_samples(kind)}
    return any(
        mixes_samples(layer) or counts_tokens(layer) or iterates(layer)
        for layer in [m for m in layers if m._forward_pre_hooks or type(m) in kinds]
    )


def keeps_samples_apart(module: nn.Module) -> bool:
    """Whether a module is made of PyTorch's layers that are known to treat samples independently.

    Hooks are not looked at.
    """
    if type(module) is nn.Sequential:
        return all(keeps_samples_apart(child) for child in module)
    if type(module) in (nn.Dropout, nn.AlphaDropout):
        return not module.inplace
    known = {nn.Linear, *_CONVOLUTIONS, *_BATCH_NORMS}
    return type(module) in known or _may_go_before(module)


def iterates(layer: nn.Module) -> bool:
    """Whether a layer's spectral norm moves on with every call."""
    if not layer.training:
        return False
    hooks = layer._forward_pre_hooks
    return isinstance(layer, _SpectralNorm) or (
        bool(hooks) and any(isinstance(hook, SpectralNorm) for hook in hooks.values())
    )


def may_write_input(module: nn.Module) -> bool:
    """Whether a stage may change its input tensor in place."""
    if not any(_setting(m, "inplace", False) for m in modules_in(module)):
        return False
    if type(module) is nn.Sequential and len(module) > 0:
        return type(module[0]) not in {*_CONVOLUTIONS, nn.Linear}
    return True
