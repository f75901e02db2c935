"""Stages whose shared branch is generated from knowledge of all tasks and factors of one task."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lasem_fast.initialisers import glorot_uniform_
from lasem_fast.transfer.mechanism import Branch, TransferMechanism, copy_of, inner_name


class Knowledge(nn.Module):
    """The tensor that all tasks share of one layer, and what the layer's own tensors look like.

    Attributes:
        tensor: the shared parameter; its shape is the mechanism's matter.
        weight_shape: shape of the weight that is generated from it.
        has_bias: whether the layer has a bias, which is then the task's own.
    """

    def __init__(self, tensor: Tensor, fans: tuple[int, int], layer: nn.Module) -> None:
        super().__init__()
        self.tensor = nn.Parameter(tensor)
        self.fans = fans
        self.weight_shape = layer.weight.shape
        self.has_bias = layer.bias is not None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the shared tensor anew (Glorot-uniform, as the release does)."""
        glorot_uniform_(self.tensor, *self.fans)


class Factors(nn.Module):
    """A task's own factors inside one layer; ``bias`` is ``[C_out]``, or None without one."""

    def __init__(self, knowledge: Knowledge) -> None:
        super().__init__()
        bias = None
        if knowledge.has_bias:
            n = knowledge.weight_shape[0]
            bias = nn.Parameter(glorot_uniform_(knowledge.tensor.detach().new_empty(n), n, n))
        self.register_parameter("bias", bias)


class GeneratedStage(nn.Module):
    """What the tasks share of a stage whose weights are generated.

    Calling it is a RuntimeError: without a task's factors it has no weights.

    Attributes:
        stage: the stage without its weights and biases, which come with each mini-batch.
        knowledge: one :class:`Knowledge` per weighted layer, in the order of ``layer_names``.
    """

    def __init__(self, stage: nn.Module, knowledge: dict[str, Knowledge]) -> None:
        super().__init__()
        self.stage = copy_of(stage)
        self.layer_names = tuple(knowledge)
        self.knowledge = nn.ModuleList(knowledge.values())
        for name in self.layer_names:
            layer = self.stage.get_submodule(name)
            layer.weight = layer.bias = None

    def forward(self, h: Tensor) -> Tensor:
        raise RuntimeError(
            "net.shared[l]: expected to be used through a task, whose factors its weights are "
            "generated from, got a call; use net(x, task, config) or net.path(task, config)[l](h)"
        )

    def reset_parameters(self) -> None:
        """Draws the shared tensors of all layers anew, but for frozen ones."""
        for knowledge in self.knowledge:
            if knowledge.tensor.requires_grad:
                knowledge.reset_parameters()

    def with_weights(self) -> nn.Module:
        """A copy of the stage as the user gave it, with weights and biases of zero."""
        stage = copy_of(self.stage)
        for name, knowledge in zip(self.layer_names, self.knowledge, strict=True):
            layer, shape = stage.get_submodule(name), knowledge.weight_shape
            layer.weight = nn.Parameter(knowledge.tensor.detach().new_zeros(shape))
            if knowledge.has_bias:
                layer.bias = nn.Parameter(knowledge.tensor.detach().new_zeros(shape[0]))
        return stage


class GeneratingMechanism(TransferMechanism, ABC):
    """Base of the mechanisms that generate the weights of the shared branch.

    ``net.shared[l]`` becomes a :class:`GeneratedStage` made from a copy of the stage, and
    ``net.adapters[task][l]`` a list of factors, one per weighted layer. A stage without parameters
    (pooling, flattening) stays what it is.
    """

    name: str
    layer_types: tuple[type[nn.Module], ...]

    @abstractmethod
    def new_knowledge(self, layer: nn.Module, number: int, where: str) -> Knowledge:
        """The shared tensor of the net's ``number``-th weighted layer (0-based)."""

    @abstractmethod
    def new_factors(self, knowledge: Knowledge) -> Factors:
        """A task's factors for a layer."""

    @abstractmethod
    def weight(self, knowledge: Knowledge, factors: Factors) -> Tensor:
        """The layer's weight as the task sees it, in the layer's own shape."""

    def shared_modules(self, stages: list[nn.Module]) -> list[nn.Module]:
        layers = [self._weighted_layers(stage, i) for i, stage in enumerate(stages)]
        self.check_layer_count(sum(map(len, layers)))
        shared, number = [], 0
        for i, (stage, named) in enumerate(zip(stages, layers, strict=True)):
            knowledge = {}
            for name, layer in named.items():
                knowledge[name] = self.new_knowledge(layer, number, _place(i, name))
                number += 1
            shared.append(GeneratedStage(stage, knowledge) if knowledge else stage)
        return shared

    def check_layer_count(self, count: int) -> None:
        """Raises ValueError if the settings are for another number of weighted layers."""

    def _weighted_layers(self, stage: nn.Module, position: int) -> dict[str, nn.Module]:
        """The layers whose weights are generated, which must be all that has parameters."""
        found = {n: m for n, m in stage.named_modules() if type(m) in self.layer_types}
        # what a layer has beside weight and bias (old-style weight_norm) is not generated
        generated: dict[int, str] = {}
        for name, layer in found.items():
            for parameter in (layer.weight, layer.bias):
                other = generated.setdefault(id(parameter), name)
                if parameter is not None and other != name:
                    raise ValueError(
                        f"transfer={self.name!r}: expected layers with parameters of their own, "
                        f"got {_place(position, other)} and {_place(position, name)}, which share "
                        f"one; use one layer twice, or another mechanism, for example 'hps'"
                    )
        for name, parameter in stage.named_parameters():
            if id(parameter) not in generated:
                owner = name.rpartition(".")[0]
                kinds = ", ".join(t.__name__ for t in self.layer_types)
                raise ValueError(
                    f"transfer={self.name!r}: expected stages whose parameters are all in layers "
                    f"of type {kinds}, got {type(stage.get_submodule(owner)).__name__} with "
                    f"{name.rpartition('.')[2]!r} at {_place(position, owner)}; use another "
                    f"mechanism, for example 'hps'"
                )
        return found

    def reset_shared(self, shared: nn.Module) -> None:
        if isinstance(shared, GeneratedStage):
            shared.reset_parameters()

    def new_specific(self, shared: nn.Module) -> nn.Module:
        if not isinstance(shared, GeneratedStage):
            return super().new_specific(shared)
        specific = shared.with_weights()
        self.init(specific)
        return specific

    def new_adapters(self, shared: nn.Module) -> nn.Module | None:
        if not isinstance(shared, GeneratedStage):
            return None
        return nn.ModuleList(self.new_factors(knowledge) for knowledge in shared.knowledge)

    def shared_branch(self, shared: nn.Module, adapters: nn.Module | None) -> Branch:
        if not isinstance(shared, GeneratedStage):
            return Branch(shared)
        tensors = {}
        for name, knowledge, factors in zip(
            shared.layer_names, shared.knowledge, adapters, strict=True
        ):
            tensors[inner_name(name, "weight")] = self.weight(knowledge, factors)
            if factors.bias is not None:
                tensors[inner_name(name, "bias")] = factors.bias
        return Branch(shared.stage, tensors)


def _place(position: int, name: str) -> str:
    return f"stages[{position}].{name}" if name else f"stages[{position}]"
