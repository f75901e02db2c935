"""The C++ extension, or why it is not there."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).parent.parent


def load() -> tuple[ModuleType | None, str]:
    """The module ``_cpu`` and "", or None and the reason in words."""
    try:
        from lasem_fast import _cpu
    except ImportError as error:
        return None, _why_not(error)
    return _cpu, ""


def _why_not(error: ImportError) -> str:
    if find_spec("lasem_fast._cpu") is not None:
        reason = str(error).partition("\n")[0]
        return f"the CPU extension cannot be loaded by this Python and PyTorch ({reason})"
    note = _PACKAGE / "_cpu_left_out.txt"  # setup.py writes it
    if note.is_file():
        return f"the CPU extension is not installed: {note.read_text(encoding='utf-8').strip()}"
    if (_PACKAGE.parent / "setup.py").is_file():
        return (
            "the CPU extension is not built in the source folder that lasem_fast is imported from: "
            "`pip install --no-build-isolation --editable .` there builds it, or start Python "
            "in another folder to take an installed lasem_fast"
        )
    return "the CPU extension is not installed"
