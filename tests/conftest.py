import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


# Coverage makes these half as slow again, as they call PyTorch's own Python code: compilers,
# transforms, gradient checks. Others reach the same lines of the package.
UNMEASURED = re.compile(
    r"tests\.(test_export|nn\.test_(swap|tooling)|models\.test_compiled"
    r"|ops\.test_backends|training\.test_fit)"
)


@pytest.fixture(scope="module", autouse=True)
def measured(request):
    # The plugin's own pause goes on with a second measurement where tests run in several processes.
    trace = sys.gettrace()
    pauses = trace is not None and UNMEASURED.fullmatch(request.module.__name__)
    if pauses:
        sys.settrace(None)
    yield
    if pauses:
        sys.settrace(trace)


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(12345)


@pytest.fixture
def golden():
    r"""Loads :obj:`tests/golden/NAME.npz` as a dictionary of tensors."""

    def load(name: str) -> dict[str, torch.Tensor]:
        path = Path(__file__).parent / "golden" / f"{name}.npz"
        with np.load(path, allow_pickle=False) as data:
            return {key: torch.from_numpy(data[key]) for key in data.files}

    return load


@pytest.fixture
def saved_numel():
    r"""The sizes of all tensors that a call saves for its backward pass."""

    def run(function, *args) -> list[int]:
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(*args)
        return sizes

    return run


@pytest.fixture
def num_threads():
    r"""Sets the number of threads of an operation, for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def compiled():
    r"""Compiles without allowing a graph break, and without what other tests have compiled."""
    torch.compiler.reset()

    def run(function, backend: str = "aot_eager"):
        if backend == "inductor" and DEVICES == ["cpu"] and shutil.which("g++") is None:
            pytest.skip("inductor needs a C++ compiler")
        if backend == "inductor" and " " in torch.__file__:
            pytest.skip("inductor cannot compile where torch lies in a path with a space")
        return torch.compile(function, backend=backend, fullgraph=True)

    return run
