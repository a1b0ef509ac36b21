import pytest
import torch

from pyg_attnpool import Mapping
from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.models import coma

POOL = {"coma": "qem", "comaatt": "attention"}
STEPS = 2


@pytest.fixture
def hierarchy(golden):
    data = golden("coma_autoencoder")
    levels = range(STEPS + 1)
    return MeshHierarchy(
        [data[f"mesh{level}/vertices"].numpy() for level in levels],
        [data[f"mesh{level}/faces"].numpy() for level in levels],
        [Mapping.from_matrix(data[f"down{level}"]) for level in range(STEPS)],
        [Mapping.from_matrix(data[f"up{level}"]) for level in range(STEPS)],
    )


def make_model(hierarchy, pool):
    attention = pool == "attention"
    return coma(
        hierarchy,
        pool,
        channels=(8, 16),
        decoder_channels=(16, 8, 8),
        variant="published",
        down_kwargs={"channels": 9, "k": 2} if attention else None,
        up_kwargs={"channels": 9, "k": 6} if attention else None,
    )


def to_our_names(data):
    r"""The authors' parameters or their gradients under the names of our model; the two fusion
    scalars of a layer stay together."""
    out = {}
    for name, value in data.items():
        part, *index, leaf = name.split(".")
        if part in ("cheb_enc", "cheb_dec"):
            i = int(index[0])
            conv = f"down_convs.{i}" if part == "cheb_enc" else f"up_convs.{i}"
            conv = "out_conv" if (part, i) == ("cheb_dec", STEPS) else conv
            if leaf == "bias":
                out[f"{conv}.bias"] = value
            else:
                out.update({f"{conv}.lins.{k}.weight": w.t() for k, w in enumerate(value)})
        elif part in ("enc_lin", "dec_lin"):
            out[f"{'to_latent' if part == 'enc_lin' else 'from_latent'}.{leaf}"] = value
        else:
            level = int(index[0])
            pool = f"pools.{level}" if part == "attpoolenc" else f"unpools.{STEPS - 1 - level}"
            fusion = leaf == "weight_prior"
            out[f"{pool}.{'fusion_weight' if fusion else leaf}"] = (
                value.flatten() if fusion else value.t()
            )
    return out


def select(data, prefix):
    return {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}


def difference(found, expected):
    r"""The largest difference, relative to the largest value."""
    assert found.shape == expected.shape and expected.abs().max() > 0
    return ((found - expected).abs().max() / expected.abs().max()).item()


def run(model, parameters, x):
    r"""Output, latent code, loss and gradients, those of the fusion scalars by the chain rule."""
    fusion = {name: w for name, w in parameters.items() if name.endswith("fusion_weight")}
    named = dict(model.named_parameters())
    assert set(named) == set(parameters)
    with torch.no_grad():
        for name, value in parameters.items():
            w_0, w_1 = value if name in fusion else (0, 0)
            named[name].copy_(w_1 / (w_0 + w_1) if name in fusion else value)
    latent = model.encode(x)
    out = model.decode(latent)
    loss = (out - x).abs().mean()
    loss.backward()
    grads = {name: parameter.grad for name, parameter in named.items()}
    for name, (w_0, w_1) in fusion.items():
        grads[name] = grads[name] * torch.stack([-w_1, w_0]) / (w_0 + w_1) ** 2
    return {"out": out, "latent": latent, "loss": loss}, grads


@pytest.mark.parametrize("name", POOL)
def test_golden_coma_autoencoder(name, hierarchy, golden, device):
    r"""The authors' models: output, latent code, loss and every gradient."""
    golden = {key: value.to(device) for key, value in golden("coma_autoencoder").items()}
    x, data = golden["x"], select(golden, f"{name}/")
    parameters = to_our_names(select(data, "param/"))
    expected = to_our_names(select(data, "grad/"))

    model = make_model(hierarchy, POOL[name]).to(device)
    found, grads = run(model, parameters, x)
    assert difference(found["out"], data["out"]) < 1e-5
    assert difference(found["latent"], data["latent"]) < 1e-5
    assert difference(found["loss"], data["loss"].float()) < 1e-5

    double = {key: value.double() for key, value in parameters.items()}
    model = make_model(hierarchy, POOL[name]).to(device, torch.float64)
    exact, exact_grads = run(model, double, x.double())
    assert difference(found["out"].double(), exact["out"]) < 1e-5
    for key, grad in grads.items():
        # The gradients of the fusion scalars are differences of nearly equal sums: single
        # precision, the authors' and ours, leaves them that far from the exact ones.
        bound = 3e-5 if key.endswith("fusion_weight") else 1e-5
        assert difference(grad, expected[key]) < bound, key
        assert difference(grad.double(), exact_grads[key]) < bound, key
        assert difference(expected[key].double(), exact_grads[key]) < bound, key
