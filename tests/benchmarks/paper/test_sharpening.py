import pytest
import torch

for name in ("tyro", "pytorch_lightning", "matplotlib"):
    pytest.importorskip(name)

from benchmarks.paper import sharpening  # noqa: E402
from pyg_attnpool import Mapping  # noqa: E402


def test_roughness_of_known_mappings():
    ring = torch.arange(30)
    edge_index = torch.stack([torch.cat([ring, ring]), torch.cat([ring.roll(1), ring.roll(-1)])])

    def roughness(matrix):
        return sharpening.roughness(Mapping.from_matrix(matrix), edge_index)

    assert roughness(torch.ones(30, 30)) == pytest.approx(0, abs=1e-5)
    assert roughness(torch.eye(30)) == pytest.approx(1, abs=0.05)
    signs = (-1.0) ** ring
    assert roughness(signs[:, None]) == pytest.approx(2, rel=1e-5)
