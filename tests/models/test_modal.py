import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import l1_loss, mse_loss
from torch.testing import assert_close

from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.models import ModalAutoencoder, ModalConfig, modal
from pyg_attnpool.nn import MappingPool
from tests.mesh.meshes import blob

ATTENTION = dict(channels=5, k=4)
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


def fitted(hierarchy, train, latent_channels=3, pool="attention", modes=5, level=1):
    kwargs = ATTENTION if pool == "attention" else {}
    network = modal(
        hierarchy,
        pool,
        latent_channels,
        modes=modes,
        level=level,
        hidden_channels=16,
        pool_kwargs=kwargs,
    )
    network.fit_modes(lambda: iter(train.split(7)))
    return network


def moved(network):
    r"""The network with last layers other than zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("pool,level", [("attention", 1), ("attention", 2), ("qem", 1), ("qem", 0)])
def test_starts_as_principal_components(hierarchy, pool, level):
    x = meshes(hierarchy, 40)
    network = fitted(hierarchy, x, 3, pool, level=level)
    new = meshes(hierarchy, 5, seed=1)
    expected = projected(x, new, 3).float()
    assert_close(network(new), expected, rtol=0, atol=1e-6)
    assert (expected - new).abs().max() > 1e-4  # there is something that they leave
    # Codes of training meshes have unit variance.
    assert_close(network.encode(x).square().mean(dim=0), torch.ones(3))


def carried(network):
    r"""The aggregation from the level of the modes to the template, dense."""
    up = None
    for layer in network.unpools:
        dense = layer.mapping().to_dense().double()
        up = dense if up is None else dense @ up
    return torch.eye(network.linear.mean.size(0)).double() if up is None else up


@pytest.mark.parametrize("level", [0, 1, 2])
def test_decodes_by_its_equation(hierarchy, level):
    x = meshes(hierarchy, 40).double()
    network = moved(fitted(hierarchy, x.float(), level=level).double())
    v, w = network.linear.components.flatten(1), network.modes.components
    assert_close(v @ v.t(), torch.eye(3).double(), atol=1e-5, rtol=0)
    basis = torch.cat([v, torch.einsum("nm,kmc->knc", carried(network), w).flatten(1)])
    away = (x - x.mean(dim=0)).flatten(1)
    s = torch.linalg.lstsq(basis.t(), away.t()).solution.square().mean(dim=1).sqrt()
    s[:3] = (away @ v.t()).square().mean(dim=0).sqrt()

    bent = z = torch.randn(4, 3, dtype=torch.double)
    for layer in network.from_code[:-1:2]:
        bent = bent @ layer.weight.t() + layer.bias
        bent = bent / (1 + (-bent).exp())
    bent = bent @ network.from_code[-1].weight.t() + network.from_code[-1].bias
    a = bent * (s * s[0]).sqrt()
    a[:, :3] += s[:3] * z
    out = x.mean(dim=0) + (a @ basis).view(4, -1, 3)
    assert_close(network.decode(z), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", [0, 1])
def test_a_code_is_the_one_whose_mesh_is_closest(hierarchy, level):
    x = meshes(hierarchy, 40)
    network = moved(fitted(hierarchy, x, level=level)).double()
    network.config = replace(network.config, refinements=20)
    new = meshes(hierarchy, 6, seed=1).double()
    z = network.encode(new)

    def distance(z):
        return (network.decode(z) - new).square().sum(dim=(1, 2))

    least = distance(z)
    for size in (1e-3, 1e-1):
        for seed in range(20):
            step = torch.randn(3, generator=torch.Generator().manual_seed(seed)).double()
            assert (distance(z + size * step) > least).all()
    # Fewer steps come less close, and none are the guess.
    network.config = replace(network.config, refinements=1)
    one = distance(network.encode(new))
    network.config = replace(network.config, refinements=0)
    none = distance(network.encode(new))
    c = network._coefficients(new, network._basis())
    assert_close(network.encode(new), network._guess(new, c))
    assert (least <= one).all() and (one <= none).all() and (least < none).any()


def test_the_gradient_of_a_code_is_that_of_the_closest_one(hierarchy):
    network = moved(fitted(hierarchy, meshes(hierarchy, 40))).double()
    network.config = replace(network.config, refinements=30)
    # Where the mesh of a code is met, its least squares are linear in small changes.
    z = torch.tensor([[0.2, -0.1, 0.1]]).double()
    x = network.decode(z).detach()
    assert_close(network.encode(x), z, rtol=0, atol=1e-6)
    x.requires_grad_()
    direction = torch.randn_like(x)
    (network.encode(x)[0, 0]).backward()
    step = 1e-5 * direction
    with torch.no_grad():
        expected = (network.encode(x + step) - network.encode(x - step))[0, 0] / 2e-5
    assert_close((x.grad * direction).sum(), expected, rtol=1e-3, atol=1e-6)


def test_modes_are_carried_as_close_as_they_can_be(hierarchy):
    # Learned aggregation comes closer to what principal components leave than QEM does.
    x = meshes(hierarchy, 40).double()
    away = (x - x.mean(dim=0)).flatten(1)
    _, _, v = torch.linalg.svd(away, full_matrices=False)
    left = away - away @ v[:3].t() @ v[:3]
    errors = []
    for pool in ("attention", "qem"):
        network = fitted(hierarchy, x.float(), pool=pool).double()
        basis = network._basis()[3:].flatten(1)
        nearest = left @ torch.linalg.pinv(basis) @ basis
        errors.append((left - nearest).norm() / left.norm())
    rest = (left - left @ v[3:8].t() @ v[3:8]).norm() / left.norm()
    assert rest < errors[0] < errors[1]


@pytest.mark.parametrize("level", [0, 1])
def test_training_minimises_the_errors_of_the_closest_and_of_the_guessed_code(hierarchy, level):
    x = meshes(hierarchy, 40).double()
    network = moved(fitted(hierarchy, x.float(), level=level).double())
    new = meshes(hierarchy, 5, seed=1).double()
    guess = network._guess(new, network._coefficients(new, network._basis()))
    outs = network(new), network.decode(guess)
    errors = [(out - new).norm(dim=-1).mean() for out in outs]
    assert (errors[0] - errors[1]).abs() > 1e-3 * errors[0]
    assert_close(network.objective(new, network.training_loss), sum(errors))
    # So does a loss of a user's own.
    assert_close(network.objective(new, mse_loss), sum(mse_loss(out, new) for out in outs))


def test_a_derived_network_is_trained_on_what_it_gives(hierarchy):
    class Shifted(ModalAutoencoder):
        def decode(self, z):
            return super().decode(z) + 0.25

    x = meshes(hierarchy, 40)
    network = fitted(hierarchy, x)
    shifted = Shifted(hierarchy, network.config)
    shifted.load_state_dict(network.state_dict())
    target = network(x)
    assert_close(shifted.objective(target, l1_loss), torch.tensor(0.25), atol=1e-3, rtol=0)


def test_gradients_do_not_reach_the_linear_path(hierarchy):
    x = meshes(hierarchy, 40)
    network = moved(fitted(hierarchy, x))
    network.objective(x, network.training_loss).backward()
    names = {name for name, _ in network.named_parameters()}
    trained = {name for name in names if network.get_parameter(name).requires_grad}
    assert trained == {name for name in names if not name.startswith("unpools.")}
    assert all(network.get_parameter(name).grad.abs().max() > 0 for name in trained)
    for module in (network.linear, network.modes):
        assert not list(module.parameters())
        assert not any(buffer.requires_grad for buffer in module.buffers())


def test_learns_what_is_curved_and_keeps_its_modes(hierarchy):
    pytest.importorskip("pytorch_lightning")
    # An arc in the space of meshes has two linear dimensions, and one that counts.
    template = torch.from_numpy(hierarchy.vertices[0]).float()
    modes = 0.1 * torch.stack([template @ torch.randn(3, 3) for _ in range(2)])  # smooth
    angle = torch.linspace(0, 0.9 * math.pi, 200)
    arc = torch.stack([angle.cos(), angle.sin()], dim=1)
    x = template + torch.einsum("ml,lnc->mnc", arc, modes)
    train, val = x[::2], x[1::2]
    model = MorphableModel.modal(hierarchy, 1, modes=3, hidden_channels=32, pool_kwargs=ATTENTION)
    model.fit(train, val, epochs=25, batch_size=10, **QUIET)
    linear = MorphableModel.pca(hierarchy, 1).fit(train)
    assert model.evaluate(val)["mean"] < 0.2 * linear.evaluate(val)["mean"]
    found = model.autoencoder.linear.components
    scale = model.std.unique()
    assert scale.numel() == 1
    assert_close(found[0].mul(linear.autoencoder.components[0]).sum().abs(), torch.tensor(1.0))


def test_no_epoch_that_is_worse_than_principal_components_is_kept(hierarchy):
    pytest.importorskip("pytorch_lightning")
    train, val = meshes(hierarchy, 40), meshes(hierarchy, 10, seed=1)
    model = MorphableModel.modal(hierarchy, 3, modes=5, hidden_channels=16, pool_kwargs=ATTENTION)
    model.fit(train, val, epochs=1, lr=10.0, seed=0, **QUIET)
    linear = MorphableModel.pca(hierarchy, 3).fit(train)
    assert_close(model(val), linear(val), rtol=0, atol=1e-6)
    error = linear.evaluate(val)["mean"]
    assert model.summary["validation error (mm)"] == pytest.approx(error, rel=1e-3)


def test_a_refused_training_leaves_statistics_and_modes(hierarchy):
    pytest.importorskip("pytorch_lightning")
    train, val = meshes(hierarchy, 40), meshes(hierarchy, 10, seed=1)
    model = MorphableModel.modal(hierarchy, 3, modes=5, hidden_channels=16, pool_kwargs=ATTENTION)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="finite"):
        model.fit(train, val, loss=lambda out, x: (out - x).sum() * math.nan, epochs=1, **QUIET)
    for name in ("mean", "std", "autoencoder.linear.components", "autoencoder.scale"):
        assert torch.equal(model.state_dict()[name], before[name]), name


def test_fewer_meshes_than_modes_leave_the_others_zero(hierarchy):
    x = meshes(hierarchy, 6)
    network = fitted(hierarchy, x, level=0)
    # Five directions differ in six meshes, and three of them are the linear path's.
    varies = network._coefficients(x, network._basis())[:, 3:].abs().amax(dim=0) > 1e-5
    assert varies.tolist() == [True] * 2 + [False] * 3
    new = meshes(hierarchy, 3, seed=1)
    assert_close(network(new), projected(x.double(), new.double(), 3).float(), atol=1e-5, rtol=0)
    assert torch.isfinite(moved(network)(new)).all()
    with pytest.raises(ValueError, match="more meshes and features than the 3 components"):
        fitted(hierarchy, x[:3])


@pytest.mark.parametrize("pool,level", [("attention", 1), ("attention", 2), ("qem", 1), ("qem", 0)])
def test_saved_and_frozen_it_computes_the_same(hierarchy, tmp_path, pool, level):
    x = meshes(hierarchy, 20)
    network = moved(fitted(hierarchy, x, pool=pool, level=level))
    model = MorphableModel(network)
    expected = model(x)
    model.save(tmp_path / "learned")
    loaded = MorphableModel.load(tmp_path / "learned")
    assert loaded.autoencoder.config == network.config
    assert torch.equal(loaded(x), expected)

    model.freeze()
    assert_close(model(x), expected)
    assert all(isinstance(layer, MappingPool) for layer in network.unpools)
    model.save(tmp_path / "frozen")
    loaded = MorphableModel.load(tmp_path / "frozen")
    assert torch.equal(loaded(x), model(x))
    assert {name.split(".")[1] for name, _ in loaded.named_parameters()} == {"to_code", "from_code"}
    card = (tmp_path / "frozen" / "README.md").read_text(encoding="utf-8")
    linear = sum(c.numel() for c in (network.linear.components, network.modes.components))
    numbers = linear + sum(parameter.numel() for parameter in network.parameters())
    assert f"| parameters | {numbers:,} |" in card


@pytest.mark.slow
def test_exports(hierarchy, tmp_path):
    model = MorphableModel.modal(hierarchy, 3, modes=5, hidden_channels=16, pool_kwargs=ATTENTION)
    x = meshes(hierarchy, 20)
    model.autoencoder.fit_modes(lambda: iter([x]))
    moved(model.autoencoder)
    model.export(tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert_close(program(x[:3]), model(x[:3]), rtol=1e-4, atol=1e-5)


def test_further_features_have_a_scale_of_their_own(hierarchy):
    pytest.importorskip("pytorch_lightning")
    coordinates = meshes(hierarchy, 60)
    color = 100 * torch.rand(60, coordinates.size(1), 1)
    x = torch.cat([coordinates, color], dim=2)
    model = MorphableModel.modal(
        hierarchy, 3, modes=5, hidden_channels=16, in_channels=4, pool_kwargs=ATTENTION
    )
    model.fit(x[:50], x[50:], epochs=1, **QUIET)
    spread = x[:50].double().var(dim=0, correction=0).mean(dim=0)
    spread = torch.cat([spread[:3].mean().expand(3), spread[3:]]).sqrt().float()
    assert_close(model.std, spread.expand_as(model.std))
    out = x[:2].clone()
    out[..., :3] += torch.tensor([3.0, 4, 0])
    out[..., 3] += 1
    network = model.autoencoder
    assert_close(network.training_loss(out, x[:2]), torch.tensor(6.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(latent_channels=0), "positive 'latent_channels'"),
        (dict(modes=-1), "non-negative 'modes'"),
        (dict(refinements=-1), "non-negative 'refinements'"),
        (dict(hidden_channels=1.5), "an integer 'hidden_channels'"),
        (dict(in_channels=2), "at least 3 'in_channels'"),
        (dict(level=-1), "non-negative 'level'"),
        (dict(level=3), "a 'level' from 0 to 2"),
        (dict(pool="nearest"), "pooling of"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(hierarchy, kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modal(hierarchy, **kwargs)


def test_bad_shapes_are_named(hierarchy):
    network = fitted(hierarchy, meshes(hierarchy, 20))
    with pytest.raises(ValueError, match="Expected vertices of shape"):
        network.encode(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="Expected latent codes of shape"):
        network.decode(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="either 'config' or its arguments"):
        ModalAutoencoder(hierarchy, ModalConfig(), modes=3)
