import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCNConv
from torch_geometric.utils import to_dense_adj, unbatch_edge_index

from pyg_attnpool import AttentionPool, AttentionUnpool, Mapping, MappingPool, freeze_attention

pytest.importorskip("tgp.src")

from tgp.connect import DenseConnect
from tgp.data import PoolDataLoader, PreCoarsening
from tgp.lift import BaseLift
from tgp.poolers import TopkPooling
from tgp.reduce import BaseReduce
from tgp.select import SelectOutput
from tgp.src import PoolingOutput, SRCPooling

from pyg_attnpool.integrations.tgp import MappingPooling

N, M, B, F = 9, 4, 3, 5


def random_mapping(num_source, num_target, k=3):
    index = torch.randint(num_source, (num_target, k))
    return Mapping(index, torch.rand(num_target, k, dtype=torch.float64) + 0.1, num_source)


def attention(lift=True):
    # By default a mapping has negative weights too, and the roots of degrees do not exist.
    pool = AttentionPool.published(N, M, k=3, prior=random_mapping(N, M), init="normal")
    unpool = AttentionUnpool.published(M, N, k=3, prior=random_mapping(M, N), init="normal")
    return MappingPooling(pool.double(), unpool.double() if lift else None)


def fixed(lift=True):
    pool, unpool = MappingPool(random_mapping(N, M)), MappingPool(random_mapping(M, N))
    return MappingPooling(pool, unpool if lift else None)


def graphs(num=B):
    r"""A mini-batch of graphs of one size with edges of their own."""
    data = []
    for _ in range(num):
        edge_index = torch.randint(N, (2, 20))
        weight = torch.rand(20, dtype=torch.float64)
        x = torch.randn(N, F, dtype=torch.float64)
        data.append(Data(x=x, edge_index=edge_index, edge_weight=weight))
    return Batch.from_data_list(data)


def dense(layer):
    return layer.mapping().to_dense()


@pytest.mark.parametrize("lift", [True, False])
@pytest.mark.parametrize("make", [attention, fixed])
def test_equals_the_reduce_connect_and_lift_of_tgp_on_a_dense_assignment(device, make, lift):
    pooler, data = make(lift).to(device), graphs(1).to(device)
    out = pooler(data.x, data.edge_index, data.edge_weight, batch=data.batch)
    assert isinstance(pooler, SRCPooling) and isinstance(out, PoolingOutput)
    assert pooler.is_sparse and out.so.is_sparse and not pooler.has_loss
    assert (out.so.num_nodes, out.so.num_supernodes) == (N, M)

    s = dense(pooler.selector.pool).t()
    assert_close(out.so.s.to_dense(), s)
    unpool = pooler.selector.unpool
    so = SelectOutput(s=s, s_inv=dense(unpool).t() if lift else None)
    x_pool, _ = BaseReduce()(data.x, so)
    adjacency = to_dense_adj(data.edge_index, edge_attr=data.edge_weight, max_num_nodes=N)
    wanted, _ = DenseConnect(degree_norm=False, adj_transpose=False)(
        adjacency, SelectOutput(s=s.unsqueeze(0))
    )
    found = to_dense_adj(out.edge_index, edge_attr=out.edge_weight, max_num_nodes=M)
    assert_close(out.x, x_pool)
    assert_close(out.x, pooler.selector.pool(data.x))
    assert_close(found, wanted)
    lifted = pooler(out.x, so=out.so, lifting=True)
    assert_close(lifted, BaseLift()(x_pool, so))
    assert_close(lifted, unpool(out.x) if lift else s @ out.x)


def test_gradients_equal_the_dense_formula(device):
    pooler, data = attention().to(device), graphs(1).to(device)
    parameters = list(pooler.parameters())
    data.x.requires_grad_()
    heads = [torch.randn(*shape, dtype=torch.float64, device=device) for shape in ((N, F), (M, M))]

    out = pooler(data.x, data.edge_index, data.edge_weight)
    lifted = pooler(out.x, so=out.so, lifting=True)
    adjacency = to_dense_adj(out.edge_index, edge_attr=out.edge_weight, max_num_nodes=M)[0]
    found = (lifted * heads[0]).sum() + (adjacency * heads[1]).sum()

    down, up = dense(pooler.selector.pool), dense(pooler.selector.unpool)
    a = to_dense_adj(data.edge_index, edge_attr=data.edge_weight, max_num_nodes=N)[0]
    a = down @ a @ down.t()
    wanted = (up @ down @ data.x * heads[0]).sum() + ((a - a.diag().diag()) * heads[1]).sum()
    inputs = [*parameters, data.x]
    for g, h in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs), strict=True
    ):
        assert h.abs().max() > 0
        assert_close(g, h)


@pytest.mark.parametrize("make", [attention, fixed])
def test_a_mini_batch_equals_its_graphs(device, make):
    pooler, data = make().to(device), graphs().to(device)
    out = pooler(data.x, data.edge_index, data.edge_weight, batch=data.batch)
    assert out.batch.tolist() == [b for b in range(B) for _ in range(M)]
    lifted = pooler(out.x, so=out.so, lifting=True)
    assert lifted.shape == data.x.shape
    pooled_edges = unbatch_edge_index(out.edge_index, out.batch)
    for b in range(B):
        one = data[b]
        wanted = pooler(one.x, one.edge_index, one.edge_weight)
        assert_close(out.x[b * M : (b + 1) * M], wanted.x)
        assert torch.equal(pooled_edges[b], wanted.edge_index)
        assert_close(out.edge_weight[out.batch[out.edge_index[0]] == b], wanted.edge_weight)
        wanted = pooler(wanted.x, so=wanted.so, lifting=True)
        assert_close(lifted[b * N : (b + 1) * N], wanted)


def test_pooled_vertices_without_a_source_stay_in_their_graph():
    weight = torch.ones(M, 1, dtype=torch.float64)
    weight[1] = 0
    pooler = MappingPooling(MappingPool(Mapping(torch.arange(M).unsqueeze(1), weight, N)))
    data = graphs()
    out = pooler(data.x, data.edge_index, batch=data.batch)
    assert out.batch.tolist() == [b for b in range(B) for _ in range(M)]
    assert (out.x.view(B, M, F)[:, 1] == 0).all()


def test_forms_of_the_adjacency():
    pooler, data = fixed(), graphs()
    wanted = pooler(data.x, data.edge_index, data.edge_weight, batch=data.batch)
    dense = to_dense_adj(wanted.edge_index, edge_attr=wanted.edge_weight, max_num_nodes=B * M)[0]
    size = (B * N, B * N)
    coo = torch.sparse_coo_tensor(data.edge_index, data.edge_weight, size).coalesce()
    out = pooler(data.x, coo, batch=data.batch)
    assert out.edge_index.is_sparse and out.edge_weight is None
    assert_close(out.edge_index.to_dense(), dense)

    module = pytest.importorskip("torch_sparse")
    adj = module.SparseTensor.from_edge_index(data.edge_index, data.edge_weight, size)
    out = pooler(data.x, adj, batch=data.batch)
    assert isinstance(out.edge_index, module.SparseTensor) and out.edge_weight is None
    assert_close(out.edge_index.to_dense(), dense)

    out = pooler(data.x, data.edge_index, batch=data.batch)
    ones = pooler(data.x, data.edge_index, torch.ones_like(data.edge_weight), batch=data.batch)
    assert_close(out.edge_weight, ones.edge_weight)


@pytest.mark.parametrize("option", ["remove_self_loops", "degree_norm", "edge_weight_norm"])
def test_options_of_the_connection_equal_those_of_tgp(option):
    options = {"remove_self_loops": False, "degree_norm": False, "edge_weight_norm": False}
    options[option] = True
    pooler, data = MappingPooling(MappingPool(random_mapping(N, M)), **options), graphs(1)
    out = pooler(data.x, data.edge_index, data.edge_weight)
    s = dense(pooler.selector.pool).t().unsqueeze(0)
    adjacency = to_dense_adj(data.edge_index, edge_attr=data.edge_weight, max_num_nodes=N)
    connect = DenseConnect(adj_transpose=False, **options)
    wanted, _ = connect(adjacency, SelectOutput(s=s))
    found = to_dense_adj(out.edge_index, edge_attr=out.edge_weight, max_num_nodes=M)
    assert_close(found, wanted)


class Net(torch.nn.Module):
    r"""A network as the users of tgp write it, for any of its sparse poolers."""

    def __init__(self, pooler):
        super().__init__()
        self.conv1, self.pooler, self.conv2 = GCNConv(F, 8), pooler, GCNConv(8, 8)
        self.conv3 = GCNConv(8, F)

    def forward(self, data):
        x = self.conv1(data.x, data.edge_index, data.edge_weight).relu()
        out = self.pooler(x=x, adj=data.edge_index, edge_weight=data.edge_weight, batch=data.batch)
        x = self.conv2(out.x, out.edge_index, out.edge_weight).relu()
        x = self.pooler(x=x, so=out.so, lifting=True, batch=data.batch)
        return self.conv3(x, data.edge_index, data.edge_weight)


@pytest.mark.parametrize("make", [attention, fixed, lambda: TopkPooling(8, ratio=0.5)])
def test_stands_where_a_pooler_of_tgp_stands(make):
    net, data = Net(make()).double(), graphs()
    net.pooler.reset_parameters()
    out = net(data)
    assert out.shape == data.x.shape and out.isfinite().all()
    out.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert type(net.pooler).__name__ in repr(net.pooler)


def test_freezing_leaves_the_result_and_no_parameters():
    net, data = Net(attention()).double(), graphs()
    wanted = net(data)
    assert net.pooler.is_trainable and not net.pooler.is_precoarsenable
    freeze_attention(net)
    assert_close(net(data), wanted)
    assert not list(net.pooler.parameters()) and net.pooler.is_precoarsenable


def test_precoarsening_in_a_loader():
    pooler = MappingPooling(MappingPool(random_mapping(N, M)))
    single = graphs().apply(lambda x: x.float() if x.is_floating_point() else x)
    data_list = [PreCoarsening(pooler)(data) for data in single.to_data_list()]
    data = next(iter(PoolDataLoader(data_list, batch_size=B)))
    pooled = data.pooled_data[0] if isinstance(data.pooled_data, list) else data.pooled_data
    wanted = pooler(data.x, data.edge_index, data.edge_weight, batch=data.batch)
    x_pool, batch_pooled = pooler.reduce(x=data.x, so=pooled.so, batch=data.batch)
    assert_close(x_pool, wanted.x)
    assert torch.equal(batch_pooled, wanted.batch)
    assert torch.equal(pooled.edge_index, wanted.edge_index)
    assert_close(pooled.edge_weight, wanted.edge_weight)


def test_errors():
    pooler, data = fixed(), graphs()
    with pytest.raises(ValueError, match=r"'unpool' from 4 to 9 vertices \(got 9 to 4\)"):
        MappingPooling(pooler.selector.pool, pooler.selector.pool)
    with pytest.raises(ValueError, match=r"\[B \* 9, F\].*\(got \[26, 5\]\)"):
        pooler(data.x[1:], data.edge_index)
    with pytest.raises(ValueError, match=r"\[B \* 9, F\].*\(got \[3, 9, 5\]\)"):
        pooler(data.x.view(B, N, F), data.edge_index)
    with pytest.raises(TypeError, match=r"floating point features \(got torch.int64\)"):
        pooler(data.x.long(), data.edge_index)
    with pytest.raises(ValueError, match=r"3 graphs with 9 vertices each.*\(got \[10, 8, 9\]\)"):
        batch = data.batch.clone()
        batch[N] = 0
        pooler(data.x, data.edge_index, batch=batch)


def test_the_package_is_imported_where_it_is_used_and_named_where_it_is_absent():
    code = """
import sys
sys.modules["tgp"] = None  # as if not installed
import pyg_attnpool
try:
    import pyg_attnpool.integrations.tgp
except ImportError as e:
    assert 'pip install "pyg_attnpool[tgp]"' in str(e), e
else:
    raise AssertionError
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
