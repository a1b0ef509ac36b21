import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import MappingPool, MeshHierarchy, MorphableModel
from pyg_attnpool.datasets import MeshDataset, RegisteredMeshes
from pyg_attnpool.mesh import read_features, read_mesh, write_mesh
from pyg_attnpool.models import PCA, MeshAutoencoder
from tests.mesh.meshes import blob, icosphere

TEMPLATE = blob(2, seed=0)
SMALL = dict(channels=(4, 5))


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(TEMPLATE, factors=[4, 4])


def meshes(num, channels=3, seed=0):
    r"""The template, stretched, with further features that depend on the stretch."""
    generator = torch.Generator().manual_seed(seed)
    stretch = 1 + 0.2 * torch.rand(num, 1, 1, generator=generator)
    x = 0.1 * stretch * torch.from_numpy(TEMPLATE[0]).float()
    further = 50 * stretch.expand(num, x.size(1), channels - 3)
    return torch.cat([x, further], dim=-1)


def test_metres_go_in_and_come_out(hierarchy):
    model = MorphableModel.coma(hierarchy, 3, **SMALL).double()
    mean, std = torch.randn_like(model.mean), 0.5 + torch.rand_like(model.std)
    model.set_statistics(mean, std)
    x = torch.randn(4, *mean.shape, dtype=torch.double)
    z = model.autoencoder.encode((x - mean) / std)
    assert_close(model.encode(x), z)
    assert_close(model.decode(z), mean + std * model.autoencoder.decode(z))
    assert_close(model(x), model.decode(z))
    assert_close(model.encode(x.float().numpy()), model.encode(x.float()))  # arrays too


def test_constructors(hierarchy, tmp_path):
    spectral = MorphableModel.coma(hierarchy, 3, **SMALL)
    spiral = MorphableModel.neural3dmm(hierarchy, 3, **SMALL)
    linear = MorphableModel.pca(hierarchy, 3)
    assert [m.autoencoder.config.conv for m in (spectral, spiral)] == ["cheb", "spiral"]
    assert all(m.autoencoder.config.down == "attention" for m in (spectral, spiral))
    assert type(linear.autoencoder) is PCA
    for model in (spectral, spiral, linear):
        assert model.hierarchy is hierarchy and model.latent_channels == 3
        np.testing.assert_allclose(model.template, TEMPLATE[0], rtol=1e-6)
        np.testing.assert_array_equal(model.faces, TEMPLATE[1])
    # Of a file in millimetres, the template is in metres.
    vertices, faces = blob(4, seed=0)
    write_mesh(tmp_path / "template.obj", 1000 * vertices, faces)
    for make in (MorphableModel.pca, MorphableModel.coma):
        kwargs = {} if make == MorphableModel.pca else dict(channels=(4, 4, 4, 4))
        model = make(tmp_path / "template.obj", 3, unit="mm", **kwargs)
        np.testing.assert_allclose(model.template, vertices, rtol=1e-5, atol=1e-7)


def test_written_meshes_are_in_the_unit_of_the_files(hierarchy, tmp_path):
    for unit, scale in (("m", 1), ("cm", 100), ("mm", 1000)):
        model = MorphableModel.coma(hierarchy, 3, unit=unit, **SMALL)
        x = meshes(1)[0]
        model.write_mesh(tmp_path / "mesh.ply", x)
        vertices, faces = read_mesh(tmp_path / "mesh.ply")
        np.testing.assert_allclose(vertices, scale * x.double().numpy(), rtol=1e-6)
        np.testing.assert_array_equal(faces, TEMPLATE[1])
    model = MorphableModel.pca(hierarchy, 2, "cm", in_channels=5)
    model.write_mesh(tmp_path / "mesh.ply", meshes(1, 5)[0])
    vertices, _ = read_mesh(tmp_path / "mesh.ply")
    np.testing.assert_allclose(vertices, 100 * meshes(1).double().numpy()[0], rtol=1e-6)
    further = read_features(tmp_path / "mesh.ply")
    assert list(further) == ["feature_3", "feature_4"]
    np.testing.assert_allclose(further["feature_4"][:, 0], meshes(1, 5)[0, :, 4], rtol=1e-6)
    with pytest.raises(ValueError, match=r"features to a PLY file .got mesh.obj"):
        model.write_mesh(tmp_path / "mesh.obj", meshes(1, 5)[0])


def test_freezing_changes_nothing_but_the_parameters(hierarchy):
    model = MorphableModel.coma(hierarchy, 3, **SMALL)
    twin = MorphableModel.coma(hierarchy, 3, "qem", **SMALL)
    x = meshes(3)
    expected = model(x)
    assert model.freeze() is model
    assert_close(model(x), expected)
    assert all(isinstance(p, MappingPool) for p in model.autoencoder.pools)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in twin.parameters())


def test_pca_in_millimetres_is_the_best_linear_model(hierarchy):
    x = meshes(40) + 0.003 * torch.randn(40, len(TEMPLATE[0]), 3)
    model = MorphableModel.pca(hierarchy, 5).fit(x, x)
    flat = x.double().flatten(1).numpy()
    centred = flat - flat.mean(axis=0)
    left = np.linalg.svd(centred, compute_uv=False)[5:]
    residual = (model(x) - x).double().square().sum().item()
    assert residual == pytest.approx((left**2).sum(), rel=1e-4)
    # The codes' covariance is diagonal, with the variances of the components.
    variance = np.linalg.svd(centred, compute_uv=False)[:5] ** 2 / 40
    np.testing.assert_allclose(model.latent_cov, np.diag(variance), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(model.latent_std, variance**0.5, rtol=1e-3)


def test_further_features_end_to_end(hierarchy, tmp_path):
    pytest.importorskip("pytorch_lightning")
    x, test = meshes(40, 5), meshes(10, 5, seed=1)
    model = MorphableModel.coma(hierarchy, 2, in_channels=5, **SMALL)
    model.fit(x, epochs=20, batch_size=8, accelerator="cpu")
    found = model.evaluate(test)
    assert found["mean"] < 5  # of some 100 mm
    assert len(found["features"]) == 2 and max(found["features"]) < 3  # of 50 to 60
    expected = (model(test) - test)[..., 3:].abs().mean(dim=(0, 1)).tolist()
    assert found["features"] == pytest.approx(expected, rel=1e-4)
    model.save(tmp_path / "model")
    assert torch.equal(MorphableModel.load(tmp_path / "model")(test), model(test))


def test_features_keep_their_names_from_ply_to_ply(tmp_path):
    plyfile = pytest.importorskip("plyfile")
    rng = np.random.default_rng(0)
    vertices, faces = TEMPLATE
    color, change = rng.integers(20, 200, (len(vertices), 3)), rng.integers(-5, 6, (1, 3))
    normals, heat = rng.standard_normal((len(vertices), 3)), rng.uniform(20, 40, len(vertices))
    columns = "red green blue x y z heat nx ny nz".split()
    kinds = ["u1"] * 3 + ["f8"] * 3 + ["f4"] * 4
    rows = [
        (*(color + i * change).T, *((100 + i) * vertices).T, heat + i, *((1 + 0.1 * i) * normals).T)
        for i in range(10)
    ]
    (tmp_path / "scans").mkdir()
    for i, row in enumerate(rows):
        vertex = np.empty(len(vertices), list(zip(columns, kinds, strict=True)))
        for name, column in zip(columns, row, strict=True):
            vertex[name] = column
        face = np.array([(f,) for f in faces.tolist()], [("vertex_indices", "i4", (3,))])
        elements = [
            plyfile.PlyElement.describe(v, n) for v, n in ((vertex, "vertex"), (face, "face"))
        ]
        plyfile.PlyData(elements).write(tmp_path / "scans" / f"{i}.ply")
    scans = RegisteredMeshes(tmp_path / "scans", unit="mm", features=["color", "heat", "normal"])
    model = MorphableModel.pca(scans.template, 1, unit="mm", in_channels=10).fit(scans[:8])
    assert model.features == ("color", "heat", "normal")
    model.save(tmp_path / "model")
    model = MorphableModel.load(tmp_path / "model")
    (tmp_path / "written").mkdir()
    for i, mesh in enumerate(model(scans.vertices)):  # two that it has not seen among them
        model.write_mesh(tmp_path / "written" / f"{i}.ply", mesh)
        found = plyfile.PlyData.read(tmp_path / "written" / f"{i}.ply")["vertex"]
        for name, column in zip(columns, rows[i], strict=True):
            # Single precision, next to heat of 40, is a hundredth of a millimetre.
            atol = 1e-2 if name in "xyz" else 1e-4
            np.testing.assert_allclose(found[name], column, rtol=1e-4, atol=atol, err_msg=name)
        for name in ("red", "green", "blue"):
            assert found[name].dtype == np.uint8
            np.testing.assert_array_equal(found[name], rows[i][columns.index(name)])
    written = RegisteredMeshes(tmp_path / "written", unit="mm", features=model.features)
    assert_close(written.vertices, scans.vertices, rtol=1e-4, atol=1e-5)
    # What a decoder makes beyond black and white is cut, not wrapped around.
    mesh[:, 3:5] = torch.tensor([-0.2, 1.2])
    model.write_mesh(tmp_path / "mesh.ply", mesh)
    assert read_features(tmp_path / "mesh.ply")["color"][:, :2].tolist() == [[0, 1]] * len(mesh)


def test_names_of_features_that_do_not_fit(hierarchy, tmp_path):
    model = MorphableModel.pca(hierarchy, 2, in_channels=6)
    for names, error, match in (
        ("color", TypeError, "a list of names of features .got 'color'"),
        ([1, 2, 3], TypeError, "a list of names"),
        (["heat"], ValueError, "the 3 channels beyond coordinates .got 1 of .'heat'"),
        (["heat", "heat", "x"], ValueError, "names of their own.*got 'heat'"),
        (["heat", "age", "x"], ValueError, "names of their own.*got 'x'"),
    ):
        with pytest.raises(error, match=match):
            model.features = names
    assert model.features == ()
    model.features = ["normal"]
    model.fit(meshes(8, 6))  # an array has no names, so they stay
    assert model.features == ("normal",)
    train = MeshDataset(meshes(8, 6), TEMPLATE)
    val = MeshDataset(meshes(4, 6, seed=1), TEMPLATE)
    train.features, val.features = ("color",), ("normal",)
    with pytest.raises(ValueError, match=r"of the features .'color'. .*got .'normal'"):
        model.fit(train, val)
    assert model.fit(train).features == ("color",)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_export_freezes_a_copy(hierarchy, tmp_path, suffix):
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    model = MorphableModel.coma(hierarchy, 3, **SMALL)
    assert model.export(tmp_path / f"model.{suffix}") < 1e-5
    assert any("key" in name for name, _ in model.named_parameters())
    if suffix == "pt2":
        x = meshes(3)
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        assert_close(loaded(x), model(x))
    with pytest.raises(ValueError, match=r"ending in one of \['.pt2', '.onnx'\].*model.txt"):
        model.export(tmp_path / "model.txt")


def test_bad_arguments(hierarchy):
    network = MeshAutoencoder(hierarchy, **SMALL)
    with pytest.raises(TypeError, match=r"without \['encode', 'decode'\]"):
        MorphableModel(torch.nn.Linear(3, 3), TEMPLATE)
    with pytest.raises(ValueError, match=r"'unit' to be one of .*\(got 'inch'\)"):
        MorphableModel(network, unit="inch")
    with pytest.raises(ValueError, match=r"template of 162 vertices .*\(got 42\)"):
        MorphableModel(network, blob(1, seed=0))
    with pytest.raises(ValueError, match="'template'"):
        MorphableModel(PCA(meshes(9), 2))
    far = hierarchy.vertices[0] + [500_000, 5_400_000, 100], hierarchy.faces[0]
    with pytest.raises(ValueError, match="a template near the origin"):
        MorphableModel.pca(far)
    model = MorphableModel(network)
    with pytest.raises(ValueError, match="mesh 2 near the origin"):
        model.fit(torch.cat([meshes(2).double(), torch.from_numpy(far[0]).unsqueeze(0)]))
    for x in (torch.zeros(162, 3), torch.zeros(1, 162, 4), torch.zeros(1, 161, 3)):
        with pytest.raises(ValueError, match=r"meshes of shape \['B', 162, 3\]"):
            model.encode(x)
    with pytest.raises(ValueError, match=r"latent codes of shape \['B', 8\]"):
        model.decode(torch.zeros(1, 7))
    for x in (torch.zeros(1, 162, 3).long(), "mesh.ply", None):
        with pytest.raises(TypeError, match="floating point"):
            model.encode(x)
    with pytest.raises(ValueError, match="positive 'std'"):
        model.set_statistics(model.mean, 0 * model.std)
    with pytest.raises(ValueError, match=r"'mean' of shape \[162, 3\]"):
        model.set_statistics(model.mean[:5], model.std)


def test_number_of_parameters():
    hierarchy = MeshHierarchy.from_template(icosphere(2), factors=[2.5] * 4)
    qem = MorphableModel.coma(hierarchy, latent_channels=3, pool="qem")
    model = MorphableModel.coma(hierarchy, latent_channels=3)
    assert model.num_parameters == sum(p.numel() for p in model.parameters())
    assert model.freeze().num_parameters == qem.num_parameters < 30_056
    # The mean mesh and three components.
    assert MorphableModel.pca(hierarchy, latent_channels=3).num_parameters == 162 * 3 * (1 + 3)
