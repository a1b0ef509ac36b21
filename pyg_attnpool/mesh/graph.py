r"""Graphs of vertices, faces or corners as SciPy takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray

if TYPE_CHECKING:
    from scipy.sparse import csr_array


def graph_of(pairs: ndarray, size: int, weight: ndarray | None = None) -> csr_array:
    r"""The graph :obj:`[size, size]` whose edges are pairs :obj:`[P, 2]`, each of weight one or of
    its own."""
    from scipy.sparse import coo_array

    ends = pairs.reshape(-1, 2).T.astype(np.int32)  # earlier SciPy takes no long indices
    weight = np.ones(ends.shape[1]) if weight is None else weight
    return coo_array((weight, ends), shape=(size, size)).tocsr()


def components(pairs: ndarray, size: int) -> ndarray:
    r"""The component :obj:`[size]` of every node, from 0 without gaps."""
    from scipy.sparse.csgraph import connected_components

    return connected_components(graph_of(pairs, size), directed=False)[1].astype(np.int64)
