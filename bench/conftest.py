"""Options of the benchmark suite, and what its results file says beside the times."""

from __future__ import annotations

from collections import defaultdict

import pytest

from bench import cases, ceilings, machine, peers, race

_lanes = pytest.StashKey()
_peaks = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("lasem_fast benchmark")
    group.addoption("--suite", choices=("quick", "full"), default="quick", help="which rows")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="of the full suite")
    group.addoption("--seconds", type=float, default=12.0, help="of timing per row")


def pytest_generate_tests(metafunc):
    if {"case", "column"} <= set(metafunc.fixturenames):
        config = metafunc.config
        full = config.getoption("suite") == "full"
        rows = cases.full(config.getoption("device")) if full else cases.quick()
        pairs = [(case, column) for case in rows for column in peers.columns(case)]
        ids = [f"{case.id}-{column.name}" for case, column in pairs]
        metafunc.parametrize(("case", "column"), pairs, ids=ids)


def _device(config) -> str:
    return config.getoption("device") if config.getoption("suite") == "full" else "cpu"


def _measured_peaks(config) -> dict[str, float | None]:
    if _peaks not in config.stash:
        config.stash[_peaks] = ceilings.measure(_device(config))
    return config.stash[_peaks]


@pytest.fixture
def peaks(request):
    """The machine's measured peaks in FLOP/s."""
    return _measured_peaks(request.config)


@pytest.fixture
def lane(request, case, column, peaks):
    """The lane of this column; the first one asked for runs the whole row's race."""
    lanes = request.config.stash.setdefault(_lanes, defaultdict(dict))
    if case not in lanes:
        chosen = [
            item.callspec.params["column"]
            for item in request.session.items
            if getattr(item, "callspec", None) and item.callspec.params.get("case") == case
        ]
        lanes[case] = race.race(case, chosen, request.config.getoption("seconds"))
    return lanes[case][column.name]


def pytest_benchmark_update_machine_info(config, machine_info):
    """Only what the times depend on: no host name, no paths."""
    machine_info.clear()
    machine_info.update(machine.describe(_device(config)))


def pytest_benchmark_update_commit_info(config, commit_info):
    for name in list(commit_info):
        if name not in ("id", "time", "dirty"):
            del commit_info[name]


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for benchmark in output_json["benchmarks"]:
        # Objects as text, with their addresses; extra_info says it readably.
        for name in ("param", "params", "options"):
            benchmark.pop(name, None)
    output_json["peaks"] = _measured_peaks(config)
    output_json["load_average_at_end"] = machine.load_average()
    output_json["refused"] = [
        {"row": case.id, "column": name, "why": lane.refused}
        for case, lanes in config.stash.get(_lanes, {}).items()
        for name, lane in lanes.items()
        if lane.refused
    ]
