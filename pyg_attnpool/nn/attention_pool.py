from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from pyg_attnpool.mapping import Mapping
from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.nn.base import PoolingLayer
from pyg_attnpool.nn.mapping_pool import MappingPool
from pyg_attnpool.ops.attention import attend, attention, cosine_at, dense_attention
from pyg_attnpool.ops.backend import at_least_single, own_types
from pyg_attnpool.ops.search import Search, cosine_topk
from pyg_attnpool.ops.sparse import Pattern, fuse_slots

K_POOL, K_UNPOOL = 2, 32

# The settings of the paper, by which `published` makes a layer.
PUBLISHED: dict[str, Any] = {"init": "positions", "normalization": "sum", "fusion_weight": 0.2}

# The channels that an initialisation fills.
NEEDED = {"lifted": 4, "prior": 1, "positions": 3, "normal": 1, "uniform": 1}

SMOOTHING = 64  # steps in which keys made from a prior take their neighbours' values

# The class that a constructor is called on, AttentionUnpool or one of your own too.
Layer = TypeVar("Layer", bound="AttentionPool")


class AttentionPool(PoolingLayer):
    r"""The learned pooling of mesh features from the `"Learning Feature Aggregation for Deep 3D
    Morphable Models" <https://arxiv.org/abs/2105.02173>`_ paper

    .. math::
        \mathbf{y}_i = \sum_{j \in \mathcal{N}_i} m_{ij} \, \mathbf{x}_j, \qquad
        m_{ij} = w_a \, a_{ij} + (1 - w_a) \, p_{ij}

    where :math:`\mathcal{N}_i` are the :math:`k` source vertices whose keys are closest to the
    query of target vertex :math:`i` by their cosine
    :math:`s_{ij} = \cos(\mathbf{q}_i, \mathbf{k}_j)`, the attention :math:`a_{ij}` is the softmax
    of :math:`\beta s_{ij}` over them, :math:`\mathbf{P}` is a precomputed prior and :math:`w_a` a
    learned scalar. Keys and queries are parameters shared by all samples; after training,
    :meth:`freeze` leaves a fixed sparse matrix.

    The mapping starts as :math:`3 \mathbf{P} - 2 \mathbf{A}` (:math:`w_a = -2`) with
    :math:`\mathbf{A}` an average over the nearest vertices. It sharpens what the prior blurs, and
    is ahead of the prior from the first steps of training. :meth:`published` makes the layer with
    the settings of the paper.

    From call to call the search for the closest keys remembers what it has found
    (:class:`~pyg_attnpool.ops.search.Search`), which changes no result. With
    :obj:`layer.search = None` every call searches in full.

    Args:
        num_source (int): The number of source vertices :math:`N`.
        num_target (int): The number of target vertices :math:`M`.
        channels (int, optional): Size of each key and query. (default: :obj:`21`)
        k (int, optional): The number of source vertices kept per target vertex. If :obj:`None`,
            all are kept and applied as a dense matrix, for small levels. (default: :obj:`2`)
        prior (Mapping, optional): The precomputed mapping :math:`\mathbf{P}`, or any matrix that
            :meth:`Mapping.from_matrix` takes. If :obj:`None`, the attention stands alone.
            (default: :obj:`None`)
        fusion_weight (float, optional): The initial :math:`w_a`. (default: :obj:`-2.0`)
        source_pos (torch.Tensor, optional): Positions :obj:`[N, 3]` of the source vertices,
            normalised as by :meth:`MeshHierarchy.positions`: centred by the mean and divided by
            the standard deviation of the template. (default: :obj:`None`)
        target_pos (torch.Tensor, optional): The same :obj:`[M, 3]` for the target vertices.
            (default: :obj:`None`)
        init (str, optional): How keys and queries start. If :obj:`None`, it is :obj:`"lifted"`
            where there are positions, :obj:`"prior"` where there is only a prior, else
            :obj:`"normal"`. (default: :obj:`None`)

            1. :obj:`"lifted"`: positions lifted to the sphere by
            :math:`\mathbf{p} \mapsto (2 \mathbf{p}, |\mathbf{p}|^2 - 1) / (|\mathbf{p}|^2 + 1)` in
            the first four channels plus N(0, 0.02²) in all, so that the first
            :math:`\mathcal{N}_i` are about the nearest vertices

            2. :obj:`"prior"`: keys are random vectors, smoothed over the source vertices that the
            prior connects, and a query is the prior's own mixture of keys, so that the first
            :math:`\mathcal{N}_i` contain what the prior takes

            3. :obj:`"positions"`: 0.1 times the position in the first three channels plus
            0.1 U(0, 1) in all; only the latter without positions

            4. :obj:`"normal"`: 0.1 N(0, 1)

            5. :obj:`"uniform"`: 0.1 U(0, 1)
        normalization (str, optional): :obj:`"softmax"` takes the softmax of :math:`\beta s_{ij}`
            with a learned :math:`\beta = \exp(\textrm{log\_beta})`, started at 3 over the mean gap
            between a row's largest and smallest kept score, or with :obj:`k=None` between its
            largest and the one that the default :obj:`k` would keep last. :obj:`"sum"` clamps the
            kept scores to at least :math:`10^{-25}` and divides them by their sum, as the paper
            does. (default: :obj:`"softmax"`)

    Shapes:
        - **input:** features :math:`(N, F)`, :math:`(B, N, F)` or a mini-batch
          :math:`(B \cdot N, F)`
        - **output:** features :math:`(M, F)`, :math:`(B, M, F)` or :math:`(B \cdot M, F)`

    Raises:
        ValueError: If :obj:`k` exceeds :obj:`num_source`, the prior or positions do not fit the
            vertex counts, or an option is unknown.

    Example:
        >>> pool = AttentionPool(100, 25)
        >>> pool(torch.randn(8, 100, 16)).shape
        torch.Size([8, 25, 16])
    """

    key: Parameter
    query: Parameter
    fusion_weight: Parameter | None
    log_beta: Parameter | None
    prior_index: Tensor | None
    prior_weight: Tensor
    source_pos: Tensor | None
    target_pos: Tensor | None
    search: Search | None
    default_k = K_POOL
    _of_slots = (("prior_weight", "prior_index"),)

    def __init__(
        self,
        num_source: int,
        num_target: int,
        channels: int = 21,
        k: int | None = K_POOL,
        prior: Any = None,
        fusion_weight: float = -2.0,
        source_pos: Tensor | None = None,
        target_pos: Tensor | None = None,
        init: str | None = None,
        normalization: str = "softmax",
    ):
        super().__init__()
        sizes = num_source, num_target, channels, 1 if k is None else k
        if not all(isinstance(size, int | np.integer) for size in sizes):
            raise TypeError(
                f"Expected 'num_source', 'num_target', 'channels' and 'k' to be integers "
                f"(got {num_source}, {num_target}, {channels} and {k})"
            )
        if min(sizes) < 1:
            raise ValueError(
                f"Expected 'num_source', 'num_target', 'channels' and 'k' to be positive "
                f"(got {num_source}, {num_target}, {channels} and {k})"
            )
        if k is not None and k > num_source:
            raise ValueError(
                f"Expected 'k' to be at most the number of source vertices {num_source} (got {k})"
            )
        if normalization not in ("sum", "softmax"):
            raise ValueError(
                f"Expected 'normalization' to be 'sum' or 'softmax' (got {normalization!r})"
            )
        if not math.isfinite(fusion_weight):
            raise ValueError(f"Expected a finite 'fusion_weight' (got {fusion_weight})")
        source_pos = _check_positions("source_pos", source_pos, num_source)
        target_pos = _check_positions("target_pos", target_pos, num_target)
        if prior is not None:
            prior = Mapping.from_matrix(prior).detach().to(torch.get_default_dtype())
            if (prior.num_target, prior.num_source) != (num_target, num_source):
                raise ValueError(
                    f"Expected a 'prior' from {num_source} to {num_target} vertices "
                    f"(got {prior.num_source} to {prior.num_target})"
                )
        init = _check_init(init, channels, prior, source_pos, target_pos)

        self.num_source = num_source
        self.num_target = num_target
        self.channels = channels
        self.k = k
        self.init = init
        self.normalization = normalization
        self.initial_fusion_weight = fusion_weight

        self.key = Parameter(torch.empty(num_source, channels))
        self.query = Parameter(torch.empty(num_target, channels))
        # Of shape [1], since FSDP shards no scalars.
        self.fusion_weight = None if prior is None else Parameter(torch.empty(1))
        self.log_beta = Parameter(torch.empty(1)) if normalization == "softmax" else None
        self.prior_index = None
        if prior is not None:
            slots = prior.index.clone()
            self.register_index("prior_index", slots, (num_target, "k"), num_source)
        self.register_buffer("prior_weight", None if prior is None else prior.weight.clone())
        # Needed again by reset_parameters() only, so no part of the learned state.
        self.register_buffer("source_pos", source_pos, persistent=False)
        self.register_buffer("target_pos", target_pos, persistent=False)

        self.search = None if k is None else Search(num_target, num_source, channels, k)
        self.reset_parameters()
        self._renew()

    @classmethod
    def published(cls: type[Layer], *args: Any, **kwargs: Any) -> Layer:
        r"""The layer with the settings of the paper: keys and queries from positions, scores
        divided by their sum, and :math:`w_a` from 0.2. The arguments are those of the constructor.

        Example:
            >>> AttentionPool.published(100, 25).normalization
            'sum'
        """
        return cls(*args, **{**PUBLISHED, **kwargs})

    @classmethod
    def from_hierarchy(
        cls: type[Layer], hierarchy: MeshHierarchy, level: int, **kwargs: Any
    ) -> Layer:
        r"""The layer between a level of a hierarchy and the next coarser one, with the hierarchy's
        mapping as its prior: pooling down from :obj:`level`, unpooling back up to it.

        Args:
            hierarchy (MeshHierarchy): The levels of the template.
            level (int): The finer of the two levels.
            **kwargs (optional): Further arguments of the constructor. Without :obj:`k`, it is the
                default, or all source vertices where there are fewer.

        Raises:
            ValueError: If there is no such level, or as the constructor does.

        Example:
            >>> from pyg_attnpool import MeshHierarchy
            >>> grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0), torch.zeros(1))
            >>> rows = torch.arange(12).view(3, 4)[:, :3].flatten()
            >>> faces = torch.cat([torch.stack([rows, rows + 4, rows + 1], dim=1),
            ...                    torch.stack([rows + 1, rows + 4, rows + 5], dim=1)])
            >>> hierarchy = MeshHierarchy.from_template((grid.numpy(), faces.numpy()), factors=[2])
            >>> AttentionPool.from_hierarchy(hierarchy, 0)
            AttentionPool(16, 8, channels=21, k=2)
        """
        num_levels = len(hierarchy.down)
        if not 0 <= level < num_levels:
            raise ValueError(f"Expected a 'level' from 0 to {num_levels - 1} (got {level})")
        source, target = cls._levels(level)
        num_source, num_target = (hierarchy.num_vertices[i] for i in (source, target))
        kwargs = {
            "k": min(cls.default_k, num_source),
            "prior": hierarchy.down[level] if source == level else hierarchy.up[level],
            "source_pos": hierarchy.positions(source),
            "target_pos": hierarchy.positions(target),
            **kwargs,
        }
        return cls(num_source, num_target, **kwargs)

    @staticmethod
    def _levels(level: int) -> tuple[int, int]:
        # The levels of source and target.
        return level, level + 1

    @classmethod
    def from_mapping(
        cls: type[Layer],
        matrix: Any,
        source_pos: Tensor | None = None,
        target_pos: Tensor | None = None,
        **kwargs: Any,
    ) -> Layer:
        r"""The layer in the place of a matrix that a model holds, with that matrix as its prior.
        It can be called, or used as the matrix was:

        .. code-block:: python

            model.D = ModuleList(AttentionPool.from_mapping(d) for d in model.D)

        :obj:`layer @ x`, :obj:`torch.matmul(layer, x)`, :obj:`torch.mm(layer, x)` and
        :obj:`torch.sparse.mm(layer, x)` apply it to features :obj:`[N, F]` or :obj:`[B, N, F]`;
        :obj:`layer.size()`, :obj:`layer.shape`, :obj:`layer._indices()` and
        :obj:`layer._values()` (or :obj:`indices` and :obj:`values`) are those of a sparse COO
        tensor, in which entries may repeat. The last two each search for the top :math:`k`, a
        product only once.

        A matrix :obj:`[1, M + 1, N + 1]` has a dummy vertex at the end, as in Neural3DMM. As a
        matrix, the layer then takes and gives features with the dummy, which keeps the share of
        itself that it had; called, it takes and gives features without.

        Args:
            matrix: The matrix :obj:`[M, N]` in any form that :meth:`Mapping.from_matrix` takes,
                or a :class:`~pyg_attnpool.nn.MappingPool`, or a :class:`torch.Tensor`
                :obj:`[1, M + 1, N + 1]` with a dummy vertex. The layer is made on its device and,
                if it is a :class:`torch.Tensor`, in its type.
            source_pos (torch.Tensor, optional): Positions :obj:`[N, 3]` of the source vertices,
                normalised as the constructor says. (default: :obj:`None`)
            target_pos (torch.Tensor, optional): The same :obj:`[M, 3]` for the target vertices.
                (default: :obj:`None`)
            **kwargs (optional): Further arguments of the constructor. Without :obj:`k`, it is the
                default, or all source vertices where there are fewer. Without positions, keys and
                queries come from the matrix itself (:obj:`init="prior"`).

        Raises:
            ValueError: If the matrix does not fit the positions, its dummy vertex is not apart
                from the others, or as the constructor does.

        Example:
            >>> layer = AttentionPool.from_mapping(torch.eye(4)[:2])
            >>> (layer @ torch.ones(4, 8)).shape
            torch.Size([2, 8])
        """
        prior, dummy_weight = _split_dummy(matrix)
        prior = Mapping.from_matrix(prior).detach()
        size = [prior.num_target, prior.num_source]
        if source_pos is not None and target_pos is not None:
            wanted = [len(target_pos), len(source_pos)]
            if size != wanted:
                raise ValueError(
                    f"Expected a matrix of shape {wanted} for 'source_pos' of {wanted[1]} and "
                    f"'target_pos' of {wanted[0]} vertices (got {size})"
                )
        kwargs.setdefault("k", min(cls.default_k, prior.num_source))
        source_pos, target_pos = (
            pos if pos is None else torch.as_tensor(pos).cpu() for pos in (source_pos, target_pos)
        )
        layer = cls(
            prior.num_source,
            prior.num_target,
            prior=prior.to("cpu"),
            source_pos=source_pos,
            target_pos=target_pos,
            **kwargs,
        )
        layer.dummy_weight = dummy_weight
        typed = isinstance(matrix, Tensor | MappingPool)
        layer.to(prior.device, prior.dtype if typed else None)
        layer.prior_weight.copy_(prior.weight)  # with all of its digits
        return layer

    @torch.no_grad()
    def reset_parameters(self) -> None:
        r"""Resets all learnable parameters of the module."""
        if self.init == "prior" and self.prior_index is not None:
            key, query = _vectors_of_prior(self.prior_index, self.prior_weight, *self.key.shape)
            self.key.copy_(key)
            self.query.copy_(query)
        else:
            _init_vectors(self.key, self.source_pos, self.init)
            _init_vectors(self.query, self.target_pos, self.init)
        if self.fusion_weight is not None:
            self.fusion_weight.fill_(self.initial_fusion_weight)
        if self.log_beta is not None:
            # The last kept source starts with e^-3 of the first one's weight. Where all are kept,
            # that would be almost an average of the mesh, so the layer starts as by default.
            k = min(self.default_k, self.num_source) if self.k is None else self.k
            score = cosine_at(self.query, self.key, cosine_topk(self.query, self.key, k))
            gap = (score[:, 0] - score[:, -1]).mean()
            self.log_beta.copy_(torch.where(gap > 0, (3 / gap).log(), torch.zeros_like(gap)))

    def _derive(self) -> None:
        # The search remembers keys of one type. Complex ones are refused where they are used.
        if self.key.is_complex():
            return
        dtype = at_least_single(self.key.dtype)
        if self.search is not None and self.k is not None and self.search.last_key.dtype != dtype:
            self.search = Search(self.num_target, self.num_source, self.channels, self.k, dtype)

    def slots(self) -> tuple[Tensor, Tensor]:
        r"""Index and weight :obj:`[M, k]` of every slot, those of the prior last."""
        return self._fused(self.prior_index)[:2]

    def _prior(self, prior_index: Tensor | None) -> tuple[Any, Tensor | None]:
        if prior_index is None:
            return None, None
        return (prior_index, self.prior_weight), self.fusion_weight

    def _fused(self, prior_index: Tensor | None) -> tuple[Tensor, Tensor, Pattern | None]:
        prior, share = self._prior(prior_index)
        if self.k is not None:
            return attention(self.query, self.key, self.k, self.log_beta, prior, share, self.search)
        weight = dense_attention(self.query, self.key, self.log_beta)
        index = torch.arange(self.num_source, device=weight.device).expand_as(weight)
        if prior is not None and share is not None:
            index, weight = fuse_slots(index, weight, prior[0], prior[1].to(weight.dtype), share)
        return index, weight, None

    def attention(self) -> Mapping:
        r"""The learned mapping alone, equations (3) to (6)."""
        return Mapping(*self._fused(None)[:2], self.num_source)

    def mapping(self) -> Mapping:
        r"""The mapping that :meth:`forward` applies: learned, and fused with the prior, equation
        (7)."""
        return Mapping(*self.slots(), self.num_source)

    def _dense(self) -> Tensor:
        # Slots for all source vertices would be gathered one by one: they are a matrix product.
        matrix = dense_attention(self.query, self.key, self.log_beta)
        if self.prior_index is None or self.fusion_weight is None:
            return matrix
        prior_weight = (1 - self.fusion_weight) * self.prior_weight.to(matrix.dtype)
        return (self.fusion_weight * matrix).scatter_add(1, self.prior_index, prior_weight)

    def rows_forward(self, x: Tensor) -> Tensor:
        if self.k is not None:
            prior, share = self._prior(self.prior_index)
            vectors = self.query, self.key, self.k, self.log_beta
            return attend(x, *vectors, prior, share, self.search)
        with own_types(x):  # the result is of the type of x
            y = self._dense().to(x.dtype) @ x.reshape(self.num_source, -1)
        return y.view(self.num_target, *x.shape[1:])

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}({self.num_source}, {self.num_target}, "
            f"channels={self.channels}, k={self.k})"
        )


class AttentionUnpool(AttentionPool):
    r"""The learned unpooling of mesh features from the `"Learning Feature Aggregation for Deep 3D
    Morphable Models" <https://arxiv.org/abs/2105.02173>`_ paper: the layer of
    :class:`AttentionPool`, from coarse source vertices to fine target vertices, with more source
    vertices kept per target vertex.

    Args:
        num_source (int): The number of source (coarse) vertices :math:`N`.
        num_target (int): The number of target (fine) vertices :math:`M`.
        channels (int, optional): Size of each key and query. (default: :obj:`21`)
        k (int, optional): The number of source vertices kept per target vertex, at most
            :obj:`num_source`. If :obj:`None`, all are kept and applied as a dense matrix, for
            small levels. (default: :obj:`32`)
        **kwargs (optional): Further arguments of :class:`AttentionPool`.

    Shapes:
        - **input:** features :math:`(N, F)`, :math:`(B, N, F)` or a mini-batch
          :math:`(B \cdot N, F)`
        - **output:** features :math:`(M, F)`, :math:`(B, M, F)` or :math:`(B \cdot M, F)`

    Raises:
        ValueError: As :class:`AttentionPool` does.

    Example:
        >>> unpool = AttentionUnpool(40, 100)
        >>> unpool(torch.randn(8, 40, 16)).shape
        torch.Size([8, 100, 16])
    """

    default_k = K_UNPOOL

    def __init__(
        self,
        num_source: int,
        num_target: int,
        channels: int = 21,
        k: int | None = K_UNPOOL,
        *args: Any,
        **kwargs: Any,
    ):
        super().__init__(num_source, num_target, channels, k, *args, **kwargs)

    @staticmethod
    def _levels(level: int) -> tuple[int, int]:
        return level + 1, level


def _split_dummy(matrix: Any) -> tuple[Any, float | None]:
    # A matrix without its dummy vertex, and the share of itself that the dummy keeps.
    if isinstance(matrix, MappingPool):
        return matrix.mapping(), matrix.dummy_weight
    if not isinstance(matrix, Tensor) or matrix.dim() != 3:
        return matrix, None
    if matrix.size(0) != 1 or min(matrix.shape[1:]) < 2:
        raise ValueError(
            f"Expected a matrix of shape [num_target, num_source], or [1, num_target + 1, "
            f"num_source + 1] with a dummy vertex (got {list(matrix.shape)})"
        )
    dense = matrix.detach().to_dense()[0]
    linked = int(dense[-1, :-1].count_nonzero() + dense[:-1, -1].count_nonzero())
    if linked > 0:
        raise ValueError(
            f"Expected a dummy vertex in the last row and column, with no entry but at "
            f"[-1, -1] (got {linked} others)"
        )
    return dense[:-1, :-1], dense[-1, -1].item()


def _check_positions(name: str, pos: Tensor | None, num_nodes: int) -> Tensor | None:
    if pos is None:
        return None
    if pos.shape != (num_nodes, 3):
        raise ValueError(f"Expected '{name}' of shape [{num_nodes}, 3] (got {list(pos.shape)})")
    if not torch.isfinite(pos).all():
        raise ValueError(f"Expected finite '{name}' (got NaN or infinity)")
    return pos.detach().to(torch.get_default_dtype(), copy=True)


def _check_init(
    init: str | None,
    channels: int,
    prior: Mapping | None,
    source_pos: Tensor | None,
    target_pos: Tensor | None,
) -> str:
    missing = [pos is None for pos in (source_pos, target_pos)]
    if init is None:
        if any(missing) and not all(missing):
            raise ValueError("Expected both 'source_pos' and 'target_pos' (got None for one)")
        if not any(missing):
            init = "lifted"
        else:
            init = "normal" if prior is None else "prior"
    if init not in NEEDED:
        raise ValueError(f"Expected 'init' to be one of {list(NEEDED)} (got {init!r})")
    if any(missing) and (init == "lifted" or (init == "positions" and not all(missing))):
        raise ValueError(
            f"Expected 'source_pos' and 'target_pos' for init={init!r} (got None for one or both)"
        )
    if init == "prior" and prior is None:
        raise ValueError("Expected a 'prior' for init='prior' (got None)")
    if channels < NEEDED[init] and not (init == "positions" and all(missing)):
        raise ValueError(
            f"Expected at least {NEEDED[init]} 'channels' for init={init!r} (got {channels})"
        )
    return init


def _init_vectors(vectors: Tensor, pos: Tensor | None, init: str) -> None:
    if init == "lifted" and pos is not None:
        square = pos.square().sum(dim=-1, keepdim=True)
        vectors.normal_(std=0.02)
        vectors[:, :4] += (torch.cat([2 * pos, square - 1], dim=-1) / (square + 1)).to(
            vectors.dtype
        )
    elif init == "normal":
        vectors.normal_(std=0.1)
    else:
        vectors.uniform_(0, 0.1)
        if init == "positions" and pos is not None:
            vectors[:, :3] += 0.1 * pos


def _vectors_of_prior(
    index: Tensor, weight: Tensor, num_source: int, channels: int
) -> tuple[Tensor, Tensor]:
    # Random keys take the mean of what the prior connects them with, again and again. Made
    # orthogonal in every step, the channels tend to the smoothest functions on the source
    # vertices, by which neighbours are alike and distant vertices are not. On few vertices there
    # are few smooth functions, so the other channels hold a little noise alone. A source vertex
    # that the prior does not take keeps its own random key.
    weight = weight.abs()
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-12)
    slots = weight.unsqueeze(-1)
    total = weight.new_zeros(num_source).index_add(0, index.flatten(), weight.flatten())
    taken = (total > 0).unsqueeze(-1)
    total = total.clamp(min=1e-12).unsqueeze(-1)
    smooth = min(channels, max(1, num_source // 4))
    key = torch.randn(num_source, smooth, device=weight.device).to(weight.dtype)
    for _ in range(SMOOTHING):
        query = (slots * key[index]).sum(dim=1)
        entries = (slots * query.unsqueeze(1)).flatten(0, 1)
        mean = torch.zeros_like(key).index_add(0, index.flatten(), entries) / total
        key = torch.where(taken, (key + mean) / 2, key)
        key = torch.linalg.qr(key).Q
    key = F.pad(F.normalize(key, dim=1), (0, channels - smooth))
    key = key + 0.02 * torch.randn_like(key)
    return key, (slots * key[index]).sum(dim=1)
