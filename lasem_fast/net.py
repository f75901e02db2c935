"""TransferNet: a network whose every stage exists in a shared and in a task's own branch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lasem_fast.configs import Configuration, parse_config
from lasem_fast.networks import checks
from lasem_fast.networks.network import Network
from lasem_fast.networks.random_state import random_state_kept_on_error
from lasem_fast.networks.saved import all_or_nothing, packed, unpacked
from lasem_fast.networks.task_modules import TaskModules
from lasem_fast.transfer import MECHANISMS, Branch, TransferMechanism
from lasem_fast.transfer.mechanism import copy_of


class TransferNet(nn.Module):
    """Stages in two branches, `shared` and `specific`, and a head per task.

    Args:
        stages: the network up to its head, cut into d stages; each an ordinary module with one
            tensor in and one out that treats the samples of a batch independently. With hps the
            modules themselves become the shared branches; tf and dfcnn take copies.
        transfer: the transfer mechanism, ``"hps"`` (hard parameter sharing), ``"tf"`` (tensor
            factorisation), ``"dfcnn"`` (deconvolutional factorisation) or a
            :class:`~lasem_fast.transfer.TransferMechanism`.

    Attributes:
        shared: ``shared[l]`` is what all tasks share of stage l (0-based): the branch itself, or
            what the mechanism generates it from.
        specific: ``specific[task][l]`` is the task's own branch; None once it has been dropped.
        adapters: ``adapters[task][l]`` are the task's factors inside the shared branch, or None.
        heads: ``heads[task]`` maps the last stage's output to ``[N, K]``.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: LASEM (Lee, Behpour, Eaton, ICML 2021), section 4.
    """

    def __init__(
        self, stages: Iterable[nn.Module], transfer: str | TransferMechanism = "hps"
    ) -> None:
        super().__init__()
        if isinstance(stages, Iterable) and getattr(stages, "ndim", 1) > 0:
            stages = list(stages)
        checks.check_stages(stages)
        self.mechanism = _mechanism(transfer)
        self.shared = nn.ModuleList(self._shared_modules(stages))
        self.specific = TaskModules()
        self.adapters = TaskModules()
        self.heads = TaskModules()
        self._configs: dict[str, Configuration | None] = {}
        self._without_adapters: dict[str, set[int]] = {}  # stages whose adapters were dropped

    @property
    def depth(self) -> int:
        """Number of stages d."""
        return len(self.shared)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks, in the order in which they were added."""
        return tuple(self._configs)

    def add_task(self, task: str, head: nn.Module) -> list[nn.Parameter]:
        """Adds a task: its head, and a specific branch with new weights for every stage.

        The branch is a copy of the shared one, layer by layer in its mode, with weights that the
        mechanism's ``init`` draws: by default each layer's ``reset_parameters()``, trainable even
        where the shared stage is frozen. A frozen parameter of a module without such a rule is a
        constant and copied; a trainable one is refused.

        Args:
            task: a name that no other task has.
            head: maps the last stage's output ``[N, ...]`` to ``[N, K]``.

        Returns:
            The task's new parameters, ready for ``optimizer.add_param_group({"params": ...})``.

        Raises:
            TypeError, ValueError: the name is not new, ``head`` is not a module of its own, or
                nothing says how to draw a trainable parameter anew.
        """
        checks.check_new_task(task, self._configs)
        checks.check_head(head, self)
        with torch.inference_mode(False), random_state_kept_on_error(self.parameters()):
            specific = [self._new_specific(i) for i in range(self.depth)]
            adapters = [self._new_adapters(i) for i in range(self.depth)]
        self.heads[task] = head
        self.specific[task] = nn.ModuleList(specific)
        self.adapters[task] = nn.ModuleList(adapters)
        self._configs[task] = None
        self._without_adapters[task] = set()
        new = (self.specific[task], self.adapters[task], head)
        return [p for module in new for p in module.parameters()]

    def _shared_modules(self, stages: list[nn.Module]) -> list[nn.Module]:
        modules = self.mechanism.shared_modules(stages)
        fits = isinstance(modules, Iterable)
        modules = list(modules) if fits else modules
        if not fits or len(modules) != len(stages) or not all(map(_is_module, modules)):
            got = [type(m).__name__ for m in modules] if fits else type(modules).__name__
            raise TypeError(
                f"transfer: expected shared_modules of {_kind(self.mechanism)} to give "
                f"a module for each of the {len(stages)} stages, got {got}"
            )
        return modules

    def _new_specific(self, stage: int) -> nn.Module:
        shared = self.shared[stage]
        try:
            specific = self.mechanism.new_specific(shared)
        except ValueError as error:
            raise ValueError(f"stages[{stage}]: {error}") from error
        self._check_new(specific, "new_specific", "a module")
        if specific.training != shared.training:
            specific.train(shared.training)  # a copy has the modes of its model, layer by layer
        return specific

    def _new_adapters(self, stage: int) -> nn.Module | None:
        shared = self.shared[stage]
        adapters = self.mechanism.new_adapters(shared)
        if adapters is None:
            return None
        self._check_new(adapters, "new_adapters", "a module or None")
        return adapters.train(shared.training)

    def _check_new(self, module: Any, method: str, expected: str) -> None:
        if not _is_module(module):
            raise TypeError(
                f"transfer: expected {method} of {_kind(self.mechanism)} to give "
                f"{expected}, got {type(module).__name__}"
            )

    def config(self, task: str) -> Configuration | None:
        """The configuration kept for a task, or None while the task has not ended."""
        checks.check_task(task, self._configs)
        return self._configs[task]

    def branches(self, task: str) -> list[tuple[Branch | None, Branch | None]]:
        """For every stage its branches for this task, shared first; None for a dropped one."""
        pairs = []
        stages = zip(self.shared, self.specific[task], self.adapters[task], strict=True)
        mechanism, without = self.mechanism, self._without_adapters[task]
        for i, (module, own, adapters) in enumerate(stages):
            shared = None
            if i not in without:
                shared = mechanism.shared_branch(module, adapters)
                if not isinstance(shared, Branch):
                    raise TypeError(
                        f"transfer: expected shared_branch of {_kind(mechanism)} to "
                        f"give a Branch, got {type(shared).__name__}"
                    )
                if shared.tensors and not torch.compiler.is_compiling():
                    shared.check_tensors(f"shared_branch of {_kind(mechanism)}")
            pairs.append((shared, None if own is None else Branch(own)))
        return pairs

    def auxiliary_losses(self, task: str) -> list[Tensor | None]:
        """For every stage what sharing it adds to a configuration's loss; None for nothing."""
        mechanism, adapters = self.mechanism, self.adapters[task]
        if not torch.compiler.is_compiling() and _adds_nothing(mechanism):
            return [None] * len(adapters)
        terms = [
            mechanism.auxiliary_loss(shared, factors)
            for shared, factors in zip(self.shared, adapters, strict=True)
        ]
        for term in terms:
            if term is None:
                continue
            fits = checks.is_plain(term) and term.shape == () and term.is_floating_point()
            fits = fits and term.device == next(self.parameters()).device
            if not fits:
                raise TypeError(
                    f"transfer: expected auxiliary_loss of {_kind(mechanism)} to give "
                    f"a floating-point tensor of no dimensions or None, got {type(term).__name__}"
                )
        return terms

    def redraw_unclaimed(self) -> None:
        """Draws the shared stages anew, in place, that no ended task has in its configuration."""
        ended = [config for config in self._configs.values() if config is not None]
        for i, shared in enumerate(self.shared):
            if not any(config[i] for config in ended):
                self.mechanism.reset_shared(shared)

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """What an optimiser of this task trains, each parameter once.

        While the task is open: the shared and specific branches of all stages, the adapters and
        the head. Once it has ended: those of them that its configuration uses.
        """
        return list(dict.fromkeys(p for _, p in self.named_task_parameters(task)))

    def named_task_parameters(self, task: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of :meth:`task_parameters` with their names in the net."""
        for name, module in self.task_parts(task):
            yield from module.named_parameters(name)

    def task_parts(self, task: str) -> list[tuple[str, nn.Module]]:
        """The modules that hold the parameters of :meth:`task_parameters`, with their names."""
        config = self.config(task)
        shared, adapters, specific = self.shared, self.adapters[task], self.specific[task]
        parts: list[tuple[str, nn.Module | None]] = []
        for i in range(self.depth):
            if config is None or config[i]:
                parts.append((f"shared.{i}", shared[i]))
                parts.append((f"adapters[{task!r}].{i}", adapters[i]))
            if config is None or not config[i]:
                parts.append((f"specific[{task!r}].{i}", specific[i]))
        parts.append((f"heads[{task!r}]", self.heads[task]))
        return [(name, module) for name, module in parts if module is not None]

    def forward(self, x: Tensor, task: str, config: Any = None) -> Tensor:
        """The head's output for one configuration.

        Args:
            x: a batch ``[N, ...]``.
            task: name of a task.
            config: bits, a row number of the full space, or a set of 1-based shared stages; None:
                the configuration that was kept when the task ended.

        Returns:
            The logits ``[N, K]``.

        Raises:
            TypeError, ValueError: an unknown task, a configuration that does not fit, none for a
                task that has not ended, or one that needs branches dropped at its end; ``x`` is
                nothing that the network can take.
        """
        path = self.path(task, config)
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if not checks.is_plain(x):
            raise TypeError("x: expected a dense tensor, got a sparse, nested or quantised one")
        if x.dim() < 1:
            raise ValueError(f"x: expected a batch [N, ...], got shape {list(x.shape)}")
        checks.check_weights_of_their_own(self)
        if torch.compiler.is_compiling():
            return self._output(path, x, task)
        with random_state_kept_on_error([x]):
            try:
                return self._output(path, x, task)
            except (RuntimeError, IndexError) as error:
                reason = checks.misfit(self._network(path, task), x)
                if reason is None:
                    raise
                raise ValueError(reason) from error
            except TypeError as error:
                reason = checks.odd_call(self._network(path, task))
                if reason is None:
                    raise
                raise TypeError(reason) from error

    def _network(self, path: list[Branch], task: str) -> Network:
        return Network([(branch, branch) for branch in path], self.heads[task], task)

    def _output(self, path: list[Branch], h: Tensor, task: str) -> Tensor:
        for branch in path:
            h = branch(h)
        return self.heads[task](h)

    def path(self, task: str, config: Any = None) -> list[Branch]:
        """The d branches that a configuration goes through (see :meth:`forward`)."""
        kept = self.config(task)
        if config is None:
            if kept is None:
                raise ValueError(
                    f"config: expected a configuration, because task {task!r} has not ended; got "
                    f"None (em.best_config({task!r}) is the one that is ahead)"
                )
            bits = kept
        else:
            bits = parse_config(config, self.depth)
        branches = self.branches(task)
        dropped = [i + 1 for i, bit in enumerate(bits) if branches[i][0 if bit else 1] is None]
        if dropped:
            raise ValueError(
                f"config: expected {list(kept)}, the configuration that task {task!r} ended with "
                f"(its other branches were dropped), got {list(bits)}"
            )
        return [pair[0 if bit else 1] for pair, bit in zip(branches, bits, strict=True)]

    def keep(self, task: str, config: Any) -> None:
        """Ends a task with this configuration and drops the branches that it does not use.

        The gradients of all that is the task's own are freed, whether it is dropped or kept.
        """
        bits = parse_config(config, self.depth)
        if self.config(task) is not None:
            raise ValueError(f"task: expected one that has not ended, got {task!r}, which has")
        for own in (self.specific, self.adapters, self.heads):
            own[task].zero_grad()
        adapters = self.adapters[task]
        without = {i for i, bit in enumerate(bits) if not bit and adapters[i] is not None}
        self._without_adapters[task] = self._without_adapters[task] | without
        for stage, bit in enumerate(bits):
            (self.specific if bit else self.adapters)[task][stage] = None
        self._configs[task] = bits

    def freeze(self, task: str) -> nn.Sequential:
        """The chosen configuration of an ended task as a plain module, for inference and export.

        Returns:
            ``nn.Sequential`` of d stages and the head: copies in evaluation mode that do not
            require gradients and share no memory with the net.
        """
        modules = [_baked(branch) for branch in self.path(task)]
        frozen = nn.Sequential(*modules, _baked(Branch(self.heads[task])))
        return frozen.eval().requires_grad_(False)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`; if it is refused, the net is as before."""
        with all_or_nothing(self):
            return super().load_state_dict(state_dict, strict, assign)

    def get_extra_state(self) -> Tensor:
        """The tasks in order and the configurations that ended ones were given."""
        configs = {t: None if c is None else list(c) for t, c in self._configs.items()}
        return packed({"configs": configs})

    def set_extra_state(self, state: Any) -> None:
        """Brings the branches to where they were saved; the tasks themselves must be there."""
        state = unpacked(state, "configs")
        missing = [task for task in state["configs"] if task not in self._configs]
        if missing:
            raise ValueError(
                f"state_dict: expected the tasks {list(self._configs)} that this net has, got "
                f"{missing} as well; call add_task for them before load_state_dict"
            )
        for task, saved in state["configs"].items():
            self._restore_branches(task)
            if saved is not None:
                self.keep(task, saved)

    def _restore_branches(self, task: str) -> None:
        """Gives an ended task new modules for the branches that it dropped; draws no numbers."""
        if self._configs[task] is None:
            return
        cuda = {p.device for p in self.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=cuda):
            for i in range(self.depth):
                if self.specific[task][i] is None:
                    self.specific[task][i] = self._new_specific(i)
                if self.adapters[task][i] is None:
                    self.adapters[task][i] = self._new_adapters(i)
        self._configs[task] = None
        self._without_adapters[task] = set()


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _kind(mechanism: TransferMechanism) -> str:
    return type(mechanism).__name__


def _mechanism(transfer: str | TransferMechanism) -> TransferMechanism:
    if isinstance(transfer, TransferMechanism):
        return transfer
    if not isinstance(transfer, str):
        raise TypeError(
            f"transfer: expected a name or a TransferMechanism, got {type(transfer).__name__}"
        )
    if transfer not in MECHANISMS:
        raise ValueError(f"transfer: expected one of {sorted(MECHANISMS)}, got {transfer!r}")
    return MECHANISMS[transfer]()


def _adds_nothing(mechanism: TransferMechanism) -> bool:
    """Whether a mechanism has no auxiliary losses, whatever it is asked for."""
    own = vars(mechanism).get("auxiliary_loss", type(mechanism).auxiliary_loss)
    return own is TransferMechanism.auxiliary_loss


def _baked(branch: Branch) -> nn.Module:
    """A copy of a branch's module with the tensors in force as its own parameters."""
    module = copy_of(branch.module)
    with torch.no_grad():
        for name, tensor in branch.tensors.items():
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor.detach().clone()))
    return module
