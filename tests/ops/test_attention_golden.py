import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import Mapping
from pyg_attnpool.ops import reference
from pyg_attnpool.ops.attention import attention


def product(key, query, prior, w_a, k, x):
    mapping = Mapping(*attention(query, key, k)[:2], key.size(0))
    mapping = mapping.fuse(Mapping.from_matrix(prior), w_a)
    return mapping.to_dense(), mapping @ x


def dense(key, query, prior, w_a, k, x):
    mapping = reference.fuse(reference.attention(query, key, k), prior, w_a)
    return mapping, reference.apply(mapping, x)


@pytest.mark.parametrize("program", [product, dense])
@pytest.mark.parametrize("name", ["attention_pool_down", "attention_pool_up"])
def test_golden_attention_pool(name, program, golden, device):
    r"""The authors' layer, its output and all of its gradients."""
    data = {key: value.to(device) for key, value in golden(name).items()}
    key, query, x = (data[name].requires_grad_() for name in ("key", "query", "x"))
    w_0, w_1 = data["w_prior"]
    w_a = (w_1 / (w_0 + w_1)).requires_grad_()
    assert_close(w_a, data["w_a"][0])

    mapping, out = program(key, query, data["prior"], w_a, data["k"].item(), x)
    (out * data["cotangent"]).sum().backward()

    grad_w_0 = -w_a.grad * w_1 / (w_0 + w_1) ** 2
    grad_w_1 = w_a.grad * w_0 / (w_0 + w_1) ** 2
    found = {
        "mapping": mapping,
        "out": out,
        "grad_x": x.grad,
        "grad_key": key.grad,
        "grad_query": query.grad,
        "grad_w_prior": torch.stack([grad_w_0, grad_w_1]),
    }
    for name, tensor in found.items():
        assert data[name].count_nonzero() > 0
        assert_close(tensor, data[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
