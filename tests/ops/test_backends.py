r"""Every build of the compiled operations, and what takes their place where there is none."""

import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import (
    AttentionPool,
    AttentionUnpool,
    Mapping,
    MappingPool,
    SpiralConv,
    StaticChebConv,
)
from pyg_attnpool.ops import _cpu, reference
from pyg_attnpool.ops import attention as attention_ops
from pyg_attnpool.ops.backend import decompositions
from pyg_attnpool.ops.cheb import cheb_conv
from pyg_attnpool.ops.search import Search, cosine_topk
from pyg_attnpool.ops.sparse import sddmm, spmm, transpose
from pyg_attnpool.ops.spiral import spiral_conv, spiral_pattern
from tests.ops.builds import RUNS, builds


@pytest.fixture(params=["any", "avx2", "avx512", "none"])
def backend(request, monkeypatch):
    r"""Runs a test with one of the builds, or without any."""
    name = request.param
    if name == "none":
        monkeypatch.setattr(_cpu, "AVAILABLE", False)
        monkeypatch.setattr(_cpu, "library", None)  # who calls it nonetheless fails
        return name
    if name not in RUNS:
        pytest.skip(f"this processor cannot run {name}")
    if not builds(name):
        pytest.skip(f"{name} is not built")
    (path,) = builds(name)
    monkeypatch.setattr(_cpu, "library", _cpu.open_library(path))
    monkeypatch.setattr(_cpu, "AVAILABLE", True)
    return name


@pytest.fixture
def called(monkeypatch):
    r"""The names of the compiled operations that ran."""
    names, call = set(), _cpu.call

    def record(name, *args):
        names.add(name.rsplit("_", 1)[0])
        call(name, *args)

    monkeypatch.setattr(_cpu, "call", record)
    return names


DTYPES = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def leaf(*size, dtype=torch.float64):
    return torch.randn(*size, dtype=dtype).requires_grad_()


def assert_same(run, expected, inputs, tolerance):
    r"""A function and its gradients are those of another one in double precision."""
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out, wanted = run(*inputs), expected(*exact)
    assert out.dtype == inputs[0].dtype
    cotangent = torch.randn_like(wanted)
    grads = torch.autograd.grad(out, inputs, cotangent.to(out.dtype))
    others = torch.autograd.grad(wanted, exact, cotangent)
    for i, (a, b) in enumerate(zip((out, *grads), (wanted, *others), strict=True)):
        scale = b.abs().max().clamp(min=1e-3)
        assert_close(a.double() / scale, b / scale, msg=lambda m, i=i: f"{i}: {m}", **tolerance)


def random_csr(num_rows, num_cols, num_entries):
    row = torch.randint(num_rows, (num_entries,)).sort().values
    row[row == 2] = 3  # an empty row
    rowptr = torch.searchsorted(row, torch.arange(num_rows + 1))
    return rowptr, torch.randint(num_cols, (num_entries,)), row


# Operations ##########################################################################

# Around the lengths of vectors of all builds, and blocks of them.
CHANNELS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200]


def test_sparse_products(backend, dtype):
    rowptr, col, row = random_csr(13, 11, 50)
    for channels in CHANNELS:
        value, x, a = (
            leaf(50, dtype=dtype),
            leaf(11, channels, dtype=dtype),
            leaf(13, channels, dtype=dtype),
        )

        def dense(value, x):
            matrix = value.new_zeros(13, 11).index_put((row, col), value, accumulate=True)
            return matrix @ x

        assert_same(lambda v, x: spmm(rowptr, col, v, x), dense, (value, x), DTYPES[dtype])
        assert_same(
            lambda a, x: sddmm(rowptr, col, a, x),
            lambda a, x: (a @ x.t())[row, col],
            (a, x),
            DTYPES[dtype],
        )


def test_transpose(backend):
    rowptr, col, row = random_csr(13, 11, 50)
    rowptr_t, col_t, perm = transpose(rowptr, col, 12)
    order = sorted(range(50), key=lambda e: (col[e], e))
    assert perm.tolist() == order and col_t.tolist() == row[order].tolist()
    assert rowptr_t.diff().tolist() == col.bincount(minlength=12).tolist()


@pytest.mark.parametrize("batch", [1, 4, 7, 17])
def test_convolutions(backend, dtype, batch, called):
    num_nodes = 70
    one_way = torch.randint(num_nodes - 2, (2, 150))
    edge_index = torch.cat([one_way, one_way.flip(0)], dim=1).unique(dim=1)
    spirals = torch.randint(-1, num_nodes, (num_nodes, 4))
    for channels in [(1, 1), (3, 16), (16, 3), (5, 33), (33, 5), (17, 15), (8, 8), (20, 4)]:
        cheb = StaticChebConv(*channels, 4, edge_index, num_nodes).to(dtype)
        laplacian = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
        rows = torch.repeat_interleave(cheb.rowptr.diff())
        laplacian[rows, cheb.col] = cheb.laplacian.double()  # itself tested elsewhere
        assert_close(laplacian, laplacian.t())
        spiral = SpiralConv(*channels, spirals).to(dtype)

        def run_cheb(x, bias, *weights, cheb=cheb):
            names = [f"lins.{i}.weight" for i in range(4)]
            parameters = dict(zip(names, weights, strict=True)) | {"bias": bias}
            return torch.func.functional_call(cheb, parameters, (x,))

        def dense_cheb(x, bias, *weights, laplacian=laplacian):
            return reference.chebyshev(laplacian, torch.stack([w.t() for w in weights]), x) + bias

        def run_spiral(x, weight, bias, spiral=spiral):
            parameters = {"lin.weight": weight, "lin.bias": bias}
            return torch.func.functional_call(spiral, parameters, (x,))

        def dense_spiral(x, weight, bias):
            padded = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
            return padded[:, spirals].flatten(2) @ weight.t() + bias

        x = leaf(batch, num_nodes, channels[0], dtype=dtype)
        bias = leaf(channels[1], dtype=dtype)
        weights = [leaf(*channels[::-1], dtype=dtype) for _ in range(4)]
        # Sums over all vertices and samples, of any sign, are less exact than their size says.
        tolerance = DTYPES[dtype] if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
        assert_same(run_cheb, dense_cheb, (x, bias, *weights), tolerance)
        weight = leaf(channels[1], 4 * channels[0], dtype=dtype)
        assert_same(run_spiral, dense_spiral, (x, weight, bias), tolerance)
    everything = {"spmm", "convolve_slots", "convolve_entries", "outer"}
    assert called >= (everything if backend != "none" else set())
    assert backend != "none" or not called


@pytest.mark.parametrize("channels", [1, 3, 4, 8, 16, 17, 21, 40])
def test_topk(backend, dtype, channels, called):
    slack = 1e-5 if dtype == torch.float32 else 1e-13
    for num_query, num_key, k in [(1, 1, 1), (5, 3, 2), (37, 200, 2), (20, 130, 33), (9, 65, 65)]:
        query, key = torch.randn(num_query, channels), torch.randn(num_key, channels)
        query, key = query.to(dtype), key.to(dtype)
        search = Search(num_query, num_key, channels, k, dtype)
        for _ in range(3):
            wanted, order = reference.cosine_topk(query.double(), key.double(), num_key)
            index, score = search(query, key, k)
            assert torch.equal(index, cosine_topk(query, key, k))
            assert_close(score.double(), wanted[:, :k], rtol=0, atol=slack)
            gap = -wanted.diff(dim=1, append=wanted.new_full((num_query, 1), -9))[:, :k]
            clear = (gap > slack).all(dim=1)
            assert torch.equal(index[clear], order[clear, :k])
            # In one dimension all tie: of equal ones the smaller index comes first.
            assert (index.diff(dim=1)[score.diff(dim=1) == 0] > 0).all()
            key += 1e-4 * torch.randn_like(key)
    assert called == ({"topk"} if backend != "none" else set())


def test_ties_go_to_the_lower_index(backend):
    axes = torch.eye(3).double()
    key = axes[torch.arange(60) % 3]
    for k in (1, 7, 20, 21, 60):
        for i, row in enumerate(cosine_topk(axes, key, k).tolist()):
            same = [j for j in range(60) if j % 3 == i]
            assert row == (same + [j for j in range(60) if j % 3 != i])[:k]


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
def test_attention(backend, dtype, softmax, prior, called):
    for num_query, num_key, channels, k in [(1, 1, 1, 1), (40, 300, 21, 2), (30, 90, 5, 33)]:
        query, key = leaf(num_query, channels, dtype=dtype), leaf(num_key, channels, dtype=dtype)
        index = torch.randint(num_key, (num_query, 3)), torch.rand(num_query, 3, dtype=dtype)
        scalars = [torch.tensor(t, dtype=dtype).requires_grad_() for t in (1.2, 0.3)]
        inputs = [query, key, *([scalars[0]] if softmax else []), *([scalars[1]] if prior else [])]

        def unpack(rest):
            rest = list(rest)
            return (rest.pop(0) if softmax else None), (rest.pop(0) if prior else None)

        def run(query, key, *rest, k=k, index=index):
            log_beta, share = unpack(rest)
            given = index if prior else None
            slots, weight, _ = attention_ops.attention(query, key, k, log_beta, given, share)
            return weight.new_zeros(query.size(0), key.size(0)).scatter_add(1, slots, weight)

        def dense(query, key, *rest, k=k, index=index):
            log_beta, share = unpack(rest)
            out = reference.attention(query, key, k, log_beta)
            if not prior:
                return out
            fixed = torch.zeros_like(out).scatter_add(1, index[0], index[1].double())
            return reference.fuse(out, fixed, share)

        if softmax or prior or dtype == torch.float64 or k < 30:
            assert_same(run, dense, inputs, DTYPES[dtype])
    wanted = {"topk", "transpose", "attention", "attention_backward"}
    assert called == (wanted if backend != "none" else set())


# Decompositions ######################################################################


class Products(torch.nn.Module):
    r"""All operators of a model without attention, one after the other."""

    def __init__(self):
        super().__init__()
        row, col = torch.tensor([[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 3]])
        rowptr = torch.searchsorted(row, torch.arange(6))
        self.laplacian = rowptr, col, torch.linspace(-1, 1, 6, dtype=torch.float64)
        self.spirals = spiral_pattern(torch.tensor([[0, 1], [1, -1], [2, 2], [-1, 3], [4, 0]]))
        self.weights = [torch.randn(3, 4, 2).double(), torch.randn(3, 2, 4).double()]
        self.steps = [torch.randn(2, 4, 3).double(), torch.randn(2, 3, 4).double()]

    def forward(self, x):
        rows = x.transpose(0, 1)
        for theta in self.weights:
            rows = cheb_conv(self.laplacian, rows, theta, None)
        for theta in self.steps:
            rows = spiral_conv(self.spirals, rows, theta, None)
        return spmm(*self.laplacian, rows.flatten(1)).view(rows.shape).transpose(0, 1)


def operators_of(program):
    return {str(node.target).split(".")[0] for node in program.graph.nodes if node.op[:4] == "call"}


def test_decompositions_leave_operations_of_pytorch_alone(backend):
    model, x = Products(), torch.randn(3, 5, 4).double()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert operators_of(program) >= {"pyg_attnpool"}
    program = program.run_decompositions(decompositions())
    assert "pyg_attnpool" not in operators_of(program)
    for batch_size in (1, 3, 8):
        x = torch.randn(batch_size, 5, 4).double()
        assert_close(program.module()(x), model(x))


def test_decompositions_by_another_function():
    def other(rowptr, col, perm, value, x, *transposed):
        return x.new_full((rowptr.size(0) - 1, x.size(1)), 7.0)

    x = torch.randn(3, 5, 4).double()
    program = torch.export.export(Products(), (x,)).run_decompositions(decompositions(spmm=other))
    assert (program.module()(x) == 7).all()
    assert torch.ops.pyg_attnpool.spmm.default in decompositions()
    with pytest.raises(ValueError, match=r"\['cheb_conv', 'spiral_conv', 'spmm'\] \(got 'topk'\)"):
        decompositions(topk=other)


# Layers ##############################################################################


def layers():
    one_way = torch.randint(27, (2, 60))
    edge_index = torch.cat([one_way, one_way.flip(0)], dim=1)
    spirals = torch.randint(-1, 29, (29, 5))
    prior = Mapping(torch.randint(29, (11, 3)), torch.rand(11, 3).double(), 29)
    up = Mapping(torch.randint(29, (90, 3)), torch.rand(90, 3).double(), 29)
    kwargs = {"channels": 6, "init": "normal"}
    return {
        "AttentionPool": AttentionPool(29, 11, prior=prior, k=3, **kwargs),
        "AttentionPool, alone": AttentionPool(29, 11, k=4, **kwargs),
        "AttentionPool, softmax": AttentionPool(
            29, 11, prior=prior, k=4, normalization="softmax", **kwargs
        ),
        "AttentionPool, all": AttentionPool(29, 11, prior=prior, k=None, **kwargs),
        "AttentionUnpool": AttentionUnpool(29, 90, prior=up, k=20, **kwargs),
        "AttentionUnpool, softmax": AttentionUnpool(
            29, 90, prior=up, k=20, normalization="softmax", **kwargs
        ),
        "StaticChebConv": StaticChebConv(5, 8, 4, edge_index, 29),
        "StaticChebConv, narrower": StaticChebConv(5, 3, 4, edge_index, 29),
        "SpiralConv": SpiralConv(5, 8, spirals),
        "SpiralConv, narrower": SpiralConv(5, 3, spirals),
        "MappingPool": MappingPool(prior),
    }


@pytest.mark.parametrize("name", layers())
def test_layers_without_the_library_are_the_same(name, monkeypatch, called):
    if not _cpu.AVAILABLE:
        pytest.skip("the compiled operations are not built")
    layer = layers()[name].double()
    x = leaf(3, 29, 5)
    inputs = (x, *layer.parameters())
    cotangent = torch.randn_like(layer(x))

    def run():
        results = []
        for features in (x, x.flatten(0, 1), x.mT.contiguous().mT):
            out = layer(features).view_as(cotangent)
            results += [out, *torch.autograd.grad(out, inputs, cotangent)]
        results.append(layer(x[1]))
        penalty = torch.autograd.grad(layer(x).square().sum(), inputs, create_graph=True)
        penalty = sum(grad.square().sum() for grad in penalty)
        return [*results, *torch.autograd.grad(penalty, inputs)]

    expected = run()
    assert called or name == "AttentionPool, all"
    called.clear()
    with monkeypatch.context() as patch:
        patch.setattr(_cpu, "AVAILABLE", False)
        patch.setattr(_cpu, "library", None)
        found = run()
    assert not called
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 1e-4
        assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["AttentionPool", "AttentionUnpool, softmax"])
def test_a_layer_goes_on_when_the_library_is_gone(name, monkeypatch):
    # As when it is made on one machine and copied to another.
    layer = layers()[name].double()
    x = leaf(3, 29, 5)
    for available in (_cpu.AVAILABLE, False, _cpu.AVAILABLE, False, _cpu.AVAILABLE):
        monkeypatch.setattr(_cpu, "AVAILABLE", available)
        dense = reference.attention(layer.query, layer.key, layer.k, layer.log_beta)
        prior = Mapping(layer.prior_index, layer.prior_weight, 29).to_dense()
        dense = reference.fuse(dense, prior, layer.fusion_weight)
        assert_close(layer(x), reference.apply(dense, x))
        with torch.no_grad():
            layer.key += 0.01 * torch.randn_like(layer.key)
