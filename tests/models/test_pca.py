import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool.models import PCA


def meshes(num_meshes, dtype=torch.float64):
    r"""Meshes whose coordinates vary by different amounts, away from the origin."""
    scale = torch.linspace(0.5, 3, 45, dtype=dtype).view(15, 3)
    return torch.randn(num_meshes, 15, 3, dtype=dtype) * scale + 4


def svd(x, latent_channels):
    mean = x.mean(dim=0)
    _, value, basis = torch.linalg.svd((x - mean).flatten(1).double(), full_matrices=False)
    return mean, value, basis[:latent_channels]


@pytest.mark.parametrize("num_meshes", [9, 45, 46, 200])
@pytest.mark.parametrize("latent_channels", [1, 8])
def test_equals_singular_value_decomposition(num_meshes, latent_channels):
    x = meshes(num_meshes)
    mean, value, basis = svd(x, latent_channels)
    pca = PCA(x, latent_channels)

    found = pca.components.flatten(1)
    sign = (found * basis).sum(dim=1, keepdim=True).sign()
    assert_close(found, sign * basis, rtol=0, atol=1e-9)
    assert_close(pca.mean, mean)

    new = meshes(5)
    projected = (new - mean).flatten(1) @ basis.t()
    assert_close(pca.encode(new), projected * sign.t())
    assert_close(pca(new), (projected @ basis).view_as(new) + mean)
    # No linear model of this size leaves less: what is left are the other singular values.
    assert_close((pca(x) - x).square().sum(), value[latent_channels:].square().sum())


def test_components_come_by_variance_and_decode_is_their_sum():
    x = meshes(60)
    pca = PCA(x, 4)
    variance = pca.encode(x).var(dim=0)
    assert torch.equal(variance, variance.sort(descending=True).values)
    z = torch.randn(2, 4, dtype=torch.float64)
    expected = sum(z[:, i, None, None] * pca.components[i] for i in range(4)) + pca.mean
    assert_close(pca.decode(z), expected)
    assert_close(pca.encode(pca.decode(z)), z)


def test_mirrored_meshes_whose_mean_is_exactly_zero():
    # The sum over such meshes is exactly zero, and with it the product with a constant vector.
    x = torch.randint(-5, 6, (8, 15, 3)).double()
    x = torch.cat([x, -x])
    _, _, basis = svd(x, 3)
    overlap = PCA(x, 3).components.flatten(1) @ basis.t()
    assert_close(overlap.abs(), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("num_meshes", [20, 100])
def test_repeats_exactly(num_meshes):
    x = meshes(num_meshes)
    first = PCA(x, 5)
    torch.randn(7)  # the global random numbers play no part
    assert torch.equal(PCA(x, 5).components, first.components)


def test_float32_is_close_to_float64(device):
    x = meshes(100)
    pca = PCA(x.float().to(device), 5)
    assert pca.components.dtype == torch.float32 and pca.components.device.type == device.type
    expected = PCA(x, 5)(x)
    assert_close(pca(x.float().to(device)).cpu().double(), expected, rtol=1e-4, atol=1e-4)


def test_state_dict_holds_everything():
    x = meshes(30)
    pca, other = PCA(x, 5), PCA(meshes(30), 5)
    assert not torch.allclose(other(x), pca(x))
    other.load_state_dict(pca.state_dict())
    assert torch.equal(other(x), pca(x))
    assert not list(pca.parameters())


@pytest.mark.parametrize("size,k", [((30, 45), 3), ((8, 15, 3), 8), ((30, 2, 3), 6)], ids=str)
def test_too_many_components_are_named(size, k):
    with pytest.raises(ValueError, match=f"the {k} components") as error:
        PCA(torch.randn(size), k)
    assert f"(got {list(size)})" in str(error.value)


@pytest.mark.parametrize("size", [4, 64])
def test_blocks_of_more_than_memory_equal_all_at_once(monkeypatch, size):
    # Variances that fall slowly are the hard case of randomised iterations.
    x = meshes(200)
    monkeypatch.setattr("pyg_attnpool.models.pca.RESIDENT", 0)
    found = PCA.empty(15, 6).double().fit(lambda: iter(x.split(size)))
    mean, value, basis = svd(x, 6)
    assert_close(found.mean, mean)
    overlap = found.components.flatten(1) @ basis.t()
    assert_close(overlap.abs(), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-2)
    assert_close((found(x) - x).square().sum(), value[6:].square().sum(), rtol=1e-4, atol=0)


def test_no_components_are_an_error():
    with pytest.raises(ValueError, match="positive 'latent_channels'"):
        PCA(torch.randn(30, 15, 3), 0)
