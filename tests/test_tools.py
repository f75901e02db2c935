"""overhead, plan and doctor: what they count is what PyTorch measures; users' nets go through."""

from __future__ import annotations

import json
import math
import socket
import sys
from itertools import product

import pytest
import torch
from nets import Residual
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lasem_fast as lf
from lasem_fast.__main__ import main
from lasem_fast.search.dispatch import choose
from lasem_fast.tools import doctor, subject
from lasem_fast.tools.builtin import NETS
from lasem_fast.tools.calibration import StageTime
from lasem_fast.tools.costs import step_cost
from lasem_fast.tools.memory import measured_held, measured_peak
from lasem_fast.tools.partition import best_partition, partitions, rows_of

USERS_NET = """
import torch
from torch import nn
import lasem_fast as lf

def stages():
    conv = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.2))
    dense = nn.Sequential(nn.Flatten(), nn.Linear(288, 16), nn.ReLU())
    return [conv, dense], nn.Linear(16, 3), (1, 6, 6)

def net():
    net = lf.TransferNet([nn.Embedding(7, 4), nn.Sequential(nn.Linear(4, 4), nn.GELU())])
    net.add_task("mine", nn.Sequential(nn.Flatten(), nn.Linear(20, 3)))
    return net, torch.zeros(5, dtype=torch.int64)

def convs():
    conv = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4)]
    return conv, nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 3)), (8, 6, 6)

def nothing():
    return 3

def with_batch():
    return [nn.Conv2d(1, 8, 3)], nn.Flatten(), (16, 1, 6, 6)

def float_words():
    return [nn.Embedding(7, 4)], nn.Flatten(), (5,)

def unknown_word():
    return [nn.Embedding(7, 4)], nn.Flatten(), torch.full((5,), 9)

def bad_sample():
    return [nn.Linear(2, 2)], nn.Linear(2, 2), 3

def no_head():
    return [nn.Linear(2, 2)], 3, (2,)

def no_parameters():
    return [nn.ReLU()], nn.Flatten(), (2,)

def on_meta():
    return [nn.Linear(2, 2, device="meta")], nn.Flatten(), (2,)

def scalar_head():
    return [nn.Linear(2, 2)], Failing("sum"), (2,)

def attention():
    return [nn.Linear(4, 4), nn.MultiheadAttention(4, 2)], nn.Flatten(), (3, 4)

def pair():
    return [nn.Linear(2, 2), Failing("pair")], nn.Linear(2, 2), (2,)

def failing_stage():
    return [nn.Linear(2, 2), Failing("key")], nn.Linear(2, 2), (2,)

def failing():
    return [][1]

def not_on_meta():
    return [nn.Linear(2, 2), Failing("item")], nn.Linear(2, 2), (2,)

def deep():
    return [nn.Linear(2, 2) for _ in range(13)], nn.Linear(2, 2), (2,)

def width(n, m=1):
    return n

class Failing(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, h):
        if self.how == "key":
            raise KeyError("gone")
        if self.how == "item":
            return h * h.sum().item()
        return h.sum() if self.how == "sum" else (h, h)

value = 3
"""
OTHER_FILES = {
    "unclosed.py": "import torch\nx = (\n",
    "imports_nothing.py": "\nimport not_there\n",
    "raises.py": "raise RuntimeError('first line\\nsecond line')\n",
    "a_program.py": "import sys\nsys.exit(3)\n",
}


@pytest.fixture
def users_net(tmp_path, monkeypatch):
    """A module outside the package, in the current directory."""
    for name, text in {"users_net.py": USERS_NET, **OTHER_FILES}.items():
        (tmp_path / name).write_text(text)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))


def _block_net():
    stages = [
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        Residual(16),
        nn.Sequential(nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Tanh()),
    ]
    return stages, nn.Sequential(nn.Flatten(), nn.Linear(16 * 64, 5)), (3, 32, 32)


def _net_of(name):
    if name == "blocks":
        stages, head, sample = _block_net()
        groups = None
    else:
        spec = NETS[name]
        stages, head, sample, groups = spec.stages(), spec.head(10), spec.sample, spec.groups
    net = lf.TransferNet(stages)
    net.add_task("t", head)
    return net, lf.ConfigSpace(net.depth, groups=groups), torch.empty(sample)


@pytest.fixture(params=["cifar-4", "cifar-6", "residual-17", "blocks"])
def measured(request):
    """A net's predicted cost and a way to run its step for real."""
    net, space, sample = _net_of(request.param)
    samples = 2
    cost = step_cost(net, "t", space, sample, samples)
    em = lf.LASEM(net, space, backend="torch")
    x, y = torch.randn(samples, *sample.shape), torch.zeros(samples, dtype=torch.int64)
    em(x, y, "t")
    return cost, em, x, y


def test_flops_are_those_of_pytorchs_counter(measured):
    cost, em, x, y = measured
    with FlopCounterMode(display=False) as counter:
        em(x, y, "t").loss.backward()
    assert cost.flops == counter.get_total_flops()
    assert sum(level.flops for level in cost.levels) == cost.flops


def test_flops_of_the_naive_loop_and_of_one_configuration(measured):
    cost, em, x, y = measured
    naive = lf.LASEM(em.net, em.space, backend="reference")
    with FlopCounterMode(display=False) as counter:
        naive(x, y, "t", posterior=torch.full((len(em.space),), 1 / len(em.space))).loss.backward()
    assert cost.naive_flops == counter.get_total_flops()
    assert cost.naive_flops == len(em.space) * cost.base_flops


def test_memory_is_within_ten_percent_of_pytorchs_profile(measured):
    cost, em, x, y = measured
    held = measured_held(lambda: em(x, y, "t").loss)
    assert cost.held == pytest.approx(held, rel=0.1)
    assert sum(level.held for level in cost.levels) == cost.held


@pytest.mark.parametrize("measured", ["cifar-4", "cifar-6", "residual-17"], indirect=True)
def test_peak_memory_is_within_ten_percent_of_pytorchs_profile(measured):
    cost, em, x, y = measured

    def step():
        em.net.zero_grad()
        em(x, y, "t").loss.backward()

    em.net.zero_grad()
    peak = measured_peak(step, "cpu")
    # private workspace, which is no part of the count: where oneDNN puts a convolution's weights
    # into an order of its own, both branches' largest weight lies there once more
    weights = [p for stage in em.net.shared for p in stage.parameters()]
    reordered = 2 * max(p.numel() * p.element_size() for p in weights)
    assert any(cost.peak + extra == pytest.approx(peak, rel=0.1) for extra in (0, reordered))


def test_counting_leaves_the_net_alone():
    net, space, sample = _net_of("cifar-4")
    before = [p.detach().clone() for p in net.parameters()]
    step_cost(net, "t", space, sample, 2)
    assert all(p.device.type == "cpu" and p.grad is None for p in net.parameters())
    assert all(map(torch.equal, net.parameters(), before))


def test_too_many_configurations_are_refused():
    net = lf.TransferNet([nn.Linear(2, 2) for _ in range(13)])
    net.add_task("t", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected at most 4096 configurations, got 8192"):
        step_cost(net, "t", lf.ConfigSpace(13), torch.empty(2), 1)


def test_partitions_are_all_of_them():
    sizes = set(partitions(5, 3))
    assert sizes == {s for s in product(range(1, 4), repeat=3) if sum(s) == 5}
    assert rows_of((2, 1, 2)) == [2, 2, 4, 8, 8]


def test_best_partition_puts_few_and_cheap_stages_last():
    times = [StageTime(0.0, t) for t in (1.0, 5.0, 1.0, 1.0, 0.1)]
    found = best_partition(times, [1] * 4, 2, sum)
    by_hand = {
        s: sum(r * t.per_row for r, t in zip(rows_of(s), times[:4], strict=True)) + 0.4
        for s in partitions(4, 2)
    }
    assert found.sizes == min(by_hand, key=by_hand.__getitem__) == (3, 1)
    assert found.seconds == pytest.approx(by_hand[found.sizes])


def test_best_partition_keeps_to_the_budget():
    times = [StageTime(0.0, 1.0)] * 3 + [StageTime(0.0, 0.0)]
    peak = {(2, 1): 100, (1, 2): 50}
    fastest = best_partition(times, [0] * 3, 2, peak.__getitem__)
    assert (fastest.sizes, fastest.peak) == ((2, 1), 100)
    smaller = best_partition(times, [0] * 3, 2, peak.__getitem__, max_memory=60)
    assert smaller.sizes == (1, 2)
    assert best_partition(times, [0] * 3, 2, peak.__getitem__, max_memory=40) is None
    assert best_partition(times, [0] * 3, 2, peak.__getitem__, max_seconds=7) is None
    assert best_partition(times, [30] * 3, 2, peak.__getitem__, max_memory=math.inf) is not None
    assert best_partition(times, [30] * 3, 2, peak.__getitem__, max_memory=200) is None


@pytest.mark.usefixtures("users_net")
@pytest.mark.parametrize("name", ["users_net:stages", "users_net:net"])
def test_a_users_net_goes_through_overhead(name, capsys):
    assert main(["overhead", name, "--batch", "4", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["batch"], result["configurations"], result["backend"]) == (4, 4, choose("auto"))
    two_forwards = name.endswith("stages")  # its dropout makes the E-step's forward another one
    phases = {"E forward", "posterior", "prior", "backward", "optimiser"}
    assert set(result["phases_ms"]) == phases | ({"M forward"} if two_forwards else set())
    assert set(result["step_ms"]) == {"EM step", "plain step", "naive loop"}
    assert all(value > 0 for value in result["peak_bytes"].values())


@pytest.mark.usefixtures("users_net")
@pytest.mark.parametrize("name", ["users_net:stages", "users_net:net"])
def test_a_users_net_goes_through_plan(name, capsys):
    argv = ["plan", name, "--batch", "4", "--max-memory", "100", "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["stage_evaluations"] == {"tree": 6, "naive": 8}
    assert [level["rows"] for level in result["levels"]] == [2, 4, 4]
    assert [found["groups"] for found in result["partitions"]] == [[2], [1, 1]]


@pytest.mark.usefixtures("users_net")
def test_tables_are_printed(capsys):
    assert main(["overhead", "users_net:stages", "--rounds", "1"]) == 0
    assert "EM costs" in capsys.readouterr().out
    assert main(["plan", "users_net:stages", "--partition", "2"]) == 0
    assert "Best: ConfigSpace(2, groups=[1, 1])" in capsys.readouterr().out


@pytest.mark.usefixtures("users_net")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "no-such-net"], "expected one of"),
        (["plan", "no_such_module:f"], "expected a module that can be imported"),
        (["plan", "users_net:absent"], "expected a function 'absent'"),
        (
            ["plan", "users_net:nothing"],
            "expected (stages, head, sample) or (net, sample), got int",
        ),
        (["plan", "users_net:stages", "--groups", "3"], "add up to depth=2"),
        (["plan", "users_net:stages", "--partition", "3"], "expected at most 2 groups, got 3"),
        (["plan", "users_net:stages", "--max-memory", "0"], "expected a number above 0"),
        (["overhead", "users_net:stages", "--batch", "0"], "expected at least 1, got 0"),
        (["overhead", "users_net:stages", "--backend", "cuda"], "got 'cuda'; 'triton' is the one"),
        (["overhead", "users_net:stages", "--backend", "abacus"], "backend: expected one of"),
        (["plan", "users_net:stages", "--groups", "2,x"], "expected a whole number, got 'x'"),
        (["plan", "users_net:stages", "--batch", "many"], "expected a whole number, got 'many'"),
        (
            ["plan", "users_net:stages", "--max-memory", "2GB"],
            "expected a number above 0, got '2GB",
        ),
        (["plan", "users_net:stages", "--device", "abacus"], "a device that PyTorch can use here"),
        (
            ["overhead", "users_net:stages", "--device", "meta"],
            "a device that PyTorch can use here",
        ),
        (["plan", "users_net"], "expected one of"),
        (["plan", "users_net:"], "expected one of"),
        (["plan", "absent.py:stages"], "got 'absent.py': no such file"),
        (["plan", "users_net.more:stages"], "expected a module that can be imported"),
        (["plan", "random:stages"], "random.py, got no such name"),
        (["plan", "users_net:value"], "users_net.py, got an object of type int (functions and"),
        (["plan", "users_net:width"], "without arguments, got one that needs n"),
        (["plan", "unclosed:f"], "unclosed:f failed in unclosed.py, line 2: SyntaxError"),
        (["plan", "imports_nothing:f"], "in imports_nothing.py, line 2: ModuleNotFoundError: No"),
        (["plan", "raises:f"], "failed in raises.py, line 1: RuntimeError: first line"),
        (["plan", "a_program:f"], "got 'a_program', which ends Python when it is"),
        (["plan", "users_net:bad_sample"], "expected sample to be the shape of one input, such as"),
        (["plan", "users_net:no_head"], "expected head to be an nn.Module, got int"),
        (["overhead", "users_net:no_parameters"], "a net with parameters to train, got none"),
        (
            ["overhead", "users_net:on_meta"],
            "parameters with values, got 'weight' on the meta device",
        ),
        (["plan", "users_net:with_batch"], "which cannot take [1, 16, 1, 6, 6] of torch.float32"),
        (["overhead", "users_net:float_words"], "which cannot take [1, 5] of torch.float32"),
        (["plan", "users_net:float_words"], "or a tensor where inputs are not float32), got stage"),
        (["plan", "users_net:attention"], "one tensor, got stage 2 (MultiheadAttention( (out_proj"),
        (["plan", "users_net:unknown_word"], "cannot be run: IndexError: index out of range"),
        (["plan", "users_net:scalar_head"], "expected a head with outputs [N, K], got [] for one"),
        (["overhead", "users_net:pair"], "stage 2 (Failing()) to return a tensor, got tuple"),
        (["plan", "users_net:failing"], "users_net:failing failed in users_net.py, line "),
        (["plan", "users_net:failing"], ", in failing: IndexError: list index out of range"),
        (["overhead", "users_net:failing_stage"], ", in forward: KeyError: 'gone'"),
        (["plan", "users_net:not_on_meta"], "users_net:not_on_meta failed in users_net.py, line"),
        (["overhead", "users_net:deep"], "at most 4096 configurations, got 8192 of 13 stages"),
    ],
)
def test_errors_name_what_was_expected(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    usage, told = capsys.readouterr().err.rsplit(": error: ", 1)
    assert message in " ".join(told.split())
    assert told.count("\n") == 1 and "Traceback" not in usage


@pytest.mark.usefixtures("users_net")
@pytest.mark.parametrize("command", ["overhead", "plan"])
def test_an_interruption_is_a_status_and_no_traceback(command, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(subject, "load", interrupted)
    assert main([command, "cifar-4"]) == 130
    assert capsys.readouterr().err == f"python -m lasem_fast {command}: interrupted\n"


def test_a_defect_of_the_tool_is_not_told_as_the_users(monkeypatch):
    monkeypatch.delattr(subject.Subject, "batch_of")
    with pytest.raises(AttributeError):
        main(["plan", "users_net:stages"])


@pytest.mark.usefixtures("users_net")
def test_a_file_can_be_named_by_its_path(capsys):
    assert main(["plan", "./users_net.py:stages", "--batch", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"] == 2


def test_help_says_how_to_name_a_net(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert subject.HOW_TO_NAME_A_NET.strip() in capsys.readouterr().out


def test_doctor_says_what_can_run_and_names_no_machine(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in text
    assert main(["doctor", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["backends"] == lf.backends()
    assert result == json.loads(json.dumps(doctor.diagnose()))
    assert json.dumps(socket.gethostname()) not in json.dumps(result)


@pytest.mark.usefixtures("users_net")
def test_doctor_tells_the_ways_of_a_net(capsys):
    assert main(["doctor", "users_net:stages", "--json"]) == 0
    ways = json.loads(capsys.readouterr().out)["ways that the stages of users_net:stages take"]
    assert ways["backend"] == choose("auto")
    assert list(ways) == ["backend", "stage 1", "stage 2"]
    assert main(["doctor", "users_net:stages"]) == 0
    assert f"  stage 2: {ways['stage 2']}\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["doctor", "users_net:absent"])
    assert "expected a function 'absent'" in capsys.readouterr().err


@pytest.mark.usefixtures("users_net")
def test_overhead_tells_the_ways_of_the_backend_that_it_measures(capsys):
    argv = ["overhead", "users_net:net", "--backend", "torch", "--batch", "2", "--rounds", "1"]
    assert main([*argv, "--json"]) == 0
    why = "the backend has no kernels for levels"
    assert json.loads(capsys.readouterr().out)["ways"] == [
        {"stage": stage, "way": "PyTorch", "why": why} for stage in (1, 2)
    ]
    assert main(argv) == 0
    assert "no kernels for levels" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("users_net")
def test_plan_tells_what_a_bounded_search_holds(capsys):
    argv = ["plan", "users_net:convs", "--batch", "16", "--backend", "torch"]
    assert main([*argv, "--json"]) == 0
    bounded = json.loads(capsys.readouterr().out)["bounded"]
    whole, least = bounded["whole"], bounded["least"]
    assert bounded["backend"] == "torch" and bounded["in_budget"] is None
    assert least < whole
    cut = bounded["at_least"]
    assert cut["peak"] == least and 1 <= cut["whole_stages"] < 4 and cut["runs"] > 1
    for budget, found in ((whole, {"whole_stages": 4, "runs": 0, "peak": whole}),
                          (least, bounded["at_least"]), (least - 1, None)):  # fmt: skip
        assert main([*argv, "--max-memory", repr(budget / 2**20), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["bounded"]["in_budget"] == found
    for budget, words in ((2 * whole, "the whole tree at once"), (least, "at the peak"),
                          (least / 2, "cannot be met")):  # fmt: skip
        assert main([*argv, "--max-memory", repr(budget / 2**20)]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert words in told and f"sub-trees in {cut['runs']} runs)" in told


def test_twelve_stages_that_are_searched_one_by_one_are_planned():
    net = lf.TransferNet([nn.Linear(2, 2) for _ in range(12)])
    net.add_task("t", nn.Linear(2, 2))
    cost = step_cost(net, "t", lf.ConfigSpace(12), torch.empty(2), 1)
    assert [level.rows for level in cost.levels] == [*(2**i for i in range(1, 13)), 4096]
    assert cost.naive_flops == 4096 * cost.base_flops


def test_flops_of_branches_that_differ_are_those_of_their_configurations():
    net = lf.TransferNet([nn.Linear(4, 4), nn.Linear(4, 4)])
    net.add_task("t", nn.Linear(4, 2))
    net.specific["t"][1] = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4))
    space = lf.ConfigSpace.from_configs([{1, 2}, {1}, {2}], depth=2)
    cost = step_cost(net, "t", space, torch.empty(4), 3)
    naive = lf.LASEM(net, space, backend="reference")
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 1])
    with FlopCounterMode(display=False) as counter:
        naive(x, y, "t", posterior=torch.full((3,), 1 / 3)).loss.backward()
    assert cost.naive_flops == counter.get_total_flops()
