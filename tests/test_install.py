import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from pyg_attnpool import MeshHierarchy, MorphableModel
from tests.mesh.meshes import blob

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
    call(*pip, Path(__file__).parents[1])
    work = tmp_path / "work"
    work.mkdir()
    # A frozen model of this environment.
    hierarchy = MeshHierarchy.from_template(blob(3, seed=0), factors=[4, 3])
    model = MorphableModel.coma(hierarchy, 4, channels=(4, 8)).freeze()
    code = torch.randn(2, 4)
    model.save(tmp_path / "sent")
    torch.save((code, model.decode(code).detach()), tmp_path / "decoded.pt")
    call(python, "-c", CHECK, tmp_path / "sent", tmp_path / "decoded.pt", cwd=work)
