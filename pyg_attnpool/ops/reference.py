r"""Dense, readable ground truth of every operation. Equation numbers are those of `"Learning
Feature Aggregation for Deep 3D Morphable Models" <https://arxiv.org/abs/2105.02173>`_.

Nothing here is fast, and nothing here is used outside of tests and benchmarks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_topk(query: Tensor, key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    r"""The :math:`k` keys of largest cosine to every query, equations (3) and (4). Of equal scores
    the smaller key index comes first.

    Args:
        query (torch.Tensor): Queries :obj:`[M, c]`.
        key (torch.Tensor): Keys :obj:`[N, c]`.
        k (int): The number of keys kept.

    Returns:
        Scores and key indices :obj:`[M, k]`, in descending order.
    """
    score = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).t()
    score, index = score.sort(dim=-1, descending=True, stable=True)
    return score[:, :k], index[:, :k]


def attention(query: Tensor, key: Tensor, k: int, log_beta: Tensor | None = None) -> Tensor:
    r"""The learned mapping as a dense matrix :obj:`[M, N]`, equations (3) to (6).

    Kept scores are clamped to at least :math:`10^{-25}` and divided by their sum; with
    :obj:`log_beta`, a softmax of :math:`\exp(\textrm{log\_beta}) \cdot s` takes its place.
    """
    score, index = cosine_topk(query, key, k)
    if log_beta is None:
        kept = score.clamp(min=1e-25)
        weight = kept / kept.sum(dim=-1, keepdim=True)
    else:
        weight = (log_beta.exp() * score).softmax(dim=-1)
    return torch.zeros(query.size(0), key.size(0)).to(weight).scatter(1, index, weight)


def fuse(attention: Tensor, prior: Tensor, fusion_weight: Tensor) -> Tensor:
    r"""The mixture of learned and precomputed mapping, equation (7)."""
    return fusion_weight * attention + (1 - fusion_weight) * prior


def apply(mapping: Tensor, x: Tensor) -> Tensor:
    r"""The aggregation of features :obj:`[B, N, F]` by a dense mapping :obj:`[M, N]`,
    equation (1)."""
    return torch.einsum("mn,bnf->bmf", mapping, x)


def chebyshev(laplacian: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    r"""The Chebyshev convolution :math:`\sum_k T_k(\hat{L}) \, \mathbf{x} \, \Theta_k` of features
    :obj:`[B, N, F]` with a dense scaled Laplacian :obj:`[N, N]` and weights
    :obj:`[K, F, F']`."""
    terms = [x, apply(laplacian, x)]
    while len(terms) < weight.size(0):
        terms.append(2 * apply(laplacian, terms[-1]) - terms[-2])
    return sum(term @ theta for term, theta in zip(terms, weight, strict=False))
