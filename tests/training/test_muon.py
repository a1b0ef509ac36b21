import pytest
import torch
from torch.nn import Linear, ReLU, Sequential
from torch.testing import assert_close

from pyg_attnpool.training.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(4, 4), (3, 9), (9, 3)])
def test_orthogonalized_is_near_the_orthogonal_factor(shape):
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    found = orthogonalized(u @ torch.diag(s + 0.5) @ v)
    inner = u.t() @ found @ v.t()  # diagonal, with singular values near one
    assert_close(inner, torch.diag(inner.diagonal()), atol=1e-4, rtol=0)
    assert 0.6 < inner.diagonal().min() and inner.diagonal().max() < 1.3


def test_orthogonalized_is_the_iteration_of_newton_and_schulz():
    x = torch.randn(5, 40) @ torch.randn(40, 40)  # some directions are a hundred times others
    expected = x.double() / x.double().norm()
    for _ in range(5):
        gram = expected @ expected.t()
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    assert_close(orthogonalized(x).double(), expected, atol=1e-4, rtol=0)
    assert_close(orthogonalized(x.t()).double(), expected.t(), atol=1e-4, rtol=0)


def test_orthogonalized_of_half_precision_stays_bounded_where_directions_are_missing():
    x = (torch.randn(16, 3) @ torch.randn(3, 40)).bfloat16()
    found = orthogonalized(x)
    assert found.dtype == torch.bfloat16
    values = torch.linalg.svdvals(found.float())
    assert values.max() < 1.3 and (values[:3] > 0.6).all()


def test_parameters_that_are_no_weights_of_layers_get_adam():
    layer = Linear(3, 2)
    reference = torch.nn.Parameter(layer.bias.detach().clone())
    ours, theirs = Muon(layer, 1e-2, 3e-3), torch.optim.Adam([reference], lr=3e-3)
    for step in range(5):
        grad = torch.randn(2, generator=torch.Generator().manual_seed(step))
        layer.bias.grad, layer.weight.grad, reference.grad = grad, torch.ones(2, 3), grad
        ours.step()
        theirs.step()
    assert_close(layer.bias, reference)


def test_all_directions_of_a_weight_learn_at_one_rate():
    # A gradient of very different singular values moves them all alike.
    layer = Linear(6, 4, bias=False)
    before = layer.weight.detach().clone()
    u, _, v = torch.linalg.svd(torch.randn(4, 6), full_matrices=False)
    layer.weight.grad = u @ torch.diag(torch.tensor([100.0, 10.0, 1.0, 0.5])) @ v
    Muon(layer, 0.1, 3e-3).step()
    moved = (u.t() @ (before - layer.weight.detach()) @ v.t()).diagonal()
    size = 0.1 * 0.2 * 6**0.5
    assert (moved > 0.1 * size).all() and (moved < 1.3 * size).all()
    assert (moved[:3] > 0.6 * size).all()


def test_state_is_stored_and_goes_on():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20, 2)

    def network():
        torch.manual_seed(1)
        return Sequential(Linear(3, 8), ReLU(), Linear(8, 2))

    def train(net, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()

    whole, half = network(), network()
    train(whole, Muon(whole, 1e-2, 3e-3), 10)
    first = Muon(half, 1e-2, 3e-3)
    train(half, first, 5)
    second = Muon(half, 1e-2, 3e-3)
    second.load_state_dict(first.state_dict())
    train(half, second, 5)
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert_close(a, b)
    assert (whole(x) - y).square().mean() < (network()(x) - y).square().mean()


def test_parameters_that_are_not_trained_stay():
    net = Sequential(Linear(3, 8), Linear(8, 2))
    net[0].requires_grad_(False)
    assert [len(group["params"]) for group in Muon(net, 1e-2, 3e-3).param_groups] == [1, 1]
