r"""Builds the compiled operations; everything else stands in :obj:`pyproject.toml`."""

import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

# One library from all sources for each instruction set; `ops/_cpu.py` takes one of them when it is
# imported. Where there is no compiler for them, the package installs and works without.
WINDOWS, MACOS = sys.platform == "win32", sys.platform == "darwin"
machine = {"AMD64": "x86_64", "ARM64": "aarch64"}.get(platform.machine(), platform.machine())
# Where sums of indices may wrap, GCC 12 adds a row's length from row to row. Where they may not, it
# keeps the offsets of sixteen rows and spills them, which makes convolutions half as slow again.
flags = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fwrapv"]
targets = {"any": []}
if WINDOWS:
    # The sources are for GCC and Clang. Zig has a Clang, and pip installs it for the build.
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", f"{machine}-windows-gnu"]
    v3, v4 = "x86_64_v3", "x86_64_v4"
else:
    flags += ["-fPIC"] if MACOS else ["-fPIC", "-fopenmp"]
    compiler = [path for path in map(shutil.which, ("g++", "c++", "clang++")) if path][:1]
    v3, v4 = "x86-64-v3", "x86-64-v4"
if machine == "x86_64":
    targets |= {"avx2": [f"-march={v3}"], "avx512": [f"-march={v4}"]}


def from_environment(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


# Set-up expects paths relative to this file, and with "/".
here = Path(__file__).parent
sources, headers = (
    sorted(path.relative_to(here).as_posix() for path in here.glob(f"pyg_attnpool/csrc/*.{ending}"))
    for ending in ("cpp", "h")
)


class BuildLibraries(build_ext):
    r"""Compiles libraries of plain C functions. They need nothing of Python, so one serves all
    versions of it, and its file has no version in its name. What GCC builds is linked to no OpenMP
    either: it finds the one that PyTorch has loaded, so that a process has one alone. Clang calls
    another one."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + (".dll" if WINDOWS else ".so")

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        if not self.force and not newer_group([*ext.sources, *ext.depends], str(library)):
            return
        command = from_environment("CXX") or compiler
        if not command:
            raise CompileError("Expected a C++ compiler on the path or in CXX (got none)")
        # A folder for each instruction set: all come from the same sources, side by side.
        folder = Path(self.build_temp, ext.name)
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        options = [*from_environment("CXXFLAGS"), *ext.extra_compile_args]
        objects = {source: str(folder / f"{Path(source).stem}.o") for source in ext.sources}
        for source, compiled in objects.items():
            self.spawn([*command, *options, "-c", source, "-o", compiled])
        built = folder / library.name
        linked = [*objects.values(), *from_environment("LDFLAGS"), "-o", str(built)]
        own_openmp = "clang" in Path(command[0]).name and "-fopenmp" in options
        self.spawn([*command, "-shared", *linked, *["-fopenmp"] * own_openmp])
        # Some linkers leave more files beside the library. A process that has loaded the older
        # library keeps it.
        library.unlink(missing_ok=True)
        shutil.move(built, library)


class Wheel(bdist_wheel):
    r"""A wheel of a platform, for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
    ext_modules=[
        Extension(
            f"pyg_attnpool.ops._cpu_{name}",
            sources,
            # With flags of another release, a library is built anew.
            depends=[*headers, "setup.py"],
            extra_compile_args=[*flags, *target],
            optional=True,
        )
        for name, target in targets.items()
    ],
)
