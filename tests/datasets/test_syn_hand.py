import numpy as np
import pytest

from pyg_attnpool.datasets import RegisteredMeshes, SynHand
from pyg_attnpool.mesh.io import write_mesh
from tests.mesh.meshes import icosphere

TEMPLATE, FACES = icosphere(1)


def hands(num):
    # In millimetres.
    return 80 * (TEMPLATE + np.random.default_rng(0).normal(0, 0.05, (num, *TEMPLATE.shape)))


@pytest.mark.parametrize("stored", [False, True])
def test_folder_and_array_are_the_same_hands_in_metres(tmp_path, stored):
    meshes = hands(130)
    for i, mesh in enumerate(meshes):
        write_mesh(tmp_path / "meshes" / f"{i // 50}" / f"{i:05d}.ply", mesh, FACES)
    np.save(tmp_path / "meshes.npy", meshes.astype(np.float32))
    roots = [tmp_path / "a" if stored else None, tmp_path / "b" if stored else None]
    folder = SynHand(tmp_path / "meshes", cache=roots[0])
    array = SynHand(tmp_path / "meshes.npy", template=(meshes[0], FACES), cache=roots[1])
    for dataset in (folder, array):
        np.testing.assert_allclose(dataset.vertices.numpy(), meshes / 1000, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(dataset.template[0], meshes[0] / 1000, rtol=1e-5, atol=1e-8)
        assert np.array_equal(dataset.template[1], FACES)
    assert folder.name[51] == "1/00051.ply"
    for root in filter(None, roots):
        files = sorted(p.suffix for p in root.iterdir())
        assert files == [".npy", ".npz"]


def test_the_file_of_an_array_stays_as_it_is(tmp_path):
    np.save(tmp_path / "meshes.npy", hands(10).astype(np.float32))
    before = (tmp_path / "meshes.npy").read_bytes()
    dataset = SynHand(tmp_path / "meshes.npy", (TEMPLATE, FACES))
    dataset.vertices[0] = 5
    assert (tmp_path / "meshes.npy").read_bytes() == before


def test_stored_again_when_the_scale_or_template_is_another(tmp_path):
    np.save(tmp_path / "meshes.npy", hands(10).astype(np.float32))
    sizes = {}
    for unit, scale in (("m", 1.0), ("mm", 0.001)):
        for factor in (1, 2):
            dataset = RegisteredMeshes(
                tmp_path / "meshes.npy", (factor * TEMPLATE, FACES), unit, cache=tmp_path / "c"
            )
            sizes[scale, factor] = float(dataset.vertices.abs().max())
            np.testing.assert_allclose(dataset.template[0], scale * factor * TEMPLATE)
    assert sizes[1.0, 1] == sizes[1.0, 2] == pytest.approx(1000 * sizes[0.001, 1])


def test_a_tenth_is_test_and_none_of_it_validation(tmp_path):
    np.save(tmp_path / "meshes.npy", np.tile(TEMPLATE.astype(np.float32), (1000, 1, 1)))
    split = SynHand(tmp_path / "meshes.npy", (TEMPLATE, FACES)).split()
    assert split.test.tolist() == [i for i in range(1000) if i % 100 < 10]
    rest = [i for i in range(1000) if i % 100 >= 10]
    assert split.val.tolist() == [i for n, i in enumerate(rest) if n % 100 < 10]
    assert len(split.train) == 810


def test_without_the_data_it_says_whom_to_ask(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"at .*hands.*arxiv\.org/abs/1808\.09208"):
        SynHand(tmp_path / "hands")


def test_files_are_in_the_plain_order_of_their_names(tmp_path):
    for i in (1, 2, 10):
        write_mesh(tmp_path / f"hand{i}.ply", i * TEMPLATE, FACES)
    assert SynHand(tmp_path).name == ["hand1.ply", "hand10.ply", "hand2.ply"]
    assert RegisteredMeshes(tmp_path).name == ["hand1.ply", "hand2.ply", "hand10.ply"]
