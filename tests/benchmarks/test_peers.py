import math

import pytest
import torch
from torch.testing import assert_close

from benchmarks.peers import tune
from benchmarks.peers.networks import LSAConv, VCConv, identity_expression_pca
from benchmarks.peers.registry import IDENTITY_EXPRESSION, PEERS, linear_peer, steps_of, train_peer
from benchmarks.peers.rows import append_row, read_rows
from benchmarks.peers.spectrum import pca_errors
from pyg_attnpool import MeshHierarchy
from pyg_attnpool.models import PCA
from tests.mesh.meshes import blob


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(blob(2, seed=0), factors=[4, 4])


def faces_of(subjects, expressions, num_vertices=30):
    r"""Every subject in every expression, a sum of both: [S * E, N, 3]."""
    generator = torch.Generator().manual_seed(0)
    identity = torch.randn(subjects, num_vertices, 3, generator=generator)
    expression = torch.randn(expressions, num_vertices, 3, generator=generator)
    expression -= expression.mean(dim=0)
    x = (identity[:, None] + 0.5 * expression[None]).flatten(0, 1)
    return x, [str(s) for s in range(subjects) for _ in range(expressions)]


def test_lsa_starts_as_a_spiral_convolution_of_activated_features(hierarchy):
    layer, spirals = LSAConv(2, 3, hierarchy, 0), hierarchy.spirals(0, length=9, fill=-1)
    x = torch.randn(2, hierarchy.num_vertices[0], 2)
    around = torch.nn.functional.elu(x[:, spirals]).flatten(2)
    assert_close(layer(x), around @ layer.lin.weight.t() + layer.lin.bias)
    # A matrix that swaps two neighbours of one vertex changes that vertex alone.
    with torch.no_grad():
        layer.order[5, [1, 2]] = layer.order[5, [2, 1]]
    changed = (layer(x) - around @ layer.lin.weight.t() - layer.lin.bias).abs().amax(dim=(0, 2))
    assert (changed > 1e-4).nonzero().flatten().tolist() == [5]


def test_vc_has_a_weight_for_every_pair(hierarchy):
    layer, spirals = VCConv(2, 3, hierarchy, 1, bases=4), hierarchy.spirals(1, length=9, fill=-1)
    num = hierarchy.num_vertices[1]
    x = torch.randn(2, num, 2)
    matrices = layer.lin.weight.view(3, 4, 2)
    expected = layer.lin.bias.expand(2, num, 3).clone()
    for i in range(num):
        for j, neighbor in enumerate(spirals[i].tolist()):
            if neighbor >= 0:
                weight = torch.einsum("m,omf->of", layer.coefficients[i, :, j], matrices)
                expected[:, i] += x[:, neighbor] @ weight.t()
    assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_components_of_identity_and_expression_span_their_sum():
    x, subjects = faces_of(4, 6)
    # Three directions differ in four subjects, and five in six expressions.
    model = identity_expression_pca(x, subjects, x, 8)
    assert_close(model(x), x, atol=1e-4, rtol=0)
    basis = model.components.flatten(1)
    assert_close(basis @ basis.t(), torch.eye(8), atol=1e-4, rtol=0)
    fewer = identity_expression_pca(x, subjects, x, 4)
    assert 0.05 < (fewer(x) - x).norm(dim=-1).mean() < 1.0


def test_errors_of_components_are_those_of_a_projection():
    x = torch.randn(40, 20, 3) * torch.logspace(0, -2, 20).view(1, -1, 1)
    train, test = x[:30], x[30:]
    for num, error in zip((2, 8), pca_errors(train, test, (2, 8)), strict=True):
        model = PCA(train, num)
        expected = 1000 * (model(test) - test).norm(dim=-1).mean().item()
        assert error == pytest.approx(expected, rel=1e-3)


def test_steps_are_whole_epochs_of_which_the_last_is_validated():
    assert steps_of(2271, 425) == (3, 426)  # 142 steps each
    assert steps_of(200, 425) == (33, 429)  # every epoch
    assert steps_of(25, 425) == (220, 440)  # one of 11


def test_the_best_rate_is_that_of_least_validation_error(tmp_path):
    path = tmp_path / "rates.csv"

    def found(lr, val, peer="MLP", seed=100, latent=8):
        values = ("faces", latent, peer, 426, seed, lr, val)
        append_row(path, tune.COLUMNS, dict(zip(tune.COLUMNS, values, strict=True)))

    for lr, val in zip(tune.GRID[:3], (0.9, 0.5, 0.7), strict=True):
        found(lr, val)
    with pytest.raises(ValueError, match="all rates of 'MLP'"):
        tune.best_rate(path, "faces", 8, "MLP")
    found(tune.GRID[3], math.inf)  # a loss that was no longer finite
    found(tune.GRID[0], 0.1, peer="token mixer")
    assert tune.best_rate(path, "faces", 8, "MLP") == tune.GRID[1]
    found(tune.GRID[1], 1.5, seed=101)  # 1.0 over both seeds
    assert tune.best_rate(path, "faces", 8, "MLP") == tune.GRID[2]
    # Rates of 8 and 32 serve the sizes that are nearer to them by ratio.
    for lr, val in zip(tune.GRID, (0.9, 0.8, 0.7, 0.1), strict=True):
        found(lr, val, latent=32)
    chosen = {size: tune.best_rate(path, "faces", size, "MLP") for size in (2, 15, 17, 32, 128)}
    assert chosen == dict.fromkeys((2, 15), tune.GRID[2]) | dict.fromkeys(
        (17, 32, 128), tune.GRID[3]
    )
    with open(path, "a", encoding="utf-8") as file:
        file.write("faces,8,ML")  # torn by a crash
    assert len(read_rows(path, tune.COLUMNS)) == 10
    with pytest.raises(ValueError, match="other columns"):
        read_rows(path, ("data",))


@pytest.mark.parametrize("name", ["MLP", "modal", "modal, QEM"])
def test_a_peer_trains_to_less_than_its_start(hierarchy, name):
    template = torch.from_numpy(hierarchy.vertices[0]).float()
    modes = 0.02 * torch.randn(20, *template.shape) * 0.7 ** torch.arange(20.0).view(-1, 1, 1)
    x = template + torch.einsum("ml,lnc->mnc", torch.randn(120, 20), modes)
    epochs, steps = steps_of(100, 21)
    assert (epochs, steps) == (3, 21)
    model = train_peer(PEERS[name], hierarchy, 3, x[:100], x[100:], epochs, 1e-3, 0)
    still = 1000 * (x[100:] - x[:100].mean(dim=0)).norm(dim=-1).mean().item()
    assert model.evaluate(x[100:])["mean"] < still


def test_a_set_without_subjects_has_no_components_of_identity(hierarchy):
    x = torch.randn(12, hierarchy.num_vertices[0], 3)
    assert linear_peer(IDENTITY_EXPRESSION, hierarchy, 3, x, x, None) is None
    found = linear_peer("PCA", hierarchy, 3, x, x, None)
    assert_close(found(x), PCA(x, 3)(x), atol=1e-3, rtol=0)
