import torch
from torch.testing import assert_close

from pyg_attnpool import AttentionPool, AttentionUnpool, Mapping, MappingPool
from pyg_attnpool.export import freeze_attention


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
