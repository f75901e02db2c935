"""`bench/on_gpu.sh` rehearsed on the CPU, without hypothesis and pytest-benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cases, measured, record, run

ROOT = Path(__file__).parents[1]


def _on_gpu(*arguments, **environment):
    return subprocess.run(
        ["bash", "bench/on_gpu.sh", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    absent = tmp_path_factory.mktemp("absent")
    for package in ("hypothesis", "pytest_benchmark"):
        (absent / f"{package}.py").write_text(f"raise ImportError('no {package} here')\n")
    out = tmp_path_factory.mktemp("results") / "new"
    done = _on_gpu(
        "--rehearse", str(out), PYTHONPATH=str(absent), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"
    )
    return done, out


def test_both_stages_pass_and_leave_results(rehearsal):
    done, out = rehearsal
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("tiles", "bench, ours", "tests", "bench, peers"):
        assert f"== {name}: passed" in done.stdout
    assert " passed" in (out / "tests.txt").read_text()
    results = measured.Results.load(out / "bench.json")
    assert results.rows() == [cases.smoke("cpu")[0].id]
    assert "lasem_fast torch" in results.columns() and not results.refused
    assert "| ms (times the base learner) |" in (out / "bench.md").read_text()


def test_results_name_no_folder(rehearsal):
    _, out = rehearsal
    for name in ("bench.json", "bench.md", "doctor.txt"):
        assert str(ROOT) not in (out / name).read_text()


def test_a_second_call_goes_on_where_the_first_one_ended(rehearsal, capsys):
    _, out = rehearsal
    before = measured.Results.load(out / "bench.json").cells
    arguments = ["--suite", "smoke", "--device", "cpu", "--out", str(out / "bench.json")]
    assert run.main(arguments) == run.FINISHED
    assert measured.Results.load(out / "bench.json").cells == before
    assert cases.smoke("cpu")[0].id in capsys.readouterr().out


def test_rows_that_the_budget_leaves_out_are_named(tmp_path, capsys):
    out = tmp_path / "bench.json"
    arguments = ["--suite", "smoke", "--device", "cpu", "--budget", "-1", "--out", str(out)]
    assert run.main(arguments) == run.LEFT_OUT
    row = cases.smoke("cpu")[0].id
    assert f"Left out, the budget of -1 s was used up: {row}" in capsys.readouterr().out


def test_results_of_two_machines_are_not_mixed(tmp_path):
    out = tmp_path / "bench.json"
    out.write_text(json.dumps({"machine_info": {"device": "another"}}))
    with pytest.raises(ValueError, match=r"--out: expected results of .*, got another's"):
        record.ResultsFile(out, "cpu", {})


def test_wrong_arguments():
    done = _on_gpu("--fast")
    assert done.returncode == 2 and "expected kernels, tests, peers, all" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    done = _on_gpu("peers", str(tmp_path), PYTHON=str(_without_pip(tmp_path)))
    assert done.returncode == 2 and "PyTorch finds no CUDA device" in done.stderr
    assert "pip cannot install here; the package is used from this folder" in done.stdout


def test_a_stage_that_fails_shows_in_the_exit_status(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(
        "#!/bin/bash\n"
        'case "$*" in *pytest*|*bench.run*) exit 4 ;; esac\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    stub.chmod(0o755)
    done = _on_gpu("--rehearse", str(tmp_path / "out"), PYTHON=str(stub))
    assert done.returncode == 1
    assert "== failed: tests (exit status 4)" in done.stdout
    assert "== failed: bench, ours (exit status 4)" in done.stdout
    assert "== failed: bench, peers (exit status 4)" in done.stdout


def _without_pip(folder):
    """An interpreter that installs nothing, so that a test changes no environment."""
    stub = folder / "python"
    stub.write_text(f'#!/bin/bash\n[ "$2" = pip ] && exit 1\nexec "{sys.executable}" "$@"\n')
    stub.chmod(0o755)
    return stub
