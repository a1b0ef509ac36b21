r"""Pooling and convolution by name, class or callable, as PyG's resolvers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch_geometric.nn
from torch import Tensor
from torch.nn import Module
from torch_geometric.nn import MessagePassing

from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.nn.attention_pool import PUBLISHED, AttentionPool, AttentionUnpool
from pyg_attnpool.nn.base import VertexLayer
from pyg_attnpool.nn.cheb_conv import StaticChebConv
from pyg_attnpool.nn.learned_pools import (
    DiffPool,
    FullPool,
    WeightedPool,
    average_mapping,
    ring_mapping,
)
from pyg_attnpool.nn.mapping_pool import MappingPool
from pyg_attnpool.nn.spiral_conv import SpiralConv
from pyg_attnpool.nn.wrappers import GraphConv, with_rows

POOLINGS = ("qem", "attention", "full", "diffpool", "average", "variant")
# The names of the layers of this package, by which a resolver finds them too.
POOLING_NAMES: dict[type[Module], str] = {
    MappingPool: "qem",
    AttentionPool: "attention",
    AttentionUnpool: "attention",
    FullPool: "full",
    DiffPool: "diffpool",
    WeightedPool: "variant",
}
CONVOLUTION_NAMES: dict[type[Module], str] = {StaticChebConv: "cheb", SpiralConv: "spiral"}
Query = str | type[Module] | Callable[..., Module]


def name_of(query: Any) -> Any:
    r"""The name by which a resolver finds a class. All else stays as it is.

    >>> name_of(AttentionPool), name_of("qem")
    ('attention', 'qem')
    """
    if inspect.isclass(query) and issubclass(query, MessagePassing):
        return query.__name__
    names: dict[Any, str] = {**POOLING_NAMES, **CONVOLUTION_NAMES}
    return names.get(query, query) if inspect.isclass(query) else query


def pooling_resolver(
    query: Query,
    hierarchy: MeshHierarchy,
    level: int,
    direction: Literal["down", "up"],
    in_channels: int,
    published: bool = False,
    **kwargs: Any,
) -> VertexLayer:
    r"""The pooling or unpooling between a level of a hierarchy and the next coarser one.

    Args:
        query (str, type or callable): One of

            1. :obj:`"qem"`: the hierarchy's own mapping

            2. :obj:`"attention"`: :class:`~pyg_attnpool.nn.AttentionPool` or
            :class:`~pyg_attnpool.nn.AttentionUnpool` over it

            3. :obj:`"full"`: a matrix of parameters, :class:`~pyg_attnpool.nn.FullPool`

            4. :obj:`"diffpool"`: an assignment from the features,
            :class:`~pyg_attnpool.nn.DiffPool`

            5. :obj:`"average"`: equal weights over what simplification joined,
            :func:`~pyg_attnpool.nn.learned_pools.average_mapping`

            6. :obj:`"variant"`: trainable weights over the neighbours of the vertex that
            simplification kept, :class:`~pyg_attnpool.nn.WeightedPool`

            or one of these classes, or a callable that makes a layer from
            :obj:`(hierarchy, level, direction, in_channels, **kwargs)`.
        hierarchy (MeshHierarchy): The levels of the template.
        level (int): The finer of the two levels.
        direction (str): :obj:`"down"` or :obj:`"up"`.
        in_channels (int): Size of the features.
        published (bool, optional): If set to :obj:`True`, attention has the settings of the paper.
            (default: :obj:`False`)
        **kwargs (optional): Arguments of the layer.

    Raises:
        ValueError: If the query is unknown, or takes no arguments and gets some.

    Example:
        >>> from pyg_attnpool.nn import pooling_resolver
        >>> pooling_resolver("attention", hierarchy, level=0, direction="up", in_channels=16)
        AttentionUnpool(161, 642, channels=21, k=32)
    """
    if direction not in ("down", "up"):
        raise ValueError(f"Expected 'direction' to be 'down' or 'up' (got {direction!r})")
    name = POOLING_NAMES.get(query, query) if isinstance(query, type) else query
    if not isinstance(name, str):
        if not callable(query):
            raise ValueError(f"Expected a pooling by name, class or callable (got {query!r})")
        layer = query(hierarchy, level, direction, in_channels, **kwargs)
        return with_rows(layer, hierarchy.num_vertices[level + (direction == "up")])
    name = name.lower()
    if name not in POOLINGS:
        raise ValueError(f"Expected a pooling of {list(POOLINGS)} (got {query!r})")
    if kwargs and name not in ("attention", "diffpool"):
        raise ValueError(f"Expected no pooling arguments with {name!r} (got {sorted(kwargs)})")

    up = direction == "up"
    source, target = (level + 1, level) if up else (level, level + 1)
    num_source, num_target = (hierarchy.num_vertices[i] for i in (source, target))
    dtype = torch.get_default_dtype()
    if name == "full":
        return FullPool(num_source, num_target)
    if name == "diffpool":
        edge_index = hierarchy.edge_index(source)
        return DiffPool(in_channels, num_target, edge_index, num_source, **kwargs)
    if name == "average":
        return MappingPool(average_mapping(hierarchy, level, up).to(dtype))
    if name == "variant":
        return WeightedPool(ring_mapping(hierarchy, level, up).to(dtype))
    if name == "qem":
        return MappingPool((hierarchy.up if up else hierarchy.down)[level].to(dtype))
    cls = AttentionUnpool if up else AttentionPool
    if kwargs.get("k") is not None:
        kwargs["k"] = min(kwargs["k"], num_source)
    return cls.from_hierarchy(hierarchy, level, **{**(PUBLISHED if published else {}), **kwargs})


def convolution_resolver(
    query: Query,
    hierarchy: MeshHierarchy,
    level: int,
    in_channels: int,
    out_channels: int,
    bias: bool = True,
    **kwargs: Any,
) -> VertexLayer:
    r"""The convolution on a level of a hierarchy.

    Args:
        query (str, type or callable): One of

            1. :obj:`"cheb"`: :class:`~pyg_attnpool.nn.StaticChebConv`, with :obj:`K=6` by default

            2. :obj:`"spiral"`: :class:`~pyg_attnpool.nn.SpiralConv`, with the arguments of
            :meth:`MeshHierarchy.spirals`

            3. the name or class of a convolution of :mod:`torch_geometric.nn`, such as
            :obj:`"GATv2Conv"`, with its arguments. :obj:`edge_attr="cartesian"` gives it the
            relative positions of neighbours, scaled to :math:`[0, 1]`, as
            :class:`~torch_geometric.nn.SplineConv` takes them; a list gives it a tensor
            :obj:`[E, D]` for every level, in the order of :meth:`MeshHierarchy.edge_index`

            4. a callable that makes a layer of features :obj:`[B, N, F]` from
            :obj:`(in_channels, out_channels, hierarchy, level, **kwargs)`
        hierarchy (MeshHierarchy): The levels of the template.
        level (int): The level.
        in_channels (int): Size of the input features.
        out_channels (int): Size of the output features.
        bias (bool, optional): Whether the convolution learns a bias. (default: :obj:`True`)
        **kwargs (optional): Arguments of the convolution. Of spirals, a list holds one value for
            every level that is convolved (:meth:`level_spirals`).

    Raises:
        ValueError: If the query is unknown.

    Example:
        >>> from pyg_attnpool.nn import convolution_resolver
        >>> conv = convolution_resolver("GCNConv", hierarchy, 0, in_channels=3, out_channels=16)
        >>> conv(torch.randn(2, 642, 3)).shape
        torch.Size([2, 642, 16])
    """
    num_nodes = hierarchy.num_vertices[level]
    edge_index = hierarchy.edge_index(level)
    if isinstance(query, type):
        query = CONVOLUTION_NAMES.get(query, query)
    if query == "cheb":
        kwargs = {"K": 6, **kwargs}
        return StaticChebConv(
            in_channels, out_channels, kwargs.pop("K"), edge_index, num_nodes, bias, **kwargs
        )
    if query == "spiral":
        spirals = level_spirals(hierarchy, level, **kwargs)
        return SpiralConv(in_channels, out_channels, spirals, bias)
    if isinstance(query, str):
        found = getattr(torch_geometric.nn, query, None)
        if not (isinstance(found, type) and issubclass(found, MessagePassing)):
            raise ValueError(
                f"Expected a convolution 'cheb', 'spiral' or of torch_geometric.nn (got {query!r})"
            )
        query = found
    if isinstance(query, type) and issubclass(query, MessagePassing):
        attr = _edge_attr(kwargs.pop("edge_attr", None), hierarchy, level, edge_index)
        if "bias" in inspect.signature(query).parameters:
            kwargs.setdefault("bias", bias)
        return GraphConv(query(in_channels, out_channels, **kwargs), edge_index, num_nodes, attr)
    if not callable(query):
        raise ValueError(f"Expected a convolution by name, class or callable (got {query!r})")
    layer = query(in_channels, out_channels, hierarchy, level, **kwargs)
    if isinstance(layer, MessagePassing):
        return GraphConv(layer, edge_index, num_nodes)
    return with_rows(layer, num_nodes)


def level_spirals(
    hierarchy: MeshHierarchy, level: int, spirals: Sequence[Tensor] | None = None, **kwargs: Any
) -> Tensor:
    r"""The spirals of a level: those given for all levels, or else
    :meth:`MeshHierarchy.spirals`, of whose arguments a list (but for :obj:`reference`) holds one
    value for every level that is convolved."""
    if spirals is not None:
        return spirals[level]
    chosen, num_levels = {}, len(hierarchy.down)
    for name, value in kwargs.items():
        if name != "reference" and isinstance(value, list | tuple):
            if len(value) != num_levels:
                raise ValueError(
                    f"Expected one '{name}' per level that is convolved, {num_levels} (got {value})"
                )
            value = value[level]
        chosen[name] = value
    return hierarchy.spirals(level, **chosen)


def _edge_attr(
    given: str | Sequence[Tensor] | None,
    hierarchy: MeshHierarchy,
    level: int,
    edge_index: Tensor,
) -> Tensor | None:
    if given is None:
        return None
    if not isinstance(given, str):
        if len(given) <= level or len(given[level]) != edge_index.size(1):
            raise ValueError(
                f"Expected 'edge_attr' of {edge_index.size(1)} edges for level {level} "
                f"(got {[len(attr) for attr in given]})"
            )
        return given[level]
    if given != "cartesian":
        raise ValueError(f"Expected 'edge_attr' to be 'cartesian' or tensors (got {given!r})")
    source, target = hierarchy.positions(level)[edge_index]
    offset = source - target  # as torch_geometric.transforms.Cartesian
    return offset / (2 * offset.abs().max()) + 0.5
