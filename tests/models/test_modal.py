import math

import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.models import ModalAutoencoder, ModalConfig, modal
from pyg_attnpool.nn import MappingPool
from tests.mesh.meshes import blob

SMALL = dict(
    channels=(4, 5),
    decoder_channels=(5, 4, 3),
    down_kwargs=dict(channels=5),
    up_kwargs=dict(channels=5, k=4),
)
QUIET = dict(enable_progress_bar=False, logger=False, accelerator="cpu")


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(blob(2, seed=0), factors=[4, 4])


def meshes(hierarchy, num, seed=0):
    r"""Meshes around the template by linear modes of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    template = torch.from_numpy(hierarchy.vertices[0]).float()
    of_modes = torch.Generator().manual_seed(99)
    modes = torch.randn(12, *template.shape, generator=of_modes)
    size = 0.02 * 0.6 ** torch.arange(12.0)
    c = torch.randn(num, 12, generator=generator) * size
    return template + torch.einsum("ml,lnc->mnc", c, modes)


def projected(train, x, k):
    r"""The meshes that k principal components leave of others, in closed form."""
    mean = train.double().mean(dim=0)
    _, _, v = torch.linalg.svd((train - mean).flatten(1), full_matrices=False)
    v = v[:k]
    return (((x - mean).flatten(1) @ v.t()) @ v).view_as(x) + mean


def fitted(hierarchy, train, latent_channels=3, modes=5, **kwargs):
    network = modal(
        hierarchy,
        latent_channels=latent_channels,
        modes=modes,
        hidden_channels=16,
        **{**SMALL, **kwargs},
    )
    network.fit_modes(lambda: iter(train.split(7)))
    return network


def moved(network):
    r"""The network with last layers other than zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("pool", ["attention", "qem", None])
def test_starts_as_principal_components(hierarchy, pool):
    x = meshes(hierarchy, 40).double()
    kwargs = {} if pool is None else SMALL
    if pool == "qem":
        kwargs = {k: v for k, v in SMALL.items() if not k.endswith("kwargs")}
    network = modal(hierarchy, pool, 3, modes=5, **kwargs).double()
    network.fit_modes(lambda: iter(x.split(7)))
    new = meshes(hierarchy, 5, seed=1).double()
    expected = projected(x, new, 3)
    assert_close(network(new), expected, rtol=0, atol=1e-9)
    assert (expected - new).abs().max() > 1e-4  # there is something that they leave
    # Codes of training meshes have unit variance.
    assert_close(network.encode(x).square().mean(dim=0), torch.ones(3).double())


def test_equals_its_equations(hierarchy):
    x = meshes(hierarchy, 40)
    network = moved(fitted(hierarchy, x)).double()
    new = meshes(hierarchy, 4, seed=1).double()
    v = network.linear.components.flatten(1)
    s = (((x.double() - network.linear.mean).flatten(1) @ v.t()).square().mean(dim=0)).sqrt()
    balance = (s * s[0]).sqrt()

    def perceptron(layers, x):
        for layer in layers[:-1:2]:
            x = layer.weight @ x
            x = x + layer.bias.unsqueeze(1)
            x = x / (1 + (-x).exp())
        return (layers[-1].weight @ x + layers[-1].bias.unsqueeze(1)).t()

    c = (new - network.linear.mean).flatten(1) @ v.t()
    z = c[:, :3] / s[:3] + perceptron(network.to_code, (c / balance).t()) + network.mesh.encode(new)
    assert_close(network.encode(new), z, rtol=1e-5, atol=1e-7)
    c = perceptron(network.from_code, z.t()) * balance
    c[:, :3] += s[:3] * z
    out = (c @ v).view_as(new) + network.linear.mean + network.mesh.decode(z)
    assert_close(network.decode(z), out, rtol=1e-5, atol=1e-7)


def test_gradients_do_not_reach_the_linear_path(hierarchy):
    x = meshes(hierarchy, 40)
    network = moved(fitted(hierarchy, x))
    network.training_loss(network(x), x).backward()
    names = {name for name, _ in network.named_parameters()}
    assert all(name.startswith(("to_code", "from_code", "mesh.")) for name in names)
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())
    for buffer in network.linear.buffers():
        assert not buffer.requires_grad and buffer.grad is None


def test_learns_what_is_curved_and_keeps_its_modes(hierarchy):
    # A circle in the space of meshes has two linear dimensions, and one that counts.
    template = torch.from_numpy(hierarchy.vertices[0]).float()
    modes = 0.05 * torch.randn(2, *template.shape)
    angle = torch.linspace(0, 1.5 * math.pi, 200)
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    x = template + torch.einsum("ml,lnc->mnc", circle, modes)
    train, val = x[::2], x[1::2]
    model = MorphableModel.modal(hierarchy, 1, modes=3, hidden_channels=32, **SMALL)
    model.fit(train, val, epochs=25, batch_size=10, **QUIET)
    linear = MorphableModel.pca(hierarchy, 1).fit(train)
    assert model.evaluate(val)["mean"] < 0.2 * linear.evaluate(val)["mean"]
    found = model.autoencoder.linear.components
    scale = model.std.unique()
    assert scale.numel() == 1
    assert_close(found[0].mul(linear.autoencoder.components[0]).sum().abs(), torch.tensor(1.0))


def test_no_epoch_that_is_worse_than_principal_components_is_kept(hierarchy):
    train, val = meshes(hierarchy, 40), meshes(hierarchy, 10, seed=1)
    model = MorphableModel.modal(hierarchy, 3, modes=5, hidden_channels=16, **SMALL)
    model.fit(train, val, epochs=1, lr=10.0, seed=0, **QUIET)
    linear = MorphableModel.pca(hierarchy, 3).fit(train)
    assert_close(model(val), linear(val), rtol=0, atol=1e-6)
    error = linear.evaluate(val)["mean"]
    assert model.summary["validation error (mm)"] == pytest.approx(error, rel=1e-3)


def test_a_refused_training_leaves_statistics_and_modes(hierarchy):
    train, val = meshes(hierarchy, 40), meshes(hierarchy, 10, seed=1)
    model = MorphableModel.modal(hierarchy, 3, modes=5, hidden_channels=16, **SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="finite"):
        model.fit(train, val, loss=lambda out, x: (out - x).sum() * math.nan, epochs=1, **QUIET)
    for name in ("mean", "std", "autoencoder.linear.components", "autoencoder.mode_std"):
        assert torch.equal(model.state_dict()[name], before[name]), name


def test_fewer_meshes_than_modes_leave_the_others_zero(hierarchy):
    x = meshes(hierarchy, 6)
    network = fitted(hierarchy, x)
    assert network.num_modes == 8
    zero = network.linear.components.flatten(1).norm(dim=1) == 0
    assert zero.tolist() == [False] * 5 + [True] * 3
    new = meshes(hierarchy, 3, seed=1)
    assert_close(network(new), projected(x.double(), new.double(), 3).float(), atol=1e-5, rtol=0)
    assert torch.isfinite(moved(network)(new)).all()
    with pytest.raises(ValueError, match="more meshes and features than the 3 components"):
        fitted(hierarchy, x[:3])


@pytest.mark.parametrize("pool", ["attention", "qem", None])
def test_saved_and_frozen_it_computes_the_same(hierarchy, tmp_path, pool):
    kwargs = {k: v for k, v in SMALL.items() if pool == "attention" or "kwargs" not in k}
    kwargs = kwargs if pool is not None else {}
    model = MorphableModel.modal(hierarchy, 3, pool, modes=5, hidden_channels=16, **kwargs)
    x = meshes(hierarchy, 20)
    model.autoencoder.fit_modes(lambda: iter([x]))
    moved(model.autoencoder)
    expected = model(x)
    model.save(tmp_path / "learned")
    loaded = MorphableModel.load(tmp_path / "learned")
    assert loaded.autoencoder.config == model.autoencoder.config
    assert torch.equal(loaded(x), expected)

    model.freeze()
    assert_close(model(x), expected)
    if pool is not None:
        layers = [*model.autoencoder.mesh.pools, *model.autoencoder.mesh.unpools]
        assert all(isinstance(layer, MappingPool) for layer in layers)
    model.save(tmp_path / "frozen")
    loaded = MorphableModel.load(tmp_path / "frozen")
    assert torch.equal(loaded(x), model(x))
    assert not any("key" in name for name, _ in loaded.named_parameters())
    card = (tmp_path / "frozen" / "README.md").read_text(encoding="utf-8")
    assert "8 principal components bent by a perceptron" in card


def test_exports(hierarchy, tmp_path):
    model = MorphableModel.modal(hierarchy, 3, modes=5, hidden_channels=16, **SMALL)
    x = meshes(hierarchy, 20)
    model.autoencoder.fit_modes(lambda: iter([x]))
    moved(model.autoencoder)
    model.export(tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert_close(program(x[:3]), model(x[:3]), rtol=1e-4, atol=1e-5)


def test_further_features_have_a_scale_of_their_own(hierarchy):
    coordinates = meshes(hierarchy, 60)
    color = 100 * torch.rand(60, coordinates.size(1), 1)
    x = torch.cat([coordinates, color], dim=2)
    model = MorphableModel.modal(hierarchy, 3, modes=5, hidden_channels=16, in_channels=4, **SMALL)
    model.fit(x[:50], x[50:], epochs=1, **QUIET)
    spread = x[:50].double().var(dim=0, correction=0).mean(dim=0)
    spread = torch.cat([spread[:3].mean().expand(3), spread[3:]]).sqrt().float()
    assert_close(model.std, spread.expand_as(model.std))
    loss = model.autoencoder.training_loss(
        torch.zeros(1, 2, 4), torch.tensor([[[3.0, 4, 0, 1]] * 2])
    )
    assert loss == 6.0


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(latent_channels=0), "'latent_channels' to be an integer from 1"),
        (dict(modes=-1), "'modes' to be an integer from 0"),
        (dict(hidden_channels=1.5), "'hidden_channels' to be an integer from 1"),
        (dict(in_channels=2), "'in_channels' to be an integer from 3"),
        (dict(down="qem"), "other arguments of the mesh path"),
        (dict(pool="nearest"), "pooling of"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(hierarchy, kwargs, message):
    with pytest.raises(ValueError, match=message):
        modal(hierarchy, **{**SMALL, **kwargs})


def test_bad_shapes_are_named(hierarchy):
    network = fitted(hierarchy, meshes(hierarchy, 20))
    with pytest.raises(ValueError, match="Expected vertices of shape"):
        network.encode(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="Expected latent codes of shape"):
        network.decode(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="either 'config' or its arguments"):
        ModalAutoencoder(hierarchy, ModalConfig(), modes=3)
