import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import (
    AttentionPool,
    AttentionUnpool,
    Mapping,
    MappingPool,
    MeshHierarchy,
    freeze_attention,
)
from pyg_attnpool.export import export, export_onnx, export_torch
from pyg_attnpool.models import MeshAutoencoder, MorphableModel, coma, neural3dmm
from tests.mesh.meshes import blob


def make_pool(cls=AttentionPool, num_source=9, num_target=6):
    prior = Mapping(torch.randint(num_source, (num_target, 2)), torch.rand(num_target, 2), 9)
    return cls(num_source, num_target, k=4, prior=prior, init="normal")


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.levels = torch.nn.ModuleList(
            [torch.nn.ModuleDict({"pool": make_pool()}), torch.nn.Sequential(make_pool())]
        )
        self.unpool = make_pool(AttentionUnpool)
        self.same = self.unpool  # one layer under two names
        self.fixed = MappingPool(Mapping(torch.arange(9).unsqueeze(1), torch.ones(9, 1), 9))
        self.lin = torch.nn.Linear(5, 5)
        self.nothing = None

    def forward(self, x):
        x = self.fixed(self.lin(x))
        out = self.levels[0]["pool"](x) + self.levels[1](x)
        return out + self.unpool(x) - 2 * self.same(x)


def test_every_attention_layer_is_replaced_in_place():
    model = torch.nn.Sequential(torch.nn.Identity(), Block())
    x = torch.randn(3, 9, 5)
    expected = model(x)
    block, lin, fixed = model[1], model[1].lin, model[1].fixed

    assert freeze_attention(model) is model
    layers = [block.levels[0]["pool"], block.levels[1][0], block.unpool, block.fixed]
    assert all(type(layer) is MappingPool for layer in layers)
    assert block.same is block.unpool and block.lin is lin and block.fixed is fixed
    assert not any(isinstance(m, AttentionPool | AttentionUnpool) for m in model.modules())
    assert [name for name, _ in model.named_parameters()] == ["1.lin.weight", "1.lin.bias"]
    assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


def test_what_is_frozen_still_passes_gradients():
    model, x = Block(), torch.randn(2, 9, 5, requires_grad=True)
    inputs = (x, model.lin.weight)
    expected = torch.autograd.grad(model(x).square().sum(), inputs)
    found = torch.autograd.grad(freeze_attention(model)(x).square().sum(), inputs)
    for grad, other in zip(found, expected, strict=True):
        assert_close(grad, other)


def test_frozen_state_moves_to_another_frozen_model():
    model, other = freeze_attention(Block()), freeze_attention(Block())
    x = torch.randn(2, 9, 5)
    assert not torch.allclose(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_an_attention_layer_itself_becomes_its_mapping_pool():
    pool, x = make_pool(), torch.randn(9, 5)
    frozen = freeze_attention(pool)
    assert type(frozen) is MappingPool
    assert_close(frozen(x), pool(x))


def test_a_model_without_attention_stays_as_it_is():
    model = torch.nn.Linear(2, 3)
    assert freeze_attention(model) is model
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]


CASES = [
    (coma, "attention"),
    pytest.param(neural3dmm, "attention", marks=pytest.mark.slow),
    pytest.param(coma, "qem", marks=pytest.mark.slow),
    pytest.param(neural3dmm, "qem", marks=pytest.mark.slow),
]
SMALL = dict(channels=(4, 5), decoder_channels=(5, 4, 3), latent_channels=3)


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(blob(2, seed=0, hole=True), factors=[4, 4])


def make_model(hierarchy, make, pool):
    kwargs = dict(down_kwargs=dict(channels=5), up_kwargs=dict(channels=5, k=4))
    kwargs = kwargs if pool == "attention" else {}
    return freeze_attention(
        make(hierarchy, pool, **({"K": 3} if make is coma else {}), **SMALL, **kwargs)
    )


def make_inputs(model, batch_size):
    return torch.randn(batch_size, model.num_vertices[0], 3)


def fresh_process(code, cwd):
    r"""Runs code that must not have this package, on files of numpy arrays in a folder."""
    code = f"import sys\nimport numpy as np\nfor name in ('x', 'y'):\n{code}"
    code += "\nassert 'pyg_attnpool' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=cwd)


LOAD_TORCH = """
    import torch
    model = torch.export.load("model.pt2").module()
    assert {node.target.namespace for node in model.graph.nodes
            if isinstance(node.target, torch._ops.OpOverload)} == {"aten"}
    out = model(torch.from_numpy(np.load(name + ".npy"))).detach().numpy()
    np.save(name + "_out.npy", out)
"""
LOAD_ONNX = """
    import onnxruntime
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(["out"], {"x": np.load(name + ".npy")})
    np.save(name + "_out.npy", out)
    assert "torch" not in sys.modules
"""


def check_in_a_fresh_process(code, model, folder):
    inputs = {"x": make_inputs(model, 1), "y": make_inputs(model, 5)}
    for name, x in inputs.items():
        np.save(folder / f"{name}.npy", x.numpy())
    fresh_process(code, folder)
    for name, x in inputs.items():
        out = torch.from_numpy(np.load(folder / f"{name}_out.npy"))
        expected = model(x).detach()
        assert (out - expected).abs().max() < 1e-5 * expected.abs().max()
        # Not a constant that a dead activation leaves.
        assert len(x) == 1 or expected.std(dim=0).max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize(("make", "pool"), CASES)
def test_torch_export_runs_without_this_package(tmp_path, hierarchy, make, pool):
    model = make_model(hierarchy, make, pool)
    difference = export_torch(model, make_inputs(model, 2), tmp_path / "model.pt2")
    assert 0 <= difference < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    check_in_a_fresh_process(LOAD_TORCH, model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "pool"), CASES)
def test_onnx_export_runs_without_this_package(tmp_path, hierarchy, make, pool):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = make_model(hierarchy, make, pool)
    difference = export_onnx(model, make_inputs(model, 2), tmp_path / "model.onnx")
    assert 0 <= difference < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {node.domain for node in graph.node} == {""}
    # Sparse products are gathers: a scatter takes ten times as long, and in onnxruntime's threads
    # the sums of ScatterND are wrong on meshes larger than these.
    assert not {node.op_type for node in graph.node if "Scatter" in node.op_type}
    check_in_a_fresh_process(LOAD_ONNX, model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("down", ["full", "diffpool", "variant"])
def test_the_other_poolings_are_exported_too(tmp_path, hierarchy, down):
    model = MeshAutoencoder(hierarchy, down=down, conv_kwargs={"K": 3}, **SMALL)
    example = make_inputs(model, 1)
    assert export_torch(model, example, tmp_path / "model.pt2") < 1e-5
    x = make_inputs(model, 3)
    out = torch.export.load(tmp_path / "model.pt2").module()(x)
    assert_close(out, model(x))


@pytest.mark.slow
def test_the_export_has_the_parameters_of_the_qem_twin_and_no_training_data(tmp_path, hierarchy):
    counts, path = {}, tmp_path / "model.pt2"
    for pool in ("qem", "attention"):
        model = make_model(hierarchy, coma, pool)
        export_torch(model, make_inputs(model, 64), path)
        counts[pool] = sum(p.numel() for p in torch.export.load(path).parameters())
    assert counts["attention"] == counts["qem"] == sum(p.numel() for p in model.parameters())
    (example,), _ = torch.export.load(path).example_inputs
    assert example.numel() == 0


def test_a_model_in_metres_is_exported_as_one(tmp_path, hierarchy):
    vertices = torch.from_numpy(hierarchy.vertices[0]).float()
    x = 0.1 * vertices + 0.01 * torch.randn(6, len(vertices), 3)
    model = MorphableModel(make_model(hierarchy, coma, "attention"))
    model.set_statistics(x.mean(0), x.std(0))
    model.train()
    assert export_torch(model, x, tmp_path / "model.pt2") < 1e-5
    assert model.training and model.autoencoder.training
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert_close(loaded(x[:3]), model(x[:3]))


@pytest.mark.slow
def test_double_precision_stays(tmp_path, hierarchy):
    model = make_model(hierarchy, neural3dmm, "attention").double()
    x = make_inputs(model, 3).double()
    assert export_torch(model, x, tmp_path / "model.pt2") < 1e-12
    assert torch.export.load(tmp_path / "model.pt2").module()(x).dtype == torch.double


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.half, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("suffix", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_half_precision_agrees_to_its_roundings(tmp_path, hierarchy, dtype, suffix):
    model = make_model(hierarchy, coma, "attention").to(dtype)
    x, path = make_inputs(model, 3).to(dtype), tmp_path / f"model.{suffix}"
    if suffix == "pt2":
        assert export(model, x, path) <= 10 * torch.finfo(dtype).eps
        out = torch.export.load(path).module()(x)
    elif dtype == torch.bfloat16:
        with pytest.raises(ValueError, match="float16 or single precision for ONNX"):
            export(model, x, path)
        return
    else:
        onnxruntime = pytest.importorskip("onnxruntime")
        assert export(model, x, path) <= 10 * torch.finfo(dtype).eps
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        out = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    assert out.dtype == dtype
    exact = copy.deepcopy(model).double()(x.double())
    assert (out - exact).abs().max() < 100 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize(
    ("method", "suffix"),
    [
        ("encode", "pt2"),
        ("decode", "onnx"),
        pytest.param("encode", "onnx", marks=pytest.mark.slow),
        pytest.param("decode", "pt2", marks=pytest.mark.slow),
    ],
)
def test_encoder_and_decoder_are_exported_alone(tmp_path, hierarchy, method, suffix):
    model = MorphableModel(make_model(hierarchy, neural3dmm, "attention"))
    model.set_statistics(torch.randn_like(model.mean), torch.rand_like(model.std) + 0.5)
    path = tmp_path / f"model.{suffix}"
    x = make_inputs(model.autoencoder, 3) if method == "encode" else torch.randn(3, 3)
    assert export(getattr(model, method), x[:2], path) < 1e-5
    if suffix == "pt2":
        out = torch.export.load(path).module()(x)
    else:
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        out = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    assert_close(out, getattr(model, method)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("export", [export_torch, export_onnx])
def test_a_model_that_holds_attention_is_refused(tmp_path, hierarchy, export):
    path = tmp_path / "model"
    kwargs = dict(down_kwargs=dict(channels=5), up_kwargs=dict(channels=5, k=4))
    model = coma(hierarchy, "attention", **SMALL, **kwargs)
    with pytest.raises(ValueError, match=r"'pools.0': 'AttentionPool'.*`freeze\(model\)"):
        export(model, make_inputs(model, 2), path)
    with pytest.raises(ValueError, match=r"AttentionPool.*`freeze\(model\)"):
        export(make_pool(), torch.randn(2, 9, 5), path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("example", "got"),
    [
        (torch.zeros(0, 9, 3), r"\[0, 9, 3\]"),
        (torch.zeros(9), r"\[9\]"),
        ("x", "str"),
        (torch.zeros(2, 9, 3).long(), "int64"),
        (torch.full((2, 9, 3), torch.nan), "NaN or infinity"),
        (torch.zeros(2, 9, 3).double(), "torch.float64"),
    ],
)
def test_bad_examples(tmp_path, example, got):
    with pytest.raises(ValueError, match=f"Expected an example.*got .*{got}"):
        export_torch(torch.nn.Linear(3, 3), example, tmp_path / "model.pt2")


class Rounded(torch.nn.Module):
    r"""Computes something else when it is traced."""

    def forward(self, x):
        return x + 1e-4 if torch.compiler.is_compiling() else x


@pytest.mark.parametrize("export", [export_torch, export_onnx])
def test_an_export_that_differs_is_not_written(tmp_path, export):
    if export is export_onnx:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    path = tmp_path / "model.pt2"
    path.write_text("the earlier one")
    with pytest.raises(RuntimeError, match=r"within 1e-05 .*difference of .*e-05.* is not written"):
        export(Rounded(), torch.randn(2, 9, 3), path)
    assert path.read_text() == "the earlier one"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_without_onnx_the_extra_is_named(tmp_path, package, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, package, None)
    line = rf'{package}.*pip install "pyg_attnpool\[export\]"'
    with pytest.raises(ImportError, match=line):
        export_onnx(torch.nn.Linear(3, 3), torch.randn(2, 9, 3), tmp_path / "model.onnx")


def test_a_model_that_searches_for_its_codes_is_exported(tmp_path, hierarchy):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    vertices, _ = blob(2, seed=0, hole=True)
    generator = np.random.default_rng(0)
    code = generator.normal(size=(40, 2))
    shapes = generator.normal(size=(3, *vertices.shape))
    # Two numbers decide each mesh, the second one by its square as well.
    weights = np.column_stack([code, code[:, 1] ** 2])
    meshes = torch.tensor(0.1 * vertices + 0.01 * np.tensordot(weights, shapes, 1)).float()
    model = MorphableModel.modal(hierarchy, latent_channels=2, modes=4)
    model.fit(meshes, epochs=1, accelerator="cpu", enable_progress_bar=False, logger=False)
    torch.nn.init.normal_(model.autoencoder.from_code[-1].weight, std=0.1)  # bent
    model.export(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    with torch.no_grad():
        expected = model(meshes[:7])
        straight = model.autoencoder.linear
        standardized = (meshes[:7] - model.mean) / model.std
        linear = straight(standardized) * model.std + model.mean
    assert (expected - linear).abs().max() > 1e-3 * expected.abs().max()  # no principal components
    (out,) = session.run(None, {"x": meshes[:7].numpy()})
    np.testing.assert_allclose(out, expected, atol=1e-5 * expected.abs().max().item())


@pytest.mark.slow
def test_an_export_prints_nothing(tmp_path):
    pytest.importorskip("onnxscript")
    code = """
        import torch
        from pyg_attnpool import MorphableModel
        from pyg_attnpool.export import export
        from tests.mesh.meshes import blob

        model = MorphableModel.neural3dmm(blob(4, seed=0), pool="qem")
        export(model, 0.01 * torch.randn(2, model.num_vertices, 3), "model.onnx")
    """
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("size", [1, 5, 17])
def test_equations_are_solved_in_onnx(tmp_path, size):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Equations(torch.nn.Module):
        def forward(self, x):
            matrix = x.transpose(1, 2) @ x
            return torch.linalg.solve(matrix, x.sum(dim=1).unsqueeze(-1)).squeeze(-1)

    x = torch.randn(3, 2 * size + 3, size, dtype=torch.double)
    export(Equations(), x, tmp_path / "equations.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "equations.onnx", providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": x.numpy()})
    gram = np.einsum("bni,bnj->bij", x, x)
    np.testing.assert_allclose(np.einsum("bij,bj->bi", gram, found), x.sum(dim=1), atol=1e-9)
