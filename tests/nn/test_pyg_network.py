import copy

import torch
from torch.testing import assert_close
from torch_geometric.nn import ChebConv

from pyg_attnpool import AttentionPool, AttentionUnpool, Mapping
from pyg_attnpool.ops import reference

FINE, COARSE = 12, 5


def ring(num_nodes, device):
    nodes = torch.arange(num_nodes, device=device)
    edge_index = torch.stack([nodes, (nodes + 1) % num_nodes])
    return torch.cat([edge_index, edge_index.flip(0)], dim=1)


def ring_laplacian(num_nodes):
    r"""The scaled Laplacian of a ring: every vertex has two neighbours."""
    shift = torch.eye(num_nodes, dtype=torch.float64).roll(1, dims=1)
    return -(shift + shift.t()) / 2


def dense_pool(layer, x):
    attention = reference.attention(layer.query, layer.key, layer.k, layer.log_beta)
    prior = Mapping(layer.prior_index, layer.prior_weight, layer.num_source).to_dense()
    return reference.apply(reference.fuse(attention, prior, layer.fusion_weight), x)


def dense_conv(layer, num_nodes, x):
    weight = torch.stack([lin.weight.t() for lin in layer.lins])
    laplacian = ring_laplacian(num_nodes).to(x.device)
    return reference.chebyshev(laplacian, weight, x) + layer.bias


class Net(torch.nn.Module):
    r"""PyG's convolutions with learned pooling and unpooling between them."""

    def __init__(self):
        super().__init__()
        down = Mapping(torch.randint(FINE, (COARSE, 1)), torch.ones(COARSE, 1), FINE)
        up = Mapping(torch.randint(COARSE, (FINE, 3)), torch.rand(FINE, 3), COARSE)
        self.conv1 = ChebConv(3, 8, K=3)
        self.pool = AttentionPool(FINE, COARSE, prior=down, init="normal")
        self.conv2 = ChebConv(8, 8, K=3)
        self.unpool = AttentionUnpool(
            COARSE, FINE, k=3, prior=up, init="normal", normalization="softmax"
        )
        self.conv3 = ChebConv(8, 3, K=3)

    def forward(self, x):
        x = self.conv1(x, ring(FINE, x.device)).relu()
        x = self.conv2(self.pool(x), ring(COARSE, x.device)).relu()
        return self.conv3(self.unpool(x), ring(FINE, x.device))


class DenseNet(Net):
    def forward(self, x):
        x = dense_conv(self.conv1, FINE, x).relu()
        x = dense_conv(self.conv2, COARSE, dense_pool(self.pool, x)).relu()
        return dense_conv(self.conv3, FINE, dense_pool(self.unpool, x))


def test_two_training_steps_equal_the_dense_computation(device):
    net, dense = Net().to(device, torch.float64), DenseNet().to(device, torch.float64)
    dense.load_state_dict(net.state_dict())
    initial = copy.deepcopy(net.state_dict())
    x = torch.randn(4, FINE, 3, dtype=torch.float64, device=device)

    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (net, dense)]
    for _ in range(2):
        for model, optimizer in zip((net, dense), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - x).abs().mean().backward()
            optimizer.step()
        for (name, found), wanted in zip(net.named_parameters(), dense.parameters(), strict=True):
            assert found.grad.isfinite().all() and found.grad.abs().max() > 1e-6, name
            assert_close(found.grad, wanted.grad, msg=lambda m, n=name: f"{n}: {m}")
    for name, parameter in net.named_parameters():
        assert not torch.equal(parameter, initial[name]), name
    assert_close(net.state_dict(), dense.state_dict())
