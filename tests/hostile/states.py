r"""Hostile states of layers and hostile arguments of operators, seeded: each is taken for what it
is, with the numbers of a dense matrix, or refused."""

import copy
import io
import math
import pickle
import random
from pathlib import Path

import torch
from torch import Tensor
from torch.testing import assert_close

from pyg_attnpool import (
    AttentionPool,
    AttentionUnpool,
    Mapping,
    MappingPool,
    SpiralConv,
    StaticChebConv,
    freeze,
)
from pyg_attnpool.nn.base import PoolingLayer
from pyg_attnpool.nn.learned_pools import WeightedPool
from pyg_attnpool.ops import _cpu, attention, cheb, reference, search, sparse, spiral

REFUSED = ValueError, TypeError
# What PyTorch itself raises, as where a key is missing or types do not fit.
TORCH = RuntimeError, NotImplementedError, IndexError, AttributeError
BAD = -1, 2**40, -(2**63), 2**63 - 1, -(2**40)


# Layers and their dense twins ########################################################


def mapping(rng, num_target, num_source, k=None):
    k = k or rng.randint(1, 4)
    index = torch.randint(num_source, (num_target, k))
    return Mapping(index, torch.rand(num_target, k), num_source)


def sizes(rng):
    return rng.randint(1, 37), rng.randint(1, 37)


def pool(rng, num_target, num_source):
    made = rng.choice(["fixed", "weighted", "sum", "softmax", "alone"])
    if made == "fixed":
        return MappingPool(mapping(rng, num_target, num_source))
    if made == "weighted":
        return WeightedPool(mapping(rng, num_target, num_source))
    cls = rng.choice([AttentionPool, AttentionUnpool])
    prior = None if made == "alone" else mapping(rng, num_target, num_source)
    k = rng.randint(1, num_source)
    normalization = "sum" if made == "sum" else "softmax"
    return cls(num_source, num_target, 5, k, prior, normalization=normalization, init="normal")


def dense_of_slots(index, weight, num_source):
    row = torch.arange(len(index)).unsqueeze(1).expand_as(index)
    out = weight.new_zeros(len(index), num_source)
    return out.index_put((row, index.long()), weight, accumulate=True)


def dense(layer):
    r"""The matrix of a pooling layer, from its parameters and indices as they are now."""
    if isinstance(layer, AttentionPool):
        matrix = reference.attention(layer.query, layer.key, layer.k, layer.log_beta)
        if layer.prior_index is None:
            return matrix
        prior = dense_of_slots(layer.prior_index, layer.prior_weight, layer.num_source)
        return reference.fuse(matrix, prior, layer.fusion_weight)
    weight = layer.weight
    if isinstance(layer, WeightedPool):
        weight = weight * (layer.initial_weight != 0)
    return dense_of_slots(layer.index, weight, layer.num_source)


def check(layer):
    r"""Output and all gradients are those of the dense matrix."""
    x = torch.randn(2, layer.num_source, 3, dtype=torch.float64, requires_grad=True)
    out, wanted = layer(x), reference.apply(dense(layer), x)
    assert_close(out, wanted, equal_nan=True)
    if not torch.isfinite(out).all():
        return
    inputs = [x, *layer.parameters()]
    head = torch.randn_like(out)
    found = torch.autograd.grad((out * head).sum(), inputs, allow_unused=True)
    wanted = torch.autograd.grad((wanted * head).sum(), inputs, allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a if a is not None else b * 0, b, rtol=1e-7, atol=1e-9)


def conv(rng):
    num_nodes = rng.randint(3, 30)
    if rng.random() < 0.5:
        ring = torch.arange(num_nodes)
        edges = torch.cat([torch.stack([ring, ring.roll(1)]), torch.stack([ring.roll(1), ring])], 1)
        return StaticChebConv(
            rng.randint(1, 5), rng.randint(1, 5), 3, edges.unique(dim=1), num_nodes
        )
    spirals = torch.randint(-1, num_nodes, (num_nodes, rng.randint(1, 5)))
    return SpiralConv(rng.randint(1, 5), rng.randint(1, 5), spirals)


def dense_conv(layer, x):
    if isinstance(layer, StaticChebConv):
        row = torch.repeat_interleave(layer.rowptr.diff())
        matrix = torch.zeros(layer.num_nodes, layer.num_nodes, dtype=x.dtype)
        matrix = matrix.index_put((row, layer.col), layer.laplacian, accumulate=True)
        weight = torch.stack([lin.weight.t() for lin in layer.lins])
        return reference.chebyshev(matrix, weight, x) + layer.bias
    padded = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    return padded[:, layer.spirals].flatten(2) @ layer.lin.weight.t() + layer.lin.bias


def check_conv(layer):
    size = 2, layer.num_source, layer.in_channels
    x = torch.randn(*size, dtype=torch.float64, requires_grad=True)
    out, wanted = layer(x), dense_conv(layer, x)
    assert_close(out, wanted)
    inputs, head = [x, *layer.parameters()], torch.randn_like(out)
    found = torch.autograd.grad((out * head).sum(), inputs)
    for a, b in zip(found, torch.autograd.grad((wanted * head).sum(), inputs), strict=True):
        assert_close(a, b)


def indices(layer):
    r"""The indices of a layer: of each, one more than the largest number."""
    if isinstance(layer, StaticChebConv):
        return {"rowptr": layer.col.numel() + 1, "col": layer.num_nodes}
    if isinstance(layer, SpiralConv):
        return {"spirals": layer.num_nodes}
    if isinstance(layer, AttentionPool):
        return {} if layer.prior_index is None else {"prior_index": layer.num_source}
    return {"index": layer.num_source}


def refused(function, *further):
    try:
        function()
    except (*REFUSED, *further):
        return True
    return False


# Families of cases ###################################################################


def spoil(rng, tensor):
    r"""A tensor of a state, changed in one of many ways; some are still fine."""
    way = rng.randrange(12)
    if way == 0 and tensor.numel() > 0:
        bad = BAD if not tensor.is_floating_point() else (math.nan, math.inf, -math.inf)
        tensor.flatten()[rng.randrange(tensor.numel())] = rng.choice(bad)
    elif way == 1:
        types = [torch.int32, torch.int16, torch.bool, torch.float32, torch.float16]
        return tensor.to(rng.choice([*types, torch.complex64, torch.uint8]))
    elif way == 2:
        return tensor[:-1] if tensor.dim() else tensor.expand(3)
    elif way == 3 and tensor.dim() == 2:
        return tensor[:, :-1]
    elif way == 4 and tensor.dim() == 2:
        return torch.cat([tensor, tensor[:, :1]], dim=1)
    elif way == 5:
        return tensor.t() if tensor.dim() == 2 else tensor.unsqueeze(0)
    elif way == 6:
        return tensor.flatten()
    elif way == 7:
        return rng.choice([None, [1, 2], "text", 3.0])
    elif way == 8:
        return tensor.to("meta")
    elif way == 9 and tensor.dim() == 2:
        return tensor.t().contiguous().t()
    elif way == 10:
        return tensor.new_empty(0)
    elif way == 11:
        return tensor.int() if not tensor.is_floating_point() else tensor.clone()
    return tensor


def load(rng):
    r"""A state is taken whole, or refused and the layer is as it was."""
    size = sizes(rng)
    layer = pool(rng, *size).double()
    check(layer)
    before = copy.deepcopy(layer.state_dict())
    other = copy.deepcopy(layer)
    for name, end in indices(other).items():
        getattr(other, name).random_(end)
    for parameter in other.parameters():
        parameter.data.normal_()
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for name in rng.sample(sorted(state), min(len(state), rng.randint(0, 2))):
        state[name] = spoil(rng, state[name])
        if rng.random() < 0.1:
            del state[name]
    nested = torch.nn.Sequential(layer) if rng.random() < 0.3 else None
    target = nested or layer
    state = {f"0.{name}": tensor for name, tensor in state.items()} if nested else state
    try:
        target.load_state_dict(state, strict=rng.random() < 0.5, assign=rng.random() < 0.5)
    except REFUSED:
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        check(layer)
        return
    except TORCH:
        pass
    for name in indices(layer):
        assert getattr(layer, name).dtype == torch.int64
    held = list(layer.state_dict().values())
    whole = all(t.dtype in (torch.float64, torch.int64) and not t.is_meta for t in held)
    if whole and all(torch.isfinite(t).all() for t in held):
        check(layer)
    else:  # mixed types and tensors without values do not crash
        refused(lambda: layer(torch.randn(layer.num_source, 3)).sum(), *TORCH)


def refill(layer):
    # The tensors that `to_empty` allocates have no values.
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_()
    if isinstance(layer, StaticChebConv):
        layer.laplacian.fill_(-0.5)


def cast(rng):
    r"""Indices stay long through casts and copies, and results are those of the same matrix."""
    layer = pool(rng, *sizes(rng)) if rng.random() < 0.7 else conv(rng)
    before = {name: getattr(layer, name).clone() for name in indices(layer)}
    for _ in range(rng.randint(1, 4)):
        change = rng.randrange(9)
        if change == 0:
            layer.half()
        elif change == 1:
            layer.type(rng.choice([torch.float32, torch.float64, torch.float16]))
        elif change == 2:
            layer.to(torch.bfloat16)
        elif change == 3:
            layer = copy.deepcopy(layer)
        elif change == 4:
            layer = pickle.loads(pickle.dumps(layer))
        elif change == 5:
            file = io.BytesIO()
            torch.save(layer, file)
            layer = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        elif change == 6:
            layer.share_memory()
        elif change == 7:
            refill(layer.to_empty(device="cpu"))
        elif change == 8:
            state = layer.state_dict()
            layer.to("meta").to_empty(device="cpu")
            x = torch.randn(2, layer.num_source, layer.in_channels or 3)
            if before:
                assert refused(lambda layer=layer, x=x: layer(x))
            for name, index in before.items():
                if name not in state:
                    setattr(layer, name, index.clone())
            refill(layer)
            layer.load_state_dict({name: t for name, t in state.items() if not t.is_meta}, False)
            for name, index in before.items():
                if name in layer.state_dict():
                    layer.load_state_dict({name: index}, strict=False, assign=True)
                    break
    for name, index in before.items():
        assert torch.equal(getattr(layer, name), index), name
    refill(layer.double())
    if isinstance(layer, PoolingLayer):
        check(layer)
    else:
        check_conv(layer)


def edit(rng):
    r"""An index that was edited in place is used as it is now, or refused until it is repaired."""
    layer = pool(rng, *sizes(rng)).double()
    check(layer)
    name = next(iter(indices(layer)), None)
    if name is None:
        layer.search.candidates.fill_(rng.choice([-1, 2**30, -(2**31), layer.num_source]))
        x = torch.randn(layer.num_source, 3, dtype=torch.float64)
        assert refused(lambda: layer(x))
        layer.search = None
        check(layer)
        return
    index, end = getattr(layer, name), indices(layer)[name]
    place = rng.randrange(index.size(0)), rng.randrange(index.size(1))
    way = rng.randrange(7)
    x = torch.randn(layer.num_source, 3, dtype=torch.float64, requires_grad=True)
    if way <= 1:
        index[place] = rng.randrange(end)
        check(layer)
        return
    before = index.clone()
    if way == 2:
        index[place] = rng.choice([*BAD, end])
    elif way == 3:  # which no version counts
        index.numpy()[place] = rng.choice([*BAD, end])
    elif way == 4:
        index.data[place] = rng.choice([*BAD, end])
    elif way == 5:
        shapes = [index.float(), index.bool(), index[0], index.unsqueeze(0), index[:-1], [1], None]
        setattr(layer, name, rng.choice(shapes))
    else:
        attention = isinstance(layer, AttentionPool)
        weight = layer.prior_weight if attention else layer.weight
        if isinstance(layer, WeightedPool) and rng.random() < 0.5:
            weight = layer.initial_weight
        slots = weight.data
        weight.data = rng.choice([slots[:, :-1], slots[:-1], slots.flatten()[:-1], slots[:0]])
        assert refused(lambda: layer(x).sum().backward(), RuntimeError)
        weight.data = slots
        check(layer)
        return
    assert refused(lambda: layer(x).sum().backward())
    assert refused(lambda: layer(x.detach()))
    setattr(layer, name, before)
    check(layer)


def edit_conv(rng):
    r"""The same of convolutions, and of all that they hold."""
    layer = conv(rng).double()
    check_conv(layer)
    x = torch.randn(2, layer.num_source, layer.in_channels, dtype=torch.float64)
    x.requires_grad_()
    names = [*indices(layer), "lin.weight", "derived"]
    if isinstance(layer, StaticChebConv):
        names = [*indices(layer), "laplacian", "bias"]
    name = rng.choice(names)
    if name == "lin.weight":
        layer.lin.weight.data = layer.lin.weight.data[:, :-1]
        assert refused(lambda: layer(x).sum().backward(), RuntimeError)
    elif name in ("laplacian", "bias"):
        tensor = getattr(layer, name)
        tensor.data = rng.choice([tensor.data[:-1], tensor.data[:0]])
        # One bias stands for all channels, as where PyTorch adds it.
        if layer.out_channels > 2 or name == "laplacian":
            assert refused(lambda: layer(x).sum().backward(), RuntimeError)
        else:
            refused(lambda: layer(x).sum().backward(), RuntimeError)
    elif name == "derived":
        tensor = getattr(
            layer, rng.choice(["rowptr", "col", "slot", "rowptr_t", "col_t", "slot_t"])
        )
        if tensor.numel() > 0:
            tensor[rng.randrange(tensor.numel())] = rng.choice(BAD)
            assert refused(lambda: layer(x).sum().backward())
    else:
        index = getattr(layer, name)
        place = tuple(rng.randrange(n) for n in index.shape)
        bad = rng.choice([-2, *BAD[1:], indices(layer)[name]])
        (index if rng.random() < 0.5 else index.numpy())[place] = bad
        if isinstance(layer, StaticChebConv) or index._version > 0:
            assert refused(lambda: layer(x).sum().backward())
        elif rng.random() < 0.5:
            refused(lambda: layer(x).sum().backward())


def operators(rng):
    r"""Valid arguments of every operator."""
    num_rows, num_cols = rng.randint(1, 9), rng.randint(1, 9)
    channels, batch, K, k = rng.randint(1, 20), rng.randint(1, 3), rng.randint(1, 4), 1
    dtype = rng.choice([torch.float32, torch.float64])

    def rand(*size):
        return torch.rand(*size, dtype=dtype)

    count = torch.randint(0, 4, (num_rows,))
    count[0] += 1
    rowptr = torch.cat([count.new_zeros(1), count.cumsum(0)])
    col = torch.randint(num_cols, (int(rowptr[-1]),))
    transposed = sparse.transpose(rowptr, col, num_cols)
    perm = torch.randperm(col.numel())
    value, x, g = rand(col.numel()), rand(num_cols, channels), rand(num_rows, channels)
    k = rng.randint(1, num_cols)
    query, key = rand(num_rows, channels), rand(num_cols, channels)
    state = search.Search(num_rows, num_cols, channels, k, dtype)
    held = state.last_query, state.last_key, state.candidates, state.angle, state.searched
    index, score = search.full_search(query, key, k)
    slots = torch.cat([index, torch.randint(num_cols, (num_rows, 2))], dim=1)
    pattern = sparse.transpose(sparse.ell_rowptr(slots), slots.flatten(), num_cols)
    prior, share, beta = rand(num_rows, 2), rand(()), rand(())
    learned = query, key, beta, share, slots, prior, *pattern, score
    ring = torch.arange(num_cols)
    laplacian = torch.arange(num_cols + 1), ring, rand(num_cols)
    rows, weight, bias = rand(num_cols, batch, 3), rand(K, 3, 2), rand(2)
    out = rand(num_cols, batch, 2)
    spirals = spiral.spiral_pattern(torch.randint(-1, num_cols, (num_cols, K)))
    return {
        "transpose": (sparse.transpose, (rowptr, col, num_cols)),
        "spmm": (sparse._spmm, (rowptr, col, None, value, x, None, None, None)),
        "spmm, perm": (sparse._spmm, (rowptr, col, perm, value, x, None, None, None)),
        "spmm_grads": (sparse._spmm_grads, (rowptr, col, value, g, x, *transposed)),
        "sddmm": (sparse._sddmm, (rowptr, col, g, x, None, None, None)),
        "topk": (search.full_search, (query, key, k)),
        "topk_again": (search._topk_again, (query, key, k, *held)),
        "attention": (attention._attention, learned),
        "attention_backward": (attention._attention_backward, (*learned, rand(*slots.shape))),
        "cheb_conv": (cheb._cheb_conv, (*laplacian, rows, weight, bias)),
        "cheb_correlate": (cheb._cheb_correlate, (*laplacian, rows, out, K)),
        "cheb_grads": (cheb._cheb_grads, (*laplacian, out, rows, weight)),
        "spiral_conv": (spiral._spiral_conv, (*spirals, rows, weight, bias, False)),
        "spiral_conv, adjoint": (
            spiral._spiral_conv,
            (*spirals, out, weight.transpose(1, 2), None, True),
        ),
        "spiral_correlate": (spiral._spiral_correlate, (*spirals, rows, out)),
    }


def operator(rng):
    r"""An operator that is called directly, with one argument spoilt: it raises. An index that it
    does not follow may change nothing."""
    available = _cpu.AVAILABLE
    name, (function, args) = rng.choice(list(operators(rng).items()))
    compiled_alone = name.startswith("attention") or name == "topk_again"
    _cpu.AVAILABLE = available and (compiled_alone or rng.random() < 0.7)
    call = function if rng.random() < 0.5 else function.overload
    try:
        wanted = call(*(copy.deepcopy(args)))
        place = rng.choice([i for i, arg in enumerate(args) if isinstance(arg, Tensor | int)])
        args = list(copy.deepcopy(args))
        spoilt = args[place]
        if not isinstance(spoilt, Tensor):
            args[place] = rng.choice([-1, -(2**40)]) if not isinstance(spoilt, bool) else spoilt
            refused(lambda: call(*args), *TORCH)
            return
        index = not spoilt.is_floating_point() and spoilt.numel() > 0
        if index and rng.random() < 0.6:
            bad = rng.choice([2**30, -3] if spoilt.dtype == torch.int32 else [*BAD[1:], -3])
            spoilt.flatten()[rng.randrange(spoilt.numel())] = bad
            try:
                found = call(*args)
            except (*REFUSED, *TORCH):
                return
            assert_close(found, wanted)
            return
        way = rng.randrange(6)
        if way == 0:
            args[place] = spoilt[:-1] if spoilt.dim() else spoilt.expand(2)
        elif way == 1:
            args[place] = spoilt.flatten()[:-1] if spoilt.dim() else spoilt
        elif way == 2:
            args[place] = spoilt.to(rng.choice([torch.int32, torch.float32, torch.bool]))
        elif way == 3:
            args[place] = spoilt.new_empty(0)
        elif way == 4:
            args[place] = (
                spoilt.narrow(-1, 0, max(spoilt.size(-1) - 1, 0)) if spoilt.dim() else spoilt
            )
        else:
            args[place] = torch.cat([spoilt, spoilt]) if spoilt.dim() else spoilt
        refused(lambda: call(*args), *TORCH)
    finally:
        _cpu.AVAILABLE = available


def no_number(rng):
    r"""Keys and queries that are not finite give what the dense formulas give, on every backend,
    leave no trace, and are not frozen."""
    num_target, num_source = rng.randint(2, 30), rng.randint(2, 30)
    prior = mapping(rng, num_target, num_source) if rng.random() < 0.5 else None
    layer = AttentionPool(
        num_source,
        num_target,
        4,
        rng.randint(1, num_source),
        prior,
        init="normal",
        normalization=rng.choice(["sum", "softmax"]),
    ).double()
    before = copy.deepcopy(layer.state_dict())
    available = _cpu.AVAILABLE
    x = torch.randn(2, num_source, 3, dtype=torch.float64)
    try:
        for _ in range(3):
            _cpu.AVAILABLE = available and rng.random() < 0.6
            layer(x)
            learned = rng.choice([layer.key, layer.query])
            rows = rng.sample(range(len(learned)), rng.randint(1, min(3, len(learned))))
            learned.data[rows, rng.randrange(4)] = rng.choice([math.nan, math.inf, -math.inf])
            for _ in range(2):
                assert_close(layer(x), reference.apply(dense(layer), x), equal_nan=True)
            message = "key" if learned is layer.key else "query"
            for frozen in (layer.freeze, lambda: freeze(torch.nn.Sequential(layer))):
                try:
                    frozen()
                except ValueError as error:
                    assert message in str(error)
                else:
                    raise AssertionError("frozen")
            layer.load_state_dict(before)
            check(layer)
    finally:
        _cpu.AVAILABLE = available


FAMILIES = [load, load, cast, edit, edit_conv, operator, operator, operator, no_number]


def name(number: int) -> str:
    return FAMILIES[number % len(FAMILIES)].__name__


def case(number: int, folder: Path) -> None:
    torch.manual_seed(number)
    FAMILIES[number % len(FAMILIES)](random.Random(number))
