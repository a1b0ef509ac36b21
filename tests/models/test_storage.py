import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.nn import GCNConv

from pyg_attnpool import MappingPool, MeshHierarchy, MorphableModel
from pyg_attnpool.models import MeshAutoencoder, coma, neural3dmm
from pyg_attnpool.models.storage import _checksum
from pyg_attnpool.nn import AttentionPool
from tests.mesh.meshes import blob

SMALL = dict(channels=(4, 5), decoder_channels=(5, 4, 3), latent_channels=3)
ATTENTION = dict(down_kwargs=dict(channels=5), up_kwargs=dict(channels=5, k=4))
FILES = ["README.md", "config.json", "hierarchy.npz", "model.safetensors"]


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(blob(2, seed=0, hole=True), factors=[4, 4])


def make_model(hierarchy, make=coma, pool="attention", unit="m", **kwargs):
    kwargs = {**SMALL, **(ATTENTION if pool == "attention" else {}), **kwargs}
    model = MorphableModel(make(hierarchy, pool, **kwargs), unit=unit)
    n = model.num_vertices
    model.set_statistics(
        0.1 * torch.randn(n, model.in_channels), 0.5 + torch.rand(n, model.in_channels)
    )
    model.latent_mean.normal_()
    return model


def inputs(model, batch_size=2):
    return torch.randn(batch_size, model.num_vertices, model.in_channels)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("make", [coma, neural3dmm])
@pytest.mark.parametrize("pool", ["qem", "attention", "frozen"])
def test_a_loaded_model_is_bit_equal_and_learns_the_same(tmp_path, hierarchy, make, pool):
    spirals = dict(hops=2, dilation=[2, 1]) if make is neural3dmm else {}
    model = make_model(hierarchy, make, "qem" if pool == "qem" else "attention", "mm", **spirals)
    if pool == "frozen":
        model.freeze()
    model.summary = {"epochs": 3}
    state = torch.random.get_rng_state()
    model.save(tmp_path / "model")
    other = MorphableModel.load(tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert names(tmp_path / "model") == FILES and names(tmp_path) == ["model"]

    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert other.hierarchy.hash == hierarchy.hash and other.unit == "mm"
    assert other.autoencoder.config == model.autoencoder.config
    assert other.summary == {"epochs": 3}
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    x = inputs(model)
    assert torch.equal(other(x), model(x))
    assert torch.equal(other.encode(x), model.encode(x))
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert list(ours) == list(theirs)
    grads = torch.autograd.grad(model(x).square().sum(), list(ours.values()))
    found = torch.autograd.grad(other(x).square().sum(), list(theirs.values()))
    assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))


@pytest.mark.filterwarnings("ignore:Expected meshes in metres")  # they are 50 away
def test_the_latent_activation_is_part_of_what_is_loaded(tmp_path, hierarchy):
    r"""Once, a linear latent came back as a ReLU, with all keys matched and another error."""
    for variant in ("default", "published"):
        model = make_model(hierarchy, pool="qem", variant=variant)
        model.save(tmp_path / variant)
        z = MorphableModel.load(tmp_path / variant).encode(10 * inputs(model, 50))
        assert (z.min() < 0) == (variant == "default")


@pytest.mark.parametrize(
    ("down", "up"), [("full", "average"), ("variant", "attention"), ("diffpool", "qem")]
)
def test_every_other_pooling_as_learned_and_where_it_can_be_frozen(tmp_path, hierarchy, down, up):
    network = MeshAutoencoder(hierarchy, down=down, up=up, conv_kwargs={"K": 3}, **SMALL)
    model = MorphableModel(network)
    x = inputs(model)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save(tmp_path / "model")
    assert torch.equal(MorphableModel.load(tmp_path / "model")(x), model(x))
    if down != "diffpool":
        network.pools[1] = network.pools[1].freeze()  # the finer one goes on learning
        model.save(tmp_path / "model")
        other = MorphableModel.load(tmp_path / "model")
        assert torch.equal(other(x), model(x))
        assert isinstance(other.autoencoder.pools[1], MappingPool)
        assert type(other.autoencoder.pools[0]) is type(network.pools[0])


def test_convolutions_and_poolings_given_as_classes(tmp_path, hierarchy):
    network = MeshAutoencoder(hierarchy, conv=GCNConv, down=AttentionPool, **SMALL)
    model = MorphableModel(network)
    model.save(tmp_path)
    x = inputs(model)
    assert torch.equal(MorphableModel.load(tmp_path)(x), model(x))


def test_sizes_of_numpy_are_sizes(tmp_path, hierarchy):
    sizes = {"channels": np.array([4, 5]), "latent_channels": np.int64(3)}
    model = MorphableModel.coma(hierarchy, **sizes, conv_kwargs={"K": np.int64(2)})
    model.save(tmp_path)
    same = MorphableModel.load(tmp_path)
    x = inputs(model)
    assert torch.equal(same(x), model(x))
    assert same.autoencoder.config == model.autoencoder.config
    linear, modal = (
        make(hierarchy, np.int8(3)) for make in (MorphableModel.pca, MorphableModel.modal)
    )
    assert linear.latent_channels == modal.latent_channels == 3
    for make in (MorphableModel.coma, MorphableModel.modal, MorphableModel.pca):
        for size in (3.0, True, "3"):
            with pytest.raises(TypeError, match="integer 'latent_channels' .got"):
                make(hierarchy, size)


def test_pca_and_a_network_of_your_own(tmp_path):
    vertices, faces = blob(1, seed=0)
    x = torch.from_numpy(vertices).float() + 0.1 * torch.randn(30, len(vertices), 3)
    model = MorphableModel.pca((vertices, faces), 4, unit="cm").fit(x)
    model.save(tmp_path / "pca")
    assert names(tmp_path / "pca") == ["README.md", "config.json", "model.safetensors"]
    other = MorphableModel.load(tmp_path / "pca")
    assert torch.equal(other(x), model(x)) and other.unit == "cm" and other.hierarchy is None
    np.testing.assert_array_equal(other.faces, faces)

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = torch.nn.Linear(vertices.size, 5)
            self.dec = torch.nn.Linear(5, vertices.size)

        def encode(self, x):
            return self.enc(x.flatten(1))

        def decode(self, z):
            return self.dec(z).unflatten(1, vertices.shape)

    model = MorphableModel(Own(), (vertices, faces))
    model.save(tmp_path / "own")
    with pytest.raises(ValueError, match=r"class .*Own, whose code .* autoencoder=\.\.\."):
        MorphableModel.load(tmp_path / "own")
    assert torch.equal(MorphableModel.load(tmp_path / "own", Own())(x), model(x))
    with pytest.raises(ValueError, match="no 'autoencoder.bias'"):
        wrong = torch.nn.Linear(3, 3)
        wrong.encode = wrong.decode = lambda x: x.flatten(1)[:, :5]
        MorphableModel.load(tmp_path / "own", wrong)


def test_further_features_and_the_type_of_the_weights_are_kept(tmp_path, hierarchy):
    model = make_model(hierarchy, in_channels=5).double()
    model.save(tmp_path)
    other = MorphableModel.load(tmp_path)
    x = inputs(model).double()
    assert other(x).dtype == torch.double and torch.equal(other(x), model(x))
    assert other(x).shape == x.shape and other.in_channels == 5


CHECK = """
import sys
import numpy as np
import torch

OPTIONAL = "openmesh torch_sparse pytorch_lightning torchmetrics matplotlib onnx anny tyro h5py"
for name in OPTIONAL.split():
    sys.modules[name] = None  # an import of it fails
from pyg_attnpool import MorphableModel

model = MorphableModel.load(f"{sys.argv[1]}/model")
x, expected = (torch.from_numpy(np.load(f"{sys.argv[1]}/{name}.npy")) for name in ("x", "out"))
assert torch.equal(model(x), expected)
assert model.evaluate(x)["alive"] == 3
"""


def test_a_fresh_process_loads_and_uses_it_with_the_core_alone(tmp_path, hierarchy):
    model = make_model(hierarchy).freeze()
    model.save(tmp_path / "model")
    x = inputs(model, 20)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "out.npy", model(x).detach().numpy())
    command = [sys.executable, "-c", CHECK, str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, cwd=Path(__file__).parents[2])


def test_a_failed_save_leaves_the_earlier_one(tmp_path, hierarchy, monkeypatch):
    model = make_model(hierarchy)
    model.save(tmp_path / "model")
    x = inputs(model)
    expected = model(x)
    for parameter in model.parameters():
        parameter.data += 1

    def disk_full(self, *args, **kwargs):
        raise OSError("no space left")

    for owner, name in [
        (MeshHierarchy, "save"),
        (Path, "write_bytes"),
        (Path, "write_text"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(owner, name, disk_full)
            model.save(tmp_path / "model")
        assert names(tmp_path) == ["model"] and names(tmp_path / "model") == FILES
        assert torch.equal(MorphableModel.load(tmp_path / "model")(x), expected)
    model.save(tmp_path / "model")
    assert torch.equal(MorphableModel.load(tmp_path / "model")(x), model(x))


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_named(tmp_path, hierarchy, name):
    make_model(hierarchy).save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        MorphableModel.load(tmp_path)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_flipped_bit_is_noticed(tmp_path, hierarchy, name):
    make_model(hierarchy).save(tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(len(content), size=20):
        content[place] ^= 4
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"Expected .*{path.name}"):
            MorphableModel.load(tmp_path)
        content[place] ^= 4
    path.write_bytes(content)
    MorphableModel.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', "\xff"])
def test_a_damaged_description(tmp_path, hierarchy, text):
    make_model(hierarchy).save(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="description of a model in .*config.json"):
        MorphableModel.load(tmp_path)


def edit(folder, **changes):
    r"""Another description, with a checksum that fits it."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    del config["checksum"]
    path.write_text(json.dumps({**config, "checksum": _checksum(config)}))


def test_a_folder_of_before_features_had_names(tmp_path, hierarchy):
    make_model(hierarchy).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("features") == []
    del config["checksum"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "checksum": _checksum(config)}))
    assert MorphableModel.load(tmp_path).features == ()


def test_what_does_not_fit_is_named(tmp_path, hierarchy):
    make_model(hierarchy).save(tmp_path)
    network = json.loads((tmp_path / "config.json").read_text())["autoencoder"]
    cases = [
        (dict(version=2), "version 1 or before in .*config.json .got 2.*later release"),
        (dict(format="other"), "format pyg_attnpool.MorphableModel"),
        (dict(autoencoder={**network, "latent_channels": 5}), "'autoencoder.from_latent.weight'"),
        (dict(autoencoder={**network, "conv_kwargs": {"K": 4}}), "autoencoder.down_convs.0.lins.4"),
        (dict(autoencoder={**network, "conv": "GCNConv"}), "argument 'K'"),
        (dict(autoencoder={**network, "channels": [4, 10**6]}), "'channels' of 1000000 in a file"),
        (dict(autoencoder={**network, "conv_kwargs": {"K": 10**9}}), "'K' of 1000000000 in a file"),
        (dict(autoencoder={**network, "latent_channels": 2**70}), "'latent_channels' of .* in a"),
        (dict(autoencoder={**network, "down": "mean"}), "a pooling of"),
        (dict(autoencoder={**network, "depth": 3}), "depth"),
        (dict(autoencoder={"type": "PCA", "latent_channels": 3}), "autoencoder.components"),
        (dict(unit="inch"), "'unit'"),
        (dict(features=["color"]), "'features' of the 0 channels beyond coordinates"),
        (dict(features=[3]), "a list of names of features"),
        (dict(template="0" * 64), "another template"),
        (dict(hierarchy="0" * 64), "another hierarchy"),
    ]
    for i, (change, match) in enumerate(cases):
        make_model(hierarchy).save(tmp_path / str(i))
        edit(tmp_path / str(i), **change)
        with pytest.raises(ValueError, match=f"Expected .*{match}"):
            MorphableModel.load(tmp_path / str(i))


@pytest.mark.parametrize("name", ["thesis.tex", "last.ckpt", ".git", "README.md", "config.json"])
def test_only_a_model_is_replaced(tmp_path, hierarchy, name):
    model, folder = make_model(hierarchy), tmp_path / "folder"
    folder.mkdir()
    for _ in range(2):  # alone, and beside a model
        (folder / name).write_text('{"format": "of another program"}')
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ValueError, match=f"of a model.*(got .*{re.escape(name)}|config.json)"):
            model.save(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert names(tmp_path) == ["folder"]
        if name in FILES:
            break
        (folder / name).unlink()
        model.save(folder)


def test_the_working_folder_is_no_place_for_a_model(tmp_path, hierarchy, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="working folder"):
        make_model(hierarchy).save(".")
    make_model(hierarchy).save("model/../face")
    assert names(tmp_path) == ["face"]
    assert "# face" in (tmp_path / "face" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("autoencoder.pools.0.index", 2**40, "pools.0.index' of vertices from 0 to"),
        ("autoencoder.pools.0.index", -1, "pools.0.index' of vertices from 0 to"),
        ("faces", 2**40, "'faces' of vertices from 0 to|another template"),
    ],
)
def test_indices_and_weights_out_of_range_are_named(tmp_path, hierarchy, name, value, match):
    model = make_model(hierarchy).freeze()
    module, _, tensor = name.rpartition(".")
    getattr(model.get_submodule(module), tensor)[0, 0] = value
    model.save(tmp_path)
    with pytest.raises(ValueError, match=match):
        MorphableModel.load(tmp_path)


def test_numbers_that_are_none_are_not_written(tmp_path, hierarchy):
    model = make_model(hierarchy)
    model.save(tmp_path / "model")
    with torch.no_grad():
        model.autoencoder.from_latent.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in 'autoencoder.from_latent.weight'"):
        model.save(tmp_path / "model")
    assert MorphableModel.load(tmp_path / "model")(inputs(model)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_a_compact_folder_rounds_large_weights_alone(tmp_path, hierarchy, dtype):
    wide = dict(channels=(4, 40), decoder_channels=(40, 40, 3))
    model = make_model(hierarchy, unit="mm", **wide).to(dtype).freeze()
    model.save(tmp_path / "whole")
    model.save(tmp_path / "compact", compact=True)
    sizes = [
        (tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "compact")
    ]
    assert sizes[1] < 0.8 * sizes[0]  # of small weights, much is the template
    loaded = MorphableModel.load(tmp_path / "compact")
    rounded = set()
    for name, tensor in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        if not torch.equal(found, tensor):
            assert torch.equal(found, tensor.half().to(dtype)) and tensor.numel() >= 1024
            rounded.add(name)
    assert rounded and all(name.startswith("autoencoder.") for name in rounded)
    x = inputs(model).to(dtype)
    assert (loaded(x) - model(x)).abs().max() < 1e-2 * model(x).abs().max()
    # As any other, it is saved whole again.
    loaded.save(tmp_path / "again")
    assert torch.equal(MorphableModel.load(tmp_path / "again")(x), loaded(x))


def test_weights_beyond_half_precision_are_not_rounded_to_infinity(tmp_path, hierarchy):
    model = make_model(hierarchy, channels=(4, 40), decoder_channels=(40, 40, 3))
    with torch.no_grad():
        model.autoencoder.from_latent.weight *= 1e8
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="infinity in 'autoencoder.from_latent.weight'"):
        model.save(tmp_path / "model", compact=True)
    MorphableModel.load(tmp_path / "model")
    with pytest.raises(TypeError, match="'compact' to be True or False .got 1"):
        model.save(tmp_path / "model", compact=1)


def test_folders_of_before_are_refused_with_a_way_out(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(ValueError, match="MeshAutoencoder.save of version 0.1.*no units"):
        MorphableModel.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        MorphableModel.load(tmp_path / "nothing")


def test_the_card_says_what_it_is_and_may_be_edited(tmp_path, hierarchy):
    model = make_model(hierarchy, unit="mm").freeze()
    model.summary = {"validation error (mm)": 1.25, "test error (mm)": {"mean": 2.5}}
    model.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "license:" not in card and "| test error (mm) | mean 2.5 |" in card
    for name, shown in (("apache-2.0", True), ("mine\ntags: []", False)):
        model.summary["license"] = name
        model.save(tmp_path / "licensed")
        front = (tmp_path / "licensed" / "README.md").read_text().split("---")[1]
        assert (f"\nlicense: {name}\n" in front) == shown and front.count("tags:") == 1
    assert card.startswith("---\nlibrary_name: pyg_attnpool\n")
    assert "aggregation attention, frozen" in card and "| validation error (mm) | 1.25 |" in card
    assert f"| vertices, faces | {model.num_vertices:,}, {len(model.faces):,} |" in card
    (tmp_path / "README.md").write_text(card + "\nMore about it.\n")
    MorphableModel.load(tmp_path)
