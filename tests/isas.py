"""Which instruction sets the kernels can be tested with on this machine."""

from __future__ import annotations

from lasem_fast.backends import cpu_ops as ops


def has(isa: str) -> bool:
    """Whether this CPU has an instruction set; the choice made at start is in force afterwards."""
    try:
        ops.force_isa(isa)
    except ValueError:
        return False
    finally:
        ops.force_isa(None)
    return True
