"""The captured step without a GPU: its fallback, its refusals, and a step that never waits."""

from __future__ import annotations

import copy
import sys
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from nets import batch, small_net
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lasem_fast as lf
from lasem_fast import capture_trial
from lasem_fast.capture import _constant_weights
from lasem_fast.capture_holdings import Holdings
from lasem_fast.capture_trial import nothing_waits, obstacles, state_on_host
from lasem_fast.levels.fold import _kept_index

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, capturable=False),
    "tf rmsprop": lambda p: lf.optim.TFRMSprop(p, lr=0.01),
}


def _made(optimizer="sgd", prior="count", extra=(), **options):
    torch.manual_seed(0)
    net = small_net(dtype=torch.float32, tasks=("a", "b"), extra=extra)
    em = lf.LASEM(net, prior=prior, **options)
    return em, OPTIMIZERS[optimizer](net.task_parameters("a"))


def _batches(count=4):
    return [batch(seed=seed, dtype=torch.float32) for seed in range(count)]


def _captured(em, optimizer, **options):
    x, y = _batches(1)[0]
    with pytest.warns(RuntimeWarning, match="runs eagerly"):
        return lf.capture(em, optimizer, x, y, "a", **options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("prior", ["count", "mean_posterior", "historic"])
@pytest.mark.parametrize("extra", [(), (lambda: nn.Dropout(0.5),)], ids=["", "dropout"])
def test_the_eager_fallback_is_the_plain_loop_bit_for_bit(optimizer, prior, extra):
    (em, opt), (plain_em, plain_opt) = (_made(optimizer, prior, extra) for _ in range(2))
    captured = _captured(em, opt)
    for x, y in _batches():
        torch.manual_seed(5)
        got = captured(x, y)
        torch.manual_seed(5)
        plain_opt.zero_grad()
        want = plain_em(x, y, "a")
        want.loss.backward()
        plain_opt.step()
        assert not got.loss.requires_grad
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    saved, plain = em.state_dict(), plain_em.state_dict()
    assert saved.keys() == plain.keys()
    for name in saved:
        equal = torch.equal if isinstance(saved[name], torch.Tensor) else lambda a, b: a == b
        assert equal(saved[name], plain[name]), name


def test_autocast_is_as_it_was_at_the_capture():
    em, opt = _made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = _captured(em, opt)
    (x, y), (plain_em, _) = _batches(1)[0], _made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = plain_em(x, y, "a")
    assert torch.equal(captured(x, y).loss, want.loss)
    em, opt = _made()
    captured = _captured(em, opt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert captured(x, y).loss != want.loss


def test_capturing_changes_nothing():
    em, opt = _made()
    before = copy.deepcopy((em.state_dict(), opt.state_dict())), torch.get_rng_state()
    assert _captured(em, opt).why_eager
    x, y = _batches(1)[0]
    with pytest.raises(RuntimeError, match="cannot be captured: the mini-batch is on cpu"):
        lf.capture(em, opt, x, y, "a", strict=True)
    assert str((em.state_dict(), opt.state_dict())) == str(before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all(p.grad is None for p in em.parameters())


def test_all_known_obstacles_are_named():
    em, opt = _made("adam", validate=True)
    reasons = obstacles(em, opt, torch.zeros(1))
    assert len(reasons) == 3
    for reason, words in zip(
        reasons, ("on cpu", "validate=True", "Adam has capturable=False"), strict=True
    ):
        assert words in reason


def test_an_optimiser_that_counts_on_the_host_is_named():
    weight = nn.Parameter(torch.zeros(2))
    opt = torch.optim.SGD([weight], lr=0.1)
    opt.state[weight] = {"momentum_buffer": None, "on": True}
    assert state_on_host(opt) == ""
    opt.state[weight]["step"] = 3
    assert "SGD keeps 'step' on the host" in state_on_host(opt)


class TestArguments:
    @pytest.mark.parametrize(
        ("name", "value", "error", "message"),
        [
            ("em", nn.Linear(1, 1), TypeError, "em: expected a LASEM"),
            ("optimizer", None, TypeError, "optimizer: expected a torch.optim.Optimizer"),
            ("x", 3, TypeError, "x: expected a tensor"),
            ("y", torch.zeros(2).long(), ValueError, "y: expected one target"),
            ("task", "c", ValueError, "task: expected one of"),
            ("optimizer", torch.optim.SGD([nn.Parameter(torch.zeros(1))]), ValueError,
             "optimizer: expected one that trains parameters of em.net for task 'a'"),
        ],
    )  # fmt: skip
    def test_of_capture(self, name, value, error, message):
        em, optimizer = _made()
        x, y = _batches(1)[0]
        arguments = {"em": em, "optimizer": optimizer, "x": x, "y": y, "task": "a", name: value}
        with pytest.raises(error, match=message):
            lf.capture(**arguments)

    def test_of_a_call(self):
        captured = _captured(*_made())
        x, y = _batches(1)[0]
        for name, changed in (
            ("x: expected shape", (x[:3], y[:3])),
            ("x: expected shape .* of torch.float32", (x.double(), y)),
            ("y: expected shape .* of torch.int64", (x, y.int())),
        ):
            with pytest.raises(ValueError, match=name):
                captured(*changed)
        with pytest.raises(TypeError, match="y: expected a tensor"):
            captured(x, None)
        assert captured.eager(x[:3], y[:3]).loss.isfinite()

    def test_an_ended_task(self):
        em, optimizer = _made()
        captured = _captured(em, optimizer)
        x, y = _batches(1)[0]
        captured(x, y)
        em.end_task("a")
        for call in (captured, captured.eager):
            with pytest.raises(ValueError, match="task: expected one that has not ended"):
                call(x, y)


def test_a_mini_batch_that_is_refused_leaves_the_gradients():
    em, optimizer = _made()
    captured = _captured(em, optimizer)
    x, y = _batches(1)[0]
    captured(x, y)
    grads = {p: p.grad.clone() for p in em.net.task_parameters("a")}
    for call in (captured, captured.eager):
        with pytest.raises(ValueError, match="y: expected class labels"):
            call(x, y + 7)
        assert all(torch.equal(p.grad, grad) for p, grad in grads.items())


def test_results_can_be_kept():
    step = _captured(*_made())(*_batches(1)[0])
    kept = step.clone()
    assert type(kept) is lf.EMStep
    for mine, theirs in zip(kept, step, strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()


CAPTURE = sys.modules["lasem_fast.capture"]  # lf.capture is the function
RECORDED = ("rehearsal", "record")


class _Replayed:
    """Stands in for a graph: writes what an eager step gives into the tensors of the recording."""

    def __init__(self, step):
        self.step, self.result = step, step._result
        self.replays = 0

    def replay(self):
        self.replays += 1
        for static, value in zip(self.result, self.step.eager(self.step._x, self.step._y),
                                 strict=True):  # fmt: skip
            static.copy_(value)


@pytest.fixture
def stand_in(monkeypatch):
    """The logic around a graph on the CPU; returns what was done, in order."""
    done = []

    def warm_up(step):
        done.append("eager")
        result = step.eager(step._x, step._y)
        step._warm = step._taken_in()
        return result

    def record(step):
        done.append("record")
        step._result = lf.EMStep(*(torch.zeros(size) for size in ((), 8, 8, 8, ())))
        step._graph = _Replayed(step)

    monkeypatch.setattr(lf.CapturedStep, "_warm_up", warm_up)
    monkeypatch.setattr(lf.CapturedStep, "_record", record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(CAPTURE, "rehearse", lambda step: done.append("rehearsal"))
    return done


class TestAroundTheGraph:
    def _loop(self, change=lambda turn, em, optimizer: None, turns=5, **options):
        """The same training with the stand-in graph and in a plain loop; they must agree."""
        results = []
        for fast in (True, False):
            torch.manual_seed(0)
            em, optimizer = _made(**options)
            step = _captured(em, optimizer)
            if fast:
                step.why_eager = None
            losses = []
            for turn, (x, y) in enumerate(_batches(turns)):
                change(turn, em, optimizer)
                losses.append((step if fast else step.eager)(x, y).loss.clone())
            weights = torch.cat([p.detach().flatten() for p in em.net.parameters()])
            results.append((torch.stack(losses), weights, em.prior("a")))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_one_eager_step_then_one_recording(self, stand_in):
        self._loop()
        assert stand_in == ["eager", *RECORDED]

    def test_a_float_that_changes_is_recorded_again(self, stand_in):
        def change(turn, em, optimizer):
            optimizer.param_groups[0]["lr"] = 0.1 if turn < 3 else 0.05

        self._loop(change)
        assert stand_in == ["eager", *RECORDED, "eager", *RECORDED]

    def test_a_tensor_that_is_filled_is_not(self, stand_in):
        def change(turn, em, optimizer):
            if turn == 0:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
            optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + turn))

        self._loop(change)
        assert stand_in == ["eager", *RECORDED]

    def test_tensors_that_are_replaced_are_recorded_again(self, stand_in):
        def change(turn, em, optimizer):
            if turn == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

        self._loop(change)
        assert stand_in == ["eager", *RECORDED, "eager", *RECORDED]

    @pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm2d(3)])
    def test_a_layer_in_another_mode_is_recorded_again(self, stand_in, layer):
        def change(turn, em, optimizer):
            for module in em.net.modules():
                if type(module) is type(layer):
                    module.train(turn < 3)

        self._loop(change, extra=(lambda: copy.deepcopy(layer),))
        assert stand_in == ["eager", *RECORDED, "eager", *RECORDED]

    def test_another_task_that_the_prior_reads_is_recorded_too(self, stand_in):
        def change(turn, em, optimizer):
            if turn == 3:
                em(*_batches(1)[0], "b")

        self._loop(change, turns=6, prior="historic")
        assert stand_in == ["eager", *RECORDED, "eager", *RECORDED]

    def test_a_recording_that_fails_leaves_the_eager_step(self, stand_in, monkeypatch):
        def fail(step):
            raise RuntimeError("no room\nfor a graph")

        monkeypatch.setattr(lf.CapturedStep, "_record", fail)
        em, optimizer = _made()
        step = _captured(em, optimizer)
        step.why_eager = None
        x, y = _batches(1)[0]
        step(x, y)
        with pytest.warns(RuntimeWarning, match="no room"):
            assert step(x, y).loss.isfinite()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(x, y)
        assert step.why_eager == "RuntimeError: no room"

    def test_a_rehearsal_that_fails_begins_no_recording(self, stand_in, monkeypatch):
        def fail(step):
            raise RuntimeError("called a synchronizing CUDA operation")

        monkeypatch.setattr(CAPTURE, "rehearse", fail)
        em, optimizer = _made()
        step = _captured(em, optimizer)
        step.why_eager = None
        x, y = _batches(1)[0]
        step(x, y)
        with pytest.warns(RuntimeWarning, match="called a synchronizing CUDA operation"):
            assert step(x, y).loss.isfinite()
        step(x, y)
        assert stand_in == ["eager"]

    def test_a_rehearsal_copies_a_net_that_keeps_what_it_computed(self, monkeypatch):
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
        monkeypatch.setattr(CAPTURE, "obstacles", lambda *arguments: [])
        monkeypatch.setattr(CAPTURE, "trial", lambda step: "")
        em, optimizer = _made()
        first = em.net.shared[0][0]
        first.last = first.weight * 2
        step = lf.capture(em, optimizer, *_batches(1)[0], "a")
        with capture_trial._copied(step) as copied:
            there = copied.em.net.shared[0][0]
            assert there is not first and torch.equal(there.last, first.last)
            assert copied.optimizer.param_groups[0]["params"][0] is there.weight

    def test_the_trial_has_rehearsed_the_first_recording(self, stand_in):
        em, optimizer = _made()
        step = _captured(em, optimizer)
        step.why_eager, step._rehearsed = None, True
        for turn, (x, y) in enumerate(_batches(5)):
            optimizer.param_groups[0]["lr"] = 0.1 if turn < 3 else 0.05
            step(x, y)
        assert stand_in == ["eager", "record", "eager", *RECORDED]


@pytest.fixture
def debug_mode(monkeypatch):
    """Stands in for PyTorch's debug mode; returns what it was set to."""
    modes = ["warn"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


class TestRehearsal:
    @pytest.mark.parametrize("error", [None, ValueError("of the step")])
    def test_nothing_waits_in_it(self, error, debug_mode):
        waits = torch.cuda.synchronize, torch.cuda.Event.query, torch.cuda.Stream.synchronize

        def refused():
            with nothing_waits():
                assert debug_mode[-1] == "error"
                with pytest.raises(RuntimeError, match=r"calls torch\.cuda\.synchronize"):
                    torch.cuda.synchronize()
                with pytest.raises(RuntimeError, match=r"calls torch\.cuda\.Event\.query"):
                    torch.cuda.Event.query(None)
                if error:
                    raise error

        with pytest.raises(ValueError, match="of the step") if error else nullcontext():
            refused()
        assert debug_mode[-1] == "warn"
        now = torch.cuda.synchronize, torch.cuda.Event.query, torch.cuda.Stream.synchronize
        assert now == waits

    @pytest.mark.parametrize("fails", [None, "first", "second", "state"])
    def test_a_trial_that_would_fail_begins_no_capture(self, fails, debug_mode, monkeypatch):
        done = []

        class Copy:
            optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])

            def _warm_up(self):
                done.append(f"eager under {debug_mode[-1]}")
                if len(done) == {"first": 1, "second": 2}.get(fails):
                    raise RuntimeError("called a synchronizing CUDA operation\nmore of it")

            def _record(self):
                done.append("record")

        if fails == "state":
            Copy.optimizer.state[Copy.optimizer.param_groups[0]["params"][0]] = {"step": 3}
        monkeypatch.setattr(capture_trial, "_copied", lambda step: nullcontext(Copy()))
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        step = _captured(*_made())
        why = capture_trial.trial(step)
        assert step._rehearsed == (fails is None)
        assert (
            why
            == {
                None: "",
                "first": "RuntimeError: called a synchronizing CUDA operation",
                "second": "RuntimeError: called a synchronizing CUDA operation",
                "state": "SGD keeps 'step' on the host",
            }[fails]
        )
        eager = ["eager under warn", "eager under error"]
        assert done == {None: [*eager, "record"], "second": eager}.get(fails, eager[:1])


class _Subclass(torch.Tensor):
    pass


MISFITS = {
    "none": (lambda t: None, TypeError, "a tensor, got NoneType"),
    "fake": (lambda t: SimpleNamespace(shape=t.shape, dtype=t.dtype, device=t.device,
                                       layout=t.layout, requires_grad=False),
             TypeError, "a tensor, got SimpleNamespace"),
    "sparse": (torch.Tensor.to_sparse, TypeError, "a dense tensor"),
    "nested": (lambda t: torch.nested.nested_tensor([*t]), TypeError, "a dense tensor"),
    "jagged": (lambda t: torch.nested.nested_tensor([*t.flatten(1)] if t.dim() > 1 else
                                                    [t, t], layout=torch.jagged),
               TypeError, "a dense tensor"),
    "quantized": (lambda t: torch.quantize_per_tensor(t.float(), 1.0, 0, torch.qint8),
                  TypeError, "a dense tensor"),
    "shape": (lambda t: t[:3], ValueError, "shape"),
    "more dimensions": (lambda t: t[None], ValueError, "shape"),
    "dtype": (torch.Tensor.half, ValueError, "shape .* of torch.* got .* of torch.float16"),
    "device": (lambda t: t.to("meta"), ValueError, "shape .* on cpu, .* on meta"),
}  # fmt: skip


class TestACallOfAGraph:
    """What a call does around the replay, with a graph that does nothing."""

    def _recorded(self):
        em, optimizer = _made()
        step = _captured(em, optimizer)
        step._result = step.eager(*_batches(1)[0])
        parameters = [p for p in em.net.parameters() if p.grad is not None]
        step._grads = parameters, [p.grad for p in parameters]
        step.why_eager, step._graph = None, Mock()
        step._recorded = step._taken_in()
        step._holds.remember()
        return step

    @pytest.fixture(autouse=True)
    def _on_a_device(self, stand_in):
        self.done = stand_in

    def test_the_mini_batch_is_where_the_graph_reads_it(self):
        step, (x, y) = self._recorded(), _batches(3)[2]
        for given in (x, x.clone().requires_grad_(), x.double().float().as_subclass(_Subclass)):
            step._x.zero_()
            assert step(given, y) is step._result
            assert torch.equal(step._x, x) and torch.equal(step._y, y)
            assert not step._x.requires_grad
        assert step._graph.replay.call_count == 3 and not self.done

    @pytest.mark.parametrize("change", [lambda grad: None, torch.clone])
    @pytest.mark.parametrize("which", [0, -1])
    def test_gradients_are_those_of_the_graph(self, change, which):
        step = self._recorded()
        parameters, grads = step._grads
        parameters[which].grad = change(grads[which])
        step(*_batches(1)[0])
        assert all(p.grad is grad for p, grad in zip(parameters, grads, strict=True))
        assert step._graph.replay.call_count == 1

    @pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:.*quantize")
    @pytest.mark.parametrize("misfit", MISFITS)
    def test_a_misfit_changes_nothing(self, misfit):
        step, (x, y) = self._recorded(), _batches(2)[1]
        before = step._x.clone(), step._y.clone()
        change, error, message = MISFITS[misfit]
        for name, given in {
            "x": (change(x), y),
            "y": (x, change(y)),
            "x, before y": (change(x), change(y)),
        }.items():
            with pytest.raises(error, match=f"{name[0]}: expected {message}"):
                step(*given)
        assert torch.equal(step._x, before[0]) and torch.equal(step._y, before[1])
        step._net._configs["a"] = (True,)
        with pytest.raises(ValueError, match="task: expected one that has not ended"):
            step(change(x), y)
        assert not step._graph.replay.called and not self.done

    @pytest.mark.filterwarnings("ignore:.*quantize")
    def test_a_quantized_mini_batch_is_refused_at_once(self):
        em, optimizer = _made()
        x, y = _batches(1)[0]
        x = torch.quantize_per_tensor(x, 1.0, 0, torch.qint8)
        with pytest.raises(TypeError, match="x: expected a dense tensor, got a quantised one of"):
            lf.capture(em, optimizer, x, y, "a")

    def test_an_ended_task(self):
        step = self._recorded()
        step.em.end_task("a")
        with pytest.raises(ValueError, match="task: expected one that has not ended"):
            step(*_batches(1)[0])
        assert not step._graph.replay.called

    def test_the_roll_back_is_told_whose_step_comes(self):
        step = self._recorded()
        step(*_batches(1)[0])
        assert step.em._rollback.active == "a"
        step.em(*_batches(1)[0], "b")
        assert step.em._rollback.active == "b"
        step._recorded = step._taken_in()  # with the prior's count of the other task
        step._holds.remember()
        step(*_batches(1)[0])
        assert step.em._rollback.active == "a" and not self.done


def _exchanged(em):
    """Two weights of one shape change places."""
    one, other = em.net.shared[1][0].weight, em.net.specific["a"][1][0].weight
    one.data, other.data = other.data, one.data


def _replaced_count(em):
    state = em._prior.states["a"]
    state.wins = state.wins.clone()


CHANGES = {
    "mode": lambda em, opt: em.eval(),
    "address": lambda em, opt: setattr(em.net.shared[0][0].weight, "data", torch.zeros(1)),
    "frozen": lambda em, opt: em.net.shared[0][0].weight.requires_grad_(False),
    "rate": lambda em, opt: opt.param_groups[0].update(lr=0.3),
    "loaded": lambda em, opt: opt.load_state_dict(copy.deepcopy(opt.state_dict())),
    "group": lambda em, opt: opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
    "task": lambda em, opt: em(*_batches(1)[0], "b"),
    "cast": lambda em, opt: em.double(),
    "thawed": lambda em, opt: em.net.heads["b"].requires_grad_(True),
    "exchanged": lambda em, opt: _exchanged(em),
    "last": lambda em, opt: setattr([*em.net.parameters()][-1], "data", torch.zeros(1)),
    "count": lambda em, opt: _replaced_count(em),
    "count forgotten": lambda em, opt: em._prior.forget("a"),
    "state": lambda em, opt: opt.state.popitem(),
    "more": lambda em, opt: opt.param_groups[0]["params"].append(nn.Parameter(torch.zeros(1))),
    "less": lambda em, opt: opt.param_groups[0]["params"].pop(),
    "new value": lambda em, opt: opt.param_groups[0].update(more=1),
    "no group": lambda em, opt: opt.param_groups.pop(),
}
# Replaced by an equal one, which a look at everything takes for the same.
EQUALS = {
    "state": lambda opt: setattr(opt, "state", copy.copy(opt.state)),
    "groups": lambda opt: setattr(opt, "param_groups", [*opt.param_groups]),
    "a value": lambda opt: opt.param_groups[0].update(lr=float(str(opt.param_groups[0]["lr"]))),
}


class TestHoldings:
    """What a quick look sees, and that a full one comes now and then."""

    def _held(self):
        em, optimizer = _made()
        em.net.heads["b"].requires_grad_(False)
        em(*_batches(1)[0], "a").loss.backward()
        optimizer.step()
        holds = Holdings(em, optimizer)
        holds.remember()
        return em, optimizer, holds

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_change_is_seen_at_once(self, change):
        em, optimizer, holds = self._held()
        before = holds.everything()
        assert holds.seem_the_same()
        CHANGES[change](em, optimizer)
        assert not holds.seem_the_same()
        assert holds.everything() != before

    @pytest.mark.parametrize("change", EQUALS)
    def test_an_equal_one_is_looked_at_closely(self, change):
        _, optimizer, holds = self._held()
        before = holds.everything()
        EQUALS[change](optimizer)
        assert not holds.seem_the_same()
        assert holds.everything() == before

    def test_a_buffer_of_the_prior_itself_is_seen(self):
        em, optimizer = _made(prior=torch.ones(8))
        holds = Holdings(em, optimizer)
        holds.remember()
        assert holds.seem_the_same()
        em._prior.probabilities = em._prior.probabilities.clone()
        assert not holds.seem_the_same()

    def test_the_probability_of_a_dropout_is_seen_at_once(self):
        em, optimizer = _made()
        dropout = nn.Dropout(0.0)
        em.net.heads["a"].append(dropout)
        holds = Holdings(em, optimizer)
        before = holds.everything()
        holds.remember()
        assert holds.seem_the_same()
        dropout.p = 0.5
        assert not holds.seem_the_same()
        assert holds.everything() != before

    def test_steps_change_nothing(self):
        em, optimizer, holds = self._held()
        em(*_batches(1)[0], "a").loss.backward()
        optimizer.step()
        assert holds.seem_the_same()

    def test_a_weight_that_is_replaced_in_its_module_is_seen_in_time(self):
        em, _, holds = self._held()
        before = holds.everything()
        conv = next(m for m in em.net.shared.modules() if "weight" in m._parameters)
        conv.weight = nn.Parameter(conv.weight.detach().clone())
        assert holds.everything() != before
        holds.remember()
        conv.weight.requires_grad_(False)
        assert not holds.seem_the_same()

    def test_everything_is_compared_now_and_then(self):
        holds = self._held()[2]
        looks = [holds.seem_the_same() for _ in range(256)]
        assert all(looks[:-1]) and not looks[-1]
        holds.remember()
        assert holds.seem_the_same()


class _NeverWaits(TorchDispatchMode):
    """Refuses what waits for a device or copies to it: neither can be in a CUDA graph."""

    READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select",
             "_unique2", "unique_dim", "bincount")  # fmt: skip

    def __enter__(self):
        self.makers = torch.tensor, torch.as_tensor
        torch.tensor = torch.as_tensor = self._from_host
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor, torch.as_tensor = self.makers
        return super().__exit__(*error)

    def _from_host(self, *args, **kwargs):
        raise AssertionError(f"a tensor made from values on the host: {args}")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        kinds = {t.device.type for t in tensors}
        assert name not in self.READS and len(kinds) < 2, f"{function}: {kinds}"
        return out


SPACES = {
    "all": None,
    "groups": lf.ConfigSpace(3, groups=(2, 1)),
    "list": lf.ConfigSpace.from_configs([{1, 2}, {3}, {1, 2, 3}, set()], depth=3),
}


@pytest.fixture
def no_kept_indices():
    """Index tensors without values must not outlive their test."""
    _kept_index.cache_clear()
    yield
    _kept_index.cache_clear()


@pytest.mark.usefixtures("no_kept_indices")
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    ("prior", "likelihood"),
    [
        ("count", "joint"),
        ("mean_posterior", "mean"),
        ("uniform", "gaussian"),
        ("historic", "joint"),
        ("tensor", "mean"),
    ],
)
def test_a_step_on_a_device_never_waits(backend, space, prior, likelihood, monkeypatch):
    """On the meta device, which has no values to read; the first step makes what is kept."""
    monkeypatch.setattr("lasem_fast.search.dispatch._why_no_triton", lambda: "")
    space = SPACES[space]
    net = small_net(dtype=torch.float32, extra=(lambda: nn.BatchNorm2d(3), lambda: nn.Dropout(0.5)))
    if prior == "tensor":
        prior = torch.ones(8 if space is None else len(space))
    if likelihood == "gaussian":
        likelihood = lf.likelihoods.Gaussian(0.5)
    em = lf.LASEM(net, space, likelihood, prior, backend).to("meta")
    x, y = (t.to("meta") for t in _batches(1)[0])
    if not isinstance(likelihood, str):
        y = torch.zeros(4, 3, device="meta")
    for dropout in (True, False):
        em.train(dropout)
        opt = OPTIMIZERS["sgd"](net.parameters())
        for mode in (nullcontext(), _NeverWaits()):
            with mode:
                opt.zero_grad()
                em(x, y, "a").loss.backward()
                opt.step()


def test_what_waits_is_found():
    waits = (
        lambda t: float(t.sum()),
        lambda t: bool((t > 0).any()),
        lambda t: t[t > 0],
        lambda t: t + torch.tensor([1.0], device="meta"),
        lambda t: t + torch.as_tensor([1.0]),
        lambda t: t.copy_(torch.zeros(1)),
        lambda t: torch.where(t > 0, t, torch.zeros(())),
    )
    t = torch.ones(1, device="meta")
    with _NeverWaits():
        torch.where(t > 0, t, 0.0)
    for wait in waits:
        with pytest.raises((AssertionError, RuntimeError)), _NeverWaits():
            wait(t)


def test_weights_stay_where_nobody_else_runs_before_the_forward():
    class Clipped(lf.LASEM):
        def forward(self, *args):
            for weight in self.net.parameters():
                weight.data.clamp_(-1, 1)
            return super().forward(*args)

    em, _ = _made()
    assert all(map(torch.equal, _constant_weights(em), em.net.parameters()))
    assert not _constant_weights(Clipped(em.net))
    handle = em.net.shared[0].register_forward_hook(lambda *_: None)
    assert not _constant_weights(em)
    handle.remove()
    assert _constant_weights(em)
