import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import MeshHierarchy
from pyg_attnpool.models import MeshAutoencoder, MorphableModel
from pyg_attnpool.models.compiled import compiled_decoder
from pyg_attnpool.models.plan import Activation, Linear, Sum, decoder_plan, run_plan
from tests.mesh.meshes import blob

CHANNELS = dict(channels=(4, 6), decoder_channels=(6, 5, 7))
CASES = {
    "coma": dict(conv="cheb", conv_kwargs={"K": 4}, down="attention"),
    "one term": dict(conv="cheb", conv_kwargs={"K": 1}),
    "spirals": dict(conv="spiral", activation="elu", expand_activation=None, out_bias=True),
    "dilated spirals": dict(conv="spiral", conv_kwargs={"hops": 2, "dilation": 2}),
    "full": dict(up="full", expand_activation="elu"),
    "variant": dict(up="variant", activation=None),
    "colours": dict(in_channels=6),
}


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(blob(2, seed=0, hole=True), factors=[4, 4])


def model_of(hierarchy, **kwargs):
    network = MeshAutoencoder(hierarchy, latent_channels=3, **{**CHANNELS, **kwargs})
    model = MorphableModel(network).double()
    model.set_statistics(torch.randn_like(model.mean), torch.rand_like(model.std) + 0.1)
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_plan_decodes_as_the_model_does(hierarchy, name):
    model = model_of(hierarchy, **CASES[name])
    z = torch.randn(4, 3, dtype=torch.double)
    expected = model.decode(z)
    # Not a constant that a dead activation leaves.
    assert expected.std(dim=0).max() > 1e-3
    out = torch.from_numpy(run_plan(decoder_plan(model), z.numpy()))
    # Mappings and Laplacians are made in single precision.
    assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_the_plan_of_pca():
    vertices, faces = blob(1, seed=0)
    x = torch.from_numpy(vertices) + 0.1 * torch.randn(20, len(vertices), 3)
    model = MorphableModel.pca((vertices, faces), latent_channels=5).double().fit(x)
    z = torch.randn(4, 5, dtype=torch.double)
    out = torch.from_numpy(run_plan(decoder_plan(model), z.numpy()))
    assert_close(out, model.decode(z), rtol=1e-12, atol=1e-12)


def modal_of(hierarchy, dtype=torch.double, **kwargs):
    r"""A modal network whose perceptrons bend."""
    torch.manual_seed(0)
    vertices = torch.from_numpy(hierarchy.vertices[0]).to(dtype)
    x = vertices + 0.1 * torch.randn(30, *vertices.shape, dtype=dtype)
    model = MorphableModel.modal(hierarchy, 3, hidden_channels=16, **kwargs).to(dtype)
    model.set_statistics(x.mean(dim=0), torch.full_like(model.std, x.std()))
    model.autoencoder.fit_modes(lambda: [model.standardize(x)])
    for parameter in model.autoencoder.from_code[-1].parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(modes=5),
        dict(modes=5, level=2, pool="qem"),
        dict(modes=5, level=0),
        dict(modes=0),
        dict(modes=40),  # more than there are meshes for
        dict(modes=5, in_channels=3, pool_kwargs={"k": 4}),
    ],
)
def test_the_plan_of_a_modal_network(hierarchy, kwargs):
    model = modal_of(hierarchy, **kwargs)
    z = torch.randn(4, 3, dtype=torch.double)
    expected = model.decode(z)
    # The perceptrons bend: half of the sum of two codes that are opposite is not the mean.
    middle = (model.decode(z) + model.decode(-z)) / 2
    assert (middle - model.decode(0 * z)).abs().max() > 1e-2
    out = torch.from_numpy(run_plan(decoder_plan(model), z.numpy()))
    assert_close(out, expected, rtol=1e-5, atol=1e-5)  # mappings in single precision
    assert compiled_decoder(modal_of(hierarchy, torch.float, **kwargs).freeze()) is None


@pytest.mark.parametrize("name", ["relu", "elu", "silu"])
def test_activations_are_those_of_torch(name):
    x = np.linspace(-100, 100, 2001)
    expected = getattr(torch.nn.functional, name)(torch.from_numpy(x))
    np.testing.assert_allclose(Activation(name)(x), expected, rtol=1e-12, atol=1e-15)


def test_two_paths_add():
    rng = np.random.default_rng(0)
    paths = [[Linear(rng.normal(size=(4, 3, 2)), rng.normal(size=(4, 3)))] for _ in range(2)]
    z = rng.normal(size=(5, 2))
    weight = paths[0][0].weight + paths[1][0].weight
    expected = np.stack([weight @ code for code in z]) + paths[0][0].bias + paths[1][0].bias
    np.testing.assert_allclose(run_plan([Sum(paths)], z), expected)


@pytest.mark.parametrize(
    ("kwargs", "got"),
    [
        (dict(conv="GATv2Conv"), "GraphConv as 'up_convs.0'"),
        (dict(up="diffpool"), "DiffPool as 'unpools.0'"),
    ],
)
def test_a_layer_without_a_step_is_named(hierarchy, kwargs, got):
    with pytest.raises(ValueError, match=f"Chebyshev or spiral convolutions .got {got}"):
        decoder_plan(model_of(hierarchy, **kwargs))


def test_a_network_of_ones_own_is_refused(hierarchy):
    class Other(MeshAutoencoder):
        def decode(self, z):
            return 2 * super().decode(z)

    model = MorphableModel(Other(hierarchy, latent_channels=3, **CHANNELS))
    with pytest.raises(ValueError, match="Expected a MeshAutoencoder, .*got Other"):
        decoder_plan(model)
