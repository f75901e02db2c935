"""The training run over a sequence: reproducible, the same conditions for all, a true record."""

import json
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lasem_fast import ConfigSpace, TransferNet
from lasem_fast.lifelong import METHODS, SequenceError, Task, train_sequence
from lasem_fast.lifelong.methods import Static
from lasem_fast.priors import Count, MeanPosterior

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
        ({"method": "some"}, "method: expected one of lasem, all, none, got 'some'"),
        ({"method": ["lasem"]}, "method: expected one of"),
        ({"method": nn.Linear(2, 2)}, "method: expected one of .*, got Linear"),
        ({"epochs": 0}, "epochs: expected a whole number of at least 1, got 0"),
        ({"epochs": 2.5}, "epochs: expected a whole number of at least 1, got float 2.5"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, got 0"),
        ({"evaluate_earlier_every": 0}, "evaluate_earlier_every: expected a whole number"),
        ({"seed": -1}, "seed: expected a number in 0"),
        ({"seed": None}, "seed: expected a whole number, got NoneType None"),
        ({"optimizer": "Adam"}, "optimizer: expected a function, got str"),
        ({"optimizer": lambda: None}, r"optimizer: .* called as optimizer\(parameters\), got <lam"),
        ({"schedule": lambda: 1.0}, r"schedule: expected a function .* schedule\(epoch\), got "),
        ({"tasks": make_tasks(1)[0]}, "tasks: expected a sequence of Task, got Task$"),
        ({"on_epoch": nn.Linear(2, 2)}, "on_epoch: expected a function, got Linear"),
        ({"tasks": make_tasks(1) * 2}, r"tasks: expected different names, got \['t0', 't0'\]"),
        ({"tasks": ["t0"]}, r"tasks: expected a sequence of Task, got \['str'\]"),
        ({"em_options": {"backed": "torch"}}, r"em_options: expected some of .*, got \['backed'\]"),
        ({"em_options": 3}, "em_options: expected a dict of LASEM's arguments, got int"),
        ({"device": "abacus"}, "device: expected one that PyTorch can use here, got 'abacus'"),
        ({"device": "meta"}, "device: expected one that PyTorch can use here, got 'meta'"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_made(changes, message):
    built = []
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^{message}"):
        run(**changes, make_net=lambda: built.append(0))
    assert not built


def test_functions_that_are_swapped_are_named():
    with pytest.raises(TypeError, match=r"^make_net: .* make_net\(\), got make_head\(task"):
        train_sequence(make_head, make_net, make_tasks())
    with pytest.raises(TypeError, match=r"^make_head: .* make_head\(task\), got make_net"):
        train_sequence(make_net, make_net, make_tasks())


def test_whole_numbers_of_numpy_and_pytorch_are_ints(tmp_path):
    tasks = [
        replace(task, n_classes=kind(CLASSES))
        for task, kind in zip(make_tasks(), (np.int64, torch.tensor, int), strict=True)
    ]
    heads = []

    def head(task: Task) -> nn.Module:
        heads.append(type(task.n_classes))
        return make_head(task)

    numbers = {"epochs": 2, "batch_size": 8, "seed": 3, "evaluate_every": 1}
    record = train_sequence(
        make_net, head, tasks, **{k: np.int64(v) for k, v in numbers.items()}, folder=tmp_path
    )
    assert set(heads) == {int}
    expected = train_sequence(make_net, make_head, make_tasks(), **numbers)
    assert json.dumps(without_times(record)) == json.dumps(without_times(expected))


@pytest.mark.parametrize("factor", [-1, float("nan"), float("inf"), "0.1"])
def test_a_schedule_that_is_no_factor_is_named_before_a_step(factor):
    with pytest.raises(SequenceError, match=r"after 1 of .* schedule\(1\): expected a finite"):
        run(schedule=lambda epoch: factor if epoch else 0.5)
    assert run(schedule=lambda epoch: 0.0, tasks=make_tasks(1)).tasks  # none is a factor, too


def test_a_method_that_needs_more_epochs_is_refused_before_anything_is_trained():
    class Slow(Static):
        least_epochs = EPOCHS + 1

    def slow(make_net):
        return Slow(make_net(), {1})

    told = []
    with pytest.raises(ValueError, match=r"^epochs: expected at least 4 for Slow and several"):
        run(method=slow, on_epoch=told.append)
    assert not told
    run(method=slow, tasks=make_tasks(1))


def test_no_tasks():
    with pytest.raises(ValueError, match="tasks: expected at least one task, got none"):
        train_sequence(make_net, make_head, [])


X, Y = torch.zeros(6, FEATURES), torch.tensor([0, 1, 2, 0, 1, 2])
WITH_NAN = torch.full((6, FEATURES), float("nan"))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            (X, Y.unsqueeze(1)),
            r"expected y of shape \[6\], one label per sample of x, got \[6, 1\]",
        ),
        ((X, Y[:5]), r"expected y of shape \[6\], one label per sample of x, got \[5\]"),
        ((X, Y.float()), r"expected y to be class labels of torch.int64, got torch.float32"),
        ((X, Y + 1), r"expected labels in 0..2 \(n_classes is 3\), got labels from 1 to 3"),
        ((X, -Y), r"expected labels in 0..2 \(n_classes is 3\), got labels from -2 to 0"),
        ((X[:0], Y[:0]), r"expected x to hold at least one sample \[N, ...\], got shape \[0, 4\]"),
        ((X[0, 0], Y), r"expected x to hold at least one sample \[N, ...\], got shape \[\]"),
        ((WITH_NAN, Y), r"expected finite values in x, got 24 that are NaN or infinite"),
        ((X.to_sparse(), Y), r"expected x to be a dense tensor, got layout torch.sparse_coo"),
        ((X.to("meta"), Y), r"expected x to be a dense tensor, got one without values \(meta\)"),
        ((X, Y.tolist()), r"expected a pair of tensors \(x, y\), got \(Tensor, list\)"),
        (None, r"expected a pair of tensors \(x, y\), got NoneType"),
    ],
)
def test_data_of_all_tasks_are_checked_before_anything_is_trained(split, pair, message):
    tasks = make_tasks()
    tasks[-1] = replace(tasks[-1], **{split: pair})
    built = []
    with pytest.raises((TypeError, ValueError), match=f"^{split} of task 't2': {message}"):
        run(tasks=tasks, make_net=lambda: built.append(0))
    assert not built


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 7}, r"tasks\[1\]: expected a name \(str\), got 7"),
        ({"name": ""}, r"tasks\[1\]: expected a name, got an empty string"),
        ({"n_classes": 0}, "n_classes of task 't1': expected a whole number .* got 0"),
        ({"n_classes": 3.0}, "n_classes of task 't1': expected a whole number .* got float 3.0"),
    ],
)
def test_names_and_classes_are_checked(change, message):
    tasks = make_tasks()
    tasks[1] = replace(tasks[1], **change)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        run(tasks=tasks)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (nn.Linear(2, 2), "expected a function that returns a TransferNet, .* returns Linear"),
        ("used", r"expected a new net without tasks at every call, got one with .* \['t0'\]"),
    ],
)
def test_nets_that_are_none_or_not_new(made, message):
    if made == "used":
        made = make_net()
        made.add_task("t0", nn.Linear(HIDDEN, CLASSES))
    with pytest.raises((TypeError, ValueError), match=f"^make_net: {message}"):
        run(make_net=lambda: made)


@pytest.mark.parametrize("prior", [Count, MeanPosterior])
def test_a_prior_that_is_given_is_the_same_for_every_run(prior):
    mine = prior()
    options = {"prior": mine}
    first = without_times(run(em_options=options))
    assert first == without_times(run(em_options=options))
    assert first == without_times(run(em_options={"prior": prior()}))
    assert options == {"prior": mine} and not list(mine.states)


# Failures


def failing_net() -> TransferNet:
    """Cannot take numbers beyond 100, which only a late task has."""

    class Picky(nn.Module):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            if (h > 100).any():
                raise KeyError("too large")
            return h

    net = make_net()
    net.shared[0].append(Picky())
    return net


def test_a_failure_does_not_lose_the_tasks_before_it():
    tasks = make_tasks()
    x, y = tasks[2].train
    tasks[2] = replace(tasks[2], train=(torch.cat([x, x[:1] + 1e3]), torch.cat([y, y[:1]])))
    with pytest.raises(
        SequenceError, match=r"'t2' \(3 of 3\) failed after 0 of 3 epochs"
    ) as failure:
        run(tasks=tasks, make_net=failing_net)
    error = failure.value
    assert isinstance(error.__cause__, KeyError) and "KeyError: 'too large'" in str(error)
    assert "ended before: 't0', 't1'" in str(error)
    alone = run(tasks=tasks[:2], make_net=failing_net)
    assert without_times(error.record) == without_times(alone)
    assert (error.unfinished.name, error.unfinished.test) == ("t2", [])
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.record, again.unfinished.name) == (str(error), error.record, "t2")


def test_a_failure_in_the_first_task_has_an_empty_record():
    with pytest.raises(SequenceError, match="ended before: none") as failure:
        run(optimizer=lambda parameters: None)
    assert "optimizer: expected a function that returns" in str(failure.value)
    plain = failure.value.record.to_dict()
    assert plain["tasks"] == plain["matrix"] == [] and set(plain["summary"].values()) == {None}


@pytest.mark.parametrize(
    ("head", "split", "message"),
    [
        (lambda task: nn.Linear(HIDDEN, 2), None, r"outputs \[N, 3\] for task 't0', got \[1, 2\]"),
        (lambda task: None, None, "make_head: expected a function that returns an nn.Module"),
        (make_head, "test", r"test of task 't0': expected samples that the network can take, got "),
    ],
)
def test_what_does_not_fit_is_found_before_the_task_is_trained(head, split, message):
    tasks = make_tasks(1)
    if split:
        x, y = tasks[0].test
        tasks[0] = replace(tasks[0], test=(x[:, 1:], y))
    told = []
    with pytest.raises(SequenceError, match=message):
        train_sequence(make_net, head, tasks, on_epoch=told.append)
    assert not told


def test_the_record_so_far_is_told_after_every_task():
    told = []

    def on_task(record) -> None:
        told.append(json.loads(json.dumps(without_times(record), allow_nan=False)))

    record = run(on_task=on_task)
    assert [len(plain["matrix"]) for plain in told] == [1, 2, 3]
    assert told[-1] == without_times(record)
    assert told[1]["matrix"] == [row[:2] for row in record.matrix[:2]]


def test_errors_of_the_callers_own_functions_come_as_they_are():
    class Enough(Exception):
        pass

    def stop(now: object) -> None:
        raise Enough

    for callback in ("on_epoch", "on_task"):
        with pytest.raises(Enough):
            run(**{callback: stop})


def test_a_ratio_to_an_accuracy_of_zero_is_none():
    tasks = [replace(task, test=(task.test[0], 2 - task.test[1])) for task in make_tasks(1)]
    record = run(tasks=tasks)
    record.matrix = [[0.0]]
    assert record.summary()["forgetting_ratio_to_end"] is None


def test_frozen_layers_stay_frozen():
    norm = nn.BatchNorm1d(HIDDEN).eval()

    def build() -> TransferNet:
        return TransferNet([nn.Sequential(nn.Linear(FEATURES, HIDDEN), norm, nn.ReLU())])

    run(method="all", make_net=build, tasks=make_tasks(1), epochs=2)
    assert int(norm.num_batches_tracked) == 0
