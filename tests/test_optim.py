"""TFRMSprop: worked by hand, against an independent loop, saved and compiled."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import lasem_fast as lf


def _with_grads(values, grads):
    params = [nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in values]
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else torch.tensor(g, dtype=torch.float64)
    return params


def test_worked_by_hand():
    # g = 2: ms = 0.9 * 1 + 0.1 * 4 = 1.3, w = 1 - 0.13 * 2 / sqrt(1.3)
    # g = 1: ms = 0.9 * 1.3 + 0.1 * 1 = 1.27, w = w - 0.13 / sqrt(1.27)
    p, untouched = _with_grads([1.0, 1.0], [2.0, None])
    optimizer = lf.optim.TFRMSprop([p, untouched], lr=0.13)
    optimizer.step()
    expected = 1 - 0.26 / math.sqrt(1.3)
    assert float(p.detach()) == pytest.approx(expected, abs=1e-10)
    p.grad.fill_(1.0)
    optimizer.step()
    expected -= 0.13 / math.sqrt(1.27)
    assert float(p.detach()) == pytest.approx(expected, abs=1e-10)
    assert float(untouched.detach()) == 1 and untouched not in optimizer.state


def test_eps_is_inside_the_square_root():
    # decay 0: ms = g^2 = 9, w = -3 / sqrt(9 + 16)
    (p,) = _with_grads([0.0], [3.0])
    lf.optim.TFRMSprop([p], lr=1.0, decay=0.0, eps=16.0).step()
    assert float(p.detach()) == pytest.approx(-0.6, abs=1e-12)


def _train(optimizer, model, steps, scheduler=None, step=None):
    for i in range(steps):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        (step or optimizer.step)()
        if scheduler is not None:
            scheduler.step()


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_equals_the_release_s_update_with_groups_and_a_schedule():
    model = _model()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.3}]
    optimizer = lf.optim.TFRMSprop(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: 1 / (1 + e / 4))
    other = _model()
    mean_squares = [torch.ones_like(p) for p in other.parameters()]
    for i in range(6):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        grads = torch.autograd.grad(other(x).square().mean(), list(other.parameters()))
        with torch.no_grad():
            for j, (p, g, ms) in enumerate(
                zip(other.parameters(), grads, mean_squares, strict=True)
            ):
                ms.copy_(0.9 * ms + 0.1 * g * g)
                lr = (0.1 if j < 2 else 0.3) / (1 + i / 4)
                p -= lr * g / torch.sqrt(ms + 1e-10)
    _train(optimizer, model, 6, scheduler)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert float((p - q).detach().abs().max()) <= 1e-10


def test_a_saved_optimiser_goes_on_as_if_never_saved():
    model = _model()
    optimizer = lf.optim.TFRMSprop(model.parameters(), lr=0.1)
    _train(optimizer, model, 3)
    again = copy.deepcopy(model)
    resumed = lf.optim.TFRMSprop(again.parameters(), lr=7.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(optimizer, model, 3)
    _train(resumed, again, 3)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_compiled_with_a_tensor_learning_rate():
    plain, compiled = _model(), _model()
    for model, compile_it in ((plain, False), (compiled, True)):
        optimizer = lf.optim.TFRMSprop(model.parameters(), lr=torch.tensor(0.1).double())
        step = torch.compile(optimizer.step, backend="aot_eager") if compile_it else None
        _train(optimizer, model, 3, step=step)
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert float((p - q).detach().abs().max()) <= 1e-10


def test_a_closure_is_run_with_gradients():
    (p,) = _with_grads([1.0], [None])
    optimizer = lf.optim.TFRMSprop([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 1 and float(p.detach()) < 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr: expected a finite number of at least 0"),
        ({"lr": math.nan}, "lr: expected"),
        ({"decay": 1.5}, "decay: expected a number in 0..1, got 1.5"),
        ({"eps": 0.0}, "eps: expected a finite number above 0"),
    ],
)
def test_bad_arguments_are_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        lf.optim.TFRMSprop([nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize("setting", [{"lr": -1.0}, {"decay": 7}, {"eps": math.nan}])
def test_settings_of_a_group_are_checked_as_well(setting):
    def group():
        return {"params": [nn.Parameter(torch.ones(1))], **setting}

    with pytest.raises(ValueError, match=f"{next(iter(setting))}: expected"):
        lf.optim.TFRMSprop([group()])
    optimizer = lf.optim.TFRMSprop([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=f"{next(iter(setting))}: expected"):
        optimizer.add_param_group(group())
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused():
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="expected dense gradients"):
        lf.optim.TFRMSprop(table.parameters()).step()


@pytest.mark.parametrize("value", ["1", None, torch.ones(2), True])
@pytest.mark.parametrize("name", ["lr", "decay", "eps"])
def test_what_is_no_number_is_refused_in_words(name, value):
    with pytest.raises(TypeError, match=f"{name}: expected a finite number"):
        lf.optim.TFRMSprop([nn.Parameter(torch.ones(1))], **{name: value})
    with pytest.raises(TypeError, match="closure: expected a function"):
        lf.optim.TFRMSprop([nn.Parameter(torch.ones(1))]).step(1)
