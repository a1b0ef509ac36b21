r"""Attention in the place of the matrices that other people's models hold."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch.nn import Linear, ModuleList
from torch.testing import assert_close

from pyg_attnpool import AttentionPool, AttentionUnpool, Mapping, MappingPool, freeze_attention
from pyg_attnpool.ops import reference

SIZES = [24, 11, 5]  # vertices of every level
N, M = SIZES[:2]


def matrix(num_target, num_source, k=3):
    r"""A dense matrix with about k entries per row."""
    out = torch.zeros(num_target, num_source, dtype=torch.float64)
    index = torch.randint(num_source, (num_target, k))
    return out.scatter(1, index, torch.rand(num_target, k, dtype=torch.float64))


def with_dummy(dense, share=1.0):
    out = dense.new_zeros(1, dense.size(0) + 1, dense.size(1) + 1)
    out[0, :-1, :-1], out[0, -1, -1] = dense, share
    return out


def positions(level):
    return torch.randn(SIZES[level], 3, dtype=torch.float64)


def dense(layer):
    r"""The matrix that a layer stands for, computed from its parameters by the reference."""
    k = layer.num_source if layer.k is None else layer.k
    out = reference.attention(layer.query, layer.key, k, layer.log_beta)
    prior = Mapping(layer.prior_index, layer.prior_weight, layer.num_source).to_dense()
    return reference.fuse(out, prior, layer.fusion_weight)


# Two models of other people ##########################################################


def sparse_pool(x, trans):
    r"""A pooling function that takes a sparse matrix apart."""
    row, col = trans._indices()
    out = x.index_select(1, col) * trans._values().unsqueeze(-1)
    zeros = out.new_zeros(x.size(0), trans.size(0), x.size(2))
    return zeros.scatter_add(1, row.view(1, -1, 1).expand_as(out), out)


class SpiralNetStyle(torch.nn.Module):
    r"""Lists of sparse matrices, applied by a function."""

    def __init__(self, spirals, D, U, pool=sparse_pool):
        super().__init__()
        self.spirals, self.pool = spirals, pool
        self.D, self.U = D, U
        length = spirals[0].size(1)
        sizes = [(3 * length, 4), (4 * length, 6), (5 * 6, 2), (2, 5 * 6)]
        sizes += [(6 * length, 4), (4 * length, 3)]
        self.layers = ModuleList(Linear(*size) for size in sizes)

    def conv(self, x, i, level):
        spirals = self.spirals[level]
        x = x.index_select(1, spirals.flatten()).view(x.size(0), spirals.size(0), -1)
        return self.layers[i](x)

    def forward(self, x):
        x = self.pool(self.conv(x, 0, 0).tanh(), self.D[0])
        x = self.pool(self.conv(x, 1, 1).tanh(), self.D[1])
        z = self.layers[2](x.flatten(1))
        x = self.pool(self.layers[3](z).view(-1, 5, 6), self.U[1])
        x = self.pool(self.conv(x, 4, 1).tanh(), self.U[0])
        return self.conv(x, 5, 0)


class Neural3DMMStyle(torch.nn.Module):
    r"""Dense matrices [1, M + 1, N + 1] and a dummy vertex of zeros in all features."""

    def __init__(self, spirals, D, U):
        super().__init__()
        self.spirals, self.D, self.U = spirals, D, U
        length = spirals[0].size(1)
        sizes = [(3 * length, 4), (4 * length, 6), (6 * 6, 2), (2, 6 * 6)]
        sizes += [(6 * length, 4), (4 * length, 3)]
        self.layers = ModuleList(Linear(*size) for size in sizes)

    def conv(self, x, i, level):
        spirals = self.spirals[level]  # its last row and -1 are the dummy vertex
        x = self.layers[i](x[:, spirals].flatten(2))
        mask = torch.ones(spirals.size(0), 1, dtype=x.dtype)
        mask[-1] = 0
        return x * mask

    def forward(self, x):
        x = torch.matmul(self.D[0], self.conv(x, 0, 0).tanh())
        x = torch.matmul(self.D[1], self.conv(x, 1, 1).tanh())
        z = self.layers[2](x.flatten(1))
        x = torch.matmul(self.U[1], self.layers[3](z).view(-1, 6, 6))
        x = torch.matmul(self.U[0], self.conv(x, 4, 1).tanh())
        return self.conv(x, 5, 0)


def spiralnet_style():
    spirals = [torch.randint(n, (n, 4)) for n in SIZES[:2]]
    D = [matrix(m, n, k=1).to_sparse() for n, m in pairwise(SIZES)]
    U = [matrix(n, m).to_sparse() for n, m in pairwise(SIZES)]
    model = SpiralNetStyle(spirals, D, U).double()
    return model, torch.randn(3, N, 3, dtype=torch.float64)


def neural3dmm_style():
    spirals = [torch.randint(-1, n, (n + 1, 4)) for n in SIZES[:2]]
    D = [with_dummy(matrix(m, n, k=1)) for n, m in pairwise(SIZES)]
    U = [with_dummy(matrix(n, m)) for n, m in pairwise(SIZES)]
    model = Neural3DMMStyle(spirals, D, U).double()
    x = torch.randn(3, N + 1, 3, dtype=torch.float64)
    x[:, -1] = 0
    return model, x


def swap(model, **kwargs):
    model.D = ModuleList(AttentionPool.from_mapping(d, k=4, **kwargs) for d in model.D)
    model.U = ModuleList(AttentionUnpool.from_mapping(u, **kwargs) for u in model.U)
    return model


def dense_twin(model):
    r"""The model as it was written, over the same weights and the dense matrices."""
    D, U = ([dense(layer) for layer in layers] for layers in (model.D, model.U))
    if isinstance(model, Neural3DMMStyle):
        D, U = ([with_dummy(m) for m in matrices] for matrices in (D, U))
        twin = Neural3DMMStyle(model.spirals, D, U)
    else:
        twin = SpiralNetStyle(model.spirals, D, U, pool=lambda x, trans: torch.matmul(trans, x))
    twin.layers = model.layers
    return twin


MODELS = {"SpiralNet++": spiralnet_style, "Neural3DMM": neural3dmm_style}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model_and_input(request):
    return request.param()


def test_swapped_without_attention_is_the_original_model(model_and_input):
    model, x = model_and_input
    expected, weights = model(x), dict(model.named_parameters())
    swap(model, fusion_weight=0)
    assert_close(model(x), expected)
    assert all(weights[name] is p for name, p in model.named_parameters() if name in weights)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"layers", "D", "U"}


@pytest.mark.parametrize("normalization", ["sum", "softmax"])
def test_output_and_gradients_equal_the_dense_formula(normalization, model_and_input):
    model, x = model_and_input
    swap(model, init="normal", normalization=normalization)
    twin = dense_twin(model)
    out, expected = model(x), twin(x)
    assert_close(out, expected)
    names, parameters = zip(*model.named_parameters(), strict=True)
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, parameters, cotangent)
    wanted = torch.autograd.grad(expected, parameters, cotangent)
    for name, grad, other in zip(names, found, wanted, strict=True):
        assert grad.abs().max() > 1e-6, name
        assert_close(grad, other, msg=lambda m, name=name: f"{name}: {m}")


def test_training_moves_attention_and_freezing_leaves_the_original_parameters(model_and_input):
    model, x = model_and_input
    original = {name: p.shape for name, p in model.named_parameters()}
    swap(model, fusion_weight=0)
    start = copy.deepcopy(dict(model.named_parameters()))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - x).abs().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.named_parameters():
        assert (parameter - start[name]).abs().max() > 1e-4, name

    expected = model(x)
    assert freeze_attention(model) is model
    assert_close(model(x), expected)
    assert {name: p.shape for name, p in model.named_parameters()} == original
    assert all(type(layer) is MappingPool for layer in (*model.D, *model.U))
    model.D = pickle.loads(pickle.dumps(model.D))
    assert_close(model(x), expected)


def test_frozen_model_can_be_swapped_and_trained_again(model_and_input):
    model, x = model_and_input
    expected = freeze_attention(swap(model, init="normal"))(x)
    swap(model, fusion_weight=0).double()
    assert_close(model(x), expected)


# In the place of a matrix ############################################################


FORMS = {
    "dense": lambda m: m,
    "coo": lambda m: m.to_sparse(),
    "uncoalesced": lambda m: torch.sparse_coo_tensor(
        torch.cat([m.to_sparse().indices()] * 2, dim=1),
        torch.cat([m.to_sparse().values() / 2] * 2),
        m.shape,
    ),
    "csr": lambda m: m.to_sparse_csr(),
    "scipy": lambda m: Mapping.from_matrix(m).to_scipy(),
    "Mapping": Mapping.from_matrix,
    "MappingPool": MappingPool,
    "SparseTensor": lambda m: pytest.importorskip("torch_sparse").SparseTensor.from_dense(m),
}


@pytest.mark.parametrize("cls", [AttentionPool, AttentionUnpool])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_takes_whatever_the_model_holds(form, cls):
    expected = matrix(M, N)
    layer = cls.from_mapping(form(expected), k=4, fusion_weight=0)
    assert type(layer) is cls and layer.dummy_weight is None
    assert_close(layer.double().mapping().to_dense(), expected)


PRODUCTS = {
    "@": lambda a, x: a @ x,
    "torch.matmul": torch.matmul,
    "torch.matmul by name": lambda a, x: torch.matmul(input=a, other=x),
    "torch.mm": torch.mm,
    "torch.sparse.mm": torch.sparse.mm,
    "method": lambda a, x: a.matmul(x),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS.keys())
@pytest.mark.parametrize("k", [4, None])
def test_stands_in_products(product, k):
    layer = AttentionPool.from_mapping(matrix(M, N), k=k, init="normal")
    x = torch.randn(N, 5, dtype=torch.float64)
    for stands in (layer, layer.freeze()):
        assert_close(product(stands, x), dense(layer) @ x)


@pytest.mark.parametrize("product", [torch.matmul, lambda a, x: a @ x])
def test_stands_in_products_of_batches(product):
    held = matrix(M, N)
    layer, x = AttentionPool.from_mapping(held), torch.randn(2, N, 5, dtype=torch.float64)
    assert_close(product(layer, x), torch.matmul(dense(layer), x))
    assert_close(layer(x), torch.matmul(dense(layer), x))


@pytest.mark.parametrize("share", [1.0, 0.0, 0.5])
def test_dummy_vertex_is_kept_as_the_matrix_did(share):
    held = with_dummy(matrix(M, N), share)
    layer = AttentionPool.from_mapping(held, k=4, init="normal")
    expected = with_dummy(dense(layer), share)
    x = torch.randn(2, N + 1, 5, dtype=torch.float64)
    for stands in (layer, layer.freeze(), copy.deepcopy(layer)):
        assert stands.shape == stands.size() == held.shape
        assert [stands.size(i) for i in (0, 1, 2, -1)] == [1, M + 1, N + 1, N + 1]
        assert_close(torch.matmul(stands, x), torch.matmul(expected, x))
        assert_close(stands @ x[0], torch.matmul(expected, x[0]))
        # Called like a pooling layer, it knows no dummy.
        assert_close(stands(x[:, :-1]), torch.matmul(dense(layer), x[:, :-1]))
        with pytest.raises(ValueError, match=r"dummy vertex \[1, 12, 25\]"):
            stands._indices()


def test_entries_and_their_gradient():
    layer = AttentionPool.from_mapping(matrix(M, N), k=4, init="normal")
    for stands in (layer, layer.freeze()):
        assert stands.size() == (M, N) and stands.size(0) == M and stands.shape[1] == N
        assert torch.equal(stands._indices(), stands.indices())
        assert torch.equal(stands._values(), stands.values())
        entries = torch.sparse_coo_tensor(stands._indices(), stands._values(), stands.size())
        assert_close(entries.to_dense(), dense(layer))
    row, col = layer._indices()
    parameters = list(layer.parameters())
    # Entries that repeat add up, so compare what any use of them comes to.
    weight = torch.randn(M, N, dtype=torch.float64)
    found = torch.autograd.grad((layer._values() * weight[row, col]).sum(), parameters)
    wanted = torch.autograd.grad((dense(layer) * weight).sum(), parameters)
    for grad, other in zip(found, wanted, strict=True):
        assert_close(grad, other)


def test_default_k_is_that_of_the_class_or_all():
    assert AttentionPool.from_mapping(matrix(M, N)).k == 2
    assert AttentionUnpool.from_mapping(matrix(40, 33)).k == 32
    assert AttentionUnpool.from_mapping(matrix(M, N)).k == N
    assert AttentionUnpool.from_mapping(matrix(M, N), k=None).k is None


def test_positions_start_the_keys():
    source, target = positions(0), positions(1)
    held, kwargs = matrix(M, N).float(), {"init": "lifted", "channels": 5}
    torch.manual_seed(3)
    layer = AttentionPool.from_mapping(held, source, target.numpy(), **kwargs)
    torch.manual_seed(3)
    other = AttentionPool(N, M, source_pos=source, target_pos=target, **kwargs)
    assert torch.equal(layer.key, other.key) and torch.equal(layer.query, other.query)


def test_device_and_type_are_those_of_the_matrix(device):
    held = matrix(M, N).to(device)
    for dtype in (torch.float32, torch.float64):
        layer = AttentionPool.from_mapping(held.to(dtype), positions(0), positions(1))
        assert {p.device.type for p in layer.parameters()} == {device.type}
        assert {p.dtype for p in layer.parameters()} == {dtype}
    # A mapping and scipy matrices are double by habit; keys are as those of any new layer.
    assert AttentionPool.from_mapping(Mapping.from_matrix(held)).key.dtype == torch.float32


@pytest.mark.parametrize(
    "make", [pytest.param(spiralnet_style, marks=pytest.mark.slow), neural3dmm_style]
)
def test_swapped_model_compiles_without_graph_breaks(make, compiled):
    model, x = make()
    for _ in range(2):  # swapped, and frozen
        swap(model, init="normal") if isinstance(model.D, list) else freeze_attention(model)
        assert_close(compiled(model)(x), model(x))


# Errors ##############################################################################


WRONG = {
    "transposed": ((N, M), [r"shape \[11, 24\] for 'source_pos' of 24 .* of 11", r"\[24, 11\]"]),
    "another level": ((5, 11), [r"shape \[11, 24\]", r"\[5, 11\]"]),
    "dummy, no batch": ((M + 1, N + 1), [r"shape \[11, 24\]", r"\[12, 25\]"]),
    "batch": ((2, M, N), [r"\[1, num_target \+ 1, num_source \+ 1\]", r"\[2, 11, 24\]"]),
    "only a dummy": ((1, 1, 5), [r"\[1, num_target \+ 1, num_source \+ 1\]", r"\[1, 1, 5\]"]),
    "linked dummy": ((1, 3, 4), [r"no entry but at \[-1, -1\]", "5 others"]),
    "vector": ((3,), [r"shape \[num_target, num_source\]", r"\[3\]"]),
}


@pytest.mark.parametrize("size,match", WRONG.values(), ids=WRONG.keys())
def test_wrong_matrices_are_refused(size, match):
    wanted, got = match
    with pytest.raises(ValueError, match=rf"{wanted}.* \(got {got}\)"):
        AttentionPool.from_mapping(torch.ones(size), positions(0), positions(1))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=rf"at most .* {N} \(got {N + 1}\)"):
        AttentionPool.from_mapping(matrix(M, N), k=N + 1)
    with pytest.raises(ValueError, match=r"'source_pos' and 'target_pos'.*got None"):
        AttentionPool.from_mapping(matrix(M, N), positions(0))
    with pytest.raises(TypeError, match=r"Expected a Mapping.*\(got str\)"):
        AttentionPool.from_mapping("down_0.npz")


@pytest.mark.parametrize("size", [(M, 5), (2, M, 5), (2 * N, 5), (N,), (1, 2, N, 5)], ids=str)
def test_features_of_another_level_are_refused(size):
    layer = AttentionPool.from_mapping(matrix(M, N))
    for stands in (layer, layer.freeze()):
        with pytest.raises(ValueError, match=rf"\[{N}, F\]") as error:
            torch.matmul(stands, torch.zeros(size, dtype=torch.float64))
        assert f"(got {list(size)})" in str(error.value)


def test_other_uses_of_a_matrix_are_refused():
    layer, x = AttentionPool.from_mapping(matrix(M, N)), torch.zeros(5, M, dtype=torch.float64)
    for use in (lambda: x @ layer, lambda: torch.matmul(x, layer), lambda: torch.relu(layer)):
        with pytest.raises(TypeError):
            use()
    with pytest.raises(TypeError):
        layer @ 3
