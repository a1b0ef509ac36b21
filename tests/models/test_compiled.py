import copy

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.models import MeshAutoencoder
from pyg_attnpool.models.compiled import CompiledPlan, compiled_decoder, compiled_encoder
from pyg_attnpool.models.plan import (
    Activation,
    Affine,
    Chebyshev,
    Gather,
    Linear,
    Spiral,
    Standardize,
    Sum,
    decoder_plan,
    run_plan,
)
from pyg_attnpool.ops import _cpu
from tests.mesh.meshes import blob
from tests.ops.builds import RUNS, builds

pytestmark = pytest.mark.skipif(not _cpu.AVAILABLE, reason="there is no compiled library")


@pytest.fixture(params=["any", "avx2", "avx512"])
def library(request, monkeypatch):
    r"""Every build that this processor runs, whose vectors have other widths."""
    if request.param not in RUNS:
        pytest.skip(f"this processor cannot run {request.param}")
    if not builds(request.param):
        pytest.skip(f"{request.param} is not built")
    (path,) = builds(request.param)
    monkeypatch.setattr(_cpu, "library", _cpu.open_library(path))


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(blob(2, seed=0), factors=[3, 3])


def matrix(rows, cols, rng):
    import scipy.sparse

    return scipy.sparse.random(rows, cols, 0.3, "csr", random_state=rng)


@pytest.mark.parametrize("channels", [1, 3, 8, 16, 21, 40])
@pytest.mark.parametrize("rows", [1, 7, 8, 19])
@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_every_step_equals_its_formula(library, rows, channels, activation):
    rng = np.random.default_rng(rows * channels)

    def normal(*size):
        return rng.normal(size=size)

    laplacian = matrix(rows, rows, rng)
    spirals = rng.integers(-1, rows, size=(rows, 5))
    path = [
        Linear(normal(4, channels, 3), normal(4, channels)),
        Activation(activation),
        Gather(matrix(rows, 4, rng)),
        Chebyshev(laplacian, normal(4, channels, channels + 1), normal(channels + 1)),
        Activation(activation),
        Spiral(spirals, normal(5, channels + 1, 5), normal(5)),
        Activation(activation),
        Chebyshev(laplacian, normal(1, 5, 3), normal(3)),
    ]
    straight = [Linear(normal(rows, 3, 3), normal(rows, 3))]
    affine = Affine(normal(rows, 3), normal(rows, 3))
    z = torch.randn(5, 3)
    for plan in ([*path, affine], [*straight, affine], [Sum([straight, path]), affine]):
        expected = torch.from_numpy(run_plan(plan, z.numpy()))
        out = CompiledPlan(plan)(z)
        assert_close(out.double(), expected, rtol=0, atol=2e-6 * expected.abs().max().item())
        assert torch.equal(CompiledPlan(plan)(z[3:4]), out[3:4])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_numbers_that_are_not_finite_come_out(library, hierarchy, activation, value):
    torch.manual_seed(0)
    network = MeshAutoencoder(hierarchy, channels=(4, 8), latent_channels=2, activation=activation)
    model = MorphableModel(network, hierarchy).freeze()
    x = torch.from_numpy(hierarchy.vertices[0]).float()[None].clone()
    x[0, 3, 1] = value
    z = torch.tensor([[0.5, value]])
    for call, given in ((model.decode, z), (model.encode, x), (model, x)):
        with torch.no_grad():
            found = call(given)
        expected = call(given.clone().requires_grad_()).detach()
        assert not found.isfinite().all()
        assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("hidden", [2, 16, 33])
@pytest.mark.parametrize("rows", [1, 8, 19])
@pytest.mark.parametrize("activation", ["relu", "elu", "silu"])
def test_every_step_of_an_encoder_equals_its_formula(library, rows, channels, hidden, activation):
    rng = np.random.default_rng(rows * hidden)

    def normal(*size):
        return rng.normal(size=size)

    laplacian, coarser = matrix(rows, rows, rng), matrix(5, rows, rng)
    spirals = rng.integers(-1, rows, size=(rows, 4))
    start = Standardize(normal(rows, channels), rng.uniform(0.5, 2, size=(rows, channels)))
    end = Linear(normal(1, 9, rows * hidden), normal(1, 9))
    spectral = [
        Chebyshev(laplacian, normal(3, channels, hidden), normal(hidden)),
        Activation(activation),
        Spiral(spirals, normal(4, hidden, hidden), normal(hidden)),
        Activation(activation),
        Gather(coarser),
        Linear(normal(1, 9, 5 * hidden), normal(1, 9)),
    ]
    spiral = [Spiral(spirals, normal(4, channels, hidden), normal(hidden)), end]
    few = [
        Linear(normal(1, 2, rows * channels), normal(1, 2)),
        Linear(normal(1, 9, 2), normal(1, 9)),
    ]
    bend = [
        Linear(normal(1, 70, 9), normal(1, 70)),
        Activation(activation),
        Linear(normal(1, 3, 70), normal(1, 3)),
    ]
    head = Sum([[Linear(normal(1, 3, 9), normal(1, 3))], bend])
    x = torch.randn(3, rows, channels)
    for plan in (
        [start, *spectral],
        [start, *spiral, Activation(activation), head],
        [start, Sum([few, spiral, spectral]), head],
    ):
        expected = torch.from_numpy(run_plan(plan, x.numpy()))[:, 0]
        out = CompiledPlan(plan)(x)
        assert_close(out.double(), expected, rtol=0, atol=2e-6 * expected.abs().max().item())
        assert torch.equal(CompiledPlan(plan)(x[1:2]), out[1:2])


@pytest.mark.parametrize("name", ["elu", "silu"])
def test_activations_are_exact_to_rounding_everywhere(library, name):
    x = torch.cat([-torch.logspace(-9, 3, 700), torch.zeros(1), torch.logspace(-9, 3, 323)])
    plan = [Linear(np.zeros((1024, 1, 1)), x.double().numpy()[:, None]), Activation(name)]
    plan += [Affine(np.ones((1024, 1)), np.zeros((1024, 1)))]
    out = CompiledPlan(plan)(torch.zeros(1, 1)).flatten()
    expected = getattr(torch.nn.functional, name)(x.double())
    assert_close(out.double(), expected, rtol=3e-7, atol=1e-7)
    nan = CompiledPlan([Linear(np.full((1024, 1, 1), np.nan), plan[0].bias), *plan[1:]])
    assert nan(torch.zeros(1, 1)).isnan().all()


def models(hierarchy):
    small = {"channels": (5, 7), "latent_channels": 3}
    vertices, faces = hierarchy.vertices[0], hierarchy.faces[0]
    pca = MorphableModel.pca((vertices, faces), 3).fit(torch.randn(9, len(vertices), 3))
    cheb = MeshAutoencoder(hierarchy, conv_kwargs={"K": 3}, down="attention", **small)
    spiral = MeshAutoencoder(hierarchy, conv="spiral", activation="elu", up="variant", **small)
    modal = MorphableModel.modal(hierarchy, latent_channels=3, modes=5, hidden_channels=20)
    modal.autoencoder.fit_modes(lambda: [torch.randn(20, len(vertices), 3)])
    for parameter in modal.autoencoder.from_code.parameters():  # the last layer starts at zero
        parameter.data.normal_(std=0.3)
    for model in (pca, MorphableModel(cheb), MorphableModel(spiral), modal):
        model.set_statistics(torch.randn_like(model.mean), torch.rand_like(model.std) + 0.5)
        yield model.freeze()


def models_by_name(hierarchy):
    return dict(zip(("pca", "cheb", "spiral", "modal"), models(hierarchy), strict=True))


@pytest.mark.parametrize("name", ["pca", "cheb", "spiral"])
def test_a_frozen_model_encodes_as_its_layers_do(library, hierarchy, name):
    model = models_by_name(hierarchy)[name]
    for batch_size in (0, 1, 17):
        x = model.mean + model.std * torch.randn(batch_size, *model.mean.shape)
        expected = model.encode(x.requires_grad_())  # with gradients: by the layers
        assert expected.requires_grad
        with torch.no_grad():
            assert compiled_encoder(model) is not None
            out = model.encode(x)
        assert not out.requires_grad
        assert_close(out, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pca", "cheb", "spiral", "modal"])
def test_a_frozen_model_decodes_as_its_layers_do(library, hierarchy, name):
    model = models_by_name(hierarchy)[name]
    for batch_size in (0, 1, 17):
        z = torch.randn(batch_size, 3)
        expected = model.decode(z)  # with gradients: by the layers
        assert expected.requires_grad or name == "pca"
        with torch.no_grad():
            assert compiled_decoder(model) is not None
            out = model.decode(z)
        assert not out.requires_grad
        assert_close(out, expected.detach(), rtol=0, atol=3e-6 * model.mean.abs().max().item())


def change_in_place(model):
    with torch.no_grad():
        model.autoencoder.out_conv.lins[0].weight += 1


def change_by_a_fused_optimizer(model):
    (weight,) = (p for p in model.autoencoder.out_conv.lins[0].parameters())
    weight.grad = torch.ones_like(weight)
    torch.optim.Adam([weight], lr=0.1, fused=True).step()  # which counts no version
    weight.grad = None


def change_by_data(model):
    model.autoencoder.from_latent.weight.data[0, 0] += 1


def change_by_loading(model):
    state = {
        name: t + 0.5 if t.is_floating_point() else t for name, t in model.state_dict().items()
    }
    model.load_state_dict(state)


def change_by_assigning(model):
    state = {
        name: t + 0.5 if t.is_floating_point() else t for name, t in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)


def change_a_layer(model):
    model.autoencoder.out_conv = copy.deepcopy(model.autoencoder.out_conv)
    model.autoencoder.out_conv.lins[0].weight.data.fill_(0.3)


def change_statistics(model):
    model.set_statistics(model.mean + 1, 2 * model.std)


def change_by_a_hook(model):
    model.autoencoder.out_conv.register_forward_hook(lambda module, args, out: 2 * out)


def change_statistics_by_data(model):
    model.mean.data[0] += 1


def change_a_mapping_by_numpy(model):
    model.autoencoder.unpools[0].weight.numpy()[0] += 1


def change_a_laplacian_by_data(model):
    model.autoencoder.out_conv.laplacian.data *= 2


def change_an_index(model):
    index = model.autoencoder.unpools[0].index
    index[:] = index.flip(0)


def change_an_index_tensor(model):
    model.autoencoder.unpools[0].index = model.autoencoder.unpools[0].index.flip(0)


def change_a_method(model):
    forward = model.autoencoder.out_conv.forward
    model.autoencoder.out_conv.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


@pytest.mark.parametrize(
    "change",
    [
        change_statistics_by_data,
        change_a_mapping_by_numpy,
        change_a_laplacian_by_data,
        change_an_index,
        change_an_index_tensor,
        change_a_method,
        change_in_place,
        change_by_a_fused_optimizer,
        change_by_data,
        change_by_loading,
        change_by_assigning,
        change_a_layer,
        change_statistics,
        change_by_a_hook,
    ],
)
def test_a_change_is_noticed(hierarchy, change):
    model, z = models_by_name(hierarchy)["cheb"], torch.randn(2, 3)
    x = model.mean + torch.randn(2, *model.mean.shape)
    with torch.no_grad():
        before = model.decode(z)
        model.encode(x)
    change(model)
    expected, codes = model.decode(z).detach(), model.encode(x).detach()
    assert not torch.allclose(before, expected)
    with torch.no_grad():
        assert_close(model.decode(z), expected, rtol=1e-5, atol=1e-5)
        assert_close(model.encode(x), codes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pca", "cheb", "spiral"])
def test_operations_are_counted(hierarchy, name):
    model = models_by_name(hierarchy)[name]
    x = model.mean + model.std * torch.randn(2, *model.mean.shape)
    counts = []
    for grad in (True, False):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            out = model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with torch.no_grad():
        assert_close(out, model(x), rtol=1e-5, atol=1e-5)
        assert compiled_decoder(model) is not None  # again


@torch.no_grad()
def test_hooks_of_all_modules_fire_for_every_layer(hierarchy):
    model = models_by_name(hierarchy)["cheb"]
    x = model.mean + model.std * torch.randn(2, *model.mean.shape)
    seen = set()
    for register in (register_module_forward_hook, register_module_forward_pre_hook):
        model(x)  # by its plan
        handle = register(lambda module, *_: seen.add(module))
        model(x)
        handle.remove()
        network = model.autoencoder
        layers = [*network.down_convs, *network.pools, *network.unpools, network.out_conv]
        assert seen.issuperset(layers)
        seen.clear()
        model(x)
        assert not seen


@torch.no_grad()
def test_forward_mode_sees_the_layers(hierarchy):
    model = models_by_name(hierarchy)["pca"]
    z, along = torch.randn(2, 3), torch.randn(2, 3)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model.decode(forward_ad.make_dual(z, along))).tangent
    expected = torch.einsum("bl,lnc->bnc", along, model.autoencoder.components) * model.std
    assert_close(found, expected)


def test_copies_decode_on_their_own(hierarchy):
    model, z = models_by_name(hierarchy)["cheb"], torch.randn(2, 3)
    with torch.no_grad():
        before = model.decode(z)
        other = copy.deepcopy(model)
        change_statistics(other)
        assert_close(model.decode(z), before)
        assert not torch.allclose(other.decode(z), before)


def test_what_has_no_compiled_step_is_decoded_by_its_layers(hierarchy):
    learning = MorphableModel(MeshAutoencoder(hierarchy, down="attention", channels=(5, 7)))
    other = MorphableModel(MeshAutoencoder(hierarchy, conv="GCNConv", channels=(5, 7)))
    for model in (learning, other, models_by_name(hierarchy)["cheb"].double()):
        assert compiled_decoder(model) is None and compiled_encoder(model) is None
    assert compiled_encoder(models_by_name(hierarchy)["modal"]) is None  # it searches


@pytest.mark.parametrize(
    "z", [torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 3).double(), torch.zeros(2, 3).long()]
)
def test_other_codes_are_refused(hierarchy, z):
    decoder = CompiledPlan(decoder_plan(models_by_name(hierarchy)["cheb"]))
    with pytest.raises(ValueError, match=r"latent codes \[B, 3\]"):
        decoder(z)


@pytest.mark.parametrize("name", ["cheb", "spiral"])
def test_edited_indices_are_refused(hierarchy, name):
    model, z = models_by_name(hierarchy)[name], torch.randn(2, 3)
    index = "col" if name == "cheb" else "spirals"
    with torch.no_grad():
        model.decode(z)
        getattr(model.autoencoder.out_conv, index)[..., 0] = 10**9
        with pytest.raises(ValueError, match=f"Expected '{index}' of vertices"):
            model.decode(z)


def test_tensors_of_inference_mode_are_known_by_their_values(hierarchy):
    model, z = models_by_name(hierarchy)["cheb"], torch.randn(2, 3)
    expected = model.decode(z).detach()
    with torch.inference_mode():
        model.autoencoder.out_conv.col = model.autoencoder.out_conv.col.clone()
        assert compiled_decoder(model) is not None
        assert_close(model.decode(z), expected)
        model.autoencoder.out_conv.col[0] = 10**9
        with pytest.raises(ValueError, match="Expected 'col' of vertices"):
            model.decode(z)
