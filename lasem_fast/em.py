"""LASEM: one mini-batch of the EM algorithm over transfer configurations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasem_fast import _checks, _dispatch, _first_look, choices
from lasem_fast._untrained import Untrained
from lasem_fast.configs import ConfigSpace, Configuration
from lasem_fast.likelihoods import Likelihood, as_likelihood
from lasem_fast.net import TransferNet
from lasem_fast.network import Network
from lasem_fast.posterior import Evidence, evidence, expected_nll, posterior_of
from lasem_fast.priors import Prior, as_prior
from lasem_fast.ranks import Ranks
from lasem_fast.rollback import Rollback
from lasem_fast.saved import all_or_nothing, lasting, packed, unpacked
from lasem_fast.tree import Tree


class EMStep(NamedTuple):
    """What one mini-batch gave. All but ``loss`` are detached; nothing waits for the device.

    Attributes:
        loss: scalar; its gradient is minus Eq. 3 and 4, averaged over the mini-batch.
        posterior: P(c | X, y) ``[C]``, or the frozen one that was passed.
        log_likelihood: L_c ``[C]``; -inf for a configuration that overflowed.
        nll: mean negative log-likelihood per sample and configuration ``[C]``; inf for one that
            overflowed.
        dropped_mass: scalar, the posterior mass that an approximation left out; 0 when exact.
    """

    loss: Tensor
    posterior: Tensor
    log_likelihood: Tensor
    nll: Tensor
    dropped_mass: Tensor

    def clone(self) -> EMStep:
        """Copies of all tensors, for results of a captured step that are to be kept."""
        return EMStep(*(tensor.clone() for tensor in self))


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

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: the backend asked for cannot run here.

    ``parameters()`` and ``buffers()`` are the net's and the prior's own, and do not change from one
    step to the next: what a task's prior counts and what the roll-back keeps is saved, moved and
    copied with the module, but not listed. So ``torch.optim.swa_utils.AveragedModel(em)`` averages
    the weights at any time between two ``add_task`` or ``end_task`` calls; its copy of the prior
    stands still, so ask ``em`` itself for :meth:`best_config`.

    Under ``DistributedDataParallel`` the prior is that of the first process, in all of them, and so
    is every choice at the end of a task; a task that was added after wrapping is refused. A LASEM
    that is compiled does not see that it is wrapped, and does none of this.

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
    ) -> None:
        super().__init__()
        if not isinstance(net, TransferNet):
            raise TypeError(f"net: expected a TransferNet, got {type(net).__name__}")
        self.space = _checked_space(space, net.depth)
        self.likelihood = as_likelihood(likelihood)
        self.backend = _dispatch.choose(backend)
        self.validate = _flag(validate, "validate")
        self.redraw_unclaimed = _flag(redraw_unclaimed, "redraw_unclaimed")
        self.net = net
        # numbers, because AveragedModel(use_buffers=True) averages all buffers
        self.register_buffer("_bits", self.space.bits.float(), persistent=False)
        # one constant for every step: a kernel less on a device
        self.register_buffer("_nothing_dropped", torch.zeros(()), persistent=False)
        self._prior = as_prior(prior)
        self._prior.check(len(self.space))
        self._rollback = Rollback()
        self._ranks = Ranks()
        self._evaluator = _dispatch.evaluator(self.backend, self.space.configs)
        self._score_operations = _dispatch.operations(self.backend).scores
        # by task and mode: the stages that were seen to write to their input
        self._seen: dict[tuple[str, bool, bool], frozenset[int]] = {}
        self._untrained = Untrained(self.space.bits)

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
            RuntimeError: a stage begins to write to its input after the first mini-batch.

        Warns:
            UserWarning: once per task, if its own parameters stay as they are while others train.
        """
        config = self._check_call(x, y, task, posterior)
        keeps_state = self._keeps_state()
        if keeps_state:
            self._meet_ranks(task)
            before = self._rollback.before(task, config is not None, self.net.shared)
        if torch.compiler.is_compiling():
            step = self._step(x, y, task, posterior, config)
        else:
            if keeps_state:
                self._untrained.look(self.net, task)
            step = self._step_or_as_before(x, y, task, posterior, config)
        if keeps_state:
            if self._ranks.several and posterior is None and config is None:
                self._ranks.take_from_first(self._prior.states[task].buffers())
            self._rollback.begin(task, config is not None, before)
        return step

    def _keeps_state(self) -> bool:
        """Whether this call is a step of training (see :meth:`forward`)."""
        return self.training and torch.is_grad_enabled() and not _transformed()

    def _step(
        self, x: Tensor, y: Tensor, task: str, posterior: Tensor | None, config: Any
    ) -> EMStep:
        if config is not None:
            return self._fixed_step(x, y, task, config)
        known = task in self._prior.states
        step = self._search_step(x, y, task, posterior)
        if not (known or self._keeps_state()):
            self._forget_prior(task)
        return step

    def _step_or_as_before(
        self, x: Tensor, y: Tensor, task: str, posterior: Tensor | None, config: Any
    ) -> EMStep:
        """A step; one that fails leaves the random state and the prior as they were."""
        known = task in self._prior.states
        random_state = _RandomState(x.device)
        try:
            return self._step(x, y, task, posterior, config)
        except BaseException:
            random_state.restore()
            if not known:
                self._forget_prior(task)
            raise

    def evaluate(self, x: Tensor, task: str) -> Tensor:
        """The logits ``[C, N, K]`` of all configurations, differentiable; changes no state.

        Raises:
            TypeError, ValueError: ``x`` does not fit, or the task is unknown or has ended.
        """
        _checks.check_batch(x)
        _checks.check_has_values(x, x, self.net)
        _checks.check_open_task(task, self.net)
        _checks.check_independent_samples(self.net, task)
        evaluator, network = self._present(self._evaluator), self._network(task, x)
        if torch.compiler.is_compiling():
            return self._run(evaluator.logits, network, x)
        random_state = _RandomState(x.device)
        try:
            return self._run(evaluator.logits, network, x)
        except BaseException:
            random_state.restore()
            raise

    def prior(self, task: str) -> Tensor:
        """The present prior P(c) of a task, ``[C]``."""
        self.net.config(task)
        known = task in self._prior.states
        try:
            log_prior = self._log_prior(task)
            if self._reads_values(log_prior):
                _checks.check_log_prior_values(log_prior)
        finally:
            if not known:
                self._prior.forget(task)
        return log_prior.softmax(dim=0)

    def best_config(self, task: str) -> Configuration:
        """The configuration that is ahead (row 0 on ties), or the one that an ended task kept."""
        kept = self.net.config(task)
        if kept is not None:
            return kept
        if task not in self._prior.states:
            return self.space[0]
        score = self._prior.score(task)
        _checks.check_score(score, len(self.space))
        return self.space[int(score.argmax())]

    def end_task(self, task: str, config: Any = None) -> Configuration:
        """Ends a task: chooses its configuration, rolls back and drops what that does not use.

        The shared stages that the configuration does not share get back their weights and buffers
        from before the task, bit for bit; where mini-batches of other tasks came in between, the
        changes that those made stay (:mod:`lasem_fast.rollback` says how). Specific branches and
        adapters that it does not use are dropped. Gradients are freed of all that is the task's
        own and of what was rolled back. With ``redraw_unclaimed``, shared stages that no task has
        kept are then drawn anew.

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
        """
        _checks.check_open_task(task, self.net)
        chosen = self.best_config(task) if config is None else config
        row = self._ranks.of_first(self.space.index(chosen), self._bits.device)
        chosen = self.space[row]
        # drawing anew runs an initialiser, which may fail
        with all_or_nothing(self) if self.redraw_unclaimed else nullcontext():
            self._rollback.end(task, chosen, self.net.shared)
            self.net.keep(task, chosen)
            for shared, kept in zip(self.net.shared, chosen, strict=True):
                if not kept:
                    shared.zero_grad()
            if self.redraw_unclaimed and self._rollback.is_idle:
                self.net.redraw_unclaimed()
                if self._ranks.several:
                    self._ranks.take_from_first(p.data for p in self.net.shared.parameters())
        return chosen

    def _check_call(
        self, x: Tensor, y: Tensor, task: str, posterior: Tensor | None
    ) -> Configuration | None:
        _checks.check_batch(x)
        _checks.check_target(y, x)
        _checks.check_has_values(x, y, self.net)
        config = self.net.config(task)
        _checks.check_independent_samples(self.net, task)
        if posterior is not None:
            _checks.check_posterior(posterior, len(self.space))
            if config is not None:
                raise ValueError(
                    f"posterior: expected None for task {task!r}, whose configuration is fixed "
                    f"since it ended; got a tensor"
                )
        if self._reads_values(x):
            _checks.check_finite_input(x)
            _checks.check_finite_weights(self.net.named_task_parameters(task))
            if posterior is not None:
                _checks.check_posterior_values(posterior)
        return config

    def _reads_values(self, x: Tensor) -> bool:
        on_host = x.device.type == "cpu" or self.validate
        return on_host and not torch.compiler.is_compiling() and not _transformed()

    def _network(self, task: str, x: Tensor) -> Network:
        network = Network(self.net.branches(task), self.net.heads[task], task)
        if not self._reads_values(x) or self.backend == "reference":
            return network
        key = (task, self.training, len(x) > 1)
        if key not in self._seen:
            self._seen[key] = self._run(_first_look.look, network, x)
        return network.protected(self._seen[key])

    def _run(self, evaluate: Callable[[Network, Tensor], Any], network: Network, x: Tensor) -> Any:
        """Evaluates; an error that the input's shape or dtype explains becomes one that says so."""
        if torch.compiler.is_compiling() or _transformed():
            return evaluate(network, x)
        try:
            return evaluate(network, x)
        except (RuntimeError, IndexError) as error:
            reason = _checks.misfit(network, x)
            if reason is None:
                raise
            raise ValueError(reason) from error

    def _present(self, evaluator: Any) -> Any:
        """The evaluator to use now: in PyTorch's own operations inside torch.func transforms."""
        if isinstance(evaluator, Tree) and _transformed():
            return Tree(evaluator.plan, _dispatch.operations("torch"))
        return evaluator

    def _search_step(self, x: Tensor, y: Tensor, task: str, frozen: Tensor | None) -> EMStep:
        network = self._network(task, x)
        one_pass = frozen is not None
        e_output, m_output = self._outputs(self._evaluator, network, x, y, one_pass)
        if e_output is m_output and frozen is None:
            step = self._scored_step(m_output, y, task)
            if step is not None:
                return step
        e_step, m_step = self._evidence(e_output, m_output, y)
        usable = torch.isfinite(e_step.nll) & torch.isfinite(m_step.nll)
        rows = None
        if self._reads_values(x) and not bool(usable.all()):
            rows, e_step, m_step = self._evidence_of_usable(network, x, y, usable, one_pass)
            usable = torch.zeros_like(usable).index_fill(0, rows, True)
        log_likelihood = _spread(e_step.log_likelihood, rows, usable, -torch.inf)
        if frozen is None:
            posterior = self._infer(task, log_likelihood, usable, x)
        else:
            posterior = self._frozen(frozen, m_step, rows)
        loss = expected_nll(posterior if rows is None else posterior[rows], m_step.nll)
        step = EMStep(
            loss=self._with_auxiliary(loss, posterior, task),
            posterior=posterior,
            log_likelihood=log_likelihood,
            nll=_spread(e_step.nll.detach(), rows, usable, torch.inf),
            dropped_mass=self._nothing_dropped,
        )
        if frozen is None and self._keeps_state():  # last, when nothing can fail any more
            self._prior.update(task, posterior, usable.any())
        return step

    def _scored_step(self, output: Tensor, y: Tensor, task: str) -> EMStep | None:
        """The step through a backend's posterior head.

        None where it has none, or where a configuration is to be left out (see _search_step).
        """
        reads_values = self._reads_values(output)
        # what an operation on a device has counted could not be taken back after the checks
        if not self._score_operations or (reads_values and output.device.type != "cpu"):
            return None
        if _transformed():
            return None
        counts = self._keeps_state()
        self._log_prior(task)
        for operation in self._score_operations:
            scores = operation(output, y, self.likelihood, self._prior, task, counts)
            if scores is None:
                continue
            # one value that is not finite makes the sum so, and the loss alone may hide it
            if reads_values and not math.isfinite((scores.nll.sum() + scores.loss).item()):
                break
            step = EMStep(
                loss=self._with_auxiliary(scores.loss, scores.posterior, task),
                posterior=scores.posterior,
                log_likelihood=scores.log_likelihood,
                nll=scores.nll,
                dropped_mass=self._nothing_dropped,
            )
            if counts and not scores.counted:
                self._prior.update(task, scores.posterior, torch.isfinite(scores.nll).any())
            return step
        return None

    def _infer(self, task: str, log_likelihood: Tensor, usable: Tensor, x: Tensor) -> Tensor:
        """The E-step's posterior."""
        log_prior = self._log_prior(task)
        posterior = posterior_of(log_prior, log_likelihood)
        if self._reads_values(x) and not bool(torch.isfinite(posterior).all()):
            _checks.check_log_prior_values(log_prior)
            raise ValueError(
                f"prior: expected probability above 0 for a configuration with a finite loss on "
                f"this mini-batch, got 0 for all {int(usable.sum())} of them"
            )
        return posterior

    def _frozen(self, posterior: Tensor, m_step: Evidence, rows: Tensor | None) -> Tensor:
        """A posterior that was passed, without the configurations that overflow now."""
        posterior = posterior.detach().to(m_step.nll)
        if rows is None:
            return posterior
        left = torch.zeros_like(posterior).index_copy(0, rows, posterior[rows])
        if not bool(left.sum() > 0):
            raise ValueError(
                "posterior: expected weight above 0 for a configuration with a finite loss on "
                f"this mini-batch, got 0 for all {rows.numel()} of them"
            )
        return left / left.sum()

    def _outputs(
        self, evaluator: Any, network: Network, x: Tensor, y: Tensor, one_pass: bool
    ) -> tuple[Tensor, Tensor]:
        """Outputs ``[C, N, ...]`` for the E-step and the M-step; one object if they are equal."""
        evaluator = self._present(evaluator)
        if one_pass:
            e_output = m_output = self._run(evaluator.logits, network, x)
        else:
            e_output, m_output = self._run(evaluator.logits_without_and_with_noise, network, x)
        if m_output.device != y.device:
            raise ValueError(
                f"head of task {network.task!r}: expected logits on {y.device}, like y, got logits "
                f"on {m_output.device}"
            )
        self.likelihood.check_target(y, m_output, values=self._reads_values(x))
        return e_output, m_output

    def _evidence(self, e_output: Tensor, m_output: Tensor, y: Tensor) -> tuple[Evidence, Evidence]:
        m_step = evidence(m_output, y, self.likelihood)
        return (m_step if e_output is m_output else evidence(e_output, y, self.likelihood)), m_step

    def _evidence_of_usable(
        self, network: Network, x: Tensor, y: Tensor, usable: Tensor, one_pass: bool
    ) -> tuple[Tensor, Evidence, Evidence]:
        """Evaluates again without the configurations that overflow; returns the rows left too."""
        rows = usable.nonzero().squeeze(1)
        while rows.numel() > 0:
            evaluator = _dispatch.evaluator(self.backend, [self.space[r] for r in rows.tolist()])
            outputs = self._outputs(evaluator, network, x, y, one_pass)
            e_step, m_step = self._evidence(*outputs, y)
            good = torch.isfinite(e_step.nll) & torch.isfinite(m_step.nll)
            if bool(good.all()):
                return rows, e_step, m_step
            rows = rows[good]
        raise ValueError(
            f"x: expected a mini-batch on which some configuration has a finite loss, got NaN or "
            f"infinity for all {len(self.space)}; the weights are finite, so the activations "
            f"overflow: use smaller inputs, weights or learning rate"
        )

    def _fixed_step(self, x: Tensor, y: Tensor, task: str, config: Configuration) -> EMStep:
        """A plain training step of the configuration that an ended task kept."""
        row = self.space.index(config)
        evaluator = _dispatch.evaluator(self.backend, [config])
        outputs = self._outputs(evaluator, self._network(task, x), x, y, one_pass=True)
        _, m_step = self._evidence(*outputs, y)
        if self._reads_values(x) and not bool(torch.isfinite(m_step.nll).all()):
            raise ValueError(
                f"x: expected a mini-batch with a finite loss, got {float(m_step.nll)} for the "
                f"configuration of task {task!r}"
            )
        loss = m_step.nll.sum()
        here = torch.arange(len(self.space), device=loss.device) == row
        posterior = here.to(loss.dtype)
        return EMStep(
            loss=self._with_auxiliary(loss, posterior, task),
            posterior=posterior,
            log_likelihood=torch.where(here, m_step.log_likelihood, -torch.inf),
            nll=torch.where(here, m_step.nll.detach(), torch.inf),
            dropped_mass=self._nothing_dropped,
        )

    def _with_auxiliary(self, loss: Tensor, posterior: Tensor, task: str) -> Tensor:
        """Adds each stage's auxiliary term, weighted by the posterior that the stage is shared."""
        terms = self.net.auxiliary_losses(task)
        if all(term is None for term in terms):
            return loss
        shared = posterior @ self._bits.to(posterior)
        for weight, term in zip(shared.unbind(), terms, strict=True):
            if term is not None:
                loss = loss + weight * term
        return loss

    def _log_prior(self, task: str) -> Tensor:
        self._start_prior(task)
        log_prior = self._prior.log_prob(task)
        _checks.check_log_prior(log_prior, len(self.space), self._bits.device)
        return log_prior

    def _forget_prior(self, task: str) -> None:
        if task in self._prior.states:
            self._prior.forget(task)

    def _start_prior(self, task: str) -> None:
        """Makes the prior's buffers for a task that is seen for the first time."""
        if task not in self._prior.states:
            device = next(self.net.parameters()).device
            with lasting():
                self._prior.start(task, len(self.space), device)

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
        }

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`; if it is refused, all is as before."""
        with choices.process().unless_refused(), all_or_nothing(self):
            return super().load_state_dict(state_dict, strict, assign)

    def get_extra_state(self) -> Tensor:
        """What is searched and which buffers exist, so that they can be made before loading.

        With them the choices in force (:mod:`lasem_fast.choices`).
        """
        return packed({**self._structure(), "choices": choices.in_force()})

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
        for task in [t for t in self._prior.states if t not in state["prior_tasks"]]:
            self._prior.forget(task)
        for task in state["prior_tasks"]:
            self._start_prior(task)
        self._rollback.restore_structure(state["rollback"], self.net.shared)
        choices.process().restore(saved)


class _RandomState:
    """PyTorch's random state on the host and on a device, to go back to."""

    def __init__(self, device: torch.device) -> None:
        self.host = torch.get_rng_state()
        self.device = device if device.type == "cuda" else None
        if self.device is not None and torch.cuda.is_current_stream_capturing():
            self.device = None  # a graph keeps its own
        self.on_device = None if self.device is None else torch.cuda.get_rng_state(self.device)

    def restore(self) -> None:
        torch.set_rng_state(self.host)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)


def _transformed() -> bool:
    """Whether a torch.func transform (vmap, grad, jacrev) runs this."""
    return torch._C._are_functorch_transforms_active()


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, int)):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return bool(value)


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


def _spread(values: Tensor, rows: Tensor | None, usable: Tensor, fill: float) -> Tensor:
    """Values of all configurations, with ``fill`` for those that are not usable."""
    if rows is None:
        return torch.where(usable, values, fill)
    return values.new_full(usable.shape, fill).index_copy(0, rows, values)
