import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pyg_attnpool.mapping import Mapping
from pyg_attnpool.nn.mapping_pool import MappingPool, MatrixProtocol
from pyg_attnpool.ops.attention import attention, cosine_at, dense_attention
from pyg_attnpool.ops.backend import at_least_single
from pyg_attnpool.ops.layout import on_rows
from pyg_attnpool.ops.search import Search, cosine_topk
from pyg_attnpool.ops.sparse import Pattern, fuse_slots, map_rows


class _AttentionMapping(MatrixProtocol, torch.nn.Module):
    # What pooling and unpooling share, which is all but the default of k.

    _default_k: int

    def __init__(
        self,
        num_source: int,
        num_target: int,
        channels: int,
        k: int | None,
        prior: Any,
        fusion_weight: float,
        source_pos: Tensor | None,
        target_pos: Tensor | None,
        init: str,
        normalization: str,
    ):
        super().__init__()
        if min(num_source, num_target, channels, 1 if k is None else k) < 1:
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
        _check_init(init, channels, source_pos, target_pos)

        self.num_source = num_source
        self.num_target = num_target
        self.channels = channels
        self.k = k
        self.init = init
        self.normalization = normalization
        self.initial_fusion_weight = fusion_weight

        self.key = Parameter(torch.empty(num_source, channels))
        self.query = Parameter(torch.empty(num_target, channels))
        self.fusion_weight = None if prior is None else Parameter(torch.empty(()))
        self.log_beta = Parameter(torch.empty(())) if normalization == "softmax" else None

        prior_index = prior_weight = None
        if prior is not None:
            prior = Mapping.from_matrix(prior).detach()
            if (prior.num_target, prior.num_source) != (num_target, num_source):
                raise ValueError(
                    f"Expected a 'prior' from {num_source} to {num_target} vertices "
                    f"(got {prior.num_source} to {prior.num_target})"
                )
            prior_index, prior_weight = prior.index.clone(), prior.weight.clone()
        self.register_buffer("prior_index", prior_index)
        self.register_buffer("prior_weight", prior_weight)
        # Needed again by reset_parameters() only, so no part of the learned state.
        self.register_buffer("source_pos", source_pos, persistent=False)
        self.register_buffer("target_pos", target_pos, persistent=False)

        self.search = None if k is None else Search(num_target, num_source, channels, k)
        self.reset_parameters()

    @classmethod
    def from_mapping(
        cls,
        matrix: Any,
        source_pos: Tensor | None = None,
        target_pos: Tensor | None = None,
        **kwargs: Any,
    ):
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
                default, or all source vertices where there are fewer.

        Raises:
            ValueError: If the matrix does not fit the positions, its dummy vertex is not apart
                from the others, or as the constructor does.
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
        kwargs.setdefault("k", min(cls._default_k, prior.num_source))
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
        return layer.to(prior.device, matrix.dtype if isinstance(matrix, Tensor) else None)

    @torch.no_grad()
    def reset_parameters(self):
        r"""Resets all learnable parameters of the module."""
        _init_vectors(self.key, self.source_pos, self.init)
        _init_vectors(self.query, self.target_pos, self.init)
        if self.fusion_weight is not None:
            self.fusion_weight.fill_(self.initial_fusion_weight)
        if self.log_beta is not None:
            # The last kept source starts with e^-3 of the first one's weight. Where all are kept,
            # that would be almost an average of the mesh, so the layer starts as by default.
            k = min(self._default_k, self.num_source) if self.k is None else self.k
            score = cosine_at(self.query, self.key, cosine_topk(self.query, self.key, k))
            gap = (score[:, 0] - score[:, -1]).mean()
            self.log_beta.copy_((3 / gap).log() if gap > 0 else torch.zeros_like(gap))

    def _apply(self, fn: Any, recurse: bool = True):
        super()._apply(fn, recurse)
        dtype = at_least_single(self.key.dtype)
        if self.search is not None and self.search.last_key.dtype != dtype:
            self.search = Search(self.num_target, self.num_source, self.channels, self.k, dtype)
        return self

    def _slots(self) -> tuple[Tensor, Tensor]:
        return self._fused(self.prior_index)[:2]

    def _fused(self, prior_index: Tensor | None) -> tuple[Tensor, Tensor, Pattern | None]:
        prior = share = None
        if prior_index is not None:
            prior, share = (prior_index, self.prior_weight), self.fusion_weight
        if self.k is not None:
            return attention(self.query, self.key, self.k, self.log_beta, prior, share, self.search)
        weight = dense_attention(self.query, self.key, self.log_beta)
        index = torch.arange(self.num_source, device=weight.device).expand_as(weight)
        if prior is not None:
            index, weight = fuse_slots(index, weight, prior[0], prior[1].to(weight.dtype), share)
        return index, weight, None

    def attention(self) -> Mapping:
        r"""The learned mapping alone, equations (3) to (6)."""
        return Mapping(*self._fused(None)[:2], self.num_source)

    def mapping(self) -> Mapping:
        r"""The mapping that :meth:`forward` applies: learned, and fused with the prior, equation
        (7)."""
        return Mapping(*self._slots(), self.num_source)

    def _dense(self) -> Tensor:
        # Slots for all source vertices would be gathered one by one: they are a matrix product.
        matrix = dense_attention(self.query, self.key, self.log_beta)
        if self.prior_index is None:
            return matrix
        prior_weight = (1 - self.fusion_weight) * self.prior_weight.to(matrix.dtype)
        return (self.fusion_weight * matrix).scatter_add(1, self.prior_index, prior_weight)

    def forward(self, x: Tensor) -> Tensor:
        r"""Maps features from source to target vertices."""
        return on_rows(x, self.num_source, self.rows)

    def rows(self, x: Tensor) -> Tensor:
        r"""As :meth:`forward`, from rows :obj:`[N, B, F]` to rows :obj:`[M, B, F]`, so that a
        network transposes its features only once."""
        if self.k is not None:
            index, weight, transposed = self._fused(self.prior_index)
            return map_rows(index, weight, x, self.num_source, transposed)
        with torch.autocast(x.device.type, enabled=False):  # the result is of the type of x
            y = self._dense().to(x.dtype) @ x.reshape(self.num_source, -1)
        return y.view(self.num_target, *x.shape[1:])

    def freeze(self) -> MappingPool:
        r"""The layer without its parameters: the mapping as it is now, for inference."""
        with torch.no_grad():
            frozen = MappingPool(self.mapping())
        frozen.dummy_weight = self.dummy_weight
        return frozen

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}({self.num_source}, {self.num_target}, "
            f"channels={self.channels}, k={self.k})"
        )


class AttentionPool(_AttentionMapping):
    r"""The learned pooling of mesh features from the `"Learning Feature Aggregation for Deep 3D
    Morphable Models" <https://arxiv.org/abs/2105.02173>`_ paper

    .. math::
        \mathbf{y}_i = \sum_{j \in \mathcal{N}_i} m_{ij} \, \mathbf{x}_j, \qquad
        m_{ij} = w_a \, a_{ij} + (1 - w_a) \, p_{ij}

    where :math:`\mathcal{N}_i` are the :math:`k` source vertices whose keys are closest to the
    query of target vertex :math:`i` by their cosine
    :math:`s_{ij} = \cos(\mathbf{q}_i, \mathbf{k}_j)`, the attention is
    :math:`a_{ij} = s_{ij} / \sum_{j^{\prime} \in \mathcal{N}_i} s_{ij^{\prime}}` over them
    (scores below :math:`10^{-25}` count as that), :math:`\mathbf{P}` is a precomputed prior and
    :math:`w_a` a learned scalar. Keys and queries are parameters shared by all samples; after
    training, :meth:`freeze` leaves a fixed sparse matrix.

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
        fusion_weight (float, optional): The initial :math:`w_a`. Where it is negative, the mapping
            sharpens: what the attention averages is subtracted from the prior's. With
            :obj:`init="lifted"` and :obj:`normalization="softmax"`, :obj:`-2.0` is the best
            start that the experiments found.
            (default: :obj:`0.2`)
        source_pos (torch.Tensor, optional): Positions :obj:`[N, 3]` of the source vertices,
            normalised as by :meth:`MeshHierarchy.positions`: centred by the mean and divided by
            the standard deviation of the template. (default: :obj:`None`)
        target_pos (torch.Tensor, optional): The same :obj:`[M, 3]` for the target vertices.
            (default: :obj:`None`)
        init (str, optional): How keys and queries start (default: :obj:`"positions"`):

            1. :obj:`"positions"`: 0.1 times the position in the first three channels plus
            0.1 U(0, 1) in all; only the latter without positions

            2. :obj:`"lifted"`: positions lifted to the sphere by
            :math:`\mathbf{p} \mapsto (2 \mathbf{p}, |\mathbf{p}|^2 - 1) / (|\mathbf{p}|^2 + 1)` in
            the first four channels plus N(0, 0.02²) in all, so that the first
            :math:`\mathcal{N}_i` are about the nearest vertices

            3. :obj:`"normal"`: 0.1 N(0, 1)

            4. :obj:`"uniform"`: 0.1 U(0, 1)
        normalization (str, optional): :obj:`"sum"` divides the kept scores by their sum,
            :obj:`"softmax"` takes the softmax of :math:`\beta s_{ij}` with a learned
            :math:`\beta = \exp(\textrm{log\_beta})`, started at 3 over the mean gap between a
            row's largest and smallest kept score, or with :obj:`k=None` between its largest and
            the one that the default :obj:`k` would keep last. (default: :obj:`"sum"`)

    Shapes:
        - **input:** features :math:`(N, F)`, :math:`(B, N, F)` or a mini-batch
          :math:`(B \cdot N, F)`
        - **output:** features :math:`(M, F)`, :math:`(B, M, F)` or :math:`(B \cdot M, F)`

    Raises:
        ValueError: If :obj:`k` exceeds :obj:`num_source`, the prior or positions do not fit the
            vertex counts, or an option is unknown.
    """

    _default_k = 2

    def __init__(
        self,
        num_source: int,
        num_target: int,
        channels: int = 21,
        k: int | None = _default_k,
        prior: Any = None,
        fusion_weight: float = 0.2,
        source_pos: Tensor | None = None,
        target_pos: Tensor | None = None,
        init: str = "positions",
        normalization: str = "sum",
    ):
        super().__init__(
            num_source,
            num_target,
            channels,
            k,
            prior,
            fusion_weight,
            source_pos,
            target_pos,
            init,
            normalization,
        )


class AttentionUnpool(_AttentionMapping):
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
        prior (Mapping, optional): As in :class:`AttentionPool`. (default: :obj:`None`)
        fusion_weight (float, optional): The initial :math:`w_a`. Where it is negative, the mapping
            sharpens: what the attention averages is subtracted from the prior's. With
            :obj:`init="lifted"` and :obj:`normalization="softmax"`, :obj:`-2.0` is the best
            start that the experiments found.
            (default: :obj:`0.2`)
        source_pos (torch.Tensor, optional): As in :class:`AttentionPool`. (default: :obj:`None`)
        target_pos (torch.Tensor, optional): As in :class:`AttentionPool`. (default: :obj:`None`)
        init (str, optional): As in :class:`AttentionPool`. (default: :obj:`"positions"`)
        normalization (str, optional): As in :class:`AttentionPool`. (default: :obj:`"sum"`)

    Shapes:
        - **input:** features :math:`(N, F)`, :math:`(B, N, F)` or a mini-batch
          :math:`(B \cdot N, F)`
        - **output:** features :math:`(M, F)`, :math:`(B, M, F)` or :math:`(B \cdot M, F)`

    Raises:
        ValueError: As :class:`AttentionPool` does.
    """

    _default_k = 32

    def __init__(
        self,
        num_source: int,
        num_target: int,
        channels: int = 21,
        k: int | None = _default_k,
        prior: Any = None,
        fusion_weight: float = 0.2,
        source_pos: Tensor | None = None,
        target_pos: Tensor | None = None,
        init: str = "positions",
        normalization: str = "sum",
    ):
        super().__init__(
            num_source,
            num_target,
            channels,
            k,
            prior,
            fusion_weight,
            source_pos,
            target_pos,
            init,
            normalization,
        )


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
    return pos.detach().clone()


def _check_init(init: str, channels: int, *positions: Tensor | None):
    needed = {"positions": 3, "lifted": 4, "normal": 1, "uniform": 1}
    if init not in needed:
        raise ValueError(f"Expected 'init' to be one of {list(needed)} (got {init!r})")
    missing = [pos is None for pos in positions]
    if any(missing) and (init == "lifted" or not all(missing)):
        raise ValueError(
            f"Expected 'source_pos' and 'target_pos' for init={init!r} (got None for one or both)"
        )
    if channels < needed[init] and not any(missing):
        raise ValueError(
            f"Expected at least {needed[init]} 'channels' for init={init!r} (got {channels})"
        )


def _init_vectors(vectors: Tensor, pos: Tensor | None, init: str):
    if init == "lifted":
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
