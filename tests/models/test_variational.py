r"""Variational networks: their objective against closed forms, and what a training says of them."""

import copy

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import l1_loss
from torch.testing import assert_close

from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.models import MeshAutoencoder
from pyg_attnpool.models.autoencoder import divergence
from pyg_attnpool.models.plan import decoder_plan, run_plan
from tests.mesh.meshes import icosphere

SMALL = dict(channels=(4, 4), decoder_channels=(4, 4, 4), latent_channels=3, variational=True)


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(icosphere(1), factors=[3, 2])


def network(hierarchy, **kwargs):
    torch.manual_seed(0)
    return MeshAutoencoder(hierarchy, **{**SMALL, **kwargs}).double()


def batch(hierarchy):
    return torch.randn(5, hierarchy.num_vertices[0], 3, dtype=torch.double)


def test_divergence_is_that_of_torch():
    mean, log_variance = torch.randn(2, 4, 3, dtype=torch.double)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0, 1.0))
    assert_close(divergence(mean, log_variance), expected)


def test_codes_without_noise_give_the_error_and_the_divergence(hierarchy):
    model, x = network(hierarchy, kl_weight=0.1, kl_warmup=0), batch(hierarchy)
    with torch.no_grad():
        model.to_log_variance.weight.zero_()
        model.to_log_variance.bias.fill_(-80)
    mean = model.encode(x)
    told = (mean.square() + 80 - 1).mean(dim=0).sum() / 2  # exp(-80) is nothing
    assert_close(model.objective(x, l1_loss, 0), l1_loss(model.decode(mean), x) + 0.1 * told)


def test_codes_are_drawn_from_the_posterior(hierarchy):
    model, x = network(hierarchy, kl_weight=0.0), batch(hierarchy)[:1].expand(20_000, -1, -1)
    drawn = []
    model.decode = lambda z: drawn.append(z) or x  # what the decoder is given
    model.objective(x, l1_loss, 0)
    mean, log_variance = model.posterior(x[:1])
    assert_close(drawn[0].mean(dim=0), mean[0], atol=0.05, rtol=0)
    assert_close(drawn[0].var(dim=0).log(), log_variance[0], atol=0.05, rtol=0)


def test_the_weight_of_the_divergence_grows(hierarchy):
    model, x = network(hierarchy, kl_weight=0.1, kl_warmup=9), batch(hierarchy)

    def objective(step):
        torch.manual_seed(1)
        return model.objective(x, l1_loss, step)

    told = 0.1 * divergence(*model.posterior(x)).mean(dim=0).sum()
    for step, share in ((4, 0.5), (9, 1.0), (torch.tensor(100.0), 1.0)):
        assert_close(objective(step) - objective(0), (share - 0.1) * told)


def test_free_bits_cost_nothing_and_pull_at_nothing(hierarchy):
    model, x = network(hierarchy, kl_weight=1.0, kl_warmup=0, free_bits=1e3), batch(hierarchy)
    model.decode = lambda z: x
    loss = model.objective(x, lambda out, target: 0 * out.sum() + 0 * model.to_latent.bias.sum(), 0)
    assert_close(loss.item(), 3e3)
    loss.backward()
    assert model.to_log_variance.bias.grad is None or not model.to_log_variance.bias.grad.any()
    assert not model.to_latent.bias.grad.any()


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        (dict(variational=1), "'variational'"),
        (dict(kl_weight=-1.0), "'kl_weight'"),
        (dict(kl_warmup=float("inf")), "'kl_warmup'"),
        (dict(free_bits=True), "'free_bits'"),
        (dict(latent_activation="relu"), "no 'latent_activation'"),
    ],
)
def test_bad_settings_are_named(hierarchy, kwargs, error):
    with pytest.raises(ValueError, match=error):
        MeshAutoencoder(hierarchy, **{**SMALL, **kwargs})


def test_only_variational_networks_have_a_posterior(hierarchy):
    model = network(hierarchy, variational=False)
    assert not any("variance" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="variational"):
        model.posterior(batch(hierarchy))


# Training #############################################################################


def meshes(num, seed=0):
    r"""Spheres of a decimetre, stretched along three axes."""
    generator = torch.Generator().manual_seed(seed)
    template = torch.from_numpy(icosphere(1)[0]).float() / 10
    return template * (1 + 0.2 * torch.rand(num, 1, 3, generator=generator))


def trained(hierarchy, make, **kwargs):
    pytest.importorskip("pytorch_lightning")
    torch.manual_seed(0)
    settings = {**SMALL, "kl_warmup": 10, **{k: v for k, v in kwargs.items() if "_" in k}}
    fit = {k: v for k, v in kwargs.items() if "_" not in k}
    model = make(hierarchy, pool="qem", **settings)
    data = dict(train=meshes(40), val=meshes(9, 1), batch_size=8, accelerator="cpu")
    return model.fit(**{"epochs": 10, **data, **fit})


@pytest.mark.parametrize("make", [MorphableModel.coma, MorphableModel.neural3dmm])
def test_a_training_says_what_the_codes_tell(hierarchy, make, tmp_path):
    model = trained(hierarchy, make, kl_weight=1e-5)
    told = model.summary["KL of latent channels (nats)"]
    x = model.standardize(meshes(40))
    with torch.no_grad():
        expected = divergence(*model.autoencoder.posterior(x)).mean(dim=0)
    assert told == pytest.approx(expected.tolist(), rel=1e-3) and min(told) > 0.01
    assert model.summary["collapsed latent channels"] == 0

    # Saved, frozen and as a plan, it is a model as any other.
    model.freeze().save(tmp_path / "model")
    loaded = MorphableModel.load(tmp_path / "model")
    with torch.no_grad():
        z = model.encode(meshes(3, 2))
        assert torch.equal(loaded.encode(meshes(3, 2)), z)
        out = model.decode(z)
    assert_close(torch.from_numpy(run_plan(decoder_plan(loaded), z.numpy())).float(), out)


@pytest.mark.slow
def test_collapse_is_named_and_free_bits_prevent_it(hierarchy):
    with pytest.warns(UserWarning, match="3 of 3 latent channels have collapsed"):
        model = trained(hierarchy, MorphableModel.coma, kl_weight=100.0, kl_warmup=0, epochs=25)
    assert model.summary["collapsed latent channels"] == 3
    model = trained(
        hierarchy, MorphableModel.coma, kl_weight=100.0, kl_warmup=0, free_bits=1.0, epochs=25
    )
    assert model.summary["collapsed latent channels"] == 0


@pytest.mark.filterwarnings("ignore:.*have collapsed")  # so few steps tell little
def test_a_training_goes_on_with_the_weight_that_it_had(hierarchy, tmp_path):
    whole = trained(hierarchy, MorphableModel.coma, kl_weight=0.01, kl_warmup=60, optimizer="adam")
    kwargs = dict(kl_weight=0.01, kl_warmup=60, optimizer="adam", output=tmp_path)
    trained(hierarchy, MorphableModel.coma, **kwargs, epochs=4)
    gone_on = trained(hierarchy, MorphableModel.coma, **kwargs, resume=True)
    states = [copy.deepcopy(model.state_dict()) for model in (whole, gone_on)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
