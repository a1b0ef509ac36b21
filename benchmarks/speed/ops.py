r"""The two operations of learned aggregation against what a user would write instead: the product
with a mapping and the cosine top-k, forward and backward.

Nothing about a pattern is prepared ahead, as attention may choose another at every step. Each
candidate is checked against double precision before it is timed, in turn with all others.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor
from torch_geometric.nn import MessagePassing

from benchmarks import report
from benchmarks.speed import measure
from pyg_attnpool import AttentionUnpool
from pyg_attnpool.ops import reference
from pyg_attnpool.ops.search import cosine_topk
from pyg_attnpool.ops.sparse import apply_mapping, sddmm

SIZES = {
    "hand": (1_193, 299),
    "coma": (5_023, 1_256),
    "dfaust": (6_890, 1_723),
    "20k": (20_000, 5_000),
    "100k": (100_000, 25_000),
    "1m": (1_000_000, 250_000),
}
COLUMNS = 256  # 16 samples of 16 channels
CHANNELS = 21
CPU_SCORES = 1e10  # beyond, a search takes minutes on a CPU
DENSE_REFERENCE = 1 << 30  # bytes; beyond, the reference goes slot by slot

FORWARD, STEP = "forward", "forward and backward"
NOTES = (
    "Before any time, results and gradients were equal to those in double precision. Of searches "
    f"over more than {measure.CHECKED_SCORES:.0e} scores a random sample of rows was compared.",
    "A candidate's column is its median time over ours, and its peak memory.",
    "The floor is the longer of two times: the bytes that must move at least over the bandwidth of "
    "a large copy, and the operations over the rate of a large product. What fits in the cache "
    "can be faster.",
    "The forward pass of our top-k is the search alone; its backward pass forms the kept scores.",
)


@dataclass
class Case:
    r"""An operation at one size, in all ways of doing it."""

    candidates: list[str]
    forward: Callable[[str], Tensor]
    step: Callable[[str], list[Tensor]]  # the result and the gradients
    check: Callable[[str, list[Tensor]], None]  # raises unless the result of a step is right
    left_out: dict[str, str]  # and why
    least: dict[str, tuple[int, int]]  # bytes and operations that each pass needs

    @property
    def runs(self) -> list[str]:
        return [name for name in self.candidates if name not in self.left_out]


def surface(num_vertices: int) -> Tensor:
    r"""Points on a sphere, numbered from pole to pole, so that neighbours lie near each other in
    memory, as those of a mesh do."""
    points = F.normalize(torch.randn(num_vertices, 3), dim=-1)
    return points[points[:, 2].argsort()]


def too_large(needed: dict[str, int], limit: float) -> dict[str, str]:
    return {name: f"needs {report.cell(n / 2**30)} GiB" for name, n in needed.items() if n > limit}


# The product ######################################################################


class Pattern:
    def __init__(self, index: Tensor, num_source: int):
        num_target, k = index.shape
        self.index = index  # [M, k], ascending and different in a row
        self.size = (num_target, num_source)
        self.rowptr = torch.arange(num_target + 1, device=index.device) * k
        self.row = torch.arange(num_target, device=index.device).repeat_interleave(k)
        self.col = index.flatten()


class Messages(MessagePassing):
    def __init__(self):
        super().__init__(aggr="add", node_dim=0)

    def forward(self, p: Pattern, weight: Tensor, x: Tensor) -> Tensor:
        edge_index = torch.stack([p.col, p.row])
        return self.propagate(edge_index, x=(x, None), weight=weight.view(-1, 1), size=p.size[::-1])

    def message(self, x_j: Tensor, weight: Tensor) -> Tensor:
        return weight * x_j


def our_product(p: Pattern, weight: Tensor, x: Tensor) -> Tensor:
    return apply_mapping(p.index, weight, x, p.size[1])


def dense_matmul(p: Pattern, weight: Tensor, x: Tensor) -> Tensor:
    return weight.new_zeros(p.size).scatter(1, p.index, weight) @ x


def torch_csr(p: Pattern, weight: Tensor, x: Tensor) -> Tensor:
    value = weight.flatten()
    return torch.sparse_csr_tensor(p.rowptr, p.col, value, p.size, check_invariants=False) @ x


def torch_sparse(p: Pattern, weight: Tensor, x: Tensor) -> Tensor:
    from torch_sparse import SparseTensor

    value = weight.flatten()
    return SparseTensor(None, p.rowptr, p.col, value, p.size, is_sorted=True, trust_data=True) @ x


def embedding_bag(p: Pattern, weight: Tensor, x: Tensor) -> Tensor:
    return F.embedding_bag(p.index, x, mode="sum", per_sample_weights=weight)


def index_add(p: Pattern, weight: Tensor, x: Tensor) -> Tensor:
    entries = weight.view(-1, 1) * x.index_select(0, p.col)
    return x.new_zeros(p.size[0], x.size(1)).index_add(0, p.row, entries)


PRODUCTS: dict[str, Callable[[Pattern, Tensor, Tensor], Tensor]] = {
    "ours": our_product,
    "dense matmul": dense_matmul,
    "torch.sparse CSR": torch_csr,
    "torch_sparse": torch_sparse,
    "embedding_bag": embedding_bag,
    "MessagePassing": Messages(),
    "index_add": index_add,
}


def product_in_double(
    p: Pattern, weight: Tensor, x: Tensor, grad: Tensor, dense: bool
) -> list[Tensor]:
    r"""The product and its gradients of weights and features in double precision, by the dense
    reference or slot by slot."""
    weight, x, grad = weight.detach().double(), x.detach().double(), grad.double()
    if dense:
        inputs = (weight.requires_grad_(), x.requires_grad_())
        matrix = weight.new_zeros(p.size).scatter(1, p.index, weight)
        out = reference.apply(matrix, x.unsqueeze(0)).squeeze(0)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    out, grad_weight, grad_x = torch.zeros_like(grad), torch.empty_like(weight), torch.zeros_like(x)
    for slot, (col, share) in enumerate(zip(p.index.t(), weight.t(), strict=True)):
        source = x[col]
        grad_weight[:, slot] = torch.linalg.vecdot(grad, source)
        out.addcmul_(share.unsqueeze(1), source)
        grad_x.index_add_(0, col, share.unsqueeze(1) * grad)
    return [out, grad_weight, grad_x]


def product(num_source: int, num_target: int, k: int, device: str, limit: float) -> Case:
    _, index = cKDTree(surface(num_source)).query(surface(num_target), k, workers=-1)
    p = Pattern(torch.from_numpy(index).sort(dim=1).values.to(device), num_source)
    weight = torch.rand(num_target, k, device=device).requires_grad_()
    x = torch.randn(num_source, COLUMNS, device=device).requires_grad_()
    grad = torch.randn(num_target, COLUMNS, device=device)
    matrix, messages = 4 * num_target * num_source, 4 * num_target * k * COLUMNS
    expected = product_in_double(p, weight, x, grad, dense=2 * matrix <= DENSE_REFERENCE)

    def step(name: str) -> list[Tensor]:
        out = PRODUCTS[name](p, weight, x)
        return [out.detach(), *torch.autograd.grad(out, (weight, x), grad)]

    def check(name: str, found: list[Tensor]):
        for part, a, b in zip(("output", "weights", "features"), found, expected, strict=True):
            measure.equal(f"{part} of {name}", a, b, rtol=1e-5)

    # The gradient of a CSR tensor's values is picked from a dense one.
    needed = {"dense matmul": 3 * matrix, "torch.sparse CSR": 2 * matrix}
    needed |= {"MessagePassing": 4 * messages, "index_add": 4 * messages}
    left_out = too_large(needed, limit)
    if find_spec("torch_sparse") is None:
        left_out["torch_sparse"] = "is not installed"
    rows, slots = x.nbytes + grad.nbytes, weight.nbytes + p.index.nbytes
    flops = 2 * weight.numel() * COLUMNS
    least = {
        FORWARD: (rows + slots, flops),
        # Backward reads features, gradient and slots, and writes the gradients of x and weights.
        STEP: (2 * rows + x.nbytes + 2 * slots + weight.nbytes, 3 * flops),
    }
    forward = torch.no_grad()(lambda name: PRODUCTS[name](p, weight, x))
    return Case(list(PRODUCTS), forward, step, check, left_out, least)


# The search #######################################################################

Chosen = tuple[Tensor, Tensor]  # keys [M, k] and their scores, differentiable


def normalized(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(query, dim=-1), F.normalize(key, dim=-1)


def our_topk(query: Tensor, key: Tensor, k: int) -> Chosen:
    index = cosine_topk(query.detach(), key.detach(), k)
    if not torch.is_grad_enabled():
        return index, index
    rowptr = torch.arange(len(index) + 1, device=index.device) * k
    return index, sddmm(rowptr, index.flatten(), *normalized(query, key)).view_as(index)


def full_topk(query: Tensor, key: Tensor, k: int) -> Chosen:
    query, key = normalized(query, key)
    value, index = (query @ key.t()).topk(k)
    return index, value


def chunked_topk(query: Tensor, key: Tensor, k: int) -> Chosen:
    query, key = normalized(query, key)
    chunks = query.split(max(1, (1 << 22) // len(key)))
    value, index = zip(*((chunk @ key.t()).topk(k) for chunk in chunks), strict=True)
    return torch.cat(index), torch.cat(value)


def full_sort(query: Tensor, key: Tensor, k: int) -> Chosen:
    value, index = reference.cosine_topk(query, key, k)
    return index, value


SEARCHES: dict[str, Callable[[Tensor, Tensor, int], Chosen]] = {
    "ours": our_topk,
    "matmul + topk": full_topk,
    "matmul + topk in chunks": chunked_topk,
    "matmul + sort": full_sort,
}


def search(num_source: int, num_target: int, k: int, device: str, limit: float) -> Case:
    r"""With the keys and queries that attention starts from."""
    positions = {"source_pos": surface(num_source), "target_pos": surface(num_target)}
    layer = AttentionUnpool.published(num_source, num_target, CHANNELS, k, **positions).to(device)
    query, key = layer.query, layer.key
    grad = torch.randn(num_target, k, device=device)

    def step(name: str) -> list[Tensor]:
        index, value = SEARCHES[name](query, key, k)
        return [index, *torch.autograd.grad(value, (query, key), grad)]

    def check(name: str, found: list[Tensor]):
        index, *gradients = found
        measure.equal_topk(name, index, query, key)
        # Scores equal within rounding may be chosen either way; the gradient is that of the choice.
        vectors = [t.detach().double().requires_grad_() for t in (query, key)]
        q, n = normalized(*vectors)
        expected = torch.autograd.grad((q.unsqueeze(1) * n[index]).sum(dim=-1), vectors, grad)
        for part, a, b in zip(("queries", "keys"), gradients, expected, strict=True):
            measure.equal(f"{part} of {name}", a, b, rtol=1e-5)

    scores, slots = num_source * num_target, num_target * k
    left_out = too_large({"matmul + topk": 12 * scores, "matmul + sort": 24 * scores}, limit)
    if device == "cpu" and scores > CPU_SCORES:
        left_out = dict.fromkeys(SEARCHES, f"takes too long on a CPU for {scores:.1e} scores")
    vectors, flops = query.nbytes + key.nbytes, 2 * CHANNELS * scores
    least = {
        FORWARD: (vectors + 8 * slots, flops),
        STEP: (3 * vectors + 20 * slots, flops + 6 * CHANNELS * slots),
    }
    forward = torch.no_grad()(lambda name: SEARCHES[name](query, key, k)[0])
    return Case(list(SEARCHES), forward, step, check, left_out, least)


# The run ##########################################################################


def check_all(case: Case, budget: float):
    r"""Leaves out what takes too long; the rest is right."""
    for name in case.runs:
        found: list[Tensor] = []
        taken = measure.seconds(lambda name=name, found=found: found.extend(case.step(name)))
        case.check(name, found)
        measure.equal(f"{name} without gradients", case.forward(name), found[0], rtol=1e-6)
        if name != "ours" and taken > budget:
            case.left_out[name] = f"takes {taken:.0f} s"


def measured(
    case: Case, part: str, floor: dict[str, float], device: str, repeat: int, budget: float
) -> dict[str, Any]:
    function = case.forward if part == FORWARD else case.step
    runs = {name: partial(function, name) for name in case.runs}
    num_bytes, flops = case.least[part]
    return {
        "seconds": measure.interleaved(runs, repeat, budget),
        "peak_bytes": {name: measure.peak_memory(run, device) for name, run in runs.items()},
        "bytes_floor_seconds": num_bytes / floor["bytes_per_s"],
        "flop_floor_seconds": flops / floor["flop_per_s"],
        "left_out": case.left_out,
    }


def line(row: dict[str, Any], candidates: list[str]) -> dict[str, Any]:
    r"""A row as the table shows it."""
    seconds, floors = row["seconds"], (row["bytes_floor_seconds"], row["flop_floor_seconds"])
    mib = {name: n and n / 2**20 for name, n in row["peak_bytes"].items()}
    cells = {
        "size": f"{row['size']} {row['kind']}",
        "source → target": f"{row['num_source']:,} → {row['num_target']:,}",
        "k": row["k"],
        "ours ms": 1000 * seconds["ours"] if "ours" in seconds else None,
        "floor ms": 1000 * max(floors),
        "floor of": "bytes" if floors[0] > floors[1] else "flops",
        "ours MiB": mib.get("ours"),
    }
    for name in candidates[1:]:
        if name in seconds:
            memory = "" if mib[name] is None else f", {report.cell(mib[name])} MiB"
            cells[name] = f"×{seconds[name] / seconds['ours']:.3g}{memory}"
        else:
            cells[name] = f"- ({row['left_out'][name]})"
    return cells


def main(
    sizes: tuple[str, ...] = tuple(SIZES),
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    threads: int = torch.get_num_threads(),
    repeat: int = 15,
    budget: float = 60.0,
    memory: float = 8.0,
    seed: int = 0,
    output: Path = measure.RESULTS,
):
    r"""Checks, times and writes ops.json and ops.md.

    Args:
        sizes: Names of sizes, or N:M for N fine and M coarse vertices.
        device: Where to run.
        threads: CPU threads.
        repeat: Rounds of interleaved runs.
        budget: Seconds for the rounds of a line. A candidate that takes longer for one call is
            left out.
        memory: GiB that a candidate may need.
        seed: Of all random numbers.
        output: The folder of the results.
    """
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="Sparse CSR")  # that it is in beta
    floor = measure.floor(device)
    about = report.machine(device) | {"columns": COLUMNS, "channels": CHANNELS, "seed": seed}
    about |= {"GB/s": floor["bytes_per_s"] / 1e9, "GFLOP/s": floor["flop_per_s"] / 1e9}
    rows: list[dict[str, Any]] = []
    tables: dict[str, list[dict[str, Any]]] = {}
    for size in sizes:
        fine, coarse = SIZES.get(size) or map(int, size.split(":"))
        for operation, make in (("product", product), ("top-k", search)):
            for kind, shape, k in (("unpool", (coarse, fine), 32), ("pool", (fine, coarse), 2)):
                torch.manual_seed(seed)
                k = min(k, shape[0])
                case = make(*shape, k, device, memory * 2**30)
                check_all(case, budget)
                head = {"operation": operation, "size": size, "kind": kind, "k": k}
                head |= {"num_source": shape[0], "num_target": shape[1]}
                for part in (FORWARD, STEP):
                    row = head | {"pass": part}
                    row |= measured(case, part, floor, device, repeat, budget)
                    cells = line(row, case.candidates)
                    rows.append(row)
                    tables.setdefault(f"{operation}, {part}", []).append(cells)
                    print(f"{operation}, {part}: {cells}", flush=True)
    print(report.write(output, "ops", report.command(), rows, tables, about, NOTES))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
