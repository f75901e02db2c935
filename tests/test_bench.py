"""The benchmark suite: right columns pass the gate, a wrong one gets no time, reports add up."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import cases, eager_host, gate, machine, measured, peers, race, report
from bench.cases import Case
from bench.peers import BASE, Column, Outcome, Runner
from lasem_fast.tools.builtin import NETS, Builtin, Skip, conv_layer, conv_stages, dense_head
from lasem_fast.tools.costs import step_cost

ROOT = Path(__file__).parents[1]

PLUGIN = """
from bench import cases
from lasem_fast.search import dispatch
from lasem_fast.tree import tree
from lasem_fast.tools.builtin import NETS, Builtin, conv_stages, dense_head

NETS["tiny"] = Builtin(lambda: conv_stages(3, (4, 4), (3, 3), (1, 2)),
                       lambda classes: dense_head(64, (), classes), (3, 8, 8), 4)
cases.quick = lambda: [cases.Case("tiny", 4, without=cases.COMPILED)]
right = dispatch.plain_torch.wide_level
dispatch.plain_torch.wide_level = lambda branches, *rest: right(branches[::-1], *rest)
"""


@pytest.fixture
def tiny(monkeypatch):
    """A net small enough for every column."""
    net = Builtin(
        lambda: conv_stages(3, (4, 4, 4), (3, 3, 3), (1, 2, 1)),
        lambda classes: dense_head(64, (8,), classes),
        (3, 8, 8),
        4,
    )
    monkeypatch.setitem(NETS, "tiny", net)
    return Case("tiny", 4, without=cases.COMPILED)


def _wrong(how):
    """The plain tree with one mistake, as a column."""

    def build(problem):
        right = peers.plain_tree(problem)
        return Runner(right.net, lambda: how(right.net, right.step()))

    return Column("wrong", build)


def _uniform_posterior(net, outcome):
    return Outcome(outcome.loss, torch.full_like(outcome.posterior, 1 / len(outcome.posterior)))


def _branch_without_gradient(net, outcome):
    next(net.specific[cases.TASK][1].parameters()).grad.zero_()
    return outcome


def _gradients_too_large(net, outcome):
    for parameter in net.parameters():
        parameter.grad *= 1.1
    return outcome


def _no_gradients(net, outcome):
    net.zero_grad()
    return outcome


def _loss_is_nan(net, outcome):
    return Outcome(outcome.loss * torch.nan, outcome.posterior)


def _crash(net, outcome):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("mistake", "why"),
    [
        (_uniform_posterior, "posterior off"),
        (_branch_without_gradient, "gradients off"),
        (_gradients_too_large, "gradients off"),
        (_no_gradients, "gradients off"),
        (_loss_is_nan, "loss off by inf"),
        (_crash, "did not run: RuntimeError: no such kernel"),
    ],
)
def test_a_wrong_column_is_refused_a_time(tiny, mistake, why):
    right = Column("right", peers.plain_tree)
    lanes = race.race(tiny, [right, _wrong(mistake)], budget=0)
    assert why in lanes["wrong"].refused
    assert lanes["wrong"].seconds == []
    assert not lanes["right"].refused
    assert len(lanes["right"].seconds) == 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_columns_pass_and_take_turns(tiny, dtype):
    case = Case("tiny", tiny.batch, dtype, without=tiny.without)
    turns = []

    def noting(column):
        def build(problem):
            runner = column.build(problem)

            def step():
                turns.append(column.name)
                return runner.step()

            return Runner(runner.net, step)

        return Column(column.name, build, column.slack, column.weighs)

    columns = peers.columns(case)
    lanes = race.race(case, [noting(column) for column in columns], budget=0)
    assert {name: lane.refused for name, lane in lanes.items() if lane.refused} == {}
    names = [column.name for column in columns]
    assert turns[-3 * len(names) :] == 3 * names
    assert all(lane.peak_memory > 0 and lane.first_step > 0 for lane in lanes.values())


def test_groups_of_blocks_pass(monkeypatch):
    def stages():
        block = [Skip(*conv_layer(4, 4, 3)) for _ in range(3)]
        return [*conv_stages(3, (4,), (3,), (2,)), *block]

    net = Builtin(stages, lambda classes: dense_head(64, (), classes), (3, 8, 8), 3)
    monkeypatch.setitem(NETS, "tiny", net)
    case = Case("tiny", 3, groups=(2, 2), without=cases.COMPILED)
    lanes = race.race(case, peers.columns(case), budget=0)
    assert {name: lane.refused for name, lane in lanes.items() if lane.refused} == {}
    assert len(case.problem().space) == 4


def test_compiled_columns_pass(tiny):
    case = Case("tiny", 2)
    compiled = [column for column in peers.PEERS if column.name in cases.COMPILED]
    problem = case.problem()
    truth = gate.Gate(problem, largest_slack=4.0)
    for column in compiled:
        eager = Column(column.name, partial(_without_compiler, column))
        runner = eager.build(problem)
        truth.check(eager, gate.answer_of(runner, runner.step()))


def _without_compiler(column, problem):
    """The column traced by Dynamo but not compiled, which takes half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        return column.build(problem)


def test_every_backend_of_the_library_is_a_column(monkeypatch):
    states = {"reference": "available", "torch": "available", "cpp": "available", "triton": "no"}
    monkeypatch.setattr("lasem_fast.backends", lambda: states)
    found = {column.name: column.slack for column in peers.library_columns("cpu")}
    exact = {"lasem_fast torch": 4.0, "lasem_fast cpp": 12.0}
    assert found == exact | {f"{name}, pruned": slack for name, slack in exact.items()}


def test_pruned_columns_follow_the_favoured_configurations_alone(tiny):
    case = replace(tiny, favours=2)
    pruned = [column for column in peers.columns(case) if column.weighs == "favoured"]
    assert len(pruned) == len(peers.columns(case)) - len(peers.columns(tiny)) > 0
    problem = case.problem()
    truth = gate.Gate(problem, [problem.space.configs[i] for i in problem.favoured()], 12.0)
    for column in pruned:
        runner = column.build(problem)
        outcome = runner.step()
        truth.check(column, gate.answer_of(runner, outcome))
        assert outcome.posterior.sum() == pytest.approx(1)
    wrong = gate.Gate(problem, largest_slack=12.0)
    with pytest.raises(gate.WrongResult):
        wrong.check(column, gate.answer_of(runner, outcome))


def test_the_suites_have_every_column_of_the_peers():
    for rows, device in ((cases.quick(), "cpu"), (cases.full("cpu"), "cpu")):
        there = {column.name for case in rows for column in peers.columns(case)}
        assert there >= {c.name for c in peers.PEERS if c.device in ("", device)}
    assert any(case.groups and len(case.groups) == 8 for case in cases.full("cuda"))
    assert {case.batch for case in cases.full("cuda")} >= {10, 16, 64, 256}
    assert "plain tree, CUDA graph" in {c.name for c in peers.columns(cases.full("cuda")[0])}


@pytest.mark.parametrize("name", sorted(NETS))
def test_nets_are_as_published(name):
    case = Case(name, 1, groups=NETS[name].groups)
    problem = case.problem()
    assert problem.net(problem.x, cases.TASK, config=problem.space.all).shape == (1, cases.CLASSES)
    kinds = {"cifar-8": 256, "residual-17": 16, "residual-17-norm": 16, "stl-9": 8}
    assert len(problem.space) == kinds.get(name, 2**problem.net.depth)


def test_flops_are_the_ones_on_record():
    """Naive over tree and tree over base for the CIFAR nets: 1.70 and 9.4, 2.50 and 25.6."""
    for name, naive, base in (("cifar-4", 1.70, 9.4), ("cifar-6", 2.50, 25.6)):
        problem = Case(name, 1).problem()
        cost = step_cost(problem.net, cases.TASK, problem.space, problem.x[0], 1)
        assert cost.naive_flops / cost.flops == pytest.approx(naive, rel=0.02)
        assert cost.flops / cost.base_flops == pytest.approx(base, rel=0.02)


@pytest.fixture(scope="module")
def run_with_a_wrong_backend(tmp_path_factory):
    """`pytest bench` on one tiny row, with a backend that mixes the branches up."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "wrong_backend.py").write_text(PLUGIN)
    out = folder / "results.json"
    argv = ["bench", "--benchmark-only", "-p", "wrong_backend", f"--benchmark-json={out}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *argv, "--seconds=0", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done, out


def test_the_suite_refuses_a_wrong_backend_and_times_the_others(run_with_a_wrong_backend):
    done, out = run_with_a_wrong_backend
    assert done.returncode == 1, done.stdout + done.stderr
    data = json.loads(out.read_text())
    timed = {b["extra_info"]["column"] for b in data["benchmarks"] if "column" in b["extra_info"]}
    assert "lasem_fast torch" not in timed
    assert timed >= {BASE, "vmap", "plain tree", "plain tree, channels last"}
    assert [refused["column"] for refused in data["refused"]] == ["lasem_fast torch"]
    for benchmark in data["benchmarks"]:
        info = benchmark["extra_info"]
        assert benchmark["stats"]["rounds"] == len(info["seconds"]) == 3
        assert benchmark["stats"]["data"] == pytest.approx(info["seconds"])
        assert info["peak_memory"] > 0 and info["first_step"] > 0 and info["fraction_of_peak"] > 0


def test_results_name_machine_and_commit_but_no_host_or_path(run_with_a_wrong_backend):
    _, out = run_with_a_wrong_backend
    text = out.read_text()
    data = json.loads(text)
    assert data["machine_info"]["torch"] == torch.__version__
    assert data["machine_info"]["cores"] == machine.describe("cpu")["cores"]
    assert set(data["commit_info"]) <= {"id", "time", "dirty"}
    assert data["peaks"]["gemm fp32"] > 0
    assert json.dumps(socket.gethostname()) not in text
    assert str(ROOT) not in text and str(out.parent) not in text


def test_report_of_a_run(run_with_a_wrong_backend, tmp_path, capsys):
    _, out = run_with_a_wrong_backend
    assert report.main([str(out), str(out), "--plots", str(tmp_path / "plots")]) == 0
    text = capsys.readouterr().out
    assert "| refused |" in text and "- Refused: tiny b4 fp32 cpu: lasem_fast torch:" in text
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{report.BEGIN}\nold\n{report.END}\nb\n")
    assert report.main([str(out), "--into", str(readme)]) == 0
    assert "old" not in readme.read_text() and "| tiny b4 fp32 cpu |" in readme.read_text()
    assert readme.read_text().startswith("a\n") and readme.read_text().endswith("\nb\n")


def _results(commit, seconds):
    cells = {
        ("row", column): measured.Cell({"row": "row", "column": column, "seconds": [s] * 3})
        for column, s in seconds.items()
    }
    return measured.Results({}, commit, {}, {}, cells)


def test_comparison_of_two_commits():
    old = _results("aaa", {BASE: 1.0, "plain tree": 4.0, "vmap": 5.0})
    new = _results("bbb", {BASE: 1.0, "plain tree": 2.0})
    table = report.comparison(old, new).splitlines()
    assert table[0] == "| time of aaa / time of bbb | base learner | plain tree |"
    assert table[2] == "| row | 1.00 | 2.00 |"
    assert new.times_base("row", "plain tree") == 2.0


def test_report_of_something_else_is_an_error(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "x.json")])
    assert "expected results of the benchmark suite, got x.json" in capsys.readouterr().err


def test_the_hosts_work_in_eager_steps_is_told_by_parts(capsys):
    eager_host.main(["--steps", "1", "--parts"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[1:] if not line.startswith(" ")]
    assert [row[0] for row in rows] == ["cifar-4", "residual-17", "residual-17"]
    for row in rows:
        plain, ours, more = map(float, row[-3:])
        assert abs(ours - plain - more) <= 1
    parts = {line.split()[0] for line in lines if line.startswith(" ")}
    assert {"Tree._call", "plain_torch.wide_level", "Joint.log_prob", "LASEM.forward"} <= parts


def test_the_hosts_work_is_that_of_the_same_step():
    with eager_host.reading_nothing():
        for problem in eager_host.problems().values():
            plain, ours = peers.plain_tree(problem).step(), peers.ours(problem, "torch").step()
            torch.testing.assert_close(ours.loss, plain.loss)
            torch.testing.assert_close(ours.posterior, plain.posterior, rtol=1e-4, atol=1e-6)
