r"""Builds the compiled operations; everything else stands in :obj:`pyproject.toml`."""

import copy
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# One library from all sources for each instruction set; `ops/_cpu.py` takes one of them when it is
# imported. The sources need no header of PyTorch or Python, so they build anywhere. Where there is
# no compiler for them, the package installs and works without.
targets = {"any": []}
if platform.machine() in ("x86_64", "AMD64"):
    targets |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}
openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
flags = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", *openmp]

# Set-up expects paths relative to this file, and with "/".
here = Path(__file__).parent
sources, headers = (
    sorted(path.relative_to(here).as_posix() for path in here.glob(f"pyg_attnpool/csrc/*.{ending}"))
    for ending in ("cpp", "h")
)


class BuildApart(build_ext):
    r"""Keeps the objects of each instruction set in a folder of their own: all come from the same
    sources, and where builds run side by side, as they do here, one would link the objects of
    another."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext: Extension) -> None:
        command = copy.copy(self)
        command.build_temp = str(Path(self.build_temp) / ext.name)
        build_ext.build_extension(command, ext)


setup(
    cmdclass={"build_ext": BuildApart},
    ext_modules=[
        Extension(
            f"pyg_attnpool.ops._cpu_{name}",
            sources,
            depends=headers,
            extra_compile_args=[*flags, *target],
            extra_link_args=openmp,
            optional=True,
        )
        for name, target in targets.items()
    ],
)
