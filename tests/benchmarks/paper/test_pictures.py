import numpy as np
import pytest
import torch

for name in ("tyro", "pytorch_lightning", "matplotlib", "sklearn"):
    pytest.importorskip(name)

from PIL import Image  # noqa: E402
from scipy.sparse import csr_array  # noqa: E402

from benchmarks.paper import mappings, receptive_fields  # noqa: E402
from benchmarks.paper.__main__ import PICTURES, main  # noqa: E402
from pyg_attnpool import Mapping  # noqa: E402
from tests.mesh.meshes import icosphere  # noqa: E402


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    r"""One folder for all pictures, so that their models are trained once."""
    return tmp_path_factory.mktemp("pictures")


QUICK = ("figure6", "figure13")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PICTURES]
)
def test_command(name, folder, options, output):
    args = [name, "--data", folder, "--scale", "smoke", "--device", "cpu", "--root", options.root]
    main(*map(str, [*args, "--output", output]))
    with Image.open(output / f"{name}-smoke-{folder.name}.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    assert (pixels < 250).any(axis=2).mean() > 0.1  # something is drawn


def test_pictures_are_of_stored_models(folder, options, output):
    args = ["figure6", "--data", folder, "--scale", "smoke", "--device", "cpu"]
    args += ["--root", options.root, "--output", output]
    main(*map(str, args))
    path = output / f"figure6-smoke-{folder.name}.png"
    known = {p: p.stat().st_mtime_ns for p in (output / "models").iterdir()}
    first = path.read_bytes()
    main(*map(str, args))
    assert {p: p.stat().st_mtime_ns for p in (output / "models").iterdir()} == known
    assert path.read_bytes() == first


def test_like_vectors_are_neighbours_on_the_line():
    # Windows that move along a ring: each shares most with the next.
    n = 120
    windows = sum(np.roll(np.eye(n), shift, axis=1) for shift in range(12))
    windows[7] = 0
    place = mappings.on_a_line(csr_array(windows))
    assert np.isnan(place[7]) and np.isfinite(np.delete(place, 7)).all()
    used = np.sort(np.delete(place, 7))
    np.testing.assert_allclose(used, (np.arange(n - 1) + 0.5) / (n - 1))
    step = np.nanmean(np.abs(place - np.roll(place, 1)))
    assert step < 0.1  # a third for places by chance


def test_jump_is_one_by_chance():
    vertices, faces = icosphere(4)
    place = np.random.default_rng(0).permutation(len(vertices)) / len(vertices)
    assert mappings.jump(place, faces) == pytest.approx(1, abs=0.03)
    assert mappings.jump(np.full(len(vertices), 0.5), faces) == 0


def test_shrunk_matrix_keeps_the_largest_of_every_block():
    matrix = np.random.default_rng(0).normal(size=(2 * mappings.SIZE, 3 * mappings.SIZE))
    image = mappings.shrunk(csr_array(matrix))
    blocks = matrix.reshape(mappings.SIZE, 2, mappings.SIZE, 3).swapaxes(1, 2)
    blocks = blocks.reshape(mappings.SIZE, mappings.SIZE, 6)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)
    np.testing.assert_array_equal(image, largest[..., 0])


def test_fields_have_the_hue_of_their_vertex_and_fade():
    index = torch.tensor([[0, 1, 1], [2, 3, 3]])
    weight = torch.tensor([[2.0, -0.25, -0.25], [1.0, 0.0, 0.0]])
    colors = receptive_fields.fields(Mapping(index, weight, 5), [0, 1])
    np.testing.assert_allclose(colors[0], [1, 0, 0], atol=0.01)  # all of the first
    np.testing.assert_allclose(colors[2], [0, 1, 1], atol=0.05)
    grey = [receptive_fields.NOTHING] * 3
    np.testing.assert_allclose(colors[1], 0.5 * colors[0] + 0.5 * np.array(grey), atol=1e-6)
    np.testing.assert_allclose(colors[3:], [grey, grey])


def test_chosen_vertices_are_seen():
    r"""Of a ball within a ball, those of the outer one's front."""
    vertices, faces = icosphere(3)
    both = np.concatenate([0.5 * vertices, vertices])
    found = receptive_fields.chosen(both, np.concatenate([faces, faces + len(vertices)]))
    assert len(set(found)) == receptive_fields.CHOSEN and min(found) >= len(vertices)
    assert (both[found] @ [-np.sin(np.pi / 9), 0, np.cos(np.pi / 9)] > 0).all()
