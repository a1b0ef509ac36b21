import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import MeshHierarchy
from pyg_attnpool.models import MeshAutoencoder, MorphableModel
from pyg_attnpool.models.plan import Activation, Linear, Sum, decoder_plan, encoder_plan, run_plan
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


@pytest.mark.parametrize("name", CASES)
def test_a_plan_encodes_as_the_model_does(hierarchy, name):
    model = model_of(hierarchy, **CASES[name])
    x = model.mean + model.std * torch.randn(4, *model.mean.shape, dtype=torch.double)
    expected = model.encode(x)
    assert expected.std(dim=0).max() > 1e-3
    out = torch.from_numpy(run_plan(encoder_plan(model), x.numpy()))[:, 0]
    assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("modes", [0, 7])
def test_the_plan_of_modes(hierarchy, level, modes):
    model = MorphableModel.modal(hierarchy, 3, level=level, modes=modes, hidden_channels=9)
    model = model.double()
    x = model.mean + torch.randn(20, *model.mean.shape, dtype=torch.double)
    model.set_statistics(x.mean(dim=0), torch.rand_like(model.std) + 0.1)
    model.autoencoder.fit_modes(lambda: [model.standardize(x)])
    for parameter in model.autoencoder.from_code.parameters():  # the last layer starts at zero
        parameter.data.normal_()
    z = torch.randn(4, 3, dtype=torch.double)
    with pytest.raises(ValueError, match="a ModalAutoencoder, which searches"):
        encoder_plan(model)
    with torch.no_grad():
        out = torch.from_numpy(run_plan(decoder_plan(model), z.numpy()))
        # The mapping up is made in single precision.
        assert_close(out, model.decode(z), rtol=1e-5, atol=1e-5)


def test_the_plan_of_pca():
    vertices, faces = blob(1, seed=0)
    x = torch.from_numpy(vertices) + 0.1 * torch.randn(20, len(vertices), 3)
    model = MorphableModel.pca((vertices, faces), latent_channels=5).double().fit(x)
    z = torch.randn(4, 5, dtype=torch.double)
    out = torch.from_numpy(run_plan(decoder_plan(model), z.numpy()))
    assert_close(out, model.decode(z), rtol=1e-12, atol=1e-12)
    out = torch.from_numpy(run_plan(encoder_plan(model), x.numpy()))[:, 0]
    assert_close(out, model.encode(x), rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("name", ["relu", "elu", "silu"])
def test_activations_are_those_of_torch(name):
    x = np.linspace(-100, 100, 2001)
    expected = getattr(torch.nn.functional, name)(torch.from_numpy(x))
    np.testing.assert_allclose(Activation(name)(x), expected, rtol=1e-12, atol=1e-15)


def test_a_network_of_ones_own_is_refused(hierarchy):
    class Other(MeshAutoencoder):
        def decode(self, z):
            return 2 * super().decode(z)

    model = MorphableModel(Other(hierarchy, latent_channels=3, **CHANNELS))
    with pytest.raises(ValueError, match="Expected a MeshAutoencoder, PCA or .*got Other"):
        decoder_plan(model)
