r"""How the compiled operations are loaded and called."""

import ctypes
import faulthandler
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pyg_attnpool.ops import _cpu
from pyg_attnpool.ops.search import Search, cosine_topk
from tests.ops.builds import PACKAGE, RUNS, builds
from tests.ops.forks import needs_fork, status_of_child

# Beside the tests, since an installed package has libraries alone.
SOURCES = Path(__file__).parents[2] / "pyg_attnpool/csrc"
needs_library = pytest.mark.skipif(not _cpu.AVAILABLE, reason="the operations are not compiled")


# Which build is taken ################################################################


def take(folder, capability="AVX512"):
    r"""What the module in a folder takes, in a process of its own: whether there is something, and
    its path."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        signal.alarm(30)
        try:
            torch.backends.cpu.get_cpu_capability = lambda: capability
            path = folder / "pyg_attnpool" / "ops" / "_cpu.py"
            spec = importlib.util.spec_from_file_location("copied", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            name = getattr(module.library, "_name", None)
            os.write(write, json.dumps([module.AVAILABLE, name]).encode())
        except BaseException as error:
            os.write(write, json.dumps(repr(error)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"died of signal {status}"
    return json.loads(said)


WORKS = """
import torch
import pyg_attnpool
from pyg_attnpool.ops import _cpu, reference
assert str(pyg_attnpool.__file__).startswith(FOLDER), pyg_attnpool.__file__
assert not _cpu.AVAILABLE
layer = pyg_attnpool.AttentionPool.published(40, 12, channels=5, k=3, init="normal").double()
ring = torch.arange(40)
edge_index = torch.stack([torch.cat([ring, ring.roll(1)]), torch.cat([ring.roll(1), ring])])
cheb = pyg_attnpool.StaticChebConv(3, 8, 4, edge_index, 40).double()
spirals = torch.stack([ring, ring.roll(1), ring.roll(2)], dim=1)
spiral = pyg_attnpool.SpiralConv(8, 2, spirals).double()
x = torch.randn(2, 40, 3, dtype=torch.float64)
dense = torch.zeros(40, 40, dtype=torch.float64)
dense[tuple(edge_index)] = -0.5
weight = torch.stack([lin.weight.t() for lin in cheb.lins])
y = reference.chebyshev(dense, weight, x) + cheb.bias
y = y[:, spirals].flatten(2) @ spiral.lin.weight.t() + spiral.lin.bias
y = reference.apply(reference.attention(layer.query, layer.key, 3), y)
parameters = [*layer.parameters(), *cheb.parameters(), *spiral.parameters()]
out = layer(spiral(cheb(x)))
# The Laplacian of a layer is formed in single precision.
torch.testing.assert_close(out, y, rtol=1e-5, atol=1e-5)
for a, b in zip(torch.autograd.grad(out.square().sum(), parameters),
                torch.autograd.grad(y.square().sum(), parameters)):
    assert b.abs().max() > 1e-3
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
print("works")
"""


def copy_package(folder):
    r"""The package without its builds."""
    ignored = shutil.ignore_patterns("_cpu_*", "__pycache__")
    shutil.copytree(PACKAGE, folder / "pyg_attnpool", ignore=ignored)


@pytest.fixture
def bare(tmp_path):
    r"""A folder with the one module that loads a build, and without any."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    ops = tmp_path / "pyg_attnpool" / "ops"
    ops.mkdir(parents=True)
    shutil.copy(PACKAGE / "ops" / "_cpu.py", ops)
    return tmp_path


@pytest.fixture
def built():
    r"""The content of a build that runs here."""
    path = next((path for name in RUNS for path in builds(name)), None)
    if path is None:
        pytest.skip("the compiled operations are not built")
    return path.read_bytes()


def add(folder, content, name="any", ending=".so"):
    path = folder / "pyg_attnpool" / "ops" / f"_cpu_{name}{ending}"
    path.write_bytes(content)
    return str(path)


def of_another_version(content):
    mark = f"pyg_attnpool_{_cpu.VERSION}\0".encode()
    assert mark in content
    return content.replace(mark, mark[:-2] + b"x\0")


@pytest.mark.parametrize("useless", [False, True], ids=["no build", "builds of no use"])
def test_everything_works_without_a_build(useless, tmp_path, request):
    copy_package(tmp_path)
    if useless:
        content = request.getfixturevalue("built")
        add(tmp_path, of_another_version(content), "avx512")
        add(tmp_path, b"", "avx2")
        add(tmp_path, content[: len(content) // 2], "any")
    done = subprocess.run(
        [sys.executable, "-c", f"FOLDER = {str(tmp_path)!r}\n{WORKS}"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    assert done.stdout.split() == ["works"]


def test_takes_the_best_that_runs(bare, built):
    table = {"AVX512": ["any", "avx2", "avx512"], "AVX2": ["any", "avx2"], "DEFAULT": ["any"]}
    assert take(bare) == [False, None]
    paths = {}
    for name in ("any", "avx2", "avx512"):
        paths[name] = add(bare, built, name)
        for capability, names in table.items():
            best = [n for n in names if n in paths][-1]
            assert take(bare, capability) == [True, paths[best]]


def test_takes_builds_of_earlier_set_ups_after_its_own(bare, built):
    # Those had the version of Python in their names.
    older = add(bare, built, "any", ".cpython-311-x86_64-linux-gnu.so")
    assert take(bare) == [True, older]
    own = add(bare, built, "any")
    assert take(bare) == [True, own]


def test_a_build_of_another_version_is_not_taken(bare, built):
    add(bare, of_another_version(built), "avx512")
    assert take(bare) == [False, None]
    path = add(bare, built, "any")  # and the next is looked at
    assert take(bare) == [True, path]


@pytest.mark.parametrize("share", [0, 1e-4, 0.01, 0.05, 0.2, 0.5, 0.8])
def test_a_truncated_build_is_not_taken(bare, built, share):
    # As an interrupted installation or copy leaves it.
    add(bare, built[: int(share * len(built))], "avx2")
    assert take(bare) == [False, None]
    path = add(bare, built, "any")
    assert take(bare) == [True, path]


def test_what_is_no_library_is_not_taken(bare):
    add(bare, b"\x7fELF" + bytes(range(256)) * 20)
    assert take(bare) == [False, None]


# Arguments ###########################################################################


def declared():
    r"""The parameters of every function, as the sources declare them."""
    functions = {}
    for path in sorted(SOURCES.glob("*.cpp")):
        source = path.read_text().replace("\\\n", "\n")
        for macro in re.findall(r"#define FUNCTIONS\(T\)(.*?)\n\n", source, re.DOTALL):
            for name, args in re.findall(r"int64_t (\w+)_##T\((.*?)\)\s*{", macro, re.DOTALL):
                functions[name] = [arg.strip() for arg in args.split(",")]
        for block in re.findall(r'extern "C" {(.*)}', source, re.DOTALL):
            for name, args in re.findall(r"int64_t (\w+)\(([^)]+)\) {", block):
                functions[name] = [arg.strip() for arg in args.split(",")]
    return functions


def test_argument_types_are_those_of_the_sources():
    def kind(argument):
        words = argument.replace("const ", "").split()
        arrays = {"T*": _cpu.ARRAY, "int64_t*": _cpu.INDEX, "int32_t*": _cpu.INDEX32}
        arrays |= {"double*": _cpu.DOUBLE, "int64_t": _cpu.SIZE, "double": _cpu.NUMBER}
        return _cpu.ARRAYS if words[1] == "const*" else arrays[words[0]]

    functions = declared()
    assert len(functions) > 8
    # Those of a plan take steps that only the package makes.
    own = {"run_plan", "plan_width", "checksum"}
    assert functions.keys() - own == _cpu.TYPED.keys() | _cpu.UNTYPED.keys()
    for name, (kinds, numels) in (_cpu.TYPED | _cpu.UNTYPED).items():
        required = [each._replace(optional=False) for each in kinds]
        assert required == [kind(argument) for argument in functions[name]], name
        num_sizes = kinds.count(_cpu.SIZE)
        assert kinds[:num_sizes] == [_cpu.SIZE] * num_sizes  # sizes come first
        num_arrays = len(kinds) - num_sizes - kinds.count(_cpu.NUMBER)
        assert len(numels(*range(2, 2 + num_sizes))) == num_arrays, name


@needs_library
def test_argument_types_are_set_before_the_first_call():
    for name, (kinds, num_sizes, _) in _cpu.FUNCTIONS.items():
        function = getattr(_cpu.library, name)
        sizes = [ctypes.c_int64] * num_sizes
        assert function.argtypes == sizes + [kind.ctype for kind in kinds]
        assert function.restype == ctypes.c_int64
    whole = torch.zeros(2, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    outs = torch.zeros(3, dtype=torch.long), whole[1], whole[1]
    _cpu.call("transpose_pattern", 1, 2, 0, *whole, *outs)
    with pytest.raises(ctypes.ArgumentError):
        _cpu.call("transpose_pattern", 1.0, 2, 0, *whole, *outs)
    with pytest.raises(ValueError):
        _cpu.call("transpose_pattern", 1, 2, 0, *whole, *outs[:2])
    with pytest.raises(TypeError):
        _cpu.call("transpose_pattern", 1, 2, 0, None, whole[1], *outs)


@needs_library
def test_arrays_of_another_kind_are_not_handed_over():
    rowptr, col = torch.tensor([0, 1, 2]), torch.tensor([1, 0])
    value, x, out = torch.ones(2), torch.ones(2, 3), torch.ones(2, 3)

    def call(**others):
        arrays = {"rowptr": rowptr, "col": col, "perm": None, "value": value, "x": x, **others}
        _cpu.call("spmm_float", 2, 3, 2, 2, *arrays.values(), 1.0, None, out)

    call()
    assert out.tolist() == x.tolist()
    for others in (
        {"x": x.double()},
        {"x": x[:1]},
        {"x": x.t()},
        {"x": x.to("meta")},
        {"value": value[:1]},
        {"col": col.int()},
        {"col": col.repeat_interleave(2)[::2]},
        {"rowptr": rowptr[:2]},
        {"perm": col[:1]},
    ):
        with pytest.raises(ValueError, match="Expected a contiguous array of"):
            call(**others)
    for name, bad in [("col", [1, 2]), ("col", [-1, 0]), ("col", [2**40, 0]), ("perm", [0, 2])] + [
        ("rowptr", ptr) for ptr in ([0, 2**40, 2], [0, -1, 2], [1, 1, 2], [0, 2, 1], [0, 1, 1])
    ]:
        with pytest.raises(ValueError, match="Expected indices within the rows"):
            call(**{name: torch.tensor(bad)})


def test_version_is_that_of_the_sources():
    (version,) = re.findall(r"void pyg_attnpool_(\d+)\(\)", (SOURCES / "sparse.cpp").read_text())
    assert int(version) == _cpu.VERSION


# Threads and processes ###############################################################


def test_workspace_is_per_type_and_thread():
    first = _cpu.workspace((3, 5), torch.float64).fill_(1)
    assert first.shape == (3, 5) and first.dtype == torch.float64
    _cpu.workspace((3, 5), torch.float32).fill_(2)
    other = []
    thread = threading.Thread(target=lambda: other.append(_cpu.workspace((3, 5), first.dtype)))
    thread.start()
    thread.join()
    other[0].fill_(3)
    assert first.eq(1).all()


@needs_fork
def test_fork_while_another_thread_holds_the_lock():
    held, events = threading.Event(), []

    def hold():
        with _cpu.search_lock:
            held.set()
            time.sleep(0.3)
            events.append("released")

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def child():
        assert events == ["released"]  # it was waited for
        assert not _cpu.search_lock.locked()
        query, key = torch.eye(3), torch.eye(3).roll(1, 0)
        assert cosine_topk(query, key, 1).tolist() == [[1], [2], [0]]

    assert status_of_child(child) == 0
    thread.join()
    assert not _cpu.search_lock.locked()
    assert _cpu.search_lock.acquire(timeout=1)
    _cpu.search_lock.release()


@needs_fork
def test_fork_while_another_thread_searches():
    # The child goes on with the state that the thread was writing.
    query, key = torch.randn(300, 8), torch.randn(400, 8)
    search = Search(300, 400, 8, 2)
    stop, errors = threading.Event(), []

    def run():
        try:
            generator = torch.Generator().manual_seed(1)
            while not stop.is_set():
                search(query, key + 1e-2 * torch.randn(400, 8, generator=generator), 2)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def child():
        for _ in range(2):
            assert torch.equal(search(query, key, 2)[0], cosine_topk(query, key, 2))

    try:
        for _ in range(5):
            assert status_of_child(child) == 0
    finally:
        stop.set()
        thread.join()
    assert not errors, errors[0]
