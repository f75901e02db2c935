"""Methods that a sequence is trained by: their numbers, and what they leave alone."""

from __future__ import annotations

import copy

import experiment_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lasem_fast import ConfigSpace
from lasem_fast.lifelong import Task
from lasem_fast.lifelong.methods import BruteForce, SingleTask, Static

DOUBLE = torch.float64


def linear_head(task: Task) -> nn.Module:
    return nn.Linear(cases.HIDDEN, task.n_classes)


def conv_task(name: str) -> Task:
    x, y = torch.randn(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    return Task(name, (x, y), (x, y), (x, y), n_classes=3)


def conv_head() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


@pytest.mark.parametrize("method", cases.METHODS)
def test_every_method_trains_by_the_same_loop(method):
    record = cases.run(method)
    assert record.method == {"single": "SingleTask", "brute": "brute_force"}.get(method, method)
    assert [len(row) for row in record.matrix] == [cases.TASKS] * cases.TASKS
    assert set(record.seconds) == {"train", "evaluate", "rest"}
    assert all(seconds >= 0 for seconds in record.seconds.values())
    assert cases.without_times(record) == cases.without_times(cases.run(method))


def test_learning_rate_follows_the_epochs_of_the_whole_run():
    rates = []

    class Noting(Static):
        def step(self, x, y, task, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])
            return super().step(x, y, task, optimizer)

    def noting(make_net):
        return Noting(make_net(), {1})

    cases.run(noting, tasks=cases.make_tasks(2), batch_size=21)
    assert rates == [0.02 * (1 / (1 + 0.1 * epoch)) for epoch in range(2 * cases.EPOCHS)]


def test_a_small_last_mini_batch_can_be_left_out():
    sizes = []

    class Noting(Static):
        def step(self, x, y, task, optimizer):
            sizes.append(len(x))
            return super().step(x, y, task, optimizer)

    def noting(make_net):
        return Noting(make_net(), {1})

    one = {"tasks": cases.make_tasks(1), "epochs": 1}
    cases.run(noting, **one)
    cases.run(noting, **one, drop_last=True)
    cases.run(noting, **one, drop_last=True, batch_size=50)
    assert sizes == [8, 8, 5, 8, 8, 21]


def test_a_static_step_of_tensor_factorisation_holds_its_factors_orthogonal():
    """Cross-entropy plus 0.1 ||U^T U - 1|| of every factor of the shared stages."""
    net = cases.make_conv_net("tf").double()
    method = Static(net, {2})
    task = conv_task("a")
    x, y = task.train[0].double(), task.train[1]
    parameters = method.add_task(task, conv_head().double())
    before = [p.detach().clone() for p in parameters]
    factors = [p for p in net.adapters["a"][1].parameters() if p.dim() == 2]
    assert len(factors) == 4
    loss = F.cross_entropy(net(x, "a", config={2}), y)
    for u in factors:
        loss = loss + 0.1 * (u.T @ u - torch.eye(len(u), dtype=DOUBLE)).square().sum().sqrt()
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = method.step(x, y, "a", torch.optim.SGD(parameters, lr=0.5))
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for p, old, grad in zip(parameters, before, grads, strict=True):
        expected = old if grad is None else old - 0.5 * grad
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)


def test_single_tasks_do_not_touch_one_another():
    nets = []

    def build():
        nets.append(cases.make_net())
        return nets[-1]

    record = cases.run("single", make_net=build)
    assert len(nets) == cases.TASKS
    for j in range(cases.TASKS):
        assert len({record.matrix[i][j] for i in range(j, cases.TASKS)}) == 1
    trunk = (cases.FEATURES + 1) * cases.HIDDEN + (cases.HIDDEN + 1) * cases.HIDDEN
    assert record.parameters == cases.TASKS * (trunk + (cases.HIDDEN + 1) * cases.CLASSES)
    assert record.share_frequency == [] and record.summary()["forgetting_ratio_to_end"] == 1
    assert [(task.config, task.label) for task in record.tasks] == [([], "")] * cases.TASKS


# Brute force


def counting(tried: list):
    class Counting(BruteForce):
        def try_out(self, task, config):
            tried.append((task.name, config))
            return super().try_out(task, config)

    def counted(make_net):
        return Counting(make_net())

    return counted


def test_brute_force_visits_every_configuration_once_and_keeps_the_best_by_validation():
    tried, progress = [], []
    record = cases.run(counting(tried), on_epoch=progress.append)
    space = ConfigSpace(cases.DEPTH)
    for number, task in enumerate(record.tasks):
        expected = [space.bottom(0)] if number == 0 else space.configs
        visited = [config for name, config in tried if name == task.name]
        # the last time is the adoption of the best
        assert visited[:-1] == expected and visited[-1] == tuple(task.config)
        scores = [trial["valid"] for trial in task.trials]
        best = task.trials[scores.index(max(scores))]  # the first on ties
        assert (best["label"], best["config"]) == (task.label, task.config)
        assert max(task.valid) == best["valid"] and task.peak == best["peak"]
    assert len({t["valid"] for task in record.tasks[1:] for t in task.trials}) > 1
    trainings = 1 + (cases.TASKS - 1) * len(space)
    assert len(progress) == trainings * cases.EPOCHS
    assert [(p.trial, p.trials) for p in progress[-1:]] == [(len(space), len(space))]


@pytest.mark.parametrize("transfer", ["hps", "tf", "dfcnn"])
def test_the_first_task_answers_the_same_in_whatever_configuration_the_second_is_tried(transfer):
    torch.manual_seed(3)
    net = cases.make_conv_net(transfer)
    method = BruteForce(net)
    a, b = conv_task("a"), conv_task("b")
    method.add_task(a, conv_head())
    (first,) = method.candidates(a)
    assert list(first) == [transfer != "hps"] * net.depth
    optimizer = torch.optim.SGD(method.try_out(a, first), lr=0.1)
    method.step(*a.train, "a", optimizer)
    method.end_task(a)
    answers = method.logits(a.test[0], "a").detach()
    method.add_task(b, conv_head())
    start = copy.deepcopy(net.state_dict())
    for config in method.candidates(b):
        net.load_state_dict(start)
        method.try_out(b, config)
        assert net.config("a") == config
        torch.testing.assert_close(method.logits(a.test[0], "a"), answers, rtol=0, atol=1e-6)


def test_a_trial_equals_a_plain_loop_over_plain_modules():
    """Two tasks in float64: every trial of the second by torch alone, from the same weights."""
    tasks = cases.make_tasks(2, DOUBLE)
    built = []

    def build():
        built.append(cases.make_net().double())
        return built[-1]

    heads = []

    def head(task):
        heads.append(linear_head(task).double())
        return heads[-1]

    starts = []  # of task 2: first task's stages, new stages, new head

    class Noting(BruteForce):
        def try_out(self, task, config):
            if task.name == "t1" and self.module.config("t0") is None:
                parts = (self.module.specific["t0"], self.module.specific["t1"], heads[1])
                starts.append([copy.deepcopy(part) for part in parts])
            return super().try_out(task, config)

    def noting(make_net):
        return Noting(make_net())

    record = cases.run(
        noting, tasks=tasks, make_net=build, make_head=head, schedule=None,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    )  # fmt: skip
    seeds = torch.randint(2**31, (3,), generator=torch.Generator().manual_seed(0)).tolist()
    for trial in record.tasks[1].trials:
        old, new, own_head = copy.deepcopy(starts[0])
        stages = [old[i] if shared else new[i] for i, shared in enumerate(trial["config"])]
        net = nn.Sequential(*stages, own_head)
        order = torch.Generator().manual_seed(seeds[2])
        (x, y), valid, test = tasks[1].train, [], []
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(cases.EPOCHS):
            for rows in torch.randperm(len(x), generator=order).split(8):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
            for split, into in ((tasks[1].valid, valid), (tasks[1].test, test)):
                into.append((net(split[0]).argmax(1) == split[1]).double().mean().item())
        assert trial["valid"] == pytest.approx(max(valid), abs=1e-12)
        assert trial["peak"] == pytest.approx(test[valid.index(max(valid))], abs=1e-12)


def test_what_is_no_method_is_refused_by_name():
    with pytest.raises(TypeError, match=r"method: expected a function that returns a .* lacks"):
        cases.run(lambda make_net: make_net())
    with pytest.raises(ValueError, match="em_options: expected None for a method of your own"):
        cases.run(SingleTask, em_options={"backend": "torch"})
    with pytest.raises(ValueError, match="space: expected configurations of the net's 2 stages"):
        BruteForce(cases.make_net(), ConfigSpace(3))


@pytest.mark.parametrize("method", ["lasem", "brute"])
def test_evaluating_less_often_changes_nothing_else(method):
    often, seldom = cases.run(method, epochs=5), cases.run(method, epochs=5, evaluate_every=2)
    for every, some in zip(often.tasks, seldom.tasks, strict=True):
        assert some.evaluated == [2, 4, 5] and every.evaluated == []
        assert len(some.loss) == 5
        if method == "lasem":  # a brute-force search chooses by what it has seen
            assert some.loss == every.loss and some.posterior == every.posterior
            assert some.valid == [every.valid[epoch - 1] for epoch in some.evaluated]
            assert some.test == [every.test[epoch - 1] for epoch in some.evaluated]
        assert some.peak == some.test[some.valid.index(max(some.valid))]
