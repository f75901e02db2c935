"""docs/experiments.md: its example runs as it stands, and it leaves no key out."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")
pytest.importorskip("lasem_fast.datasets")

from lasem_fast.__main__ import main
from lasem_fast.experiments import network, presets, schema

TEXT = (Path(__file__).parent.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_example_of_a_method_runs(tmp_path, monkeypatch):
    for language, text in BLOCKS:
        if language == "python":
            (tmp_path / text[2:].split()[0]).write_text(text)
        if language == "toml":
            (tmp_path / "config.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["run", "config.toml"]) == 0
    run = json.loads((tmp_path / "runs/warm-start/warmstart-hps/seed0/run.json").read_text())
    assert run["settings"]["method"]["options"] == {"smoothing": 0.1}
    assert len(run["record"]["tasks"]) == 3
    # a net of its own for every task: nothing is forgotten
    assert run["summary"]["forgetting"] == 0.0
    stages, head = (9 * 8 + 8) + (72 * 8 + 8), 128 * 5 + 5
    assert run["record"]["parameters"] == 3 * (stages + head)


def test_every_key_is_described():
    keys = [*schema.Config.model_fields, *schema.Training.model_fields, *schema.Net.model_fields]
    keys += [name for method in schema.METHODS.values() for name in method.model_fields]
    missing = [
        key for key in {*keys} - {"data", "net", "training", "methods"}
        if not re.search(rf"\b{key}\b", TEXT)
    ]  # fmt: skip
    assert missing == []
    for name in (*schema.METHODS, *presets.TRAINING):
        assert f'"{name}"' in TEXT or f"`{name}`" in TEXT
    assert all(name.partition("-")[0] in TEXT for name in network.NETS)
