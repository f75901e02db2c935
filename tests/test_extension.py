"""Without the C++ extension: the wheel, the backends and the first LASEM say so, and why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import lasem_fast as lf
from lasem_fast.backends import extension
from lasem_fast.search import dispatch

ROOT = Path(__file__).parent.parent
NOT_THERE = ImportError("cannot import name '_cpu' from 'lasem_fast'")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a package without the extension lies."""
    package = tmp_path / "lasem_fast"
    package.mkdir()
    monkeypatch.setattr(extension, "_PACKAGE", package)
    monkeypatch.setattr(extension, "find_spec", lambda name: None)
    return package


def test_the_note_of_the_installation_is_the_reason(folder):
    (folder / "_cpu_left_out.txt").write_text("there was no C++ compiler (c++)\n")
    expected = "the CPU extension is not installed: there was no C++ compiler (c++)"
    assert extension._why_not(NOT_THERE) == expected


def test_a_source_folder_that_was_not_built_says_so(folder):
    assert extension._why_not(NOT_THERE) == "the CPU extension is not installed"
    (folder.parent / "setup.py").touch()
    reason = extension._why_not(NOT_THERE)
    assert "not built in the source folder" in reason and "--editable ." in reason


def test_an_extension_that_does_not_load_says_what_the_loader_said(monkeypatch):
    monkeypatch.setattr(extension, "find_spec", lambda name: object())
    reason = extension._why_not(ImportError("_cpu.so: undefined symbol: f\nmore"))
    assert reason == (
        "the CPU extension cannot be loaded by this Python and PyTorch (_cpu.so: undefined "
        "symbol: f)"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_auto_warns_once_of_missing_kernels(monkeypatch):
    monkeypatch.setattr(dispatch.cpu_ops, "why_unsupported", lambda: "the CPU is a slide rule")
    dispatch._warn_once.cache_clear()
    net = lf.TransferNet([nn.Linear(2, 2)])
    with pytest.warns(RuntimeWarning, match="'cpp' is not available: the CPU is a slide") as told:
        assert lf.LASEM(net).backend == "torch"
    assert [Path(warning.filename).name for warning in told] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lf.LASEM(net)
        dispatch._warn_once.cache_clear()
        lf.LASEM(net, backend="torch")  # it is meant: nothing to say


def test_a_wheel_without_the_extension_is_tagged_as_pure_and_knows_why(tmp_path):
    """What setup.py does where there is no compiler."""
    source = tmp_path / "source"
    left_out = shutil.ignore_patterns("_cpu*", "__pycache__")
    for name in ("lasem_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LASEM_FAST")}
    compiler = str(tmp_path / "no-compiler")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=source, text=True,
        env=environment | {"CXX": compiler}, capture_output=True, check=True,
    )  # fmt: skip
    assert "WARNING: lasem_fast is built WITHOUT its C++ kernels: there was no" in done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "_cpu." in name]
        note = archive.read("lasem_fast/_cpu_left_out.txt").decode()
    assert note == f"there was no C++ compiler ({compiler}) when it was installed\n"
