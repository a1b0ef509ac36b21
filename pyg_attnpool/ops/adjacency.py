r"""The adjacency of a pooled graph, :math:`\mathbf{S} \mathbf{A} \mathbf{S}^{\top}`, as sparse
products."""

import torch
from torch import Tensor


def pool_adjacency(
    row: Tensor,
    col: Tensor,
    weight: Tensor,
    size: tuple[int, int],
    edge_index: Tensor,
    edge_weight: Tensor | None = None,
    remove_self_loops: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The edges of a pooled graph: the entries of :math:`\mathbf{S} \mathbf{A}
    \mathbf{S}^{\top}` for a mapping :math:`\mathbf{S}`, given by its entries, and the weighted
    adjacency :math:`\mathbf{A}`. Differentiable in both weights.

    Args:
        row (torch.Tensor): Target vertex of every entry.
        col (torch.Tensor): Source vertex of every entry.
        weight (torch.Tensor): Value of every entry.
        size (tuple): The numbers of target and source vertices.
        edge_index (torch.Tensor): Edges :obj:`[2, E]` between source vertices. Repeated edges add.
        edge_weight (torch.Tensor, optional): Edge weights :obj:`[E]`.
            (default: :obj:`None`, ones)
        remove_self_loops (bool, optional): If set to :obj:`True`, edges within one target vertex
            are left out. (default: :obj:`False`)

    Returns:
        Edges :obj:`[2, E']` between target vertices, sorted and without repetition, and their
        weights :obj:`[E']` of the type of :obj:`edge_weight`.

    Raises:
        ValueError: If a shape does not fit, or an edge has a vertex that is no source vertex.
        TypeError: If edges are not integers, or weights no floating point numbers.

    >>> row, col = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])  # 0 and 1 are joined
    >>> edge_index = torch.tensor([[1, 2], [2, 1]])
    >>> pool_adjacency(row, col, torch.tensor([0.5, 0.5, 1.0]), (2, 3), edge_index)
    (tensor([[0, 1],
            [1, 0]]), tensor([0.5000, 0.5000]))
    """
    num_target, num_source = size
    if edge_weight is None:
        edge_weight = weight.new_ones(edge_index.size(-1))
    _check_edges(edge_index, edge_weight, num_source)
    weight = weight.to(edge_weight.dtype)

    source, order = edge_index[0].long().sort()
    adjacency = source, edge_index[1].long()[order], edge_weight[order]
    product = _multiply((row, col, weight), adjacency, num_source, num_source)
    col, order = col.sort()
    transposed = col, row[order], weight[order]
    row, col, value = _multiply(product, transposed, num_source, num_target)

    if remove_self_loops:
        kept = row != col
        row, col, value = row[kept], col[kept], value[kept]
    return torch.stack([row, col]), value


def _check_edges(edge_index: Tensor, edge_weight: Tensor, num_nodes: int) -> None:
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"Expected 'edge_index' to be a long tensor (got {edge_index.dtype})")
    if not edge_weight.is_floating_point():
        raise TypeError(
            f"Expected 'edge_weight' to be a floating point tensor (got {edge_weight.dtype})"
        )
    if edge_index.dim() != 2 or edge_index.size(0) != 2:
        raise ValueError(f"Expected 'edge_index' of shape [2, E] (got {list(edge_index.shape)})")
    if edge_weight.shape != edge_index.shape[1:]:
        raise ValueError(
            f"Expected 'edge_weight' of shape [{edge_index.size(1)}] "
            f"(got {list(edge_weight.shape)})"
        )
    if edge_index.numel() > 0:
        low, high = int(edge_index.min()), int(edge_index.max())
        if low < 0 or high >= num_nodes:
            raise ValueError(
                f"Expected edges between vertices 0 to {num_nodes - 1} (got {low} to {high})"
            )


def _multiply(
    a: tuple[Tensor, Tensor, Tensor],
    b: tuple[Tensor, Tensor, Tensor],
    num_inner: int,
    num_cols: int,
) -> tuple[Tensor, Tensor, Tensor]:
    # The product of two sparse matrices given by row, column and value. The second one is sorted by
    # row. PyTorch's sparse product has no second derivative and no half precision, and its backward
    # pass is several times slower.
    (a_row, a_col, a_value), (b_row, b_col, b_value) = a, b
    count = torch.bincount(b_row, minlength=num_inner)
    start = count.cumsum(0) - count
    count, start = count[a_col], start[a_col]  # entries of b in the row that each entry of a meets
    left = torch.arange(a_col.numel(), device=a_col.device).repeat_interleave(count)
    place = torch.arange(left.numel(), device=left.device) - (count.cumsum(0) - count)[left]
    right = start[left] + place
    entry, slot = (a_row[left] * num_cols + b_col[right]).unique(return_inverse=True)
    product = a_value[left] * b_value[right]
    value = product.new_zeros(entry.numel()).index_add(0, slot, product)
    row = torch.div(entry, num_cols, rounding_mode="floor")
    return row, entry - row * num_cols, value
