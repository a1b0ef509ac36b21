import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from pyg_attnpool.datasets import MeshDataset
from pyg_attnpool.metrics import encode_all, vertex_distances, warn_millimetres
from pyg_attnpool.models import MorphableModel
from tests.mesh.meshes import icosphere

TEMPLATE = icosphere(1)


class Shifted(torch.nn.Module):
    r"""Gives every vertex of mesh i back at a known distance."""

    latent_channels = 2

    def encode(self, x):
        return x[:, 0, :2]

    def decode(self, z):
        return self.meshes[: len(z)]


def meshes(num):
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(TEMPLATE[0]).float() + 0.1 * torch.randn(
        num, 42, 3, generator=generator
    )


def test_distances_are_millimetres_of_metres():
    x = torch.zeros(2, 2, 4)
    out = x.clone()
    out[..., 0] = torch.tensor([[0.001, 0.002], [0.004, 0.013]])
    out[..., 3] = 5.0  # a further feature, which is no distance
    assert vertex_distances(out, x).tolist() == [[1, 2], pytest.approx([4, 13])]


@pytest.mark.parametrize("num", [1, 3, 4])
def test_mean_std_and_true_median(num):
    x = meshes(num)
    network = Shifted()
    model = MorphableModel(network, TEMPLATE)
    offset = torch.rand(num, 42, 3) / 100
    network.meshes = x + offset - model.mean
    d = 1000 * np.linalg.norm((x + offset - x).double().numpy(), axis=-1)
    found = model.train().evaluate(x)
    assert found["mean"] == pytest.approx(d.mean(), rel=1e-4)
    assert found["std"] == pytest.approx(d.std(), rel=1e-4)
    assert found["median"] == pytest.approx(np.median(d), rel=1e-4)
    assert model.training


def test_living_latent_channels():
    x = meshes(40)
    model = MorphableModel.pca(TEMPLATE, 4).fit(x, x)
    assert model.evaluate(x)["alive"] == 4
    model.autoencoder.components[1:] = 0
    assert model.evaluate(x)["alive"] == 1


def test_all_forms_of_meshes_have_one_error():
    x = meshes(10)
    model = MorphableModel.pca(TEMPLATE, 3).fit(x[:8], x[8:])
    face = torch.from_numpy(TEMPLATE[1].T.copy())
    forms = [
        x,
        x.double(),
        x.numpy(),
        MeshDataset(x, TEMPLATE),
        [Data(pos=p, face=face) for p in x],
    ]
    errors = [model.evaluate(form, batch_size=size) for form in forms for size in (3, 64)]
    assert all(error == pytest.approx(errors[0]) for error in errors)
    expected = (x - model.autoencoder.mean).flatten(1) @ model.autoencoder.components.flatten(1).t()
    torch.testing.assert_close(encode_all(model, x), expected)
    other = Data(pos=x[0], face=face.flip(0))
    for bad, error, match in (
        ([forms[-1][0], other], ValueError, "faces of the first mesh"),
        ([forms[-1][0], Data(pos=x[0, :9], face=face)], ValueError, r"\[9, 3\] in mesh 1"),
        ("meshes.npy", TypeError, "got str"),
        (x.long(), TypeError, "floating point"),
        (x[:, :9], ValueError, "42 vertices"),
    ):
        with pytest.raises(error, match=match):
            model.evaluate(bad)


def test_millimetres_are_noticed():
    x = meshes(2)
    assert not warn_millimetres("meshes", x)
    with pytest.warns(UserWarning, match="Expected scans in metres .*millimetres"):
        assert warn_millimetres("scans", 100 * x)
    assert not warn_millimetres("meshes", x + 1e6)  # far away, but small
