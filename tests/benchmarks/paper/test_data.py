from dataclasses import replace

import pytest
import torch

from benchmarks.paper.data import Meshes


def test_units_and_places_of_data(options, folder):
    meshes = Meshes(options.data[0], options)
    small = Meshes(options.data[0], replace(options, unit="mm"))
    torch.testing.assert_close(small.dataset.vertices, 0.001 * meshes.dataset.vertices)
    assert meshes.hierarchy.num_vertices == [162, 65, 26, 11, 5]
    assert [len(part) for part in meshes.split()] == [37, 5, 6]
    # Synthetic hands, in millimetres, are drawn one by one.
    (options.root / "SynHand").mkdir(parents=True)
    (options.root / "SynHand" / "raw").symlink_to(folder)
    hands = Meshes("synhand", options)
    torch.testing.assert_close(hands.dataset.vertices, small.dataset.vertices)
    assert [len(part) for part in hands.split()] == [38, 5, 5]


# At this size an eyeball may end before the coarsest level.
@pytest.mark.filterwarnings("ignore:.*components end before the level:UserWarning")
@pytest.mark.slow
def test_sets_made_here_at_smoke_scale(options):
    sizes = {}
    for name in ("faces", "bodies", "hands"):
        meshes = Meshes(name, options)
        sizes[name] = meshes.hierarchy.num_vertices
        parts = meshes.split()
        assert [len(part) for part in parts] == [48, *(min(16, len(p)) for p in parts[1:])]
        assert all(part.shape[1:] == (400, 3) for part in parts)
    assert all(size == [400, 160, 64, 26, 11] for size in sizes.values())
    plain, detailed = (Meshes(name, options).split()[0] for name in ("faces", "detailed_faces"))
    # Detail is small, and on every mesh.
    distance = (plain - detailed).norm(dim=-1)
    assert distance.amax(dim=1).min() > 1e-4 and distance.mean() < 3e-3
