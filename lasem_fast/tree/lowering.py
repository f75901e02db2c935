"""What a stage computes, as a few fused layers: how an ordinary module reaches the kernels.

A fused layer is a convolution or linear layer with what kernels do in its epilogue:

    pool(relu_after(relu(norm(core(source))) + skip))

where everything but the core may be missing, and another activation may take the first ReLU's
place. A stage that is made of nothing else, however its ``forward`` is written, becomes a
:class:`Program`; any other is refused with a reason, and runs in PyTorch as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lasem_fast.levels.relu_and_pool import Pool, max_pool, relu_and_pool
from lasem_fast.networks.layers import (
    ACTIVATIONS,
    does_nothing,
    flattens_samples,
    is_batch_norm,
    is_group_norm,
    is_patched,
    is_random,
    plain_stage,
    same_settings,
)
from lasem_fast.networks.skip_layer import SkipLayer
from lasem_fast.tree.forward_reading import Known, Unreadable, read

_CORES = (nn.Conv2d, nn.Linear)


class FusedLayer(NamedTuple):
    """One weighted layer of a stage and its epilogue.

    Attributes:
        name: the core's name inside the stage ("" if it is the stage).
        core: the convolution or linear layer.
        source: the value that the core reads (see :class:`Program`).
        flatten: whether every sample is flattened first.
        relu: whether a ReLU follows the core.
        skip: the value that is added then, or None.
        relu_after: whether another ReLU follows that sum.
        pool: the max-pool at the end.
        norm: name of the batch or group norm behind the core, or None.
        activation: what stands in the place of the ReLU, or None.
    """

    name: str
    core: nn.Module
    source: int = 0
    flatten: bool = False
    relu: bool = False
    skip: int | None = None
    relu_after: bool = False
    pool: Pool = Pool()
    norm: str | None = None
    activation: nn.Module | None = None


class Program(NamedTuple):
    """A stage as fused layers.

    Values are numbered: first the stage's inputs, then the layers' outputs in order. More than one
    input or output are parts of one tensor, one behind the other in the channels.

    Attributes:
        inputs: number of inputs, 1 or 2.
        layers: in the order in which they run.
        outputs: the values that leave the stage.
    """

    inputs: int
    layers: tuple[FusedLayer, ...]
    outputs: tuple[int, ...]


def program_of(module: nn.Module) -> Program | str:
    """A stage's program, or the reason in words why it has none.

    What is traced is remembered for as long as the module's layers and settings stay, in the modes
    that it was last in: those of an E-step and of an M-step alternate where there is dropout.
    """
    program = _plain(module)
    if program is not None:
        return program
    if type(module) is SkipLayer:
        return _skip_layer(module)
    if torch.compiler.is_compiling():
        return "inside torch.compile only a sequence of layers is looked into"
    last = _traced.get(module, ())
    known = next((trace for trace in last if trace.holds(module)), None)
    if known is None:
        inner = [m for m in module.modules() if m is not module]
        seen = _Seen.now(module), [(m, _Seen.now(m)) for m in inner]
        known = _Traced(*seen, *_trace(module))
        _traced[module] = (known, *last[: _MODES - 1])
    return known.program


class _Seen(NamedTuple):
    """What a trace depends on in one module besides what its forward reads."""

    children: tuple[nn.Module | None, ...]
    training: bool
    settings: list[Any]

    @classmethod
    def now(cls, module: nn.Module) -> _Seen:
        return cls(tuple(module._modules.values()), module.training, _settings(module))

    def holds(self, module: nn.Module) -> bool:
        return (
            module.training == self.training
            and tuple(module._modules.values()) == self.children
            and not is_patched(module)
            and (not self.settings or _settings(module) == self.settings)
        )


class _Traced(NamedTuple):
    """A program and what it depends on; does not hold the stage itself, so that it can go."""

    stage: _Seen
    inner: list[tuple[nn.Module, _Seen]]
    program: Program | str
    known: tuple[Known, ...] = ()

    def holds(self, stage: nn.Module) -> bool:
        return (
            self.stage.holds(stage)
            and all([seen.holds(m) for m, seen in self.inner])
            and all([known.holds() for known in self.known])
        )


_MODES = 3
"""That a stage's traces are kept of: an E-step's, an M-step's and evaluation's."""

_traced: WeakKeyDictionary[nn.Module, tuple[_Traced, ...]] = WeakKeyDictionary()


def same_program(a: Program, b: Program) -> bool:
    """Whether two programs differ in their weights alone, whatever the weights' shapes."""
    if (a.inputs, a.outputs, len(a.layers)) != (b.inputs, b.outputs, len(b.layers)):
        return False
    for ours, theirs in zip(a.layers, b.layers, strict=True):
        alike = {"core": None, "activation": None}
        if ours._replace(**alike) != theirs._replace(**alike):
            return False
        if not same_settings(ours.core, theirs.core):
            return False
        a, b = ours.activation, theirs.activation
        if a is not b and not same_settings(a, b):
            return False
    return True


def common_program(modules: Sequence[nn.Module]) -> Program | str:
    """The program that all branches of a stage have, up to their weights."""
    program = program_of(modules[0])
    for module in modules[1:]:
        other = program_of(module)
        if isinstance(program, str) or isinstance(other, str):
            return program if isinstance(program, str) else other
        if not same_program(program, other):
            return "its branches are not of one form"
    return program


def layers_of(program: Program, module: nn.Module) -> list[nn.Module]:
    """The cores of ``module``, a stage with this program."""
    return [
        # a stage's own child, as nearly always; get_submodule takes long to find it
        module._modules[layer.name]
        if layer.name in module._modules
        else module.get_submodule(layer.name)
        for layer in program.layers
    ]


def _plain(module: nn.Module) -> Program | None:
    """The program of a convolution or linear layer with ReLU or another activation, and max-pool.

    Needs no tracing.
    """
    stage = plain_stage(module, with_norm=True)
    if stage is None or type(stage.core) not in _CORES:
        return None
    if stage.norm is not None and not _are_images(stage.core, module._modules[stage.norm]):
        return None
    after = [layer for layer in stage.after if type(layer) is not nn.Identity]
    activation = after.pop(0) if after and type(after[0]) in ACTIVATIONS else None
    behind = relu_and_pool(after)
    if behind is None or (behind.relu and activation is not None):
        return None
    if behind.pool.size > 1 and type(stage.core) is not nn.Conv2d:
        return None
    before = [layer for layer in stage.before if type(layer) is not nn.Identity]
    flatten = bool(before)
    if flatten and not (len(before) == 1 and flattens_samples(before[0])):
        return None
    if flatten and type(stage.core) is not nn.Linear:
        return None
    layer = FusedLayer(
        stage.name, stage.core, flatten=flatten, relu=behind.relu, pool=behind.pool,
        norm=stage.norm, activation=activation,
    )  # fmt: skip
    return Program(1, (layer,), (1,))


def _are_images(core: nn.Module, norm: nn.Module) -> bool:
    return type(core) is nn.Conv2d and type(norm) in (nn.BatchNorm2d, nn.GroupNorm)


def _skip_layer(module: SkipLayer) -> Program | str:
    pool = Pool() if type(module.pool) is nn.Identity else max_pool(module.pool)
    if pool is None:
        return f"its pool is no plain max-pool of 2 or 3: {module.pool!r}"
    if any(is_patched(m) for m in module.modules()) or type(module.conv) is not nn.Conv2d:
        return (
            "its convolution is no plain nn.Conv2d, or it has hooks or a forward put in its place"
        )
    inputs = 1 if module.begins else 2
    skip = inputs - 1
    if module.ends:
        layer = FusedLayer("conv", module.conv, relu=True, skip=skip, pool=pool)
        return Program(inputs, (layer,), (inputs,))
    if pool.size > 1:
        return "a skip passes its pool, which pools the skip too"
    return Program(inputs, (FusedLayer("conv", module.conv, relu=True),), (inputs, skip))


def _settings(module: nn.Module) -> list[Any]:
    """Of layers that are part of a program by what they do, and not as themselves."""
    return [vars(module).get(name) for name in _SETTINGS.get(type(module), ())]


_SETTINGS = {
    nn.MaxPool2d: (
        "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices",
    ),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Dropout: ("p",), nn.Dropout1d: ("p",), nn.Dropout2d: ("p",), nn.Dropout3d: ("p",),
    nn.AlphaDropout: ("p",), nn.FeatureAlphaDropout: ("p",),
}  # fmt: skip


class _Refused(Exception):
    """Why a stage has no program."""


def _trace(module: nn.Module) -> tuple[Program | str, tuple[Known, ...]]:
    """The program, or why there is none, and what it depends on."""
    patched = next((m for m in module.modules() if is_patched(m)), None)
    if patched is not None:
        kind = type(patched).__name__
        return f"it has a {kind} with hooks or another forward than its type's", ()
    try:
        graph, known = read(module, _FUNCTIONS)
        return _Builder(module, graph).program(), known
    except Unreadable as reason:
        return str(reason), reason.known
    except _Refused as reason:
        return str(reason), known


class _Layer:
    """A fused layer that may still take in what follows it."""

    def __init__(self, fields: FusedLayer) -> None:
        self.fields = fields
        self.value: int | None = None  # once nothing more can be fused


class _Builder:
    """Goes through a traced graph and gathers fused layers."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module = module
        self.graph = graph
        self.layers: list[FusedLayer] = []
        self.known: dict[fx.Node, int | _Layer] = {}
        self.flat: set[fx.Node] = set()
        self.same: dict[fx.Node, fx.Node] = {}  # whose tensor a node passes on
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def program(self) -> Program:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if self.known:
                    raise _Refused("its forward takes more than one tensor")
                self.known[node] = 0
            elif node.op == "output":
                out = self._value(node.args[0])
                return Program(1, tuple(self.layers), (out,))
            else:
                self._add(node)
        raise _Refused("its forward returns nothing")

    def _add(self, node: fx.Node) -> None:
        if not node.args or not isinstance(node.args[0], fx.Node):
            raise _Refused(f"it uses {_name(node)} in a way that is not looked into")
        if node.op == "call_module":
            self._add_module(node, self.module.get_submodule(node.target))
        elif node.op in ("call_function", "call_method"):
            kind = _FUNCTIONS.get(node.target)
            if kind is None:
                raise _Refused(f"it uses {_name(node)}, which no kernel has")
            kind(self, node)
        else:
            raise _Refused(f"its forward reads {node.target!r}")

    def _add_module(self, node: fx.Node, layer: nn.Module) -> None:
        source = node.args[0]
        if type(layer) in _CORES:
            flatten = source in self.flat
            if flatten and type(layer) is nn.Conv2d:
                raise _Refused("it flattens images before a convolution")
            value = self._value(source)
            if value > 0 and type(self.layers[value - 1].core) is not type(layer):
                raise _Refused("it has a linear layer on images, or a convolution on vectors")
            fields = FusedLayer(node.target, layer, value, flatten)
            self.known[node] = _Layer(fields)
        elif is_batch_norm(layer) or is_group_norm(layer):
            self._norm(node, layer)
        elif type(layer) in ACTIVATIONS:
            self._activation(node, layer)
        elif type(layer) is nn.ReLU:
            self._relu(node)
        elif type(layer) is nn.MaxPool2d:
            self._pool(node, max_pool(layer))
        elif does_nothing(layer):
            self._same(node)
        elif flattens_samples(layer):
            self._flatten(node)
        elif layer.training and is_random(layer):
            raise _Refused(f"{type(layer).__name__} draws random numbers in training mode")
        else:
            raise _Refused(f"it has a layer {type(layer).__name__}, which no kernel has")

    def _same(self, node: fx.Node) -> None:
        source = self.same[node] = node.args[0]
        # what others read as well takes nothing in any more
        shared = len(source.users) > 1
        self.known[node] = self._value(source) if shared else self.known[source]
        if node.args[0] in self.flat:
            self.flat.add(node)

    def _value(self, node: Any) -> int:
        """The number of a node's value; nothing is fused into its layer any more."""
        if not isinstance(node, fx.Node):
            raise _Refused("its forward returns or uses something else than one tensor")
        known = self.known[node]
        if isinstance(known, int):
            return known
        if known.value is None:
            self.layers.append(known.fields)
            known.value = len(self.layers)  # value 0 is the input
        return known.value

    def _open(self, node: fx.Node, what: str) -> _Layer:
        """The layer of a node that only one other reads, so that ``what`` can go into it."""
        known = self.known[node]
        if isinstance(known, int) or known.value is not None or len(node.users) > 1:
            raise _Refused(f"{what} does not follow a convolution or linear layer of its own")
        return known

    def _relu(self, node: fx.Node) -> None:
        layer = self._open(node.args[0], "a ReLU")
        name = "relu" if layer.fields.skip is None else "relu_after"
        if name == "relu" and layer.fields.activation is not None:
            raise _Refused("it has a ReLU behind another activation")
        layer.fields = layer.fields._replace(**{name: True})  # it commutes with a max-pool
        self._same(node)

    def _activation(self, node: fx.Node, activation: nn.Module) -> None:
        layer = self._open(node.args[0], type(activation).__name__)
        fields = layer.fields
        plain = fields.pool.size == 1 and fields.skip is None and not fields.relu
        if not plain or fields.activation is not None:
            raise _Refused(
                f"it has {type(activation).__name__} behind another activation, a sum or a max-pool"
            )
        layer.fields = fields._replace(activation=activation)
        self._same(node)

    def _norm(self, node: fx.Node, norm: nn.Module) -> None:
        layer = self._open(node.args[0], "a batch norm or group norm")
        fields = layer.fields
        if not _are_images(fields.core, norm):
            raise _Refused("it has a norm that does not follow a 2-D convolution")
        if fields != FusedLayer(fields.name, fields.core, fields.source, fields.flatten):
            raise _Refused("it has a norm behind an activation, a sum, a max-pool or another one")
        layer.fields = fields._replace(norm=node.target)
        self._same(node)

    def _pool(self, node: fx.Node, pool: Pool | None) -> None:
        layer = self._open(node.args[0], "a max-pool")
        if pool is None:
            raise _Refused("it has a max-pool that is no plain one of 2 or 3")
        if layer.fields.pool.size > 1 or type(layer.fields.core) is not nn.Conv2d:
            raise _Refused("it has two max-pools behind one layer, or one behind a linear layer")
        layer.fields = layer.fields._replace(pool=pool)
        self._same(node)

    def _flatten(self, node: fx.Node) -> None:
        if self.known[node.args[0]] != 0:
            raise _Refused("it flattens what is not its input")
        self.known[node] = 0
        self.flat.add(node)

    def _sum(self, node: fx.Node) -> None:
        if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
            raise _Refused("it adds something else than two of its own tensors")
        if self.flat & set(node.args):
            raise _Refused("it adds to a flattened input")
        in_place = node.target in (operator.iadd, "add_")
        if in_place and self._is_read_again(node.args[0]):
            raise _Refused("it adds in place to a tensor that it uses again")
        # the layer that comes later takes the other's output in
        ready = [arg for arg in node.args if self._may_take(arg)]
        if not ready or self.known[node.args[0]] is self.known[node.args[1]]:
            raise _Refused("a sum does not follow a convolution or linear layer of its own")
        last = max(ready, key=self.order.__getitem__)
        other = node.args[1] if last is node.args[0] else node.args[0]
        layer = self.known[last]
        layer.fields = layer.fields._replace(skip=self._value(other))
        self.known[node] = layer

    def _is_read_again(self, node: fx.Node) -> bool:
        """Whether more than one node reads a tensor, under any of its names."""
        while len(node.users) == 1 and node in self.same:
            node = self.same[node]
        return len(node.users) > 1

    def _may_take(self, node: fx.Node) -> bool:
        known = self.known[node]
        if isinstance(known, int) or known.value is not None or len(node.users) > 1:
            return False
        return known.fields.skip is None and known.fields.pool.size == 1


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _only(count: int, *keywords: str) -> Callable:
    """Runs the builder's method for a call with ``count`` arguments and these keywords at most."""

    def wrap(method: Callable) -> Callable:
        def run(builder: _Builder, node: fx.Node) -> None:
            if len(node.args) > count or set(node.kwargs) - set(keywords):
                raise _Refused(f"it uses {_name(node)} in a way that is not looked into")
            method(builder, node)

        return run

    return wrap


def _of_function(kind: type[nn.Module]) -> Callable[[_Builder, fx.Node], None]:
    """Of a function that does what ``kind()`` does where it is given a tensor alone."""
    return _only(1)(lambda builder, node: builder._activation(node, kind()))


_relu = _only(1, "inplace")(_Builder._relu)
_sum = _only(2)(_Builder._sum)


@_only(2, "start_dim", "end_dim")
def _flatten(builder: _Builder, node: fx.Node) -> None:
    start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
    if (start, node.kwargs.get("end_dim", -1)) != (1, -1):
        raise _Refused("it flattens something else than every sample")
    builder._flatten(node)


def _function_pool(builder: _Builder, node: fx.Node) -> None:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    plain = all(isinstance(v, (int, tuple, type(None))) for v in given.values())
    if "kernel_size" not in given or set(given) - set(names) or not plain:
        raise _Refused("it uses max_pool2d in a way that is not looked into")
    if given.pop("return_indices", False):
        raise _Refused("it uses the indices of a max-pool")
    given = {name: value for name, value in given.items() if value is not None}
    builder._pool(node, max_pool(nn.MaxPool2d(**given)))


_FUNCTIONS: dict[Any, Callable[[_Builder, fx.Node], None]] = {
    torch.relu: _relu,
    torch.relu_: _relu,
    F.relu: _relu,
    F.relu_: _relu,
    "relu": _relu,
    "relu_": _relu,
    F.elu: _of_function(nn.ELU),
    F.gelu: _of_function(nn.GELU),
    F.hardswish: _of_function(nn.Hardswish),
    F.leaky_relu: _of_function(nn.LeakyReLU),
    F.mish: _of_function(nn.Mish),
    F.relu6: _of_function(nn.ReLU6),
    F.silu: _of_function(nn.SiLU),
    torch.sigmoid: _of_function(nn.Sigmoid),
    torch.tanh: _of_function(nn.Tanh),
    "sigmoid": _of_function(nn.Sigmoid),
    "tanh": _of_function(nn.Tanh),
    operator.add: _sum,
    operator.iadd: _sum,
    torch.add: _sum,
    "add": _sum,
    "add_": _sum,
    torch.flatten: _flatten,
    "flatten": _flatten,
    F.max_pool2d: _function_pool,
    torch.max_pool2d: _function_pool,
    Tensor.relu: _relu,
}
