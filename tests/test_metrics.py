import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from pyg_attnpool import metrics
from pyg_attnpool.datasets import MeshDataset
from pyg_attnpool.metrics import (
    compactness,
    coverage,
    diversity,
    encode_all,
    error_quantiles,
    generalisation,
    generation,
    mean_distances,
    nearest_neighbor_accuracy,
    specificity,
    vertex_distances,
)
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


# As many distances as there are, one that ends a block, and ties among few values.
RANKED = {
    "spread": lambda n: np.random.default_rng(n).lognormal(size=n) * 10.0 ** (n % 7 - 3),
    "ties": lambda n: np.random.default_rng(n).integers(0, 4, size=n) / 8,
    "zeros": lambda n: np.zeros(n),
    "close": lambda n: 1 + np.random.default_rng(n).integers(0, 999, size=n) * 2.0**-23,
    "not finite": lambda n: np.where(np.arange(n) % 3 == 1, np.inf, 1.5),
}


@pytest.mark.parametrize("kind", RANKED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kept", [0, 10**9])
def test_ranks_are_those_of_numpy(monkeypatch, kind, dtype, kept):
    monkeypatch.setattr(metrics, "KEPT", kept)
    for n in (1, 2, 7, 64, 1000, 70_001):
        values = RANKED[kind](n).astype(dtype)
        parts = torch.from_numpy(values).split(64)
        ranks = metrics._Ranks()
        for part in parts:
            ranks.add(part)
        assert ranks.count == n and (ranks.first is not None) == (kept == 0)
        wanted = [0, (n - 1) // 2, n // 2, int(0.9 * (n - 1)), n - 1]
        found = ranks.values(wanted, lambda parts=parts: iter(parts))
        assert found == np.sort(values)[wanted].astype(np.float64).tolist()
        assert (found[1] + found[2]) / 2 == np.median(values.astype(np.float64))


@pytest.mark.parametrize("kept", [0, 300, 10**9])
def test_errors_do_not_depend_on_what_is_kept(monkeypatch, kept):
    x = meshes(19)
    model = MorphableModel.pca(TEMPLATE, 3).fit(x, x)
    with torch.no_grad():
        d = vertex_distances(model(x), x).flatten().double().numpy()
    monkeypatch.setattr(metrics, "KEPT", kept)
    found = model.evaluate(x, batch_size=4)
    assert found["mean"] == pytest.approx(d.mean(), rel=1e-6)
    assert found["std"] == pytest.approx(d.std(), rel=1e-6)
    assert found["median"] == pytest.approx(np.median(d), rel=1e-6)
    shares = [0, 0.013, 0.25, 0.5, 0.99, 1]
    quantiles = error_quantiles(model, x, shares, batch_size=4)
    np.testing.assert_allclose(quantiles, np.quantile(d, shares), rtol=1e-6)
    with pytest.raises(ValueError, match="quantiles from 0 to 1"):
        error_quantiles(model, x, [0.5, 1.5])


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


def linear_model(num=60, latent_channels=4):
    x = meshes(num)
    return MorphableModel.pca(TEMPLATE, latent_channels).fit(x).double(), x


def test_mean_distances_of_all_pairs():
    x, y = meshes(3), meshes(2) + 0.01
    expected = [[1000 * (a - b).norm(dim=-1).mean().item() for b in y] for a in x]
    np.testing.assert_allclose(mean_distances(x, y), expected, rtol=1e-5)
    # Features beyond coordinates are no distance.
    further = torch.cat([x, torch.rand(3, 42, 2)], dim=-1)
    assert mean_distances(further, further).diagonal().max() == 0
    with pytest.raises(ValueError, match=r"of one shape .*\[3, 42, 3\] and \[2, 9, 3\]"):
        mean_distances(x, y[:, :9])


def test_compactness_of_pca_are_its_eigenvalues():
    model, x = linear_model()
    flat = 1000 * x.double().flatten(1).numpy()
    eigenvalues = np.linalg.svd(flat - flat.mean(axis=0), compute_uv=False) ** 2 / len(x)
    found = compactness(model, x, batch_size=7).numpy()
    assert len(found) == len(x)
    np.testing.assert_allclose(found[:4], eigenvalues[:4].cumsum() / 42, rtol=1e-5)
    np.testing.assert_allclose(found[4:], found[3])  # no variance beyond the components
    assert generalisation(model, x) == model.evaluate(x)["mean"]


def test_specificity_against_a_search_mesh_by_mesh():
    x = meshes(5)
    samples = x[[4, 0]] + torch.tensor([0.0, 0.003, 0.004])
    assert specificity(samples, x) == pytest.approx(5, rel=1e-4)
    assert specificity(x, x) == 0


def test_diversity():
    x = torch.zeros(3, 42, 3)
    x[1, :, 0], x[2, :, 0] = 0.003, 0.006
    assert diversity(x) == pytest.approx(4)  # of 3, 3 and 6
    with pytest.raises(ValueError, match="at least two samples .got 1"):
        diversity(x[:1])


def test_coverage_and_nearest_neighbours_of_points_on_a_line():
    def at(*places):
        return torch.tensor(places).view(-1, 1, 1).expand(-1, 42, 3)

    real = at(0.0, 1.0, 2.0, 10.0)
    assert coverage(at(0.1, 0.2, 1.9), real) == 0.5
    # Of their own kind are the neighbours of 20, 21 and 2 alone: that of 1 is 0.1.
    samples = at(0.1, 20.0, 21.0, 9.9)
    assert nearest_neighbor_accuracy(samples, real) == pytest.approx(3 / 8)
    with pytest.raises(ValueError, match="as many samples as meshes .got 2 and 4"):
        nearest_neighbor_accuracy(samples[:2], real)
    # Two sets of one distribution cannot be told apart.
    x = torch.randn(600, 1, 3)
    assert nearest_neighbor_accuracy(x[:300], x[300:]) == pytest.approx(0.5, abs=0.1)
    assert 0.45 < coverage(x[:300], x[300:]) < 0.75


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda m, x: m.evaluate(x, batch_size=0), ValueError, "positive 'batch_size'"),
        (lambda m, x: m.evaluate(x, batch_size=2.0), TypeError, "integer 'batch_size' .got 2.0"),
        (lambda m, x: m.evaluate(np.array([[["a"]]])), TypeError, "meshes .*<U1"),
        (lambda m, x: encode_all(m, x, "8"), TypeError, "integer 'batch_size' .got '8'"),
        (lambda m, x: error_quantiles(m, x, "half"), TypeError, "list of numbers .got 'half'"),
        (lambda m, x: error_quantiles(m, x, 0.5), TypeError, "list of numbers .got 0.5"),
        (lambda m, x: generation(m, x, x, 2.5), TypeError, "integer 'n' .got 2.5"),
        (lambda m, x: generation(m, x, x, 1), ValueError, "at least 2 'n' .got 1"),
        (lambda m, x: generation(m, x, x[:1]), ValueError, "two test meshes .got 1"),
        (lambda m, x: generation(m, x, x, 4, 0), TypeError, "torch.Generator .*got 0"),
        (lambda m, x: diversity("ab"), TypeError, "'samples' .*str"),
        (lambda m, x: specificity(x.tolist(), x), TypeError, "'x' .*list"),
        (lambda m, x: vertex_distances(x, None), TypeError, "'x' .*NoneType"),
    ],
)
def test_bad_arguments(call, error, match):
    model, x = linear_model()
    with pytest.raises(error, match=match):
        call(model, x)


def test_arguments_may_be_those_of_numpy():
    model, x = linear_model()
    assert model.evaluate(x, np.int64(7)) == pytest.approx(model.evaluate(x, 7))
    assert error_quantiles(model, x, np.array([0, 1])) == error_quantiles(model, x, [0, 1])
    for measure in (specificity, coverage, nearest_neighbor_accuracy):
        assert measure(x[:9].numpy(), x[9:18].numpy()) == measure(x[:9], x[9:18])
    assert diversity(x.numpy()) == diversity(x)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    found = [
        generation(model, x, x, n, seed) for n, seed in zip((9, np.int16(9)), seeds, strict=True)
    ]
    assert found[0] == found[1]


def test_metrics_of_generation():
    # Meshes of PCA are Gaussian: samples of the right model look like them, those of one with half
    # the deviations or without most of the components do not.
    generator = torch.Generator().manual_seed(0)
    model, _ = linear_model()
    model.latent_mean.zero_()
    model.latent_cov.copy_(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]).double() ** 2))
    train, test = model.sample(150, generator), model.sample(80, generator)
    right = generation(model, train, test, 80, generator)
    assert right["generalisation"] < 1e-3
    assert 0.35 < right["nearest neighbor accuracy"] < 0.65
    assert right["diversity"] == pytest.approx(right["diversity of test meshes"], rel=0.1)
    assert right["compactness"] == pytest.approx(16 / 30, abs=0.12)
    model.latent_cov /= 16
    narrow = generation(model, train, test, 80, generator)
    assert narrow["diversity"] < 0.4 * right["diversity"]
    assert narrow["coverage"] < right["coverage"]
    assert narrow["nearest neighbor accuracy"] > right["nearest neighbor accuracy"]
    model.latent_cov *= 16 * 25
    wide = generation(model, train, test, 80, generator)
    assert wide["specificity"] > 2 * right["specificity"]
