r"""What a user sees who hands over something broken: `pytest tests/test_bad_inputs.py -rP` prints
every message. Each module's own tests go further."""

import re

import numpy as np
import pytest
import torch

from pyg_attnpool import AttentionUnpool, Mapping, MappingPool, MeshHierarchy
from pyg_attnpool.datasets import RegisteredMeshes
from pyg_attnpool.mesh import read_mesh, write_mesh
from pyg_attnpool.models import coma
from tests.mesh.meshes import blob, icosphere


def more_neighbours_than_vertices(folder):
    AttentionUnpool(num_source=20, num_target=79, k=32)


def features_of_another_mesh(folder):
    MappingPool(Mapping(torch.zeros(4, 1).long(), torch.ones(4, 1), 9))(torch.randn(2, 10, 3))


def prior_of_another_mesh(folder):
    AttentionUnpool(20, 79, k=4, prior=torch.eye(79, 21))


def truncated_template(folder):
    write_mesh(folder / "template.ply", *icosphere(2))
    content = (folder / "template.ply").read_bytes()
    (folder / "template.ply").write_bytes(content[:1500])
    read_mesh(folder / "template.ply")


def edge_with_three_faces(folder):
    vertices, faces = icosphere(2)
    fin = np.array([[*faces[0, :2], len(vertices)]])
    MeshHierarchy.from_template((np.vstack([vertices, [[2.0, 0, 0]]]), np.vstack([faces, fin])))


def template_with_nan(folder):
    vertices, faces = icosphere(2)
    vertices[7, 1] = np.nan
    MeshHierarchy.from_template((vertices, faces))


def empty_template(folder):
    MeshHierarchy.from_template((np.empty((0, 3)), np.empty((0, 3), dtype=int)))


def one_scan_of_another_topology(folder):
    write_mesh(folder / "a.ply", *blob(2, seed=0))
    write_mesh(folder / "b.ply", *blob(1, seed=0))
    RegisteredMeshes(folder)


def one_scan_with_nan(folder):
    meshes = np.zeros((5, 42, 3), dtype=np.float32)
    meshes[3, 5] = np.nan
    np.save(folder / "scans.npy", meshes)
    RegisteredMeshes(folder / "scans.npy", template=icosphere(1))


def hierarchy_of_another_program(folder):
    np.savez(folder / "hierarchy.npz", vertices=np.zeros(3))
    MeshHierarchy.load(folder / "hierarchy.npz")


def channels_of_another_depth(folder):
    coma(MeshHierarchy.from_template(icosphere(2), factors=[4, 4]), "attention")


def weights_that_are_pickled(folder):
    np.save(folder / "scans.npy", np.array([{}], dtype=object), allow_pickle=True)
    RegisteredMeshes(folder / "scans.npy", template=icosphere(1))


CASES = {
    more_neighbours_than_vertices: "at most the number of source vertices 20 (got 32)",
    features_of_another_mesh: "(got [2, 10, 3])",
    prior_of_another_mesh: "from 20 to 79 vertices (got 21 to 79)",
    truncated_template: "template.ply",
    edge_with_three_faces: "(got 3 at the edge of vertices 0 and 46)",
    template_with_nan: "at vertex 7",
    empty_template: "(got 0 vertices and 0 faces)",
    one_scan_of_another_topology: "b.ply",
    one_scan_with_nan: "in mesh 3",
    hierarchy_of_another_program: "hierarchy.npz",
    channels_of_another_depth: "for a hierarchy of 3 levels",
    weights_that_are_pickled: "scans.npy",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_message(case, tmp_path):
    with pytest.raises(ValueError, match=f"^Expected .*{re.escape(CASES[case])}") as error:
        case(tmp_path)
    print(f"{type(error.value).__name__}: {error.value}")
