"""Packages and the optional C++ extension; the rest of the metadata is in pyproject.toml.

``LASEM_FAST_SKIP_EXT=1`` leaves the extension out, ``LASEM_FAST_REQUIRE_EXT=1`` makes a failure to
build it fatal. Without it the package works on its plain PyTorch backend: then the wheel is tagged
as pure Python, and a note in the package tells `lasem_fast.backends` why.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

# The oldest PyTorch that is promised; the extension uses its stable ABI and nothing newer.
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11
NOTE = "_cpu_left_out.txt"  # read by lasem_fast/backends/extension.py


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
            # messages name files, and not where they lay when they were compiled
            f"-ffile-prefix-map={Path.cwd()}/=",
        ],
        py_limited_api=True,
    )


class OptionalExtension(BuildExtension):
    """Goes on without the extension where it cannot be built, and says so."""

    def run(self) -> None:
        # a failed build does not put ``inplace`` back
        folder = Path("lasem_fast" if self.inplace else f"{self.build_lib}/lasem_fast")
        reason = self._built_or_why_not()
        (folder / NOTE).unlink(missing_ok=True)
        if reason:
            self.extensions = []
            for stale in folder.glob("_cpu.*"):  # it would be used, and packed, as if it were new
                stale.unlink()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / NOTE).write_text(reason + "\n", encoding="utf-8")

    def _built_or_why_not(self) -> str:
        """Builds; "" or why the extension is left out."""
        if os.environ.get("LASEM_FAST_SKIP_EXT") == "1":
            return "LASEM_FAST_SKIP_EXT=1 was set when it was installed"
        try:
            super().run()
        except Exception as error:
            if os.environ.get("LASEM_FAST_REQUIRE_EXT") == "1":
                raise
            compiler = get_cxx_compiler()
            if shutil.which(shlex.split(compiler)[0]) is None:
                reason = f"there was no C++ compiler ({compiler}) when it was installed"
            else:
                reason = f"{compiler} could not build it when it was installed"
            first = str(error).partition("\n")[0]
            print(WARNING.format(reason=reason, error=first), file=sys.stderr, flush=True)
            return reason
        return ""


WARNING = """
***************************************************************************************************
WARNING: lasem_fast is built WITHOUT its C++ kernels: {reason}
({error})
Training steps will run in plain PyTorch, several times as slow on a CPU. Install a C++20 compiler
(Debian, Ubuntu: g++; macOS: xcode-select --install) and install again; LASEM_FAST_REQUIRE_EXT=1
makes this an error, LASEM_FAST_SKIP_EXT=1 says that it is meant.
***************************************************************************************************
"""


class TrueWheel(bdist_wheel):
    """A wheel whose tag says whether the extension is in it."""

    def run(self) -> None:
        self.run_command("build_ext")
        if not self.get_finalized_command("build_ext").extensions:
            self.distribution.ext_modules = []
            self.root_is_pure = True
            self.py_limited_api = False
        super().run()


setup(
    packages=find_packages(include=["lasem_fast", "lasem_fast.*"]),
    ext_modules=[cpu_extension()],
    cmdclass={"build_ext": OptionalExtension, "bdist_wheel": TrueWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
