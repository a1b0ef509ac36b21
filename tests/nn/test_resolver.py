from itertools import product

import pytest
import torch
from torch.testing import assert_close
from torch_geometric.nn import ChebConv, FeaStConv, GATv2Conv, GMMConv, SplineConv
from torch_geometric.nn.conv import spline_conv

from pyg_attnpool import AttentionPool, AttentionUnpool, MappingPool, MeshHierarchy
from pyg_attnpool.models import MeshAutoencoder
from pyg_attnpool.nn import FullPool, SpiralConv, StaticChebConv
from pyg_attnpool.nn.resolver import convolution_resolver, pooling_resolver
from pyg_attnpool.nn.wrappers import GraphConv
from tests.mesh.meshes import blob

SMALL = dict(channels=(4, 5), latent_channels=3, activation="elu", expand_activation=None)


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(blob(2, seed=0, hole=True), factors=[4, 4])


CONVS = {
    "GCNConv": ("GCNConv", {}),
    "FeaStConv": (FeaStConv, {"heads": 2}),
    "GATv2Conv": (GATv2Conv, {"heads": 2, "concat": False}),
    "ChebConv": (ChebConv, {"K": 3}),
    "GMMConv": (GMMConv, {"dim": 3, "kernel_size": 2, "edge_attr": "cartesian"}),
    "SplineConv": (SplineConv, {"dim": 3, "kernel_size": 3, "edge_attr": "cartesian"}),
}


def spline_basis(pseudo, kernel_size, is_open_spline, degree):
    r"""Linear B-splines on an open grid, from their formula: the two knots beside every
    coordinate, with its distance to the other one as a weight."""
    assert degree == 1 and bool(is_open_spline.all())
    position = pseudo * (kernel_size - 1)
    knot = position.floor()
    frac = position - knot
    stride = kernel_size.cumprod(0) // kernel_size
    basis, index = [], []
    for side in product((0, 1), repeat=pseudo.size(1)):
        side = torch.tensor(side)
        basis.append(torch.where(side == 1, frac, 1 - frac).prod(dim=1))
        index.append((((knot.long() + side) % kernel_size) * stride).sum(dim=1))
    return torch.stack(basis, dim=1), torch.stack(index, dim=1)


def spline_weighting(x, weight, basis, weight_index):
    return torch.einsum("es,ei,esio->eo", basis, x, weight[weight_index])


@pytest.fixture(autouse=True)
def splines(monkeypatch):
    r"""SplineConv runs where its compiled library is absent, too."""
    for flag in ("WITH_SPLINE", "WITH_TORCH_SPLINE_CONV"):  # by version of PyG
        if getattr(spline_conv.torch_geometric.typing, flag, True) is False:
            monkeypatch.setattr(spline_conv.torch_geometric.typing, flag, True)
            monkeypatch.setattr(spline_conv, "spline_basis", spline_basis, raising=False)
            monkeypatch.setattr(spline_conv, "spline_weighting", spline_weighting, raising=False)


@pytest.mark.filterwarnings("ignore:We do not recommend using the non-optimized CPU version")
@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_of_pyg_computes_what_it_does_on_each_mesh(hierarchy, name):
    query, kwargs = CONVS[name]
    conv = convolution_resolver(query, hierarchy, 1, 3, 6, **kwargs)
    assert isinstance(conv, GraphConv) and type(conv.conv).__name__ == name
    n = hierarchy.num_vertices[1]
    x = torch.randn(2, n, 3, requires_grad=True)
    args = [] if conv.edge_attr is None else [conv.edge_attr]
    expected = torch.stack([conv.conv(mesh, hierarchy.edge_index(1), *args) for mesh in x])
    assert_close(conv(x), expected)
    assert_close(conv(x.transpose(0, 1), rows=True), expected.transpose(0, 1))
    grads = [
        torch.autograd.grad(out.square().sum(), x, retain_graph=True) for out in (conv(x), expected)
    ]
    assert_close(*grads)


@pytest.mark.filterwarnings("ignore:We do not recommend using the non-optimized CPU version")
@pytest.mark.parametrize("name", CONVS)
def test_an_autoencoder_trains_with_it(hierarchy, name):
    query, kwargs = CONVS[name]
    model = MeshAutoencoder(hierarchy, conv=query, down="attention", conv_kwargs=kwargs, **SMALL)
    x = torch.randn(4, hierarchy.num_vertices[0], 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (model(x) - x).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_cartesian_attributes_are_those_of_pyg(hierarchy):
    from torch_geometric.data import Data
    from torch_geometric.transforms import Cartesian

    from pyg_attnpool.nn.resolver import _edge_attr

    edge_index = hierarchy.edge_index(0)
    found = _edge_attr("cartesian", hierarchy, 0, edge_index)
    data = Cartesian()(Data(pos=hierarchy.positions(0), edge_index=edge_index))
    assert_close(found, data.edge_attr)


def test_own_names_and_classes(hierarchy):
    for query in ("cheb", StaticChebConv):
        conv = convolution_resolver(query, hierarchy, 0, 3, 6, K=4)
        assert type(conv) is StaticChebConv and len(conv.lins) == 4
    for query in ("spiral", SpiralConv):
        conv = convolution_resolver(query, hierarchy, 1, 3, 6, hops=[1, 2])
        assert torch.equal(conv.spirals, hierarchy.spirals(1, hops=2))
    for query, up in (("attention", False), (AttentionPool, False), (AttentionUnpool, True)):
        pool = pooling_resolver(query, hierarchy, 0, "up" if up else "down", 4)
        assert type(pool) is (AttentionUnpool if up else AttentionPool)
        assert (pool.num_source > pool.num_target) != up
    assert type(pooling_resolver(MappingPool, hierarchy, 0, "up", 4)) is MappingPool
    assert type(pooling_resolver(FullPool, hierarchy, 0, "up", 4)) is FullPool


def test_callables_make_layers_of_their_own(hierarchy):
    class PerVertex(torch.nn.Module):
        def __init__(self, in_channels, out_channels, hierarchy, level, scale=1.0):
            super().__init__()
            self.lin, self.scale = torch.nn.Linear(in_channels, out_channels), scale

        def forward(self, x):  # [B, N, F]
            return self.scale * self.lin(x)

    def keep(hierarchy, level, direction, in_channels):
        mapping = (hierarchy.down if direction == "down" else hierarchy.up)[level]
        return MappingPool(mapping.to(torch.float32))

    model = MeshAutoencoder(
        hierarchy, conv=PerVertex, down=keep, conv_kwargs={"scale": 2.0}, **SMALL
    )
    x = torch.randn(2, hierarchy.num_vertices[0], 3)
    first = model.down_convs[0](x)
    assert_close(first, 2 * model.down_convs[0].layer.lin(x))
    assert_close(model.pools[0](first), hierarchy.down[0].to(torch.float32).to_dense() @ first)
    model(x).sum().backward()


def test_unknown_ones_are_named(hierarchy):
    with pytest.raises(ValueError, match="'cheb', 'spiral' or of torch_geometric.nn .got 'Linear'"):
        convolution_resolver("Linear", hierarchy, 0, 3, 6)
    with pytest.raises(ValueError, match="a pooling of .*got 'topk'"):
        pooling_resolver("topk", hierarchy, 0, "down", 4)
    with pytest.raises(ValueError, match="'down' or 'up' .got 'left'"):
        pooling_resolver("qem", hierarchy, 0, "left", 4)
    with pytest.raises(ValueError, match="name, class or callable .got 3"):
        convolution_resolver(3, hierarchy, 0, 3, 6)


def test_hooks_fire_for_every_layer_that_ran(hierarchy):
    model = MeshAutoencoder(hierarchy, conv="spiral", down="attention", **SMALL)
    fired = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: fired.add(name))
    model(torch.randn(2, hierarchy.num_vertices[0], 3))
    layers = [*model.down_convs, *model.pools, *model.unpools, *model.up_convs, model.out_conv]
    names = {name for name, module in model.named_modules() if module in layers}
    assert names <= fired and len(names) == 9
    assert {"to_latent", "from_latent", ""} <= fired


def test_summaries_know_every_layer(hierarchy):
    pytest.importorskip("tabulate", reason="needs tabulate, which PyG's summary prints with")
    torchinfo = pytest.importorskip("torchinfo")
    from torch_geometric.nn import summary

    model = MeshAutoencoder(hierarchy, conv="cheb", down="attention", **SMALL)
    x = torch.randn(2, hierarchy.num_vertices[0], 3)
    layers = [*model.down_convs, *model.pools, *model.unpools, *model.up_convs, model.out_conv]
    shapes = {}
    for layer in layers:
        layer.register_forward_hook(lambda m, i, o: shapes.update({m: list(o.shape)}))
    table = summary(model, x, max_depth=2).splitlines()
    lines = [line for line in table if "Conv" in line or "Attention" in line]
    listed = sorted(line.split("|")[3].strip() for line in lines)
    assert listed == sorted(str(shape) for shape in shapes.values()) and len(listed) == 9
    found = torchinfo.summary(model, input_data=x, verbose=0)
    assert found.total_params == sum(p.numel() for p in model.parameters())
    ran = {info.module for info in found.summary_list}
    assert ran.issuperset(layers)


def test_levels_are_those_of_the_hierarchy(hierarchy):
    n = hierarchy.num_vertices
    for level in (0, 1):
        pool = AttentionPool.from_hierarchy(hierarchy, level)
        unpool = AttentionUnpool.from_hierarchy(hierarchy, level, channels=7)
        assert (pool.num_source, pool.num_target) == (n[level], n[level + 1])
        assert (unpool.num_source, unpool.num_target) == (n[level + 1], n[level])
        assert pool.k == 2 and unpool.k == min(32, n[level + 1]) and unpool.channels == 7
        for layer, prior in ((pool, hierarchy.down[level]), (unpool, hierarchy.up[level])):
            assert layer.prior_weight.dtype == layer.source_pos.dtype == torch.float32
            with torch.no_grad():
                layer.fusion_weight.zero_()
            assert_close(layer.mapping().to_dense(), prior.to_dense().float())
        assert torch.equal(pool.source_pos, hierarchy.positions(level))
    with pytest.raises(ValueError, match="'level' from 0 to 1 .got 2"):
        AttentionPool.from_hierarchy(hierarchy, 2)
