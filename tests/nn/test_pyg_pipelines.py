import copy

import pytest
import torch
from torch.testing import assert_close
from torch_geometric import EdgeIndex
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import ChebConv, FeaStConv, GCNConv

from pyg_attnpool import (
    AttentionPool,
    AttentionUnpool,
    MappingPool,
    MeshHierarchy,
    freeze_attention,
)
from tests.mesh.meshes import blob

B, F = 4, 3
CONVS = {
    "gcn": lambda i, o: GCNConv(i, o),
    "cheb": lambda i, o: ChebConv(i, o, K=3),
    "feast": lambda i, o: FeaStConv(i, o, heads=2),
}


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(blob(2, seed=0, hole=True), factors=[3])


class UNet(torch.nn.Module):
    r"""Convolutions of PyG on both levels, pooling and unpooling between, a skip connection."""

    def __init__(self, hierarchy, conv, fixed=False):
        super().__init__()
        n, m = hierarchy.num_vertices
        fine, coarse = hierarchy.positions(0), hierarchy.positions(1)
        down, up = hierarchy.down[0], hierarchy.up[0]
        self.conv1, self.conv2, self.conv3 = (
            CONVS[conv](i, o) for i, o in ((F, 6), (6, 6), (12, 2))
        )
        self.pool = (
            MappingPool(down) if fixed else AttentionPool(n, m, 21, 4, down, 0.5, fine, coarse)
        )
        self.unpool = (
            MappingPool(up) if fixed else AttentionUnpool(m, n, 21, 8, up, 0.5, coarse, fine)
        )

    def forward(self, x, fine, coarse):
        x = self.conv1(x, fine).relu()
        y = self.conv2(self.pool(x), coarse).relu()
        return self.conv3(torch.cat([self.unpool(y), x], dim=-1), fine)


class Mesh(Data):
    r"""A registered mesh with the edges of two levels: those of the coarse one count its own
    vertices."""

    def __inc__(self, key, value, *args, **kwargs):
        if key == "coarse_index":
            return self.num_coarse
        return super().__inc__(key, value, *args, **kwargs)


def samples(hierarchy, device):
    n = hierarchy.num_vertices[0]
    return torch.randn(B, n, F, dtype=torch.float64, device=device)


def edges(hierarchy, device):
    return [hierarchy.edge_index(level).to(device) for level in range(2)]


def check(net, run, x, adjacency):
    r"""The network on all samples at once, and its gradients, are those of one sample after the
    other over plain edges. :obj:`run` returns :obj:`[B, N, F']`."""
    head = torch.randn(*x.shape[:2], 2, dtype=x.dtype, device=x.device)
    parameters = list(net.parameters())
    x.requires_grad_()
    wanted = torch.stack([net(sample, *adjacency) for sample in x])
    grads = torch.autograd.grad((wanted * head).sum(), [x, *parameters])
    assert all(g.abs().max() > 0 for g in grads)
    found = run(net, x)
    assert_close(found, wanted)
    for g, h in zip(
        torch.autograd.grad((found * head).sum(), [x, *parameters]), grads, strict=True
    ):
        assert_close(g, h)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("conv", CONVS)
def test_mini_batches_of_a_data_loader(device, hierarchy, conv, fixed):
    (n, m), (fine, coarse) = hierarchy.num_vertices, edges(hierarchy, device)
    net = UNet(hierarchy, conv, fixed).to(device, torch.float64)

    def run(net, x):
        meshes = [
            Mesh(x=sample, edge_index=fine, coarse_index=coarse, num_coarse=m) for sample in x
        ]
        (batch,) = DataLoader(meshes, batch_size=B)
        assert batch.x.shape == (B * n, F)
        assert batch.coarse_index.max() == B * m - 1
        return net(batch.x, batch.edge_index, batch.coarse_index).view(B, n, -1)

    check(net, run, samples(hierarchy, device), (fine, coarse))


@pytest.mark.parametrize("conv", ["gcn", "cheb"])  # FeaStConv knows no static graphs
def test_static_graphs(device, hierarchy, conv):
    adjacency = edges(hierarchy, device)
    net = UNet(hierarchy, conv).to(device, torch.float64)
    check(net, lambda net, x: net(x, *adjacency), samples(hierarchy, device), adjacency)


@pytest.mark.parametrize("conv", CONVS)
def test_edge_index_objects(device, hierarchy, conv):
    adjacency = edges(hierarchy, device)
    net = UNet(hierarchy, conv).to(device, torch.float64)
    objects = [
        EdgeIndex(e, sparse_size=(n, n), sort_order="row", is_undirected=True)
        for e, n in zip(adjacency, hierarchy.num_vertices, strict=True)
    ]

    def run(net, x):
        meshes = [
            Mesh(
                x=sample,
                edge_index=objects[0],
                coarse_index=objects[1],
                num_coarse=hierarchy.num_vertices[1],
            )
            for sample in x
        ]
        (batch,) = DataLoader(meshes, batch_size=B)
        assert isinstance(batch.coarse_index, EdgeIndex)
        assert_close(net(x[0].detach(), *objects), net(x[0].detach(), *adjacency))
        return net(batch.x, batch.edge_index, batch.coarse_index).view(*x.shape[:2], -1)

    check(net, run, samples(hierarchy, device), adjacency)


@pytest.mark.parametrize("conv", ["gcn", "feast"])  # ChebConv takes no SparseTensor
def test_sparse_tensors(device, hierarchy, conv):
    module = pytest.importorskip("torch_sparse")
    adjacency = edges(hierarchy, device)
    net = UNet(hierarchy, conv).to(device, torch.float64)
    fine, coarse = (
        module.SparseTensor.from_edge_index(e, sparse_sizes=(n, n)).t()
        for e, n in zip(adjacency, hierarchy.num_vertices, strict=True)
    )

    def run(net, x):
        (batch,) = DataLoader([Data(x=s, adj_t=fine, adj_t1=coarse) for s in x], batch_size=B)
        return net(batch.x, batch.adj_t, batch.adj_t1).view(*x.shape[:2], -1)

    check(net, run, samples(hierarchy, device), adjacency)


def test_sparse_tensors_with_static_graphs(device, hierarchy):
    module = pytest.importorskip("torch_sparse")
    adjacency = edges(hierarchy, device)
    net = UNet(hierarchy, "gcn").to(device, torch.float64)
    tensors = [
        module.SparseTensor.from_edge_index(e, sparse_sizes=(n, n)).t()
        for e, n in zip(adjacency, hierarchy.num_vertices, strict=True)
    ]
    check(net, lambda net, x: net(x, *tensors), samples(hierarchy, device), adjacency)


@pytest.mark.parametrize("conv", CONVS)
def test_training_over_a_loader_equals_training_over_samples(device, hierarchy, conv):
    r"""Two steps over shuffled mini-batches, against the mean of per-sample losses."""
    m, (fine, coarse) = hierarchy.num_vertices[1], edges(hierarchy, device)
    net = UNet(hierarchy, conv).to(device, torch.float64)
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (net, twin)]
    meshes = [
        Mesh(x=x, edge_index=fine, coarse_index=coarse, num_coarse=m, sample=torch.tensor([i]))
        for i, x in enumerate(samples(hierarchy, device))
    ]
    for batch in DataLoader(meshes, batch_size=B // 2, shuffle=True):
        found = net(batch.x, batch.edge_index, batch.coarse_index).square().mean()
        outs = [twin(meshes[i].x, fine, coarse) for i in batch.sample.tolist()]
        wanted = torch.stack([out.square().mean() for out in outs]).mean()
        for loss, optimizer in zip((found, wanted), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_close(net.state_dict(), twin.state_dict())
    x = meshes[0].x
    wanted = net(x, fine, coarse)
    assert_close(freeze_attention(net)(x, fine, coarse), wanted)
