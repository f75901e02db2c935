"""The training run over a sequence: reproducible, the same conditions for all, a true record."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from lasem_fast import ConfigSpace, TransferNet
from lasem_fast.lifelong import METHODS, Task, train_sequence

FEATURES, HIDDEN, CLASSES, DEPTH = 4, 6, 3, 2
EPOCHS, TASKS = 3, 3


def make_tasks(n: int = TASKS) -> list[Task]:
    """Tasks that a linear map of the inputs defines, a different one for each."""
    generator = torch.Generator().manual_seed(7)
    tasks = []
    for number in range(n):
        rule = torch.randn(FEATURES, CLASSES, generator=generator)
        splits = []
        for size in (21, 10, 25):
            x = torch.randn(size, FEATURES, generator=generator)
            splits.append((x, (x @ rule).argmax(1)))
        tasks.append(Task(f"t{number}", *splits, n_classes=CLASSES, note=f"rule {number}"))
    return tasks


def make_net() -> TransferNet:
    sizes = (FEATURES, HIDDEN, HIDDEN)
    return TransferNet(
        [nn.Sequential(nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()) for i in range(DEPTH)]
    )


def make_head(task: Task) -> nn.Module:
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(HIDDEN, task.n_classes))


def run(**changes):
    options = {
        "epochs": EPOCHS,
        "batch_size": 8,
        "optimizer": partial(torch.optim.Adam, lr=0.02),
    }
    tasks = changes.pop("tasks", None) or make_tasks()
    build = changes.pop("make_net", make_net)
    return train_sequence(build, make_head, tasks, **{**options, **changes})


def without_times(record) -> dict:
    plain = record.to_dict()
    del plain["seconds"]
    return plain


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_record_bit_for_bit(method):
    torch.manual_seed(1)
    first = without_times(run(method=method, seed=3))
    torch.manual_seed(2)
    second = without_times(run(method=method, seed=3))
    assert first == second
    assert first != without_times(run(method=method, seed=4))


def test_random_state_of_the_caller_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("method", METHODS)
def test_record_is_json_without_nan(method):
    record = run(method=method, tasks=make_tasks(1))  # one task: most measures are undefined
    plain = record.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["summary"]["backward_transfer"] is None


def test_record_of_a_search():
    record = run()
    space = ConfigSpace(DEPTH)
    assert record.configurations == [space.label(row) for row in range(len(space))]
    for task in record.tasks:
        assert len(task.loss) == len(task.valid) == len(task.test) == EPOCHS
        posterior = torch.tensor(task.posterior, dtype=torch.float64)
        assert posterior.shape == (EPOCHS, len(space))
        torch.testing.assert_close(
            posterior.sum(1), torch.ones(EPOCHS, dtype=torch.float64), check_dtype=False,
            rtol=len(space) * torch.finfo(torch.float32).eps, atol=0.0,
        )  # fmt: skip
        best = max(range(len(space)), key=task.prior.__getitem__)
        assert task.label == record.configurations[best]
        assert tuple(task.config) == space[best]
        assert task.peak == task.test[task.valid.index(max(task.valid))]
        assert task.learning_curve_area == pytest.approx(sum(task.test) / EPOCHS)
    shared = [sum(task.config[stage] for task in record.tasks) for stage in range(DEPTH)]
    assert record.share_frequency == [count / TASKS for count in shared]


@pytest.mark.parametrize("method", METHODS)
def test_matrix_holds_what_the_net_answers(method):
    nets = []

    def build() -> TransferNet:
        nets.append(make_net())
        return nets[-1]

    tasks = make_tasks()
    record = run(method=method, tasks=tasks, make_net=build)
    (net,) = nets
    net.eval()
    for j, task in enumerate(tasks):
        x, y = task.test
        right = (net(x, task.name).argmax(1) == y).sum().item()
        assert record.matrix[-1][j] == right / len(y)
    for i, row in enumerate(record.matrix):
        assert [value is None for value in row] == [j > i for j in range(TASKS)]
        # The roll-back at the end of a task does not reach the configuration that it keeps.
        assert row[i] == record.tasks[i].test[-1]


def test_static_methods_prescribe_the_configuration():
    everything, nothing = run(method="all"), run(method="none")
    assert [task.label for task in everything.tasks] == ["{1,2}"] * TASKS
    assert [task.label for task in nothing.tasks] == ["{}"] * TASKS
    assert everything.configurations == nothing.configurations == []
    assert everything.share_frequency == [1.0, 1.0]
    for j in range(TASKS):  # nothing shared, nothing forgotten
        assert len({nothing.matrix[i][j] for i in range(j, TASKS)}) == 1


def test_parameters_that_have_to_be_kept():
    head = HIDDEN * CLASSES + CLASSES
    trunk = FEATURES * HIDDEN + HIDDEN + HIDDEN * HIDDEN + HIDDEN
    assert run(method="all").parameters == trunk + TASKS * head
    assert run(method="none").parameters == TASKS * (trunk + head)


def test_a_search_among_one_configuration_is_the_static_method():
    """Same initial weights, heads, mini-batches and dropout for every method."""
    torch.set_default_dtype(torch.float64)
    try:
        tasks = [
            Task(t.name, *((x.double(), y) for x, y in (t.train, t.valid, t.test)), CLASSES)
            for t in make_tasks()
        ]
        space = ConfigSpace.from_configs([ConfigSpace(DEPTH).all])
        search = run(tasks=tasks, em_options={"space": space})
        static = run(tasks=tasks, method="all")
    finally:
        torch.set_default_dtype(torch.float32)
    assert search.matrix == static.matrix
    for one, other in zip(search.tasks, static.tasks, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.loss, dtype=torch.float64),
            torch.tensor(other.loss, dtype=torch.float64),
        )


def test_earlier_tasks_are_evaluated_every_so_often_and_at_the_end():
    record = run(evaluate_earlier_every=2)
    seen = [(curve["task"], curve["epoch"], len(curve["test"])) for curve in record.curves]
    assert seen == [(t, e, t + 1) for t in range(TASKS) for e in (2, 3)]
    assert record.tasks == run(evaluate_earlier_every=1).tasks


def test_progress_is_told_after_every_epoch():
    told = []
    record = run(on_epoch=told.append)
    where = [(now.task_number, now.epoch) for now in told]
    assert where == [(t, e) for t in range(1, TASKS + 1) for e in range(1, EPOCHS + 1)]
    last = told[-1]
    assert (last.method, last.task, last.n_tasks, last.epochs) == ("lasem", "t2", TASKS, EPOCHS)
    assert last.label == record.tasks[-1].label
    assert last.test == record.tasks[-1].test[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "some"}, "method must be one of lasem, all, none, got 'some'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"evaluate_earlier_every": 0}, "evaluate_earlier_every must be at least 1"),
        ({"tasks": make_tasks(1) * 2}, r"different names, got \['t0', 't0'\]"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)
