import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import Mapping, MappingPool
from pyg_attnpool.ops import reference

N, M = 13, 7


def random_mapping(device="cpu", k=3):
    weight = torch.randn(M, k, dtype=torch.float64)
    return Mapping(torch.randint(N, (M, k)), weight, N).to(device)


def check(pool, dense):
    r"""Output and gradient of the pool are those of the dense matrix."""
    x = torch.randn(2, N, 5, dtype=torch.float64, device=dense.device, requires_grad=True)
    out, expected = pool(x), reference.apply(dense, x)
    assert_close(out, expected)
    cotangent = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, cotangent)
    assert_close(grad, torch.autograd.grad(expected, x, cotangent)[0])
    assert_close(pool(x[1]), expected[1])
    assert_close(pool(x.flatten(0, 1)), expected.flatten(0, 1))


def test_equals_reference_in_every_layout(device):
    mapping = random_mapping(device)
    pool = MappingPool(mapping)
    assert repr(pool) == f"MappingPool({N}, {M}, k=3)"
    assert not list(pool.parameters())
    assert torch.equal(pool.mapping().to_dense(), mapping.to_dense())
    check(pool, mapping.to_dense())


@pytest.mark.parametrize("form", ["to_dense", "to_torch_csr", "to_scipy"])
def test_takes_any_matrix(form):
    mapping = random_mapping()
    check(MappingPool(getattr(mapping, form)()), mapping.to_dense())


def test_state_dict_holds_everything(device):
    pool, other = MappingPool(random_mapping(device)), MappingPool(random_mapping(device))
    assert set(pool.state_dict()) == {"index", "weight"}
    other.load_state_dict(pool.state_dict())
    check(other, pool.mapping().to_dense())  # its transpose, for the gradient, included


def test_loading_a_wrong_index_is_an_error():
    pool = MappingPool(random_mapping())
    state = pool.state_dict()
    state["index"] = state["index"] + N
    with pytest.raises(ValueError, match=f"from 0 to {N - 1}"):
        pool.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal_and_independent(copied, device):
    mapping = random_mapping(device)
    pool = MappingPool(mapping)
    other = copied(pool)
    dense = mapping.to_dense()
    pool.load_state_dict(MappingPool(random_mapping(device)).state_dict())
    mapping.weight.zero_()
    check(other, dense)


def test_to_casts_weights_only(device):
    mapping = random_mapping()
    pool = MappingPool(mapping).to(device, torch.float32)
    assert (pool.weight.dtype, pool.index.dtype) == (torch.float32, torch.int64)
    check(pool, mapping.to_dense().to(device, torch.float32).double())


def test_result_has_the_type_of_the_features(device):
    pool = MappingPool(random_mapping(device))
    x = torch.randn(2, N, 5, device=device, dtype=torch.bfloat16)
    expected = reference.apply(pool.mapping().to_dense(), x.double())
    assert pool(x).dtype == torch.bfloat16
    assert_close(pool(x).double(), expected, rtol=3e-2, atol=6e-2)


def test_compiles_without_graph_breaks(compiled, device):
    pool = MappingPool(random_mapping(device))
    check(compiled(pool), pool.mapping().to_dense())
