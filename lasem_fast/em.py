"""LASEM: one mini-batch of the EM algorithm over transfer configurations."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasem_fast._host_values import is_transformed
from lasem_fast._numbers import flag, whole_number
from lasem_fast.backends import choices
from lasem_fast.configs import ConfigSpace, Configuration
from lasem_fast.em_step import EMStep
from lasem_fast.likelihoods import Likelihood, as_likelihood
from lasem_fast.net import TransferNet
from lasem_fast.networks import checks
from lasem_fast.networks.network import Network
from lasem_fast.networks.random_state import RandomState, random_state_kept_on_error
from lasem_fast.networks.rollback import Rollback
from lasem_fast.networks.saved import all_or_nothing, lasting, packed, unpacked
from lasem_fast.networks.walk import Walk
from lasem_fast.priors import Prior, as_prior
from lasem_fast.search import dispatch, first_look
from lasem_fast.search.m_step import MStep
from lasem_fast.search.parts import Parts
from lasem_fast.search.posterior import evidence, is_finite
from lasem_fast.search.ranks import Ranks, check_is_whole
from lasem_fast.search.reuse import Posteriors
from lasem_fast.search.search import Found, NothingLeft, Search
from lasem_fast.search.trainers import note_step
from lasem_fast.search.untrained import Untrained
from lasem_fast.tree.budget import checked_max_memory


class _Call(NamedTuple):
    """The arguments of a step, which fit.

    Attributes:
        config: the configuration that the task has kept; None: it is open.
        walk: one through all that the task may use.
    """

    x: Tensor
    y: Tensor
    task: str
    posterior: Tensor | None
    config: Configuration | None
    walk: Walk


class LASEM(nn.Module):
    """Trains a :class:`TransferNet` while finding out which stages each task should share.

    Args:
        net: the network; the LASEM owns it (``em.net``).
        space: the configurations to search; None: all 2^d.
        likelihood: ``"joint"`` (Eq. 2), ``"mean"`` (the authors' release), or a
            :class:`~lasem_fast.likelihoods.Likelihood`, for example ``Gaussian(sigma)``.
        prior: ``"count"`` (Eq. 1), ``"mean_posterior"``, ``"uniform"``, ``"historic"``, a tensor
            ``[C]`` of probabilities, or a :class:`~lasem_fast.priors.Prior`, of which the LASEM
            takes a copy: what it counts is its own.
        backend: ``"auto"``, or one of :func:`lasem_fast.backends` by name.
        validate: on a device, also run the checks that read values (label range, finiteness) and
            leave out configurations that overflow; this waits for the device at every step. On the
            CPU they always run, except inside ``torch.compile`` and ``torch.func`` transforms.
            Where they do not run, a bad step has a NaN loss.
        redraw_unclaimed: at the end of a task, once no other task is under way, draw those shared
            stages anew that no task has kept so far, so that the next task finds them untrained
            (the authors' release).
        max_memory: what a step may hold beside weights, their gradients and the mini-batch: bytes
            (int) or a fraction of the device's memory (float, at most 1.0). The upper levels of the
            tree then run whole and its sub-trees one after another, those that carry weight twice;
            the numbers are the same up to rounding. A budget that no cut meets is a ValueError at
            the first mini-batch. None: no bound.
        prune: posterior mass, from 0 to below 1, that an M-step may leave out: the least probable
            configurations that sum to at most this much. The gradient is off by at most
            ``EMStep.dropped_mass`` times the largest gradient of one of them. 0: exact.
        m_step_draws: number of configurations that each M-step draws from the posterior, with
            replacement, in place of following all; unbiased. Uses PyTorch's random state. None:
            exact.
        e_step_every: mini-batches of a task per E-step: the posterior is inferred, and counted, on
            the first of them and followed by the others. 1: every mini-batch has its own.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: the backend asked for cannot run here.

    ``parameters()`` and ``buffers()`` are the net's and the prior's own, and do not change from one
    step to the next: what a task's prior counts and what the roll-back keeps is saved, moved and
    copied with the module, but not listed. So ``torch.optim.swa_utils.AveragedModel(em)`` averages
    the weights at any time between two ``add_task`` or ``end_task`` calls; its copy of the prior
    stands still, so ask ``em`` itself for :meth:`best_config`.

    Under ``DistributedDataParallel`` posterior and log-likelihoods are those of the whole
    mini-batch, of which every process has a part; ``loss`` and ``nll`` are those of its own part,
    whose gradients are averaged. The prior is that of the first process, in all of them, and so is
    every choice at the end of a task; a task that was added after wrapping is refused. A LASEM that
    is compiled does not see that it is wrapped, and does none of this.

    Source: LASEM (Lee, Behpour, Eaton, ICML 2021), Algorithm 1.
    """

    def __init__(
        self,
        net: TransferNet,
        space: ConfigSpace | None = None,
        likelihood: str | Likelihood = "joint",
        prior: str | Tensor | Prior = "count",
        backend: str = "auto",
        *,
        validate: bool = False,
        redraw_unclaimed: bool = False,
        max_memory: float | None = None,
        prune: float = 0.0,
        m_step_draws: int | None = None,
        e_step_every: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(net, TransferNet):
            raise TypeError(f"net: expected a TransferNet, got {type(net).__name__}")
        space, likelihood = _checked_space(space, net.depth), as_likelihood(likelihood)
        backend = dispatch.choose(backend)
        self.validate = flag(validate, "validate")
        self.redraw_unclaimed = flag(redraw_unclaimed, "redraw_unclaimed")
        self.net = net
        # numbers, because AveragedModel(use_buffers=True) averages all buffers
        self.register_buffer("_bits", space.bits.float(), persistent=False)
        # made once: a captured step has a kernel less
        self.register_buffer("_nothing_dropped", torch.zeros(()), persistent=False)
        self._prior = as_prior(prior)
        self._prior.check(len(space))
        self._rollback = Rollback()
        self._ranks = Ranks()
        max_memory = checked_max_memory(max_memory)
        self._e_step_every = whole_number(e_step_every, "e_step_every")
        self._posteriors = Posteriors()
        m_step = MStep.checked(prune, m_step_draws)
        self._search = Search(space, likelihood, self._prior, backend, m_step, max_memory)
        # by task and mode: the layers that were looked at, and stages that write to their input
        self._seen: dict[tuple[str, bool, bool], tuple[list[nn.Module], frozenset[int]]] = {}
        self._untrained = Untrained(space.bits)

    @property
    def space(self) -> ConfigSpace:
        """The configurations that are searched; like all that follows, what the LASEM is made of:
        another one needs another LASEM."""
        return self._search.space

    @property
    def likelihood(self) -> Likelihood:
        """How outputs are scored."""
        return self._search.likelihood

    @property
    def backend(self) -> str:
        """Name of the backend that was chosen."""
        return self._search.backend

    @property
    def max_memory(self) -> float | None:
        """What a step may hold."""
        return self._search.max_memory

    @property
    def prune(self) -> float:
        """Posterior mass that an M-step may leave out."""
        return self._search.m_step.prune

    @property
    def m_step_draws(self) -> int | None:
        """Number of configurations that each M-step draws."""
        return self._search.m_step.draws

    @property
    def e_step_every(self) -> int:
        """Mini-batches of a task per E-step."""
        return self._e_step_every

    @classmethod
    def reference(
        cls, net: TransferNet, space: ConfigSpace | None = None, backend: str = "auto"
    ) -> LASEM:
        """The choices of the authors' release, for reproduction.

        Mean likelihood, mean-posterior prior, unclaimed shared stages drawn anew for every task.
        What every LASEM does belongs to it too: the E-step runs without dropout and the M-step
        with a mask of its own for every configuration, and a task that comes back after its end is
        trained with the configuration it kept. :mod:`lasem_fast.nets` has the release's networks
        and :class:`lasem_fast.optim.TFRMSprop` its optimiser.
        """
        return cls(
            net,
            space,
            likelihood="mean",
            prior="mean_posterior",
            backend=backend,
            redraw_unclaimed=True,
        )

    def forward(self, x: Tensor, y: Tensor, task: str, posterior: Tensor | None = None) -> EMStep:
        """One E-step and the loss of one M-step.

        For a task that has ended there is nothing left to infer: the loss is the one of its
        configuration, whose posterior is 1, and the prior stays as it is.

        A call counts as a step of training if the LASEM is in training mode and gradients are
        enabled: then the prior takes the posterior in, and the roll-back remembers the shared
        weights before the task. Any other call (after ``em.eval()``, under ``torch.no_grad()`` or
        ``torch.inference_mode()``, inside ``torch.func`` transforms) returns the same and changes
        no state, a validation loss for example. The mode is that of the LASEM itself, whatever
        that of layers inside the net.

        The first mini-batch of a task is also looked at: a stage of your own whose output for one
        sample depends on the others is refused by name, and one that writes to its input is given
        copies from then on.

        Args:
            x: the mini-batch ``[N, ...]``.
            y: the targets: int64 class labels ``[N]``, or what the likelihood asks for.
            task: name of a task of the net.
            posterior: ``[C]``, a posterior to keep frozen for a further M-step; then the prior is
                not updated. None: infer it from this mini-batch.

        Returns:
            An :class:`EMStep`; call ``backward()`` on its ``loss``.

        Raises:
            TypeError, ValueError: an argument is not as described, or the net cannot be evaluated
                as one tree. Weights, prior, snapshots and random state are then as before.
            RuntimeError: a stage begins to write to its input after the first mini-batch; the
                LASEM is wrapped in ``nn.DataParallel`` or sharded by FSDP.

        Warns:
            UserWarning: once per task, if its own parameters stay as they are while others train;
                another LASEM trains the same net and has tasks under way; the net is in training
                mode and the LASEM, with gradients enabled, is not.
        """
        if self.max_memory is not None and torch.compiler.is_compiling():
            raise RuntimeError(
                "max_memory: expected None inside torch.compile, which traces one step whole, got "
                f"{self.max_memory}"
            )
        if not torch.compiler.is_compiling():
            check_is_whole(self, self.net)
        call = self._checked_call(x, y, task, posterior)
        run = LASEM._checked_step
        if call.walk.is_normed and "torch._dynamo" in sys.modules:
            if not torch.compiler.is_compiling():
                run = _outside_of_graphs()
        return run(self, call)

    def _checked_step(self, call: _Call) -> EMStep:
        """A step whose arguments fit, and what changes with it."""
        x, _, task, posterior, config, walk = call
        keeps_state = self._keeps_state()
        if keeps_state:
            if posterior is None and config is None and not torch.compiler.is_compiling():
                checks.check_infers_once()
            self._meet_ranks(task)
            before = self._rollback.before(task, config is not None, self.net.shared)
        alike = None
        if keeps_state and self._ranks.several:
            alike = self._ranks.agree((task, posterior is None, config is None), x.device)
            if self._reads_values(x):
                checks.check_ranks_agree(bool(alike), task)
                alike = None
        if torch.compiler.is_compiling():
            step = self._step(call)
        else:
            if keeps_state:
                note_step(self.net, self._rollback)
                self._untrained.look(self.net, task, walk.layers)
            elif self.net.training and not self.training and torch.is_grad_enabled():
                warnings.warn(
                    "em: expected the mode of its net, got evaluation mode while the net is in "
                    "training mode, so that this call does not count as a step of training: "
                    "neither prior nor roll-back takes notice; em.train() puts both into training "
                    "mode, em.eval() both into evaluation mode",
                    UserWarning,
                    stacklevel=5,  # this, forward, two of nn.Module, the loop
                )
            step = self._step_or_as_before(call)
        if keeps_state:
            if self._ranks.several and posterior is None and config is None:
                self._ranks.take_from_first(self._prior.states[task].buffers())
            if alike is not None:
                step = step._replace(loss=torch.where(alike, step.loss, torch.nan))
            self._rollback.begin(task, config is not None, before, self.net)
        return step

    def _keeps_state(self) -> bool:
        """Whether this call is a step of training (see :meth:`forward`)."""
        return self.training and torch.is_grad_enabled() and not is_transformed()

    def _step(self, call: _Call) -> EMStep:
        if call.config is not None:
            return self._fixed_step(call)
        known = self._keeps_state() or call.task in self._prior.states
        step = self._search_step(call)
        if not known:
            self._forget_prior(call.task)
        return step

    def _step_or_as_before(self, call: _Call) -> EMStep:
        """A step; one that fails leaves the random state and the prior as they were."""
        known, random = call.task in self._prior.states, RandomState.now([call.x])
        try:
            return self._step(call)
        except BaseException:
            random.restore()
            if not known:
                self._forget_prior(call.task)
            raise

    def evaluate(self, x: Tensor, task: str) -> Tensor:
        """The logits ``[C, N, K]`` of all configurations, differentiable; changes no state.

        Raises:
            TypeError, ValueError: ``x`` does not fit, or the task is unknown or has ended.
        """
        checks.check_batch(x)
        checks.check_has_values(x, x, self.net)
        checks.check_open_task(task, self.net)
        checks.check_weights_of_their_own(self.net)
        walk = checks.check_independent_samples(self.net, task)
        network, evaluator = self._network(task, x, walk), self._search.present_evaluator()
        if torch.compiler.is_compiling():
            return evaluator.logits(network, x)
        with random_state_kept_on_error([x]):
            return checks.or_misfit(lambda: evaluator.logits(network, x), network, x)

    def prior(self, task: str) -> Tensor:
        """The present prior P(c) of a task, ``[C]``."""
        self.net.config(task)
        known = task in self._prior.states
        try:
            log_prior = self._log_prior(task)
            if self._reads_values(log_prior):
                checks.check_log_prior_values(log_prior)
        finally:
            if not known:
                self._forget_prior(task)
        return log_prior.softmax(dim=0)

    def best_config(self, task: str) -> Configuration:
        """The configuration that is ahead (row 0 on ties), or the one that an ended task kept."""
        kept = self.net.config(task)
        if kept is not None:
            return kept
        if task not in self._prior.states:
            return self.space[0]
        score = self._prior.score(task)
        checks.check_score(score, len(self.space))
        return self.space[int(score.argmax())]

    def end_task(self, task: str, config: Any = None) -> Configuration:
        """Ends a task: chooses its configuration, rolls back and drops what that does not use.

        The shared stages that the configuration does not share get back their weights and buffers
        from before the task, bit for bit; where mini-batches of other tasks came in between, the
        changes that those made stay (:mod:`lasem_fast.networks.rollback` says how). Specific
        branches and adapters that it does not use are dropped. Gradients are freed of all that is
        the task's own and of what was rolled back. With ``redraw_unclaimed``, shared stages that
        no task has kept are then drawn anew.

        Under ``DistributedDataParallel`` all processes have to call this, on ``ddp.module``; the
        first one's configuration is everybody's.

        Args:
            task: a task that has not ended.
            config: a configuration of the space to keep; None: :meth:`best_config`.

        Returns:
            The configuration, a tuple of d booleans, True where shared.

        Raises:
            TypeError, ValueError: the task is unknown or has ended, or ``config`` is not in the
                space.
            RuntimeError: a shared stage has lost parameters that would have to be put back.

        Warns:
            UserWarning: no mini-batch of the task was counted and ``config`` is None.
        """
        checks.check_open_task(task, self.net)
        if config is None and task not in self._prior.states:
            warnings.warn(
                f"task: expected one with at least one mini-batch in training mode, got {task!r} "
                f"without any; nothing is known about its configurations, and the first is kept",
                UserWarning,
                stacklevel=2,
            )
        chosen = self.best_config(task) if config is None else config
        row = self._ranks.of_first(self.space.index(chosen), self._bits.device)
        chosen = self.space[row]
        # drawing anew runs an initialiser, which may fail
        with all_or_nothing(self) if self.redraw_unclaimed else nullcontext():
            self._rollback.end(task, chosen, self.net.shared, self.net)
            self.net.keep(task, chosen)
            self._posteriors.forget(task)
            # they hold what has been dropped
            self._untrained.forget_parameters()
            self._seen = {key: seen for key, seen in self._seen.items() if key[0] != task}
            for shared, kept in zip(self.net.shared, chosen, strict=True):
                if not kept:
                    shared.zero_grad()
            if self.redraw_unclaimed and self._rollback.is_idle:
                self.net.redraw_unclaimed()
                if self._ranks.several:
                    self._ranks.take_from_first(p.data for p in self.net.shared.parameters())
        return chosen

    def _checked_call(self, x: Tensor, y: Tensor, task: str, posterior: Tensor | None) -> _Call:
        net = self.net
        checks.check_batch(x)
        checks.check_target(y, x)
        checks.check_has_values(x, y, net)
        config = net.config(task)
        checks.check_weights_of_their_own(net)
        walk = checks.check_independent_samples(net, task)
        if posterior is not None:
            checks.check_posterior(posterior, len(self.space))
            if config is not None:
                raise ValueError(
                    f"posterior: expected None for task {task!r}, whose configuration is fixed "
                    f"since it ended; got a tensor"
                )
        if self._reads_values(x):
            checks.check_finite_input(x)
            checks.check_finite_weights(net.task_parts(task))
            if posterior is not None:
                checks.check_posterior_values(posterior)
        return _Call(x, y, task, posterior, config, walk)

    def _reads_values(self, x: Tensor) -> bool:
        on_host = x.device.type == "cpu" or self.validate
        return on_host and not torch.compiler.is_compiling() and not is_transformed()

    def _network(self, task: str, x: Tensor, walk: Walk | None = None) -> Network:
        net = self.net
        network = Network(net.branches(task), net.heads[task], task).looked_into(walk)
        if not self._reads_values(x) or self.backend == "reference":
            return network
        key = (task, self.training, len(x) > 1)
        known = self._seen.get(key)
        if known is None or known[0] != network.layers:
            found = checks.or_misfit(lambda: first_look.look(network, x), network, x)
            known = self._seen[key] = network.layers, found
        return network.protected(known[1])

    def _search_step(self, call: _Call) -> EMStep:
        x, y, task, frozen, _, walk = call
        keeps_state = self._keeps_state()
        reused = None
        if frozen is None and self.e_step_every > 1 and keeps_state:
            reused = self._posteriors.again(task)
        follow = frozen if reused is None else reused
        if follow is None:
            self._start_prior(task)
            if not self._is_known("log_prob"):
                self._log_prior(task)  # a user's own is checked before anything else
        network, reads_values = self._network(task, x, walk), self._reads_values(x)
        parts = self._parts(x) if keeps_state and self._ranks.several else None
        try:
            found = self._search.step(network, x, y, follow, reads_values, keeps_state, parts)
        except NothingLeft:
            if reused is None:
                raise
            self._start_prior(task)
            reused = None  # what it followed overflows now: it is time for another E-step
            found = self._search.step(network, x, y, None, reads_values, keeps_state, parts)
        step = EMStep(
            loss=self._with_auxiliary(found.loss, found.weights, task),
            # what is kept for the next mini-batches is not given away: a caller may write to it
            posterior=found.posterior if reused is None else found.posterior.clone(),
            log_likelihood=found.log_likelihood,
            nll=found.nll,
            dropped_mass=self._dropped(found),
        )
        if not keeps_state:
            return step
        if reused is None and frozen is None and not found.counted:
            finite = is_finite(found.nll) if found.finite is None else found.finite
            with self._as_before_if_a_users_own_fails("update"):
                self._prior.update(task, found.posterior, finite.any())
        # last, when nothing can fail any more
        self._search.note(task, found)
        if network.batch_norms is not None:
            network.batch_norms.move(found.weights)
        if reused is not None:
            self._posteriors.used(task)
        elif frozen is None and self.e_step_every > 1:
            self._posteriors.keep(task, found.posterior, self.e_step_every - 1)
        return step

    def _parts(self, x: Tensor) -> Parts:
        """The mini-batch that all processes have a part of."""
        return Parts(self._ranks, self.likelihood, len(x), len(self.space), x.device)

    def _as_before_if_a_users_own_fails(self, method: str) -> AbstractContextManager:
        """A context that puts the prior back where its method is not one of the library's."""
        return nullcontext() if self._is_known(method) else all_or_nothing(self._prior)

    def _is_known(self, method: str) -> bool:
        return getattr(type(self._prior), method).__module__ == Prior.__module__

    def _dropped(self, found: Found) -> Tensor:
        return self._no_mass() if found.dropped_mass is None else found.dropped_mass

    def _no_mass(self) -> Tensor:
        """A zero of the caller's own; in a graph the constant, which is a kernel less."""
        zero = self._nothing_dropped
        if zero.is_cuda and not torch.compiler.is_compiling():
            return zero if torch.cuda.is_current_stream_capturing() else zero.clone()
        return zero.clone()

    def _fixed_step(self, call: _Call) -> EMStep:
        """A plain training step of the configuration that an ended task kept."""
        x, y, task, _, config, walk = call
        row = self.space.index(config)
        evaluator, network = self._search.evaluator_of([config]), self._network(task, x, walk)
        output = checks.or_misfit(lambda: evaluator.logits(network, x), network, x)
        checks.check_logits_device(output, y, task)
        self.likelihood.check_target(y, output, values=self._reads_values(x))
        m_step = evidence(output, y, self.likelihood)
        if self._reads_values(x) and not bool(torch.isfinite(m_step.nll).all()):
            raise ValueError(
                f"x: expected a mini-batch with a finite loss, got {float(m_step.nll)} for the "
                f"configuration of task {task!r}"
            )
        loss = m_step.nll.sum()
        here = torch.arange(len(self.space), device=loss.device) == row
        posterior = here.to(loss.dtype)
        step = EMStep(
            loss=self._with_auxiliary(loss, posterior, task),
            posterior=posterior,
            log_likelihood=torch.where(here, m_step.log_likelihood, -torch.inf),
            nll=torch.where(here, m_step.nll.detach(), torch.inf),
            dropped_mass=self._no_mass(),
        )
        # last, when nothing can fail any more
        if network.batch_norms is not None and self._keeps_state():
            network.batch_norms.move(torch.ones(1, device=x.device))
        return step

    def _with_auxiliary(self, loss: Tensor, weights: Tensor, task: str) -> Tensor:
        """Adds each stage's auxiliary term, by the weight of the configurations that share it."""
        terms = self.net.auxiliary_losses(task)
        if all([term is None for term in terms]):
            return loss
        # no product of matrices, which autocast rounds
        shared = (weights[:, None] * self._bits.to(weights)).sum(dim=0)
        for weight, term in zip(shared.unbind(), terms, strict=True):
            if term is not None:
                loss = loss + weight * term
        return loss

    def _log_prior(self, task: str) -> Tensor:
        self._start_prior(task)
        log_prior = self._prior.log_prob(task)
        checks.check_log_prior(log_prior, len(self.space), self._bits.device)
        return log_prior

    def _forget_prior(self, task: str) -> None:
        if task in self._prior.states:
            self._prior.forget(task)

    def _start_prior(self, task: str) -> None:
        """Makes the prior's buffers for a task that is seen for the first time."""
        if task not in self._prior.states:
            device = next(self.net.parameters()).device
            with self._as_before_if_a_users_own_fails("start"), lasting():
                self._prior.start(task, len(self.space), device)
                if not self._is_known("start"):
                    checks.check_started(self._prior, task, len(self.space))

    def _meet_ranks(self, task: str) -> None:
        """Under DDP, takes over what the first process has when it calls for the first time."""
        if torch.compiler.is_compiling():
            return
        if self._ranks.note_call(task, (p for _, p in self.net.named_task_parameters(task))):
            self._ranks.check_alike(self._structure())
            for made_later in (self._prior.states, self._rollback):
                self._ranks.take_from_first(made_later.all_buffers())

    def _structure(self) -> dict[str, Any]:
        return {
            "space": self.space.bits.tolist(),
            "prior_tasks": list(self._prior.states),
            "rollback": self._rollback.structure(),
            "posteriors": self._posteriors.structure(),
            "few": sorted(self._search.few),
        }

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`; if it is refused, all is as before."""
        few = set(self._search.few)
        try:
            with choices.process().unless_refused(), all_or_nothing(self):
                return super().load_state_dict(state_dict, strict, assign)
        except BaseException:
            self._search.few = few
            raise

    def get_extra_state(self) -> Tensor:
        """What is searched and which buffers exist, so that they can be made before loading.

        With them the choices in force (:mod:`lasem_fast.choices`).
        """
        tasks, chosen = list(self.net.tasks), choices.in_force()
        return packed({**self._structure(), "tasks": tasks, "choices": chosen})

    def set_extra_state(self, state: Any) -> None:
        """Makes the buffers that a saved state has values for; its choices come into force."""
        state = unpacked(state, "space", "prior_tasks", "rollback")
        if state["space"] != self.space.bits.tolist():
            raise ValueError(
                f"state_dict: expected one saved with the same space, {self.space}, got one with "
                f"{len(state['space'])} configurations of other stages"
            )
        missing = [task for task in state["prior_tasks"] if task not in self.net.tasks]
        if missing:
            raise ValueError(
                f"state_dict: expected the tasks {list(self.net.tasks)} that this net has, got "
                f"{missing} as well; call add_task for them before load_state_dict"
            )
        saved = choices.checked(state.get("choices", {}), "state_dict: choices")
        # of a task that the state does not have it says nothing; former versions did not save which
        known = state.get("tasks", self.net.tasks)
        for task in [t for t in self._prior.states if t in known]:
            if task not in state["prior_tasks"]:
                self._prior.forget(task)
        for task in state["prior_tasks"]:
            self._start_prior(task)
        self._rollback.restore_structure(state["rollback"], self.net.shared, self.net)
        self._posteriors.restore_structure(state.get("posteriors", {}), self._bits)
        self._search.few = set(state.get("few", ()))
        choices.process().restore(saved)


def _checked_space(space: ConfigSpace | None, depth: int) -> ConfigSpace:
    if space is None:
        return ConfigSpace(depth)
    if not isinstance(space, ConfigSpace):
        raise TypeError(f"space: expected a ConfigSpace or None, got {type(space).__name__}")
    if space.depth != depth:
        raise ValueError(
            f"space: expected configurations of the net's {depth} stages, got depth {space.depth}"
        )
    return space


@lru_cache(1)
def _outside_of_graphs() -> Callable[..., EMStep]:
    """A step of which ``torch.compile``, having refused the whole, compiles no part.

    Inside such a part the forward that a batch norm has during a step would not be called.
    """
    return torch.compiler.disable(LASEM._checked_step)
