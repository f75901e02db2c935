"""What the machine can do: GEMM and FMA peaks, measured in the same run as the steps."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

# 16 independent chains of vectors of 16 floats keep every FMA unit busy on any x86 or Arm core.
_FMA_SOURCE = """
typedef float vec __attribute__((vector_size(64)));
float fma_chains(long rounds, float a, float b) {
    vec acc[16], va = {0}, vb = {0};
    va += a; vb += b;
    for (int i = 0; i < 16; i++) acc[i] = vb * (float)i;
    for (long r = 0; r < rounds; r++)
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) acc[i] = acc[i] * va + vb;
    vec sum = acc[0];
    for (int i = 1; i < 16; i++) sum += acc[i];
    float total = 0;
    for (int i = 0; i < 16; i++) total += sum[i];
    return total;
}
"""
_FLOPS_PER_ROUND = 2 * 16 * 16

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


def gemm_peak(dtype: str, device: str, rounds: int = 8) -> float:
    """FLOP/s of the best of a few square matrix products."""
    set_tf32(dtype == "tf32")
    size = 8192 if device == "cuda" else 256
    a = torch.randn(size, size, device=device).to(_DTYPES[dtype])
    # A CPU without bf16 instructions would take minutes for a size that others need to warm up.
    while device == "cpu" and len(a) < 2048 and _seconds_of_product(a) < 0.02:
        a = a.repeat(2, 2)
    best = min(_seconds_of_product(a) for _ in range(rounds))
    return 2 * len(a) ** 3 / best


def _seconds_of_product(a: torch.Tensor) -> float:
    synchronize(a.device.type)
    start = time.perf_counter()
    torch.mm(a, a)
    synchronize(a.device.type)
    return time.perf_counter() - start


def fma_peak(threads: int, rounds: int = 2_000_000, repeats: int = 5) -> float | None:
    """FLOP/s of fp32 multiply-adds in registers on ``threads`` cores; None without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "fma.c"), Path(folder, "fma.so")
        source.write_text(_FMA_SOURCE)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        chains = ctypes.CDLL(str(library)).fma_chains
        chains.argtypes = (ctypes.c_long, ctypes.c_float, ctypes.c_float)
        chains.restype = ctypes.c_float
        best = float("inf")
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(repeats):
                start = time.perf_counter()
                # ctypes gives the interpreter lock up while it calls.
                list(pool.map(lambda _: chains(rounds, 0.5, 1.0), range(threads)))
                best = min(best, time.perf_counter() - start)
    return threads * rounds * _FLOPS_PER_ROUND / best


def set_tf32(allowed: bool) -> None:
    """Whether CUDA may round the inputs of fp32 products to tf32."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(device: str) -> dict[str, float | None]:
    """GEMM peaks by dtype and the CPU's FMA peak, in FLOP/s."""
    dtypes = ("fp32", "bf16") if device == "cpu" else ("fp32", "tf32", "bf16")
    peaks: dict[str, float | None] = {f"gemm {dtype}": gemm_peak(dtype, device) for dtype in dtypes}
    if device == "cpu":
        peaks["fma fp32"] = fma_peak(torch.get_num_threads())
    return peaks
