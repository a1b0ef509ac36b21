from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import Module, ModuleList, ParameterList

from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.nn.attention_pool import AttentionPool, AttentionUnpool

Matrices = Sequence[Any] | ModuleList | ParameterList | tuple[Module, Sequence[str]]


class Swapped(NamedTuple):
    r"""The layers that :meth:`swap_pooling` has put in the place of matrices. Printed, it says
    which."""

    down: ModuleList
    up: ModuleList

    def __repr__(self) -> str:  # also what print shows
        layers = [*self.down, *self.up]
        lines = [
            f"{layer} in the place of a matrix {list(layer.shape)}, starting from "
            f"{'positions' if layer.init == 'lifted' else layer.init}"
            for layer in layers
        ]
        learned = sum(p.numel() for layer in layers for p in layer.parameters())
        return "\n".join([*lines, f"{learned:,} parameters until `freeze`"])


def swap_pooling(
    down: Matrices,
    up: Matrices,
    hierarchy: MeshHierarchy | None = None,
    positions: Sequence[Tensor] | None = None,
    **kwargs: Any,
) -> Swapped:
    r"""Learned aggregation in the place of the matrices of a model that you did not write
    (:meth:`AttentionPool.from_mapping` for each):

    .. code-block:: python

        model.D, model.U = swap_pooling(model.D, model.U, hierarchy)
        ...                                                 # train
        freeze(model)                                       # the size it had

    Assigned to the model, the layers are part of it, with their parameters. Matrices that the model
    holds one by one, as buffers or attributes, are named, and replaced in place:

    .. code-block:: python

        swap_pooling((model, ["D0", "D1"]), (model, ["decoder.U0", "decoder.U1"]), hierarchy)

    The order of the levels, fine to coarse or coarse to fine, is that of the matrices.

    Args:
        down (list): The matrices :obj:`[M, N]` from fine to coarse levels, in a list, tuple,
            :class:`~torch.nn.ModuleList` or :class:`~torch.nn.ParameterList`; or a module and the
            names, dotted for those of submodules, under which it holds them as buffers, parameters
            or attributes, which are then replaced in place.
        up (list): The matrices from coarse to fine levels, likewise.
        hierarchy (MeshHierarchy, optional): The hierarchy of the matrices, of which the positions
            are taken. (default: :obj:`None`)
        positions (list, optional): In its place, the positions :obj:`[n_l, 3]` of every level from
            fine to coarse. Without either, keys come from the matrices. (default: :obj:`None`)
        **kwargs (optional): Further arguments of :class:`AttentionPool`, such as :obj:`k`.

    Returns:
        The layers down and up. Printed, the result says what was replaced. Lists stay as they are:
        assign the result to the model.

    Raises:
        TypeError: If matrices are neither in a list nor named.
        ValueError: If a name is of nothing or given twice, a matrix is of no pair of levels, or
            both :obj:`hierarchy` and :obj:`positions` are given.

    Example:
        >>> swapped = swap_pooling([torch.eye(4)[:2]], [torch.ones(4, 2) / 2])
        >>> print(swapped)
        AttentionPool(4, 2, channels=21, k=2) in the place of a matrix [2, 4], starting from prior
        AttentionUnpool(2, 4, channels=21, k=2) in the place of a matrix [4, 2], starting from prior
        256 parameters until `freeze`
    """
    if hierarchy is not None and positions is not None:
        raise ValueError("Expected either 'hierarchy' or 'positions' (got both)")
    if hierarchy is not None:
        positions = [hierarchy.positions(level) for level in range(len(hierarchy.vertices))]
    known = {len(pos): torch.as_tensor(pos) for pos in positions or []}
    if len(known) != len(positions or []):
        raise ValueError(
            f"Expected levels of different sizes (got {[len(p) for p in positions or []]})"
        )
    layers = []
    for name, matrices, cls in (("down", down, AttentionPool), ("up", up, AttentionUnpool)):
        found = ModuleList()
        for i, matrix in enumerate(_held(matrices)):
            num_target, num_source = _size(f"{name}[{i}]", matrix, name == "up")
            if known and not (num_source in known and num_target in known):
                raise ValueError(
                    f"Expected matrices between levels of {sorted(known, reverse=True)} vertices "
                    f"(got one from {num_source} to {num_target} in '{name}')"
                )
            pos = known.get(num_source), known.get(num_target)
            found.append(cls.from_mapping(matrix, *pos, **kwargs))
        layers.append(found)
    # Nothing of the model is touched before all layers are there.
    for matrices, found in zip((down, up), layers, strict=True):
        if _is_named(matrices):
            module, names = cast(tuple[Module, Sequence[str]], matrices)
            for name, layer in zip(names, found, strict=True):
                owner, attribute = _place(module, name)
                delattr(owner, attribute)
                setattr(owner, attribute, layer)
    return Swapped(*layers)


def _is_named(matrices: Any) -> bool:
    # A module and names, and not a pair of layers.
    pair = isinstance(matrices, tuple) and len(matrices) == 2
    return pair and isinstance(matrices[0], Module) and not isinstance(matrices[1], Module)


def _place(module: Module, name: str) -> tuple[Module, str]:
    # The module that holds a name, "encoder.D0", and the name there.
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


def _held(matrices: Any) -> list[Any]:
    if _is_named(matrices):
        module, names = matrices
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"Expected a list of names of matrices (got {names!r})")
        if len(set(names)) < len(names):
            raise ValueError(f"Expected different names of matrices (got {list(names)})")
        return [_named(module, name) for name in names]
    if not isinstance(matrices, Sequence | ModuleList | ParameterList):
        raise TypeError(
            f"Expected a list of matrices, or a module and the names of its buffers "
            f"(got {type(matrices).__name__})"
        )
    return list(matrices)


def _named(module: Module, name: str) -> Any:
    try:
        owner, attribute = _place(module, name)
        return getattr(owner, attribute)
    except AttributeError as e:
        raise ValueError(
            f"Expected names of attributes of {type(module).__name__} (got {name!r})"
        ) from e


def _size(name: str, matrix: Any, up: bool) -> tuple[int, int]:
    # The numbers of target and source vertices, without a dummy vertex.
    if hasattr(matrix, "sparse_sizes"):
        shape = tuple(matrix.sparse_sizes())
    elif hasattr(matrix, "num_target"):
        shape = (matrix.num_target, matrix.num_source)
    else:
        shape = tuple(getattr(matrix, "shape", ()))
    if len(shape) == 3:
        shape = tuple(n - 1 for n in shape[1:])
    if len(shape) != 2:
        raise ValueError(f"Expected a matrix in {name} (got {type(matrix).__name__} {shape})")
    num_target, num_source = (int(n) for n in shape)
    if (num_target < num_source) == up:
        way = "coarse to fine" if up else "fine to coarse"
        raise ValueError(
            f"Expected a matrix from {way} in {name} (got {num_source} to {num_target} vertices)"
        )
    return num_target, num_source
