r"""The corners of what is supported, each in an environment of its own:

    nox                                         # all of them
    nox -s core-3.13                            # one of them
    nox -s oldest-3.10 -- tests/nn              # and a part of the tests

Interpreters that are absent are left out. Every session installs the source archive and runs the
tests that this holds.
"""

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
# What needs the core alone.
CORE = ["tests/nn", "tests/ops", "tests/mesh", "tests/models", "tests/test_mapping.py"]
# All extras but those that compile: torch_sparse and openmesh. `make test` has them.
EXTRAS = "[train,data,viz,cli,export,tgp,hub]"


def install(session: nox.Session, extras: str = "", env: dict[str, str] | None = None) -> None:
    session.install("build", "pytest")
    folder = Path(session.create_tmp()) / "built"
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "--sdist", "--outdir", str(folder), ".")
    (archive,) = folder.glob("*.tar.gz")
    session.install(f"pyg_attnpool{extras} @ {archive.resolve().as_uri()}", env=env)
    shutil.unpack_archive(archive, folder)
    session.chdir(folder / archive.name.removesuffix(".tar.gz"))
    # The tests find the installed package, not the one beside them.
    for path in Path("pyg_attnpool").rglob("*.py"):
        path.unlink()


def run_tests(session: nox.Session, *default: str, compiled: bool = True) -> None:
    found = f"from pyg_attnpool.ops import _cpu; assert _cpu.AVAILABLE is {compiled}"
    session.run("python", "-c", found)
    tests = session.posargs or default
    env = {"OMP_WAIT_POLICY": "passive"}
    session.run("python", "-m", "pytest", "-m", "not slow", *tests, env=env)


@nox.session(python=PYTHONS)
def core(session: nox.Session) -> None:
    r"""The newest releases of the dependencies, and no extra."""
    install(session)
    run_tests(session, *CORE)


@nox.session(python=["3.10", "3.12"])
def oldest(session: nox.Session) -> None:
    r"""The oldest releases that pyproject.toml allows."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    session.install(*(line.replace(">=", "==") for line in project["dependencies"]))
    install(session)
    run_tests(session, *CORE)


@nox.session(python=["3.11", "3.13"])
def extras(session: nox.Session) -> None:
    r"""All extras, without torch_sparse and openmesh."""
    install(session, EXTRAS)
    run_tests(session, "tests")


@nox.session(python="3.11")
def no_compiler(session: nox.Session) -> None:
    r"""A machine whose compiler does not work."""
    install(session, env={"CXX": "false"})
    run_tests(session, *CORE, compiled=False)


@nox.session(python="3.13")
def package(session: nox.Session) -> None:
    r"""What the archive and the wheel made of it look like to an index."""
    session.install("build", "twine", "check-wheel-contents")
    folder = Path(session.create_tmp()) / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(folder), ".")
    built = [str(path) for path in folder.iterdir()]
    session.run("twine", "check", "--strict", *built)
    session.run("check-wheel-contents", *(path for path in built if path.endswith(".whl")))
