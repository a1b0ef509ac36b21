import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyg_attnpool import MappingPool, MeshHierarchy, freeze_attention
from pyg_attnpool.models import MeshAutoencoder, coma, neural3dmm
from tests.mesh.meshes import blob

pytest.importorskip("safetensors")
SMALL = dict(encoder_channels=(3, 4, 5), decoder_channels=(5, 4, 3, 3), latent_channels=3)
ATTENTION = dict(down_kwargs=dict(channels=5), up_kwargs=dict(channels=5, k=4))
FILES = ["hierarchy.npz", "model.json", "weights.safetensors"]


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(blob(2, seed=0, hole=True), factors=[4, 4])


def make_model(hierarchy, make=coma, pool="attention", **kwargs):
    kwargs = {**SMALL, **(ATTENTION if pool == "attention" else {}), **kwargs}
    return make(hierarchy, pool, **kwargs)


def inputs(model, batch_size=2):
    return torch.randn(batch_size, model.num_vertices[0], 3)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("make", [coma, neural3dmm])
@pytest.mark.parametrize("pool", ["qem", "attention", "frozen"])
def test_a_loaded_model_is_bit_equal_and_learns_the_same(tmp_path, hierarchy, make, pool):
    spirals = dict(hops=2, dilation=[2, 1]) if make is neural3dmm else {}
    model = make_model(hierarchy, make, "qem" if pool == "qem" else "attention", **spirals)
    if pool == "frozen":
        freeze_attention(model)
    state = torch.random.get_rng_state()
    model.save(tmp_path)
    other = MeshAutoencoder.load(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert names(tmp_path) == FILES

    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert other.hierarchy.hash == hierarchy.hash
    x = inputs(model)
    assert torch.equal(other(x), model(x))
    assert torch.equal(other.encode(x), model.encode(x))
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert list(ours) == list(theirs)
    grads = torch.autograd.grad(model(x).square().sum(), list(ours.values()))
    found = torch.autograd.grad(other(x).square().sum(), list(theirs.values()))
    assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))


@pytest.mark.parametrize(
    ("down", "up"), [("full", "average"), ("variant", "attention"), ("diffpool", "qem")]
)
def test_every_other_pooling_as_learned_and_where_it_can_be_frozen(tmp_path, hierarchy, down, up):
    model = MeshAutoencoder(hierarchy, down=down, up=up, K=3, **SMALL)
    x = inputs(model)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save(tmp_path)
    assert torch.equal(MeshAutoencoder.load(tmp_path)(x), model(x))
    if down != "diffpool":
        model.pools[1] = model.pools[1].freeze()  # the finer one goes on learning
        model.save(tmp_path)
        other = MeshAutoencoder.load(tmp_path)
        assert torch.equal(other(x), model(x))
        assert isinstance(other.pools[1], MappingPool) and type(other.pools[0]) is type(
            model.pools[0]
        )


def test_the_type_of_the_weights_is_kept(tmp_path, hierarchy):
    model = make_model(hierarchy).double()
    model.save(tmp_path)
    other = MeshAutoencoder.load(tmp_path)
    x = inputs(model).double()
    assert other(x).dtype == torch.double and torch.equal(other(x), model(x))


CHECK = """
import sys
import numpy as np
import torch
from pyg_attnpool.models import MeshAutoencoder

folder = sys.argv[1]
model = MeshAutoencoder.load(folder)
assert not {"onnx", "onnxruntime", "anny", "pyg_attnpool.training"} & set(sys.modules)
x, expected = (torch.from_numpy(np.load(f"{folder}/{name}.npy")) for name in ("x", "out"))
assert torch.equal(model(x), expected)
"""


def test_a_fresh_process_loads_it_without_optional_packages(tmp_path, hierarchy):
    model = freeze_attention(make_model(hierarchy))
    model.save(tmp_path)
    x = inputs(model)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "out.npy", model(x).detach().numpy())
    command = [sys.executable, "-c", CHECK, str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, cwd=Path(__file__).parents[2])


def test_without_safetensors_models_load_and_saving_names_the_extra(
    tmp_path, hierarchy, monkeypatch
):
    model = MeshAutoencoder(hierarchy, down="attention", **SMALL)
    model.save(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    loaded = MeshAutoencoder.load(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    with pytest.raises(ImportError, match=r'safetensors.*pip install "pyg_attnpool\[export\]"'):
        model.save(tmp_path)


def test_a_failed_save_leaves_the_earlier_one(tmp_path, hierarchy, monkeypatch):
    model = make_model(hierarchy)
    model.save(tmp_path)
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
            model.save(tmp_path)
        assert names(tmp_path) == FILES
        assert torch.equal(MeshAutoencoder.load(tmp_path)(x), expected)
    model.save(tmp_path)
    assert torch.equal(MeshAutoencoder.load(tmp_path)(x), model(x))


def test_arguments_that_json_cannot_hold(tmp_path, hierarchy):
    kwargs = dict(SMALL, encoder_channels=(3, 4), decoder_channels=(5, 4, 3))
    two = MeshHierarchy(
        hierarchy.vertices[:2], hierarchy.faces[:2], hierarchy.down[:1], hierarchy.up[:1]
    )
    prior = dict(prior=two.down[0])
    model = MeshAutoencoder(two, down="attention", down_kwargs=prior, **kwargs)
    with pytest.raises(TypeError, match="arguments that JSON can hold .got: .*Mapping"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, hierarchy, name):
    make_model(hierarchy).save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        MeshAutoencoder.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', "\xff"])
def test_a_damaged_description(tmp_path, hierarchy, text):
    make_model(hierarchy).save(tmp_path)
    (tmp_path / "model.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="whole description of a model in .*model.json"):
        MeshAutoencoder.load(tmp_path)


def edit(folder, **changes):
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_description_of_another_version_or_another_architecture(tmp_path, hierarchy):
    make_model(hierarchy).save(tmp_path)
    arguments = json.loads((tmp_path / "model.json").read_text())["arguments"]
    edit(tmp_path, version=2)
    with pytest.raises(ValueError, match="model of version 1 in .*model.json .got 2"):
        MeshAutoencoder.load(tmp_path)
    for wrong in ({"K": 4}, {"latent_channels": 5}, {"pool": "qem"}, {"down": "mean"}):
        edit(tmp_path, version=1, arguments={**arguments, **wrong})
        with pytest.raises(ValueError, match="Expected"):
            MeshAutoencoder.load(tmp_path)


def test_weights_of_another_model_or_damaged(tmp_path, hierarchy):
    model = make_model(hierarchy)
    model.save(tmp_path / "a")
    for parameter in model.parameters():
        parameter.data += 1
    model.save(tmp_path / "b")
    path = tmp_path / "a" / "weights.safetensors"
    own = path.read_bytes()
    for content in ((tmp_path / "b" / path.name).read_bytes(), own[:-4], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="Expected the weights .* in .*weights.safetensors"):
            MeshAutoencoder.load(tmp_path / "a")


def test_another_hierarchy_or_one_of_another_version(tmp_path, hierarchy, monkeypatch):
    make_model(hierarchy).save(tmp_path)
    other = MeshHierarchy.from_template(blob(2, seed=1, hole=True), factors=[4, 4])
    other.save(tmp_path / "hierarchy.npz")
    with pytest.raises(ValueError, match="Expected the hierarchy .* in .*hierarchy.npz"):
        MeshAutoencoder.load(tmp_path)
    monkeypatch.setattr("pyg_attnpool.mesh.hierarchy.VERSION", 2)
    with pytest.raises(ValueError, match="hierarchy of version 2 in .*hierarchy.npz .got 1"):
        MeshAutoencoder.load(tmp_path)
