r"""The splits of the published experiments, from the labels of meshes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("interpolation", "extrapolation", "identity", "sequence", "independent", "listed")

Labels = Mapping[str, "list | None"]


class Split(NamedTuple):
    r"""Indices of the meshes of each part, each sorted.

    Example:
        >>> from pyg_attnpool.datasets import Split
        >>> split = Split(*torch.arange(24).split([16, 4, 4]))
        >>> meshes[split.test].shape
        torch.Size([4, 642, 3])
    """

    train: Tensor
    val: Tensor
    test: Tensor


def split_meshes(
    kind: str,
    num_meshes: int,
    labels: Labels,
    expression: str | None = None,
    subject: str | None = None,
    names: Sequence[str] | None = None,
) -> Split:
    r"""The split of a number of meshes; see :meth:`MeshDataset.split
    <pyg_attnpool.datasets.MeshDataset.split>`.

    Args:
        kind (str): The kind of split.
        num_meshes (int): The number of meshes.
        labels (dict): :obj:`"name"`, :obj:`"subject"` and :obj:`"expression"` of every mesh, or
            :obj:`None` where they are unknown.
        expression (str, optional): The expression held out. (default: :obj:`None`)
        subject (str, optional): The subject held out. (default: :obj:`None`)
        names (list, optional): The names of test meshes. (default: :obj:`None`)
    """
    if kind not in KINDS:
        raise ValueError(f"Expected 'kind' to be one of {', '.join(KINDS)} (got {kind!r})")
    if kind != "extrapolation" and expression is not None:
        raise ValueError(f"Expected no 'expression' for kind={kind!r} (got {expression!r})")
    if kind != "identity" and subject is not None:
        raise ValueError(f"Expected no 'subject' for kind={kind!r} (got {subject!r})")
    if kind != "listed" and names is not None:
        raise ValueError(f"Expected no 'names' for kind={kind!r} (got {len(names)})")

    if kind == "interpolation":
        is_test, is_val = of_every(100, num_meshes, 11, 10)
    elif kind == "sequence":
        sequence = _sequences(labels)
        parts = of_every(10, len(sequence.unique()), 1, 1)
        is_test, is_val = (part[sequence] for part in parts)
    else:
        if kind == "extrapolation":
            is_test = _held_out(labels, "expression", expression)
        elif kind == "identity":
            is_test = _held_out(labels, "subject", subject)
        elif kind == "independent":
            (is_test,) = of_every(100, num_meshes, 10)
        else:
            is_test = _listed(labels, names)
        rest = (~is_test).nonzero().flatten()
        is_val = torch.zeros_like(is_test)
        is_val[rest[of_every(100, len(rest), 10)[0]]] = True
    index = torch.arange(num_meshes)
    split = Split(index[~is_test & ~is_val], index[is_val], index[is_test])
    if any(len(part) == 0 for part in split):
        raise ValueError(
            f"Expected enough meshes for three parts (got {num_meshes}, that is "
            f"{len(split.train)} for training, {len(split.val)} for validation and "
            f"{len(split.test)} for test)"
        )
    return split


def of_every(size: int, num: int, *counts: int) -> list[Tensor]:
    r"""The first :obj:`count` of every block of a size, the next count and so on, as masks. Less
    than one block is a block in proportion: the rule would leave it all to the first parts."""
    block = max(min(num, size), 1)
    place = torch.arange(num) % block
    masks, end = [], 0
    for count in counts:
        start, end = end, end - (-count * block // size)
        masks.append((place >= start) & (place < end))
    return masks


def _listed(labels: Labels, names: Sequence[str] | None) -> Tensor:
    known = labels["name"]
    if known is None or names is None:
        raise ValueError("Expected meshes with known 'name', and 'names' of some (got none)")
    unknown = set(names).difference(known)
    if unknown:
        raise ValueError(
            f"Expected 'names' of meshes such as {known[0]!r} (got {min(unknown)!r} and "
            f"{len(unknown) - 1} other unknown ones)"
        )
    test = set(names)
    return torch.tensor([name in test for name in known], dtype=torch.bool)


def _sequences(labels: Labels) -> Tensor:
    # The number of the sequence of every mesh, in sorted order.
    subject, expression = labels["subject"], labels["expression"]
    if subject is None or expression is None:
        raise ValueError("Expected meshes with known 'subject' and 'expression' (got none)")
    sequences = list(zip(subject, expression, strict=True))
    place = {sequence: i for i, sequence in enumerate(sorted(set(sequences)))}
    return torch.tensor([place[sequence] for sequence in sequences], dtype=torch.long)


def _held_out(labels: Labels, key: str, value: str | None) -> Tensor:
    known = labels[key]
    if known is None:
        raise ValueError(f"Expected meshes with known '{key}' (got none)")
    if value not in known:
        raise ValueError(f"Expected '{key}' to be one of {sorted(set(known))} (got {value!r})")
    return torch.tensor([label == value for label in known], dtype=torch.bool)
