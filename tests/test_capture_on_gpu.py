"""What only a GPU shows: graph replay, streams, waits, memory of over 2^31 elements."""

from __future__ import annotations

import copy
from functools import partial

import parity
import pytest
import torch
from torch import nn

import lasem_fast as lf
from bench.cases import TASK
from lasem_fast.backends import triton_level
from lasem_fast.capture import CapturedStep
from lasem_fast.search import dispatch

pytestmark = pytest.mark.gpu

BACKENDS = ["torch", "triton"]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, capturable=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True, fused=True),
    "tf rmsprop": lambda p: lf.optim.TFRMSprop(p, lr=0.01),
}


@pytest.fixture(autouse=True)
def _deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False
    torch.use_deterministic_algorithms(False)


def _made(backend, optimizer="sgd", prior="count", net="pool 2 thrice", dropout=0.0):
    drawn = parity.problem(net, device="cuda")
    if dropout:
        drawn.net.heads[TASK].insert(1, nn.Dropout(dropout).cuda())
    em = lf.LASEM(drawn.net, drawn.space, prior=prior, backend=backend)
    return em, OPTIMIZERS[optimizer](drawn.net.parameters()), drawn


def _batches(drawn, count):
    generator = torch.Generator("cuda").manual_seed(3)
    for _ in range(count):
        x = torch.randn(drawn.x.shape, generator=generator, device="cuda")
        yield x, torch.randint(parity.CLASSES, drawn.y.shape, generator=generator, device="cuda")


def _plain(em, optimizer, x, y):
    optimizer.zero_grad()
    step = em(x, y, TASK)
    step.loss.backward()
    optimizer.step()
    return step


def _assert_same_training(
    captured, em, optimizer, drawn, turns=6, change=lambda t, o: None, prepare=lambda em: None
):  # fmt: skip
    """Every replay gives what the plain loop gives from the same state, bit for bit."""
    plain_em, plain_optimizer = copy.deepcopy((em, optimizer))
    prepare(plain_em)
    for turn, (x, y) in enumerate(_batches(drawn, turns)):
        change(turn, optimizer)
        change(turn, plain_optimizer)
        got, want = captured(x, y), _plain(plain_em, plain_optimizer, x, y)
        for name, g, w in zip(got._fields, got, want, strict=True):
            assert torch.equal(g, w), (turn, name)
    for (name, a), b in zip(em.net.named_parameters(), plain_em.net.parameters(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(em.net.named_buffers(), plain_em.net.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(em.prior(TASK), plain_em.prior(TASK))


@pytest.fixture
def in_boxes(monkeypatch):
    """Levels that read boxes alone, which a device before Hopper cannot."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("boxes need a device of compute capability 9.0")
    monkeypatch.setattr(dispatch, "_ON_GPU", (triton_level.BoxLevel(),))


def _scale_in_place(parameter):
    parameter.grad.mul_(2)


# What looks at a gradient within the backward: its sum must be there by then.
LOOKS = {
    "nobody": lambda em: None,
    "a hook": lambda em: em.net.shared[1][0].weight.register_hook(lambda grad: 2 * grad),
    "a later hook": lambda em: em.net.shared[1][0].weight.register_post_accumulate_grad_hook(
        _scale_in_place
    ),
    "another layer": lambda em: setattr(em.net.shared[2][0], "bias", em.net.shared[0][0].bias),
}


@pytest.mark.usefixtures("in_boxes")
@pytest.mark.parametrize("looks", LOOKS)
def test_replay_in_boxes_is_the_plain_loop(looks):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        em, opt, drawn = _made("triton", net="runs of 8 channels")
        LOOKS[looks](em)
        opt = OPTIMIZERS["sgd"](em.net.parameters())
        captured = lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)
        # copies have no hooks
        prepare = LOOKS[looks] if "hook" in looks else LOOKS["nobody"]
        _assert_same_training(captured, em, opt, drawn, prepare=prepare)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_replay_with_batch_norm(backend, momentum):
    """Running statistics move in the graph."""
    drawn = parity.problem("batch norm", device="cuda")
    for layer in drawn.net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = momentum
    em = lf.LASEM(drawn.net, drawn.space, backend=backend)
    opt = OPTIMIZERS["sgd"](drawn.net.parameters())
    captured = lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)
    _assert_same_training(captured, em, opt, drawn)
    assert any(int(t) == 6 for n, t in em.net.named_buffers() if n.endswith("batches_tracked"))


@pytest.mark.usefixtures("in_boxes")
@pytest.mark.parametrize("past_the_counter", [False, True])
def test_a_weight_that_is_changed_within_the_step(past_the_counter):
    """Its copy is not made from the step's beginning on."""

    @torch.no_grad()
    def halve(em, _):
        weight = em.net.shared[1][0].weight
        (weight.data if past_the_counter else weight).mul_(0.5)

    with torch.autocast("cuda", dtype=torch.bfloat16):
        em, opt, drawn = _made("triton", net="runs of 8 channels")
        em.register_forward_pre_hook(halve)
        captured = lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)
        _assert_same_training(captured, em, opt, drawn)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replay_is_the_plain_loop(backend, optimizer):
    em, opt, drawn = _made(backend, optimizer)
    captured = lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)
    _assert_same_training(captured, em, opt, drawn)
    assert captured._graph is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prior", ["mean_posterior", "uniform", "historic"])
def test_every_prior(backend, prior):
    em, opt, drawn = _made(backend, prior=prior)
    captured = lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)
    _assert_same_training(captured, em, opt, drawn)


@pytest.mark.parametrize("net", ["linear", "groups", "tf", "dfcnn", "residual", "stride 2"])
def test_every_kind_of_net(net):
    em, opt, drawn = _made("triton", net=net)
    captured = lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)
    _assert_same_training(captured, em, opt, drawn)


@pytest.mark.parametrize("optimizer", ["adam", "sgd, fused", "tf rmsprop"])
def test_learning_rates_that_change(optimizer):
    em, opt, drawn = _made("triton", optimizer)
    captured = lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)

    def change(turn, optimizer):
        if turn == 0:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.05, device="cuda")
        optimizer.param_groups[0]["lr"].fill_(0.05 / (turn + 1))

    _assert_same_training(captured, em, opt, drawn, change=change)
    graph = captured._graph

    def change_float(turn, optimizer):
        optimizer.param_groups[0]["lr"] = 0.05 if turn < 3 else 0.01

    _assert_same_training(captured, em, opt, drawn, turns=7, change=change_float)
    assert captured._graph is not None and captured._graph is not graph


def test_capturing_changes_nothing():
    em, opt, drawn = _made("triton", dropout=0.5)
    before = copy.deepcopy((em.state_dict(), opt.state_dict()))
    random_state = torch.cuda.get_rng_state()
    lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)
    assert str((em.state_dict(), opt.state_dict())) == str(before)
    assert torch.equal(torch.cuda.get_rng_state(), random_state)


def test_dropout_draws_anew_in_every_replay():
    em, opt, drawn = _made("triton", dropout=0.5)
    opt.param_groups[0].update(lr=0.0, momentum=0.0)
    captured = lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)
    losses = {float(captured(drawn.x, drawn.y).loss) for _ in range(6)}
    assert len(losses) > 3


class _Waits(nn.Module):
    def forward(self, h):
        return h * float(h.detach().sum() > -1e9)


@pytest.mark.filterwarnings("ignore:.*CUDA Graph is empty.*")
def test_a_stage_that_waits_leaves_the_eager_step():
    em, opt, drawn = _made("torch")
    drawn.net.heads[TASK].append(_Waits())
    with pytest.raises(RuntimeError, match="cannot be captured"):
        lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)
    stream = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="runs eagerly"):
        captured = lf.capture(em, opt, drawn.x, drawn.y, TASK)
    assert captured.why_eager and torch.cuda.current_stream() == stream
    _assert_same_training(captured, em, opt, drawn)


def test_an_optimiser_that_is_not_capturable():
    em, _, drawn = _made("torch")
    opt = torch.optim.Adam(drawn.net.parameters())
    with pytest.raises(RuntimeError, match="Adam has capturable=False"):
        lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)
    opt = torch.optim.Adagrad(drawn.net.parameters())
    with pytest.raises(RuntimeError, match="cannot be captured"):
        lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)


def test_autocast():
    em, opt, drawn = _made("triton")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        captured = lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)
    plain_em, plain_opt = copy.deepcopy((em, opt))
    for x, y in _batches(drawn, 5):
        got = captured(x, y)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            plain_opt.zero_grad()
            want = plain_em(x, y, TASK)
        want.loss.backward()
        plain_opt.step()
        assert torch.equal(got.loss, want.loss) and torch.equal(got.posterior, want.posterior)


def _on_late_input(stream, step, x, y):
    """A step on ``stream``, whose input arrives late: what does not wait for it reads NaN."""
    late = torch.full_like(x, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        result = step(late, y)
    torch.cuda.synchronize()
    return result


def test_replays_follow_the_current_stream():
    em, opt, drawn = _made("triton")
    captured = lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)
    plain_em, plain_opt = copy.deepcopy((em, opt))
    stream = torch.cuda.Stream()
    for x, y in _batches(drawn, 5):
        got = _on_late_input(stream, lambda late, y: captured(late, y).clone(), x, y)
        assert torch.equal(got.loss, _plain(plain_em, plain_opt, x, y).loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eager_steps_follow_the_current_stream(backend):
    em, opt, drawn = _made(backend)
    plain_em, plain_opt = copy.deepcopy((em, opt))
    stream = torch.cuda.Stream()
    for x, y in _batches(drawn, 3):
        got = _on_late_input(stream, partial(_plain, em, opt), x, y)
        assert torch.equal(got.loss, _plain(plain_em, plain_opt, x, y).loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("net", ["pool 2 thrice", "groups", "linear", "tf", "residual"])
def test_no_step_waits_for_the_device(backend, net):
    em, opt, drawn = _made(backend, net=net)
    captured = lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)
    for _ in range(3):
        captured(drawn.x, drawn.y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured(drawn.x, drawn.y)
        _plain(em, opt, drawn.x, drawn.y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_ended_task_and_a_new_one():
    em, opt, drawn = _made("triton")
    drawn.net.add_task("next", copy.deepcopy(drawn.net.heads[TASK]))
    drawn.net.cuda()
    captured = lf.capture(em, opt, drawn.x, drawn.y, TASK, strict=True)
    for x, y in _batches(drawn, 4):
        captured(x, y)
    before = [p.detach().clone() for p in em.net.shared.parameters()]
    other = OPTIMIZERS["sgd"](drawn.net.task_parameters("next"))
    second = lf.capture(em, other, drawn.x, drawn.y, "next", strict=True)
    assert isinstance(second, CapturedStep)
    assert all(torch.equal(a, b) for a, b in zip(before, em.net.shared.parameters(), strict=True))
    em.end_task(TASK)
    with pytest.raises(ValueError, match="has not ended"):
        captured(drawn.x, drawn.y)
    for x, y in _batches(drawn, 4):
        assert second(x, y).loss.isfinite()


class TestMoreThan2To31Elements:
    @pytest.fixture(autouse=True)
    def _room(self):
        torch.use_deterministic_algorithms(False)  # it would fill every new tensor
        yield
        torch.cuda.empty_cache()

    def _needs(self, gib):
        if torch.cuda.mem_get_info()[0] < gib * 2**30:
            pytest.skip(f"needs {gib} GiB of free device memory")

    def test_of_logits(self):
        self._needs(20)
        from lasem_fast.backends.triton_head_op import posterior_head

        configs, samples, classes = 4096, 64, 8200
        logits = torch.zeros(configs, samples, classes, dtype=torch.bfloat16, device="cuda")
        assert logits.numel() > 2**31
        y = torch.full((samples,), classes - 1, device="cuda")
        logits[-1, :, -1] = 4.0
        few = logits[-2:].clone().requires_grad_()
        logits.requires_grad_()
        log_prior = torch.full((configs,), -torch.inf, device="cuda")
        log_prior[-2:] = 0.0
        got = posterior_head(logits, y, log_prior=log_prior)
        want = posterior_head(few, y)
        for g, w in zip(got[:3], want[:3], strict=True):
            assert torch.equal(g[-2:], w)
        got[3].backward()
        want[3].backward()
        assert torch.equal(logits.grad[-2:], few.grad) and few.grad.any()
        assert not logits.grad[:2].any()

    def test_of_a_levels_output(self):
        self._needs(40)
        stages = [nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
        net = lf.TransferNet(stages)
        net.add_task("a", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)))
        em = lf.LASEM(net.cuda(), backend="triton")
        samples, side = 66, 1024
        x = torch.randn(samples, 3, side, side, device="cuda", dtype=torch.bfloat16)
        assert 2 * samples * 64 * (side // 2) ** 2 > 2**31
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            whole, last = em.evaluate(x, "a")[:, -1:], em.evaluate(x[-1:], "a")
        # two roundings of bf16 apart, where another tiling adds in another order
        assert (whole - last).abs().max() <= 2 * 2**-8 * last.abs().max()
