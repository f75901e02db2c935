"""Packages and the optional C++ extension; the rest of the metadata is in pyproject.toml.

``LASEM_FAST_SKIP_EXT=1`` leaves the extension out, ``LASEM_FAST_REQUIRE_EXT=1`` makes a failure to
build it fatal. Without it the package works on its plain PyTorch backend.
"""

import os
from pathlib import Path

from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# The oldest PyTorch that is promised; the extension uses its stable ABI and nothing newer.
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11


def cpu_extension() -> CppExtension:
    """The CPU kernels; instruction sets are chosen inside their units, never by a flag here."""
    return CppExtension(
        "lasem_fast._cpu",
        sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
        extra_compile_args=[
            "-std=c++20",
            # the sanitizers (make sanitize) multiply the code, and with it the time to optimise it
            "-O1" if "-fsanitize" in os.environ.get("CFLAGS", "") else "-O3",
            "-g0",
            "-Wall",
            "-Wextra",
            "-fvisibility=hidden",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        ],
        py_limited_api=True,
    )


class OptionalExtension(BuildExtension):
    """Goes on without the extension where it cannot be built, and says so."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if os.environ.get("LASEM_FAST_REQUIRE_EXT") == "1":
                raise
            self.extensions = []
            self.warn(f"lasem_fast is installed without its C++ kernels: {error}")


setup(
    packages=find_packages(include=["lasem_fast", "lasem_fast.*"]),
    ext_modules=[] if os.environ.get("LASEM_FAST_SKIP_EXT") == "1" else [cpu_extension()],
    cmdclass={"build_ext": OptionalExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
