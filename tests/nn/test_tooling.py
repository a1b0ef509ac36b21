r"""Layers and models under PyTorch's own tools. Rows are what is run, columns the tools. The
numbers of each are those of a dense twin, and PyG's ChebConv runs under the same tool."""

import copy
import io

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torch_geometric.nn import ChebConv

from pyg_attnpool import (
    AttentionPool,
    AttentionUnpool,
    Mapping,
    MappingPool,
    MeshHierarchy,
    SpiralConv,
    StaticChebConv,
    freeze,
)
from pyg_attnpool.models import MeshAutoencoder, coma, neural3dmm
from pyg_attnpool.nn.base import VertexLayer
from pyg_attnpool.nn.learned_pools import DiffPool, FullPool, WeightedPool
from pyg_attnpool.ops import reference
from tests.mesh.meshes import blob, icosphere

N, M, B, F = 18, 7, 2, 3
ring = torch.arange(N)
EDGES = torch.stack([torch.cat([ring, ring.roll(1)]), torch.cat([ring.roll(1), ring])])


def mapping():
    return Mapping(torch.randint(N, (M, 3)), torch.rand(M, 3), N)


class OnGraph(torch.nn.Module):
    r"""ChebConv of PyG with its graph."""

    def __init__(self):
        super().__init__()
        self.conv = ChebConv(F, 4, K=3)

    def forward(self, x):
        return self.conv(x, EDGES)


def spirals():
    return torch.randint(-1, N, (N, 4))


def network(make, pool):
    r"""A whole autoencoder with its hierarchy, small enough for second derivatives."""
    keys = {"channels": 4} if pool == "attention" else {}
    kwargs = {"down_kwargs": keys, "up_kwargs": keys | ({"k": 4} if keys else {})}
    hierarchy = MeshHierarchy.from_template(icosphere(0), factors=[2])
    return make(
        hierarchy,
        pool,
        2,
        channels=(2,),
        activation="elu",  # of one derivative everywhere
        expand_activation="elu",
        **({"K": 3} if make is coma else {}),
        **kwargs,
    )


LAYERS = {
    "MappingPool": lambda: MappingPool(mapping()),
    "WeightedPool": lambda: WeightedPool(mapping()),
    "FullPool": lambda: FullPool(N, M),
    "sum": lambda: AttentionPool(N, M, 5, 3, mapping(), normalization="sum", init="normal"),
    "softmax": lambda: AttentionPool(N, M, 5, 3, mapping(), init="normal"),
    "alone": lambda: AttentionUnpool(N, M, 5, 4, init="normal"),
    "all kept": lambda: AttentionPool(N, M, 5, None, mapping(), init="normal"),
    "DiffPool": lambda: DiffPool(F, M, EDGES, N),
    "StaticChebConv": lambda: StaticChebConv(F, 4, 3, EDGES, N),
    "StaticChebConv, narrow": lambda: StaticChebConv(F, 2, 3, EDGES, N),
    "SpiralConv": lambda: SpiralConv(F, 4, spirals()),
    "SpiralConv, narrow": lambda: SpiralConv(F, 2, spirals()),
    "ChebConv of PyG": OnGraph,
    "CoMA, QEM": lambda: network(coma, "qem"),
    "CoMA, attention": lambda: network(coma, "attention"),
    "Neural3DMM, attention": lambda: network(neural3dmm, "attention"),
}


def features(module):
    r"""Two samples that a layer or a network takes."""
    num = module.num_vertices[0] if isinstance(module, MeshAutoencoder) else N
    return torch.randn(B, num, F, dtype=torch.float64)


def dense_mapping(mapping):
    row = torch.arange(len(mapping.index)).unsqueeze(1).expand_as(mapping.index)
    matrix = mapping.weight.new_zeros(len(mapping.index), mapping.num_source)
    return matrix.index_put((row, mapping.index), mapping.weight, True)


def Dense(module):
    r"""The same by dense matrices, on the parameters of the module: of a network, layer by layer
    in its place."""
    if not isinstance(module, MeshAutoencoder):
        return DenseLayer(module)
    parameters = {id(p): p for p in module.parameters()}
    twin = copy.deepcopy(module, parameters)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, VertexLayer):
            place, _, last = name.rpartition(".")
            setattr(twin.get_submodule(place), last, DenseLayer(layer))
    return twin


class DenseLayer(torch.nn.Module):
    r"""The same layer by dense matrices, on the parameters of the layer, under their names."""

    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]  # of which the structure alone is read
        for name, parameter in layer.named_parameters():
            self.register_parameter(name.replace(".", "_"), parameter)

    def forward(self, x, rows=False):
        if rows:
            return self(x.transpose(0, 1)).transpose(0, 1)
        layer, batched = self.layer[0], x if x.dim() == 3 else x.unsqueeze(0)
        y = self.dense(layer, batched)
        return y if x.dim() == 3 else y.squeeze(0)

    def chebyshev(self, layer, x, prefix):
        conv = layer.conv if prefix else layer
        row = torch.repeat_interleave(conv.rowptr.diff())
        matrix = x.new_zeros(conv.num_nodes, conv.num_nodes)
        matrix = matrix.index_put((row, conv.col), conv.laplacian, True)
        names = [f"{prefix}lins_{i}_weight" for i in range(len(conv.lins))]
        weight = torch.stack([getattr(self, name).t() for name in names])
        y = reference.chebyshev(matrix, weight, x)
        return y if conv.bias is None else y + getattr(self, f"{prefix}bias")

    def dense(self, layer, x):
        if isinstance(layer, OnGraph):
            scale = torch.zeros(N, N, dtype=x.dtype)
            scale[tuple(EDGES)] = -0.5
            weight = torch.stack([getattr(self, f"conv_lins_{i}_weight").t() for i in range(3)])
            return reference.chebyshev(scale, weight, x) + self.conv_bias
        if isinstance(layer, StaticChebConv):
            return self.chebyshev(layer, x, "")
        if isinstance(layer, DiffPool):
            assignment = self.chebyshev(layer, x, "conv_").softmax(dim=-1)
            return assignment.transpose(1, 2) @ x
        if isinstance(layer, SpiralConv):
            padded = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
            y = padded[:, layer.spirals].flatten(2) @ self.lin_weight.t()
            return y if layer.lin.bias is None else y + self.lin_bias
        if isinstance(layer, MappingPool):
            matrix = dense_mapping(layer.mapping())
        elif isinstance(layer, WeightedPool):
            matrix = dense_mapping(Mapping(layer.index, layer.initial_weight, N)).new_zeros(M, N)
            row = torch.arange(M).unsqueeze(1).expand_as(layer.index)
            matrix = matrix.index_put((row, layer.index), self.weight, True)
        elif isinstance(layer, FullPool):
            matrix = self.weight
        else:
            log_beta, k = getattr(self, "log_beta", None), layer.k or N
            matrix = reference.attention(self.query, self.key, k, log_beta)
            if layer.prior_index is not None:
                prior = dense_mapping(
                    Mapping(layer.prior_index, layer.prior_weight, layer.num_source)
                )
                matrix = reference.fuse(matrix, prior, self.fusion_weight)
        return torch.einsum("mn,bnf->bmf", matrix, x)


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]().double()


@pytest.fixture
def twin(layer):
    return Dense(layer)


@pytest.fixture
def x(request):
    return features(request.getfixturevalue("layer") if "layer" in request.fixturenames else None)


def parameters(module):
    return {_name(name): p.detach() for name, p in module.named_parameters()}


def _name(name):
    # The same in a layer and in its twin, also within a network.
    return name.replace(".", "_")


def called(module, parameters, x):
    r"""A call with other parameters, whose names have dots replaced."""
    names = {_name(name): name for name, _ in module.named_parameters()}
    return functional_call(module, {names[key]: p for key, p in parameters.items()}, (x,))


def loss(module):
    head = torch.linspace(-1, 1, 1000, dtype=torch.float64)

    def function(parameters, x):
        y = called(module, parameters, x)
        return (y.square().flatten() * head[: y.numel()]).sum()

    return function


# One column each ####################################################################


def of_jvp(module, x):
    tangent = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    return jvp(module, (x,), (tangent,))


def of_jvp_of_parameters(module, x):
    own = parameters(module)
    if not own:
        return 0
    tangents = {name: torch.cos(p * 17) for name, p in own.items()}
    return jvp(lambda p: called(module, p, x), (own,), (tangents,))


def of_dual_numbers(module, x):
    with forward_ad.dual_level():
        out = module(forward_ad.make_dual(x, torch.sin(x)))
        return tuple(forward_ad.unpack_dual(out))


def of_vjp(module, x):
    y, pull = vjp(module, x)
    return y, pull(torch.cos(y))


def of_hessian(module, x):
    own = parameters(module)
    return hessian(loss(module))(own, x[:1]) if own else 0


def of_gradients_per_sample(module, x):
    own, x = parameters(module), x.unsqueeze(1)
    return vmap(grad(loss(module)), (None, 0))(own, x) if own else vmap(grad(module_sum(module)))(x)


def module_sum(module):
    return lambda x: module(x).square().sum()


def of_ensemble(module, x):
    own = parameters(module)
    several = {name: torch.stack([p, torch.cos(5 * p)]) for name, p in own.items()}
    return vmap(lambda p: called(module, p, x))(several) if own else 0


def of_batched_gradients(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    heads = torch.linspace(-1, 1, 3 * y.numel(), dtype=y.dtype).view(3, *y.shape)
    inputs = [x, *module.parameters()]
    return torch.autograd.grad(y, inputs, heads, is_grads_batched=True)


def of_second_gradients(module, x):
    x = x.clone().requires_grad_()
    inputs = [x, *module.parameters()]
    first = torch.autograd.grad(module(x).square().sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)


def of_checkpoint(module, x):
    x = x.clone().requires_grad_()
    out = checkpoint(module, x, use_reentrant=False)
    return torch.autograd.grad(out.square().sum(), [x, *module.parameters()])


def of_trace(module, x):
    traced = torch.jit.trace(module, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    return torch.jit.load(io.BytesIO(file.getvalue()))(torch.cat([x, -x]))


def of_flop_counter(module, x):
    with FlopCounterMode(display=False):
        return module(x)


TOOLS = {
    "jvp": of_jvp,
    "jvp of parameters": of_jvp_of_parameters,
    "dual numbers": of_dual_numbers,
    "jacfwd": lambda module, x: jacfwd(module)(x[:1]),
    "jacrev": lambda module, x: jacrev(module)(x[:1]),
    "vjp": of_vjp,
    "grad": lambda module, x: grad(module_sum(module))(x),
    "hessian": of_hessian,
    "vmap": lambda module, x: vmap(module)(torch.stack([x, 2 * x])),
    "vmap of grad": of_gradients_per_sample,
    "ensemble": of_ensemble,
    "is_grads_batched": of_batched_gradients,
    "second gradients": of_second_gradients,
    "checkpoint": of_checkpoint,
}


def test_ensemble_with_buffers(layer, x):
    layers = [layer, copy.deepcopy(layer)]
    for p in layers[1].parameters():
        p.data = torch.cos(5 * p.data)
    state = torch.func.stack_module_state(layers)
    if not any(state):
        return
    for _ in range(2):
        out = vmap(lambda *state: functional_call(layer, state, (x,)))(*state)
        assert_close(out, torch.stack([Dense(each)(x) for each in layers]), rtol=1e-6, atol=1e-8)
        assert_close(layer(x), out[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("tool", TOOLS)
def test_numbers_are_those_of_the_dense_twin(layer, twin, x, tool):
    found, wanted = TOOLS[tool](layer, x), TOOLS[tool](twin, x)
    assert_close(found, wanted, rtol=1e-6, atol=1e-8)


# The twin's structure would be traced with it.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_trace(layer, twin, x):
    assert_close(of_trace(layer, x), twin(torch.cat([x, -x])), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "ChebConv of PyG"])
def test_shapes_on_the_meta_device(name):
    layer = LAYERS[name]()
    x = features(layer).float()
    expected = Dense(layer)(x).shape
    assert layer.to("meta")(x.to("meta")).shape == expected


def test_flop_counter(layer, twin, x):
    assert_close(of_flop_counter(layer, x), twin(x), rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "ChebConv of PyG"])
def test_onnx_of_before(name):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, file = LAYERS[name](), io.BytesIO()
    x = features(layer).float()
    torch.onnx.export(layer, (x,), file, dynamo=False, opset_version=17, input_names=["x"])
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": x.numpy()})
    assert_close(torch.from_numpy(out), Dense(layer)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_graph_of_tensorboard(layer, x, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="no tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(layer, x)
    assert any(path.stat().st_size > 500 for path in tmp_path.iterdir())


def test_gradcheck_forward_and_backward(layer, x):
    x = x[:1].requires_grad_()
    assert torch.autograd.gradcheck(layer, x, check_forward_ad=True, check_batched_grad=False)


@pytest.mark.parametrize("kind", ["mean", "decay", "decay, one by one"])
def test_moving_averages_leave_indices_alone(layer, x, kind):
    kwargs = {
        "mean": {},
        "decay": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
        "decay, one by one": {"avg_fn": get_ema_avg_fn(0.9)},
    }[kind]
    averaged = AveragedModel(layer, use_buffers=True, **kwargs)
    seen = []
    for _ in range(4):
        averaged.update_parameters(layer)
        seen.append({name: p.detach().clone() for name, p in layer.named_parameters()})
        for p in layer.parameters():
            p.data += 0.1 * torch.randn_like(p)
    wanted = copy.deepcopy(layer)
    for name, p in wanted.named_parameters():
        mean = seen[0][name]
        for step, each in enumerate(seen[1:], start=1):
            share = 1 / (step + 1) if kind == "mean" else 0.1
            mean = mean + share * (each[name] - mean)
        p.data = mean
    assert_close(averaged(x), Dense(wanted)(x), rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize(
    "reparametrize",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
    ids=["old weight_norm", "old spectral_norm", "weight_norm", "spectral_norm", "orthogonal"],
)
@pytest.mark.parametrize("name", ["sum", "softmax", "all kept"])
def test_parametrized_keys(name, reparametrize, x):
    layer = LAYERS[name]().double()
    reparametrize(layer, "key")
    layer.eval()
    y = layer(x)  # which sets the key of the older kinds
    prior = dense_mapping(Mapping(layer.prior_index, layer.prior_weight, N))
    matrix = reference.attention(layer.query, layer.key, layer.k or N, layer.log_beta)
    wanted = reference.apply(reference.fuse(matrix, prior, layer.fusion_weight), x)
    assert_close(y, wanted)
    learned = list(layer.parameters())
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), learned, retain_graph=True),
        torch.autograd.grad(wanted.square().sum(), learned),
        strict=True,
    ):
        assert_close(a, b)
    assert_close(freeze(torch.nn.Sequential(layer))(x), y)


REPARAMETRIZE = {
    "old weight_norm": torch.nn.utils.weight_norm,
    "old spectral_norm": torch.nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": lambda module, name: prune.l1_unstructured(module, name, amount=0.3),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("kind", REPARAMETRIZE)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "ChebConv of PyG"])
def test_every_weight_may_be_made_of_others(name, kind):
    # PyG's ChebConv reads the weight of its last `lin` without a call, which the older ones miss.
    first = LAYERS[name]().double()
    matrices = [n for n, p in first.named_parameters() if p.dim() == 2]
    for place in matrices[:: max(1, len(matrices) // 4)]:
        layer, plain, x = copy.deepcopy(first), copy.deepcopy(first), features(first)
        inner, _, last = place.rpartition(".")
        REPARAMETRIZE[kind](layer.get_submodule(inner), last)
        for _ in range(2):  # the second step meets what the first has changed
            layer.zero_grad()
            layer(x).square().sum().backward()
            for p in layer.parameters():
                assert p.grad is not None and p.grad.isfinite().all()
                p.data -= 1e-4 * p.grad
        layer.eval()
        y = layer(x)
        for n, p in plain.named_parameters():
            p.data = getattr(layer.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]).data
        assert_close(y, Dense(plain)(x), rtol=1e-6, atol=1e-8)
        # Of what it is made of, not what it was.
        assert not torch.equal(plain.get_parameter(place), first.get_parameter(place))


@pytest.mark.parametrize("name", ["MappingPool", "WeightedPool", "FullPool", "sum", "softmax"])
@pytest.mark.parametrize("write", ["layer @ x", "torch.matmul"])
def test_products_compile(name, write, x, compiled):
    layer = LAYERS[name]().double()
    function = (lambda x: layer @ x) if write == "layer @ x" else lambda x: torch.matmul(layer, x)
    assert_close(compiled(function)(x), Dense(layer)(x))


def test_the_other_product_stays_refused_when_compiled(compiled):
    layer = LAYERS["softmax"]()
    with pytest.raises(Exception, match="torch_function"):
        compiled(lambda x: x @ layer)(torch.randn(B, F, M))


@pytest.mark.parametrize("name", ["MappingPool", "softmax", "StaticChebConv", "SpiralConv"])
def test_transforms_compile(name, x, compiled):
    layer = LAYERS[name]().double()
    # In a function: earlier PyTorch compiles no `vmap` of a module.
    out = compiled(vmap(lambda x: layer(x)))(torch.stack([x, 2 * x]))
    assert_close(out, torch.stack([Dense(layer)(x), Dense(layer)(2 * x)]))


@pytest.fixture(scope="module")
def processes():
    r"""One process that takes itself for all."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("PyTorch was built without distribution")
    if not hasattr(torch.cpu.current_stream(), "record_event"):
        pytest.skip("this PyTorch shards on GPUs alone")
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_fully_sharded(layer, x, processes):
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    twin = Dense(copy.deepcopy(layer))
    fully_shard(layer, mesh=processes)
    y, wanted = layer(x), twin(x)
    assert_close(y, wanted)
    if not list(twin.parameters()):
        return
    y.square().sum().backward()
    wanted.square().sum().backward()
    for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
        assert_close(a.grad.full_tensor(), b.grad)


def test_states_with_scalars_are_read():
    layer = LAYERS["softmax"]()
    state = layer.state_dict()
    scalars = {name: state[name].squeeze() for name in ("fusion_weight", "log_beta")}
    for assign in (False, True):
        other = LAYERS["softmax"]()
        other.load_state_dict({**state, **scalars}, assign=assign)
        assert_close(other.state_dict(), state)


# The whole model ####################################################################


@pytest.fixture(
    scope="module", params=[(coma, "qem"), (coma, "attention"), (neural3dmm, "attention")]
)
def model(request):
    make, pool = request.param
    torch.manual_seed(1)
    hierarchy = MeshHierarchy.from_template(blob(1, seed=0), factors=[3])
    kwargs = {"K": 3} if make is coma else {}
    return make(hierarchy, pool, 2, channels=(4,), activation="elu", **kwargs).double()


@pytest.fixture
def meshes(model):
    return torch.randn(2, model.num_vertices[0], 3, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_of_a_model(model, meshes):
    def by_backward(x, module=model):
        return torch.autograd.functional.jacobian(module, x)

    wanted, tangent = by_backward(meshes[:1]), torch.randn_like(meshes[:1])
    out, moved = jvp(model, (meshes[:1],), (tangent,))
    assert_close(out, model(meshes[:1]))
    assert_close(moved, torch.einsum("bmfcng,cng->bmf", wanted, tangent))
    z = model.encode(meshes)
    assert_close(
        jacfwd(model.decode)(z[:1]), torch.autograd.functional.jacobian(model.decode, z[:1])
    )
    assert_close(vmap(lambda x: model(x.unsqueeze(0)).squeeze(0))(meshes), model(meshes))

    own = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return functional_call(model, parameters, (x.unsqueeze(0),)).square().sum()

    found = vmap(grad(loss), (None, 0))(own, meshes)
    for i in range(len(meshes)):
        grads = torch.autograd.grad(model(meshes[i : i + 1]).square().sum(), model.parameters())
        for name, g in zip(own, grads, strict=True):
            assert_close(found[name][i], g)
