"""Argument checks and their messages: argument, expected, got. Nothing here changes state."""

from __future__ import annotations

import cmath
import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lasem_fast._host_values import is_transformed
from lasem_fast.networks.batch_norm import frozen, is_checkpointed
from lasem_fast.networks.layers import (
    counts_tokens,
    iterates,
    mixes_samples,
    moves_statistics,
    parameters_in,
)
from lasem_fast.networks.network import Network
from lasem_fast.networks.walk import Walk

# characters of a module in a message, which is about more than the module
_LONGEST = 200


class TaskNet(Protocol):
    """What the checks ask of a net with tasks; :class:`~lasem_fast.net.TransferNet` has it."""

    shared: nn.ModuleList
    specific: Mapping[str, nn.Module]
    adapters: Mapping[str, nn.Module]
    heads: Mapping[str, nn.Module]

    def config(self, task: str) -> Sequence[bool] | None:
        """The configuration of a task that has ended, or None."""


def check_stages(stages: Any) -> None:
    """Stages are distinct modules with initialised parameters and statistics of their own."""
    if not isinstance(stages, list) or not all(isinstance(s, nn.Module) for s in stages):
        got = [type(s).__name__ for s in stages] if isinstance(stages, list) else stages
        raise TypeError(f"stages: expected a sequence of nn.Module, got {got!r}")
    if not stages:
        raise ValueError("stages: expected at least one stage, got none")
    owner: dict[int, int] = {}
    norms: dict[nn.Module, int] = {}
    for i, stage in enumerate(stages):
        _check_trainable(stage, f"stages[{i}]")
        for name, layer in stage.named_modules():
            if moves_statistics(layer) and norms.setdefault(layer, i) != i:
                raise ValueError(
                    f"stages: expected every stage to have running statistics of its own, got "
                    f"{name!r} ({type(layer).__name__}) in both stages[{norms[layer]}] and "
                    f"stages[{i}]"
                )
        for name, parameter in stage.named_parameters():
            other = owner.setdefault(id(parameter), i)
            if other != i:
                raise ValueError(
                    f"stages: expected every stage to have parameters of its own, got {name!r} in "
                    f"both stages[{other}] and stages[{i}]"
                )


def check_head(head: Any, net: nn.Module) -> None:
    """A head is a module that no other part of the net uses."""
    if not isinstance(head, nn.Module):
        raise TypeError(f"head: expected an nn.Module, got {type(head).__name__}")
    _check_trainable(head, "head")
    taken = {id(p) for p in net.parameters()}
    for name, parameter in head.named_parameters():
        if id(parameter) in taken:
            raise ValueError(
                f"head: expected a module of the task's own, got one whose parameter {name!r} "
                f"belongs to the net already"
            )


def _check_trainable(module: nn.Module, argument: str) -> None:
    """Parameters that have values and can be trained."""
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{argument}: expected initialised parameters, got the lazy {name!r}; run the "
                f"module once on a batch first"
            )
        if parameter.is_meta:
            raise ValueError(
                f"{argument}: expected parameters with values, got {name!r} on the meta device; "
                f"make the module on the device where it is trained"
            )
        if parameter.is_inference():
            raise ValueError(
                f"{argument}: expected parameters that can be trained, got {name!r}, which was "
                f"made under torch.inference_mode()"
            )


def check_new_task(task: Any, tasks: Container[str]) -> None:
    """The name of a task that is to be added."""
    _check_task_name(task)
    if task in tasks:
        raise ValueError(f"task: expected a new name, got {task!r}, which was added before")


def check_task(task: Any, tasks: Iterable[str]) -> None:
    """The name of a task that was added."""
    _check_task_name(task)
    if task not in tasks:
        raise ValueError(
            f"task: expected one of {list(tasks)}, got {task!r}; add_task adds a new one"
        )


def check_open_task(task: Any, net: TaskNet) -> None:
    """The name of a task that has not ended."""
    config = net.config(task)
    if config is not None:
        raise ValueError(
            f"task: expected one that has not ended, got {task!r}, which ended with the "
            f"configuration {list(config)}"
        )


def _check_task_name(task: Any) -> None:
    if not isinstance(task, str):
        raise TypeError(f"task: expected a name (str), got {type(task).__name__} {task!r}")
    if not task:
        raise ValueError("task: expected a name, got an empty string")


def check_batch(x: Any) -> None:
    """A non-empty batch of samples."""
    _check_dense(x, "x")
    if x.dim() < 1:
        raise ValueError(f"x: expected a batch [N, ...], got shape {list(x.shape)}")
    if x.shape[0] == 0:
        raise ValueError(f"x: expected at least one sample, got shape {list(x.shape)}")


def _check_dense(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {kind}")
    if value.is_quantized:
        raise TypeError(f"{name}: expected a dense tensor, got a quantised one of {value.dtype}")


def check_has_values(x: Tensor, y: Tensor, net: nn.Module) -> None:
    """The mini-batch is no mere shape on the meta device, unless the net is one, too."""
    for name, tensor in (("x", x), ("y", y)):
        if tensor.is_meta and not any(p.is_meta for p in net.parameters()):
            raise ValueError(
                f"{name}: expected a tensor with values, got one on the meta device, of shape "
                f"{list(tensor.shape)}"
            )


def check_target(y: Any, x: Tensor) -> None:
    """One target per sample, on the samples' device."""
    _check_dense(y, "y")
    if y.dim() < 1 or y.shape[0] != x.shape[0] or 0 in y.shape:
        raise ValueError(
            f"y: expected one target for each of the {x.shape[0]} samples of x, got shape "
            f"{list(y.shape)}"
        )
    if y.device != x.device:
        raise ValueError(f"y: expected a tensor on {x.device} like x, got one on {y.device}")


def check_finite_input(x: Tensor) -> None:
    """No NaN and no infinity in the batch (reads the values)."""
    if not _may_be_infinite(x) or _has_finite_sum(x):
        return
    bad = int((~torch.isfinite(_summable(x))).sum())
    if bad:
        raise ValueError(f"x: expected finite values, got {bad} that are NaN or infinite")


def check_finite_weights(parts: Sequence[tuple[str, nn.Module]]) -> None:
    """No NaN and no infinity in the weights of modules with these names (reads the values)."""
    if all([_has_finite_sum(p.detach()) for p in parameters_in(*[part for _, part in parts])]):
        return
    bad = [
        name
        for prefix, part in parts
        for name, p in part.named_parameters(prefix)
        if not bool(torch.isfinite(_summable(p)).all())
    ]
    if bad:
        raise ValueError(f"net: expected finite weights, got NaN or infinity in {bad}")


def _may_be_infinite(values: Tensor) -> bool:
    return values.is_floating_point() or values.is_complex()


def _has_finite_sum(values: Tensor) -> bool:
    """One fast pass that NaN and infinity survive; finite values may overflow in it, too."""
    return cmath.isfinite(_summable(values).sum().item())


def _summable(values: Tensor) -> Tensor:
    """The values in a dtype that PyTorch can add up, which float8 is not."""
    return values.float() if values.itemsize == 1 and values.is_floating_point() else values


def check_posterior(posterior: Any, n_configs: int) -> None:
    """A frozen posterior: one weight per configuration."""
    if not isinstance(posterior, Tensor):
        raise TypeError(f"posterior: expected a tensor or None, got {type(posterior).__name__}")
    _check_dense(posterior, "posterior")
    if posterior.shape != (n_configs,):
        raise ValueError(
            f"posterior: expected shape [{n_configs}], one weight per configuration, got "
            f"{list(posterior.shape)}"
        )
    if not posterior.is_floating_point():
        raise TypeError(f"posterior: expected a floating-point tensor, got {posterior.dtype}")


def check_posterior_values(posterior: Tensor) -> None:
    """A frozen posterior sums to one (reads the values)."""
    posterior = posterior.detach()
    total = float(posterior.sum())
    # Rounding of a sum of C terms, each of them rounded to the posterior's precision.
    slack = 4 * torch.finfo(posterior.dtype).eps * max(16, posterior.numel())
    if not bool((posterior >= 0).all()) or not abs(total - 1) <= slack:
        raise ValueError(
            f"posterior: expected weights of at least 0 that add up to 1, got sum {total:.6g} and "
            f"minimum {float(posterior.min()):.6g}"
        )


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor of ordinary form."""
    if not isinstance(value, Tensor) or value.is_nested or value.is_quantized:
        return False
    return value.layout == torch.strided


def check_started(prior: Any, task: str, n_configs: int) -> None:
    """What a prior has made for a task; wins, if there are any, count every configuration."""
    made = f"prior: expected start of {type(prior).__name__} to make the buffers of task {task!r}"
    if task not in prior.states:
        raise ValueError(f"{made}, as super().start(task, n_configs, device) does, got none")
    wins = getattr(prior.states[task], "wins", None)
    if wins is not None and wins.shape != (n_configs,):
        raise ValueError(f"{made}, among them wins of shape [{n_configs}], got {list(wins.shape)}")


def check_log_prior(log_prior: Any, n_configs: int, device: torch.device) -> None:
    """What a prior says: one log-probability per configuration."""
    if not is_plain(log_prior) or not log_prior.is_floating_point():
        got = log_prior.dtype if isinstance(log_prior, Tensor) else type(log_prior).__name__
        raise TypeError(f"prior: expected log_prob to give a floating-point tensor, got {got}")
    if (log_prior.device.type == "meta") != (device.type == "meta"):
        raise ValueError(f"prior: expected log_prob on {device}, got it on {log_prior.device}")
    if log_prior.shape != (n_configs,):
        raise ValueError(
            f"prior: expected log_prob to give shape [{n_configs}], one per configuration, got "
            f"{list(log_prior.shape)}"
        )


def check_score(score: Any, n_configs: int) -> None:
    """What a prior chooses by: one number per configuration."""
    if not is_plain(score):
        raise TypeError(f"prior: expected score to give a dense tensor, got {type(score).__name__}")
    if score.shape != (n_configs,) or score.dtype == torch.bool or score.is_complex():
        raise ValueError(
            f"prior: expected score to give [{n_configs}] numbers, one per configuration, got "
            f"{score.dtype} of shape {list(score.shape)}"
        )
    if score.device.type == "meta":
        raise ValueError("prior: expected score to give values, got a tensor on meta")
    if bool(torch.isnan(score).any()):
        raise ValueError("prior: expected score to give numbers, got NaN")


def check_log_prior_values(log_prior: Tensor) -> None:
    """A prior's log-probabilities are finite or -inf (reads the values)."""
    bad = torch.isnan(log_prior) | (log_prior == torch.inf)
    if bool(bad.any()):
        raise ValueError(
            f"prior: expected log_prob to give values below infinity, got {int(bad.sum())} that "
            f"are NaN or +inf"
        )


def check_log_likelihood_values(log_likelihood: Tensor, method: str) -> None:
    """What a likelihood's ``method`` gives is finite or -inf (reads the values)."""
    bad = torch.isnan(log_likelihood) | (log_likelihood == torch.inf)
    if bool(bad.any()):
        raise ValueError(
            f"likelihood: expected {method} to give values below infinity for finite "
            f"log-probabilities, got {int(bad.sum())} that are NaN or +inf"
        )


def check_weights_of_their_own(net: nn.Module) -> None:
    """No cache gives a copy of a parametrised layer the weight of its model."""
    if torch.compiler.is_compiling() or not parametrize._cache_enabled:
        return
    for name, layer in net.named_modules():
        if parametrize.is_parametrized(layer):
            raise ValueError(
                f"net: expected a call outside of torch.nn.utils.parametrize.cached(), whose cache "
                f"has one weight for a layer and all its copies, so that specific branches would "
                f"use the shared weights; got one inside, with the parametrised {name} "
                f"({type(layer).__name__})"
            )


def check_independent_samples(net: TaskNet, task: str) -> Walk:
    """No layer that the task uses mixes the samples of the folded batch.

    Returns:
        The walk through all of them, which others need, too.
    """
    specific, adapters, head = net.specific[task], net.adapters[task], net.heads[task]
    walk = Walk.through(net.shared, specific, adapters, head)
    if walk.is_normed and torch.compiler.is_compiling():
        raise ValueError(
            "net: expected no BatchNorm in training mode inside torch.compile, because each "
            "configuration's statistics are gathered outside of a graph; put it into evaluation "
            "mode or call the LASEM without torch.compile"
        )
    if not walk.mixes:
        return walk
    parts = {"shared": net.shared, f"specific[{task!r}]": specific}
    parts |= {f"adapters[{task!r}]": adapters, f"heads[{task!r}]": head}
    for part, module in parts.items():
        for name, layer in module.named_modules():
            where = f"{part}.{name}" if name else part
            # the first stage sees the mini-batch once, whatever the configurations
            first = not part.startswith("heads") and name.partition(".")[0] == "0"
            if counts_tokens(layer) and not first:
                raise ValueError(
                    f"net: expected layers that treat samples independently, got {where} "
                    f"({type(layer).__name__}), whose scale_grad_by_freq counts tokens over all "
                    f"configurations behind the first stage; make it part of the first stage, or "
                    f"leave that out"
                )
            if not (mixes_samples(layer) or iterates(layer)):
                continue
            if iterates(layer):
                raise ValueError(
                    f"net: expected layers that a call leaves as they are, got {where} "
                    f"({type(layer).__name__}), whose spectral norm moves on with every call, so "
                    f"that every configuration would see other weights; put it into evaluation mode"
                )
            raise ValueError(
                f"net: expected layers that treat samples independently, got {where} "
                f"({type(layer).__name__}), whose batch statistics would mix configurations; "
                f"put it into evaluation mode (frozen statistics) or use GroupNorm or LayerNorm"
            )
    return walk


def check_is_tensor(out: Any, module: nn.Module, where: str) -> None:
    """What a stage gives is one tensor."""
    if not is_plain(out):
        got = "a sparse, nested or quantised one" if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"net: expected a tensor from {where} ({name_of(module)}), got {got}")


def check_stage_output(out: Any, samples: int, module: nn.Module, where: str) -> None:
    """What a stage or a head gives: one tensor, with one entry per sample of the folded batch."""
    check_is_tensor(out, module, where)
    if out.dim() < 1 or out.shape[0] != samples:
        raise ValueError(
            f"net: expected {where} ({name_of(module)}) to keep the number of samples, got "
            f"{samples} in and shape {list(out.shape)} out; keep what belongs to a sample in its "
            f"own dimensions, or use backend='reference'"
        )


def version_of(h: Tensor) -> int | None:
    """How often a tensor was changed in place; None where that is not counted."""
    if torch.compiler.is_compiling() or h.is_inference():
        return None
    return h._version


def check_input_as_it_was(version: int | None, h: Tensor, module: nn.Module, where: str) -> None:
    """A stage has not changed its input tensor, which other configurations read, too."""
    if version is not None and h._version != version:
        raise RuntimeError(
            f"net: expected stages that leave their input as it is, or write to it in a task's "
            f"first mini-batch, too, got {where} ({name_of(module)}), which has begun to"
        )


def check_logits(logits: Tensor, leaves: int, samples: int, task: str) -> None:
    """A head's output: one row of outputs per sample of the folded batch."""
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"head of task {task!r}: expected a tensor of logits [N, K], got "
            f"{type(logits).__name__}"
        )
    if logits.dim() < 2 or logits.shape[0] != leaves * samples or logits.shape[-1] == 0:
        raise ValueError(
            f"head of task {task!r}: expected logits [N, K] with N={leaves * samples} (here "
            f"{leaves} configuration(s) of {samples} samples), got shape {list(logits.shape)}"
        )
    if not is_plain(logits) or not logits.is_floating_point():
        raise TypeError(
            f"head of task {task!r}: expected dense floating-point logits, got {logits.dtype} of "
            f"layout {logits.layout}"
        )


def check_infers_once() -> None:
    """A step that changes the prior is not run a second time in the backward."""
    # the other kind of checkpoint runs it without gradients first, which changes nothing
    in_backward = torch._C._current_graph_task_id() != -1
    if not in_backward and is_checkpointed():
        raise ValueError(
            "em: expected a step of training outside of torch.utils.checkpoint(use_reentrant="
            "False), because its second run would follow the prior that the first has changed; "
            "got one inside; LASEM(max_memory=...) saves memory instead"
        )


def check_ranks_agree(alike: bool, task: str) -> None:
    """All processes of DistributedDataParallel take the same kind of step of the same task."""
    if not alike:
        raise RuntimeError(
            f"task: expected a mini-batch of the same task in all processes, got {task!r} in this "
            f"one and another task, or another kind of step, elsewhere; the prior and the "
            f"roll-back are those of one task at a time"
        )


def check_logits_device(logits: Tensor, y: Tensor, task: str) -> None:
    """A head's output lies where the targets do."""
    if logits.device != y.device:
        raise ValueError(
            f"head of task {task!r}: expected logits on {y.device}, like y, got logits on "
            f"{logits.device}"
        )


def or_misfit(evaluate: Callable[[], Any], network: Network, x: Tensor) -> Any:
    """Evaluates; an error that the input's shape or dtype explains becomes one that says so.

    So does one of a stage that takes the mini-batch's number of samples alone, or not one tensor.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return evaluate()
    try:
        return evaluate()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, AssertionError) as error:
        reason = misfit(network, x) or _fixed_number(network, x)
        if reason is None:
            raise
        raise ValueError(reason) from error
    except TypeError as error:
        reason = odd_call(network)
        if reason is None:
            raise
        raise TypeError(reason) from error


def odd_call(network: Network) -> str | None:
    """Which stage, or the head, cannot be called with one tensor; None if all can."""
    places = [
        (f"stage {i + 1}", branch.module)
        for i, branches in enumerate(network.stages)
        for branch in branches
        if branch is not None
    ]
    for where, module in [*places, (f"the head of task {network.task!r}", network.head)]:
        reason = why_not_one_tensor(module)
        if reason is not None:
            return (
                f"net: expected stages and heads that are called with one tensor, got {where} "
                f"({name_of(module)}), whose forward cannot be ({reason}); put it into a module "
                f"whose own forward takes one tensor and passes the rest"
            )
    return None


def why_not_one_tensor(module: nn.Module) -> str | None:
    """Why a module's forward cannot be called with one tensor; None if its signature allows it."""
    if module._forward_pre_hooks:  # which may bring what else it takes
        return None
    try:
        inspect.signature(module.forward).bind(None)
    except ValueError:  # there is no signature to be had
        return None
    except TypeError as error:
        return str(error)
    return None


@torch.no_grad()
def misfit(network: Network, x: Tensor) -> str | None:
    """Why a network cannot take ``x``, of its first sample or else of all; None if it can."""
    with frozen(network.modules()):
        of_all = _misfit(network, x, x)
        return of_all and (_misfit(network, x, x[:1]) or of_all)


def _misfit(network: Network, x: Tensor, h: Tensor) -> str | None:
    for i, branches in enumerate(network.stages):
        branch = next(b for b in branches if b is not None)
        try:
            out = branch(h.clone())
        except (RuntimeError, IndexError, AssertionError) as error:
            return _misfit_message(x, f"stage {i + 1} ({name_of(branch.module)})", h, error)
        if not isinstance(out, Tensor):
            return None
        h = out
    try:
        network.head(h.clone())
    except (RuntimeError, IndexError, AssertionError) as error:
        return _misfit_message(x, f"the head of task {network.task!r}", h, error)
    return None


@torch.no_grad()
def _fixed_number(network: Network, x: Tensor) -> str | None:
    """Which stage takes a mini-batch and not twice as many samples; None if none is found."""
    h = x
    with frozen(network.modules()):
        for i, branches in enumerate(network.stages):
            branch = next(b for b in branches if b is not None)
            try:
                branch(torch.cat([h, h]))
            except (RuntimeError, IndexError, AssertionError) as error:
                return (
                    f"net: expected stages that take any number of samples, got stage {i + 1} "
                    f"({name_of(branch.module)}), which takes {len(h)} and not {2 * len(h)} "
                    f"({_in_short(error)}); the samples of all configurations are evaluated as one "
                    f"batch, so what belongs to a sample has to travel in the stages' tensors"
                )
            h = branch(h.clone())
    return None


def _in_short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def name_of(module: nn.Module) -> str:
    """A module on one line, for messages; a long one is cut off."""
    name = " ".join(repr(module).split())
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]} ...)"


def _misfit_message(x: Tensor, where: str, h: Tensor, error: Exception) -> str:
    reason = _in_short(error)
    if not _may_be_infinite(h) and h.numel() > 0:
        reason += f"; the values are from {int(h.min())} to {int(h.max())}"
    return (
        f"x: expected samples that the network can take, got shape {list(x.shape)} of {x.dtype} on "
        f"{x.device}: {where} cannot take an input of shape [N, {', '.join(map(str, h.shape[1:]))}]"
        f" ({reason})"
    )
