r"""Swapping the matrices of programs written by others, as their authors would use the layers."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Linear, ModuleList
from torch.testing import assert_close

from pyg_attnpool import (
    AttentionPool,
    AttentionUnpool,
    MappingPool,
    MeshHierarchy,
    freeze,
    swap_pooling,
)
from tests.mesh.meshes import icosphere, join

LENGTH, C, LATENT = 9, 8, 4


def components():
    r"""A template of three components: a body and two eyeballs of 12 vertices."""
    vertices, faces = icosphere(3)
    for side in (-1, 1):
        eye, eye_faces = icosphere(0)
        vertices, faces = join((vertices, faces), (0.2 * eye + [side * 0.4, 0.3, 0.8], eye_faces))
    return vertices, faces


@pytest.fixture(scope="module")
def hierarchy():
    with pytest.warns(UserWarning, match="2 of 3 components end before the level of 42"):
        return MeshHierarchy.from_template(components(), factors=[4, 4])


def pool(x, trans):
    # As a program in SpiralNet++'s style does.
    row, col = trans._indices()
    value = trans._values().unsqueeze(-1)
    out = torch.index_select(x, 1, col) * value
    zeros = out.new_zeros(x.size(0), trans.size(0), x.size(2))
    return zeros.scatter_add(1, row.view(1, -1, 1).expand_as(out), out)


class SpiralConv(torch.nn.Module):
    def __init__(self, in_channels, out_channels, spirals):
        super().__init__()
        self.spirals = spirals
        self.lin = Linear(in_channels * spirals.size(1), out_channels)

    def forward(self, x):
        x = torch.index_select(x, 1, self.spirals.view(-1))  # a -1 ends this
        return self.lin(x.view(x.size(0), self.spirals.size(0), -1))


class Program(torch.nn.Module):
    r"""In SpiralNet++'s style, with :obj:`view` right after pooling, which a view in another layout
    does not survive."""

    def __init__(self, spirals, down, up, apply):
        super().__init__()
        self.D, self.U, self.apply_ = down, up, apply
        self.encoder = ModuleList([SpiralConv(3, C, spirals[0]), SpiralConv(C, C, spirals[1])])
        self.coarse = down[-1].size(0)
        self.to_latent = Linear(self.coarse * C, LATENT)
        self.from_latent = Linear(LATENT, self.coarse * C)
        self.decoder = ModuleList([SpiralConv(C, C, spirals[1]), SpiralConv(C, C, spirals[0])])
        self.out = SpiralConv(C, 3, spirals[0])

    def forward(self, x):
        for conv, trans in zip(self.encoder, self.D, strict=True):
            x = self.apply_(F.elu(conv(x)), trans)
        z = self.to_latent(x.view(x.size(0), -1))
        x = self.from_latent(z).view(-1, self.coarse, C)
        for conv, trans in zip(self.decoder, reversed(list(self.U)), strict=True):
            x = F.elu(conv(self.apply_(x, trans)))
            x = x.view(-1).as_strided(x.shape, x.stride())  # reads the storage in order
        return self.out(x)


STYLES = {
    "entries": pool,
    "product": lambda x, trans: trans @ x,
    "call": lambda x, trans: trans(x) if isinstance(trans, torch.nn.Module) else trans @ x,
}


def make(hierarchy, style="entries"):
    torch.manual_seed(0)
    spirals = [hierarchy.spirals(level, length=LENGTH) for level in (0, 1)]
    assert all((s >= 0).all() for s in spirals)
    down, up = (
        [m.to(torch.float32).to_dense() for m in ms] for ms in (hierarchy.down, hierarchy.up)
    )
    if style == "entries":
        down, up = ([m.to_sparse() for m in ms] for ms in (down, up))
    return Program(spirals, down, up, STYLES[style])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("known", ["hierarchy", "positions", "nothing"])
def test_swapped_program_starts_as_the_unsharp_mask_trains_and_freezes(hierarchy, style, known):
    model = make(hierarchy, style)
    x = torch.randn(2, hierarchy.num_vertices[0], 3)
    before = model(x)
    parameters = {name: p.shape for name, p in model.named_parameters()}
    matrices = [m.to_dense() for m in [*model.D, *model.U]]
    arguments = {
        "hierarchy": dict(hierarchy=hierarchy),
        "positions": dict(positions=[hierarchy.positions(level) for level in range(3)]),
        "nothing": {},
    }
    model.D, model.U = swap_pooling(model.D, model.U, **arguments[known])
    assert [type(layer) for layer in model.D] == [AttentionPool] * 2
    assert [type(layer) for layer in model.U] == [AttentionUnpool] * 2
    for layer, matrix in zip([*model.D, *model.U], matrices, strict=True):
        assert layer.init == ("prior" if known == "nothing" else "lifted")
        attention = layer.attention().to_dense()
        assert_close(layer.mapping().to_dense(), 3 * matrix - 2 * attention)
        with torch.no_grad():
            layer.fusion_weight.zero_()
    assert_close(model(x), before, atol=1e-5, rtol=1e-5)  # w_a = 0 is the matrix

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(layer.fusion_weight.abs() > 1e-3 for layer in [*model.D, *model.U])
    expected = model(x)
    freeze(model)
    assert all(type(layer) is MappingPool for layer in [*model.D, *model.U])
    assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert {name: p.shape for name, p in model.named_parameters()} == parameters


def test_buffers_are_replaced_in_place_and_either_order_will_do(hierarchy):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i in (0, 1):
                self.register_buffer(f"D{i}", hierarchy.down[i].to(torch.float32).to_dense())
                self.register_buffer(f"U{i}", hierarchy.up[i].to(torch.float32).to_dense())

        def forward(self, x):
            return self.U0 @ (self.U1 @ (self.D1 @ (self.D0 @ x)))

    model = Holder()
    x = torch.randn(2, hierarchy.num_vertices[0], 3)
    expected = model(x)
    swapped = swap_pooling(
        (model, ["D0", "D1"]), (model, ["U1", "U0"]), hierarchy, fusion_weight=0.0
    )
    assert type(model.D1) is AttentionPool and type(model.U1) is AttentionUnpool
    assert model.U1 is swapped.up[0] and "D0" not in dict(model.named_buffers())
    assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    said = str(swapped).splitlines()
    assert len(said) == 5 and said[0].endswith("[167, 666], starting from positions")
    learned = sum(p.numel() for p in model.parameters())
    assert said[-1] == f"{learned:,} parameters until `freeze`"


def test_buffers_of_submodules_are_named_with_dots(hierarchy):
    class Half(torch.nn.Module):
        def __init__(self, matrices):
            super().__init__()
            for i, matrix in enumerate(matrices):
                self.register_buffer(f"d{i}", matrix.to(torch.float32).to_dense())

        def forward(self, x):
            return self.d1 @ (self.d0 @ x)

    model = torch.nn.Sequential(Half(hierarchy.down), Half(hierarchy.up[::-1]))
    x = torch.randn(2, hierarchy.num_vertices[0], 3)
    expected = model(x)
    swapped = swap_pooling(
        (model, ["0.d0", "0.d1"]), (model, ["1.d1", "1.d0"]), hierarchy, fusion_weight=0.0
    )
    assert model[0].d0 is swapped.down[0] and model[1].d1 is swapped.up[0]
    assert not list(model.named_buffers(recurse=False)) and not hasattr(model, "0.d0")
    assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    freeze(model)
    assert type(model[1].d0) is MappingPool
    assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_a_list_of_parameters_is_taken(hierarchy):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            dense = ([m.to(torch.float32).to_dense() for m in ms] for ms in (down, up))
            self.D, self.U = map(torch.nn.ParameterList, dense)

    down, up = hierarchy.down, hierarchy.up
    model = Holder()
    matrices = [p.detach().clone() for p in model.parameters()]
    swapped = swap_pooling(model.D, model.U, hierarchy, fusion_weight=0.0)
    assert all(isinstance(p, torch.nn.Parameter) for p in [*model.D, *model.U])  # not touched
    model.D, model.U = swapped
    for layer, matrix in zip([*model.D, *model.U], matrices, strict=True):
        assert_close(layer.mapping().to_dense(), matrix)


def test_a_console_shows_what_was_replaced():
    swapped = swap_pooling([torch.eye(4)[:2]], [torch.ones(4, 2) / 2])
    assert repr(swapped) == str(swapped)
    assert repr(swapped).startswith("AttentionPool(4, 2, channels=21, k=2) in the place of")


def test_nothing_is_touched_where_something_does_not_fit(hierarchy):
    model = make(hierarchy)
    kept = list(model.D), list(model.U)
    other = MeshHierarchy.from_template(icosphere(2), factors=[4, 4])
    cases = [
        ((model.D, model.U, other), ValueError, "levels of .162, 41, 11. vertices"),
        ((model.U, model.D, hierarchy), ValueError, "from fine to coarse in down"),
        ((model.D, model.D, hierarchy), ValueError, "from coarse to fine in up"),
        ((3, model.U, hierarchy), TypeError, "a list of matrices.*got int"),
        ((["D.npz"], model.U, hierarchy), ValueError, r"a matrix in down.0. .got str"),
        (((model, ["D9"]), model.U, hierarchy), ValueError, r"attributes of Program .got 'D9'"),
        (((model, ["out.D0"]), model.U, hierarchy), ValueError, "attributes of Program.*out.D0"),
        (((model, ["no.D0"]), model.U, hierarchy), ValueError, "attributes of Program.*no.D0"),
        (((model, "D0"), model.U, hierarchy), TypeError, "a list of names of matrices .got 'D0'"),
        (((model, ["D0", "D0"]), model.U, hierarchy), ValueError, "different names of matrices"),
    ]
    for arguments, error, match in cases:
        with pytest.raises(error, match=match):
            swap_pooling(*arguments)
    with pytest.raises(ValueError, match="either 'hierarchy' or 'positions'"):
        swap_pooling(model.D, model.U, hierarchy, [hierarchy.positions(0)])
    assert (list(model.D), list(model.U)) == kept
