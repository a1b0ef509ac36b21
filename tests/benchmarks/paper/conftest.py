import numpy as np
import pytest

from benchmarks.paper.options import Options
from pyg_attnpool.mesh import write_mesh
from tests.mesh.meshes import blob


@pytest.fixture(autouse=True)
def alone(one_thread):
    pass


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    r"""Stretched blobs of about 10 cm: two subjects, three expressions, eight frames."""
    folder = tmp_path_factory.mktemp("scans")
    vertices, faces = blob(2, seed=0)
    rng = np.random.default_rng(0)
    for subject in ("ann", "bob"):
        for expression in ("calm", "glad", "sad"):
            (folder / subject / expression).mkdir(parents=True)
            for frame in range(8):
                mesh = rng.uniform(0.09, 0.11, 3) * vertices
                write_mesh(folder / subject / expression / f"{frame}.ply", mesh, faces)
    return folder


@pytest.fixture
def options(folder, tmp_path):
    return Options(
        data=(str(folder),),
        scale="smoke",
        seeds=(0, 1),
        device="cpu",
        root=tmp_path / "data",
        output=tmp_path / "out",
    )
