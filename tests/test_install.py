import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.mesh import write_mesh
from pyg_attnpool.models.plan import run_plan
from pyg_attnpool.visualize import read_viewer
from tests.mesh.meshes import blob

ROOT = Path(__file__).parents[1]

CHECK = """
import shutil
import sys
import torch
from torch_geometric.nn import ChebConv
import pyg_attnpool
from pyg_attnpool import AttentionPool, Mapping, freeze

from pyg_attnpool.ops import _cpu
assert _cpu.AVAILABLE == (shutil.which("g++") is not None), "compiled where there is a compiler"

optional = "torch_sparse torch_scatter pytorch_lightning torchmetrics anny matplotlib"
assert not {name for name in optional.split() if name in sys.modules}
pool = AttentionPool(9, 4, channels=5)
x = torch.randn(2, 9, 3)
pool(x).sum().backward()
assert torch.isfinite(pool.key.grad).all()
torch.testing.assert_close(freeze(pool)(x), pool(x))

# What fits itself needs no trainer.
from pyg_attnpool import MorphableModel
faces = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
meshes = torch.randn(20, 4, 3)
linear = MorphableModel.pca((meshes[0].numpy(), faces.numpy()), 11).fit(meshes)
assert linear.evaluate(meshes)["mean"] < 900  # mm; of coordinates of about a metre
assert "pytorch_lightning" not in sys.modules

# A model that somebody has sent, in a folder.
x = linear.decode(torch.zeros(1, 11))
linear.save("model")
again = MorphableModel.load("model")
assert torch.equal(again.decode(torch.zeros(1, 11)), x) and x.shape == (1, 4, 3)
sent = MorphableModel.load(sys.argv[1])
code, decoded = torch.load(sys.argv[2], weights_only=True)
torch.testing.assert_close(sent.decode(code), decoded, rtol=1e-5, atol=1e-6)
assert "pytorch_lightning" not in sys.modules

def sparse():
    pool.mapping().to_sparse_tensor()

from pyg_attnpool.mesh import read_mesh, write_mesh
import numpy as np
for suffix in ("obj", "ply", "off", "stl"):
    write_mesh(f"mesh.{suffix}", np.eye(3), np.array([[0, 1, 2]]))
    assert read_mesh(f"mesh.{suffix}")[1].tolist() == [[0, 1, 2]]

def train():
    from pyg_attnpool.training import MeshTraining

def viz():
    from pyg_attnpool.visualize import plot_mesh
    plot_mesh(None, torch.rand(3, 3), torch.tensor([[0, 1, 2]]))

def data():
    from pyg_attnpool.datasets import AnnyFaces
    AnnyFaces("faces")

def export():
    from pyg_attnpool.export import export_onnx
    export_onnx(torch.nn.Linear(3, 3), x, "model.onnx")

def tgp():
    import pyg_attnpool.integrations.tgp

for use, package, line in [
    (sparse, "torch_sparse", "pip install torch_scatter torch_sparse --no-build-isolation"),
    (train, "pytorch_lightning", 'pip install "pyg_attnpool[train]"'),
    (viz, "matplotlib", 'pip install "pyg_attnpool[viz]"'),
    (data, "anny", 'pip install "pyg_attnpool[data]"'),
    (export, "onnxruntime", 'pip install "pyg_attnpool[export]"'),
    (tgp, "torch-geometric-pool", 'pip install "pyg_attnpool[tgp]"'),
]:
    try:
        use()
    except ImportError as e:
        assert package in str(e) and line in str(e), str(e)
        print(e)
    else:
        raise AssertionError(f"{package} was not missed")
"""


@pytest.mark.slow
def test_bare_install_pools_and_names_every_missing_extra(tmp_path):
    def call(*command, **kwargs):
        subprocess.run(command, check=True, timeout=1200, **kwargs)

    # As in the Makefile: a Python without ensurepip will do.
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    # Wheels of PyPI have no "+cu130" in their version, which torch itself tells.
    call(*pip, f"torch==={version('torch')}")
    call(*pip, ROOT)
    work = tmp_path / "work"
    work.mkdir()
    # A frozen model of this environment.
    hierarchy = MeshHierarchy.from_template(blob(3, seed=0), factors=[4, 3])
    model = MorphableModel.coma(hierarchy, 4, channels=(4, 8)).freeze()
    code = torch.randn(2, 4)
    model.save(tmp_path / "sent")
    torch.save((code, model.decode(code).detach()), tmp_path / "decoded.pt")
    call(python, "-c", CHECK, tmp_path / "sent", tmp_path / "decoded.pt", cwd=work)


PRETRAINED = """
import pyg_attnpool
print(pyg_attnpool.__file__)
print(pyg_attnpool.MorphableModel.from_pretrained("faces").num_vertices)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    r"""The programs of an environment where the package is installed from its wheel, beside the
    libraries of this environment, of which none is downloaded."""
    pytest.importorskip("tyro")
    pytest.importorskip("pytorch_lightning")
    folder = tmp_path_factory.mktemp("installed")
    # What a wheel is built from, without what earlier builds have left.
    source, venv = folder / "source", folder / "venv"
    left_out = shutil.ignore_patterns("*.so", "*.dll", "__pycache__", "node_modules")
    shutil.copytree(ROOT / "pyg_attnpool", source / "pyg_attnpool", ignore=left_out)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip"]
    quiet = ["--quiet", "--no-deps"]
    subprocess.run(
        [*pip, "wheel", *quiet, "--no-build-isolation", "-w", folder, source], check=True
    )
    (wheel,) = folder.glob("pyg_attnpool-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    programs = venv / ("Scripts" if os.name == "nt" else "bin")
    python = programs / Path(sys.executable).name
    subprocess.run([*pip, "--python", python, "install", *quiet, wheel], check=True)
    # The libraries come after the wheel: pip would find the package among them. An editable package
    # is no library, since Python does not read the .pth files of a folder that one names.
    libraries = next(venv.rglob("site-packages")) / "libraries.pth"
    libraries.write_text(sysconfig.get_path("purelib") + "\n")
    return programs


@pytest.mark.slow
def test_an_installed_package_goes_from_scans_to_a_page(installed, tmp_path):
    r"""As a newcomer does, in the folder where the scans are."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def call(program, *arguments):
        done = subprocess.run(
            [shutil.which(program, path=installed), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    vertices, faces = blob(3, seed=0)
    stretch = np.random.default_rng(0).uniform(90, 110, size=(24, 1, 3))
    for i, mesh in enumerate(stretch * vertices):
        write_mesh(tmp_path / "scans" / f"{i}.ply", mesh, faces)
    options = ["--unit", "mm", "--steps", "3", "--latent", "4", "--device", "cpu"]
    call("pyg-attnpool", "train", "scans", "-o", "mine", *options)
    found = json.loads(call("pyg-attnpool", "evaluate", "mine", "scans", "--json"))
    assert 0 < found["mean"] < 5  # mm, of blobs of 20 cm
    call("pyg-attnpool", "view", "mine", "--no-open")
    # The page computes what the model computes where it is loaded here.
    model = MorphableModel.load(tmp_path / "mine")
    code = model.latent_mean + torch.randn(2, 4) * model.latent_std
    plan = read_viewer((tmp_path / "mine.html").read_text("utf-8"))["plan"]
    with torch.no_grad():
        expected = model.decode(code).numpy()
    np.testing.assert_allclose(run_plan(plan, code.numpy()), expected, atol=1e-4)
    # A model that comes with the package, from Python and on the command line.
    place, num_vertices = call(Path(sys.executable).name, "-c", PRETRAINED).split("\n")[:2]
    assert Path(place).is_relative_to(installed.parent)
    found = json.loads(call("pyg-attnpool", "info", "faces", "--json"))
    assert found["vertices"] == int(num_vertices)
