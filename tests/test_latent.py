import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.latent import extrapolate, interpolate, latent_axes, sample, transfer
from tests.mesh.meshes import blob

TEMPLATE = blob(1, seed=0)


def meshes(num, seed=0):
    r"""The template, stretched along its axes and bent."""
    rng = np.random.default_rng(seed)
    x = TEMPLATE[0] * rng.uniform(0.8, 1.2, size=(num, 1, 3))
    x[..., 0] += rng.normal(0, 0.1, size=(num, 1)) * x[..., 1] ** 2
    return torch.from_numpy(0.1 * x).float()


@pytest.fixture(scope="module")
def linear():
    return MorphableModel.pca(TEMPLATE, 4).fit(meshes(60)).double()


@pytest.fixture(scope="module")
def curved():
    torch.manual_seed(0)
    hierarchy = MeshHierarchy.from_template(TEMPLATE, factors=[3])
    model = MorphableModel.coma(hierarchy, 3, channels=(6,))
    x = meshes(60)
    model.set_statistics(x.mean(dim=0), x.std(dim=0).clamp(min=1e-3))
    with torch.no_grad():
        model.autoencoder.from_latent.weight.normal_()
    model.set_latent_statistics(x)
    return model


def test_walks_of_a_linear_model_are_straight(linear):
    x = meshes(4, seed=1).double()
    a, b, c, _ = linear(x)
    path = linear.interpolate(x[0], x[1], 5)
    t = torch.tensor([0, 0.25, 0.5, 0.75, 1]).double().view(-1, 1, 1)
    assert_close(path, a + t * (b - a))
    alphas = [-1.0, 0.0, 1.0, 2.5]
    alpha = torch.tensor(alphas).double().view(-1, 1, 1)
    assert_close(linear.extrapolate(x[0], x[1], alphas), a + alpha * (b - a))
    assert_close(linear.transfer(x[0], x[1], x[2]), c + b - a)


def test_walks_go_through_the_latent_space(curved):
    x = meshes(3, seed=1)
    za, zb, zc = z = curved.encode(x)
    expected = [curved.decode((za + t * (zb - za))[None])[0] for t in (0, 0.5, 1)]
    found = curved.interpolate(x[0], x[1], 3)
    assert_close(found, torch.stack(expected))
    assert not torch.allclose(found[1], (found[0] + found[2]) / 2, atol=1e-6)  # not a straight line
    far = curved.extrapolate(x[0], x[1], [-0.5, 1.5])
    assert_close(far[0], curved.decode((za - 0.5 * (zb - za))[None])[0])
    assert_close(far[1], curved.decode((za + 1.5 * (zb - za))[None])[0])
    assert_close(curved.transfer(x[0], x[1], x[2]), curved.decode((zc + zb - za)[None])[0])
    # Codes in the place of meshes, arrays in the place of tensors.
    assert_close(curved.interpolate(za, x[1].double().numpy(), 3), found)
    assert_close(curved.transfer(*z), curved.transfer(*x))
    assert not found.requires_grad


def test_batches_are_their_meshes(curved):
    x, y = meshes(3, seed=1), meshes(3, seed=2)
    path = curved.interpolate(x, y[0], 4)
    assert path.shape == (3, 4, *x.shape[1:])
    for i in range(3):
        assert_close(path[i], curved.interpolate(x[i], y[0], 4))
    far = curved.extrapolate(x[:1], y, torch.tensor([0.0, 2.0]))
    assert_close(far[2], curved.extrapolate(x[0], y[2], [0.0, 2.0]))
    moved = curved.transfer(x[0], y, x)
    assert_close(moved[1], curved.transfer(x[0], y[1], x[1]))
    assert_close(curved.transfer(x[:1], y[:1], x[:1])[0], curved.transfer(x[0], y[0], x[0]))


def test_arguments_may_be_those_of_numpy(curved):
    a, b = x = meshes(2, seed=1)
    expected = curved.interpolate(a, b, 3)
    assert_close(curved.interpolate(a, b, np.int64(3)), expected)
    assert curved.sample(np.uint8(3)).shape == (3, *a.shape)
    # Arrays of any layout: backwards, of the other byte order, and of more than double precision.
    backwards = x.numpy()[::-1].copy()[::-1]
    for y in (backwards, x.numpy().astype(">f8"), x.numpy().astype(np.longdouble)):
        assert_close(curved.encode(y), curved.encode(x))
        assert_close(curved.interpolate(y[0], y[1], 3), expected)
    for alphas in (np.array([2, 0]), np.float32([2, 0]), torch.tensor([2, 0])):
        assert_close(curved.extrapolate(a, b, alphas), curved.extrapolate(a, b, [2.0, 0.0]))


def test_a_mesh_of_as_many_features_as_a_code_is_long_is_a_mesh(curved):
    x = meshes(2)
    assert curved.latent_channels == x.size(2)
    assert_close(curved.interpolate(x[0], x[1], 2), curved(x))


def test_samples_have_the_statistics_of_the_codes(linear):
    num = 4000
    x = linear.sample(num, generator=torch.Generator().manual_seed(3))
    z = linear.encode(x)
    assert_close(linear.decode(z), x)  # meshes of the model
    error = (z.mean(dim=0) - linear.latent_mean) / linear.latent_std
    assert error.abs().max() < 4 / num**0.5
    whitened = torch.linalg.solve(latent_axes(linear), (z - linear.latent_mean).t())
    # An entry of the covariance of white noise has the standard deviation 1 / sqrt(n), or sqrt(2)
    # times that on the diagonal.
    assert (whitened.cov() - torch.eye(4)).abs().max() < 4 * (2 / num) ** 0.5


def test_samples_follow_the_seed_and_nothing_else(curved):
    def drawn(seed, model=curved):
        return model.sample(3, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    state = torch.get_rng_state()
    drawn(2)
    assert torch.equal(torch.get_rng_state(), state)
    curved.sample(2)
    assert not torch.equal(torch.get_rng_state(), state)
    # In another precision they are the same meshes.
    curved.double()
    try:
        assert_close(drawn(5).float(), drawn(5, curved.float()), atol=1e-6, rtol=1e-5)
    finally:
        curved.float()


def test_axes_of_the_codes(linear):
    axes = latent_axes(linear)
    assert_close(axes @ axes.t(), linear.latent_cov)
    assert (axes.norm(dim=0).diff() <= 0).all()
    # A latent dimension that no training mesh uses is never moved along.
    model = MorphableModel.pca(TEMPLATE, 3)
    model.latent_cov.copy_(torch.tensor([[2.0, 0, 2], [0, 0, 0], [2, 0, 2]]))
    assert_close(latent_axes(model)[:, 1:], torch.zeros(3, 2))
    model.autoencoder.components.normal_()
    z = model.encode(model.sample(5))
    assert model.sample(5).isfinite().all() and z.isfinite().all()


def test_the_mode_of_the_model_stays(curved):
    for mode in (True, False):
        curved.train(mode)
        curved.interpolate(meshes(1)[0], meshes(1)[0], 2)
        curved.sample(1)
        assert curved.training is mode


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda m, x: interpolate(m, x[0], x[1], 1), ValueError, "at least 2 'steps' .got 1"),
        (lambda m, x: interpolate(m, x[0], x[1], 2.5), TypeError, "integer 'steps' .got 2.5"),
        (lambda m, x: interpolate(m, x[0], x[1], True), TypeError, "integer 'steps' .got True"),
        (lambda m, x: interpolate(m, x[0], x[1], np.float64(3)), TypeError, "integer 'steps'"),
        (lambda m, x: interpolate(m, x[0, :9], x[1], 3), ValueError, r"'a' .* \[42, 3\].*\[9, 3\]"),
        (lambda m, x: interpolate(m, x[0], torch.zeros(7), 3), ValueError, r"'b' .*code \[4\].*7"),
        (lambda m, x: interpolate(m, x, x[:2], 3), ValueError, "one or 3 of 'b' .*got 2"),
        (lambda m, x: interpolate(m, x[:0], x, 3), ValueError, r"'a' .*\[0, 42, 3\]"),
        (lambda m, x: interpolate(m, x[0].long(), x[0], 3), TypeError, "'a' .*int64"),
        (lambda m, x: interpolate(m, "face.obj", x[0], 3), TypeError, "'a' .*str"),
        (lambda m, x: interpolate(m, np.array(["a"]), x[0], 3), TypeError, "'a' .*<U1"),
        (lambda m, x: interpolate(m, np.array([None]), x[0], 3), TypeError, "'a' .*object"),
        (lambda m, x: extrapolate(m, x[0], x[1], "abc"), TypeError, "'alphas' .*got 'abc'"),
        (lambda m, x: extrapolate(m, x[0], x[1], ["a"]), TypeError, "'alphas' .*got .'a'"),
        (lambda m, x: extrapolate(m, x[0], x[1], None), TypeError, "'alphas' .*got None"),
        (lambda m, x: extrapolate(m, x[0], x[1], [1, [2]]), TypeError, "'alphas'"),
        (lambda m, x: extrapolate(m, x[0], x[1], [10**400]), TypeError, "'alphas'"),
        (lambda m, x: extrapolate(m, x[0], x[1], 1.5), ValueError, "'alphas' .*got 1.5"),
        (lambda m, x: extrapolate(m, x[0] * torch.nan, x[1], [1]), ValueError, "finite 'neutral'"),
        (lambda m, x: extrapolate(m, x[0], x[1], []), ValueError, "'alphas'"),
        (lambda m, x: extrapolate(m, x[0], x[1], [1, torch.inf]), ValueError, "'alphas'.*inf"),
        (lambda m, x: transfer(m, x[0], x[1], torch.zeros(2, 5)), ValueError, "'target_neutral'"),
        (lambda m, x: sample(m, 0), ValueError, "positive 'n' .got 0"),
        (lambda m, x: sample(m, 2**70), ValueError, "'n' below"),
        (lambda m, x: sample(m, torch.tensor(True)), TypeError, "integer 'n'"),
        (lambda m, x: sample(m, 2, 0), TypeError, "torch.Generator .*got 0"),
        (lambda m, x: m.write_mesh("a.ply", "b.ply"), TypeError, "a mesh .*str"),
        (lambda m, x: m.set_statistics([0.0], x[0]), TypeError, "'mean' .*list"),
    ],
)
def test_bad_arguments(linear, call, error, match):
    with pytest.raises(error, match=match):
        call(linear, meshes(3).double())
