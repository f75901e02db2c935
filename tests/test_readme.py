"""README's code does what it says: its blocks, in order, with tiny data."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lasem_fast import __main__
from lasem_fast.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
FILES = {text[2:].split()[0]: text for text in PYTHON if re.match(r"# \w+\.py\n", text)}
SESSION = [text for text in PYTHON if text not in FILES.values()]
COMMANDS = [
    line.partition("#")[0].strip()
    for language, text in BLOCKS
    if not language
    for line in text.splitlines()
    if line.startswith("python -m lasem_fast")
]
# Stands for the reader's own data, and for nothing else that the blocks need.
LOADER = """
def _loader():
    import torch
    return [(torch.randn(2, 3, 32, 32), torch.randint(10, (2,))) for _ in range(2)]
loader = _loader()
del _loader
"""


def test_the_python_blocks_run_in_order_in_a_fresh_interpreter(tmp_path):
    assert len(SESSION) >= 2
    check = "print(logits.shape, config == net.config('birds'), result.loss.isfinite().item())"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([LOADER, *SESSION, check])], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([2, 10]) True True\n"


@pytest.mark.parametrize("command", [c for c in COMMANDS if "my_file" in c])
def test_the_commands_take_the_file_that_is_shown(command, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_file", raising=False)
    arguments = [*shlex.split(command)[3:], *["--batch", "1"] * ("doctor" not in command)]
    assert main(arguments + ["--rounds", "1"] * ("overhead" in command)) == 0
    assert "my_file:my_net" in capsys.readouterr().out


def test_the_commands_exist():
    named = {command.split()[3] for command in COMMANDS}
    assert named and named <= set(__main__.COMMANDS)
