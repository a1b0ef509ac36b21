from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch_geometric.data import Data, Dataset

KINDS = ("interpolation", "extrapolation", "identity", "sequence", "independent", "listed")


class Split(NamedTuple):
    r"""Indices of the meshes of each part, each sorted."""

    train: Tensor
    val: Tensor
    test: Tensor


class MeshDataset(Dataset):
    r"""Registered meshes: every mesh has the vertices and faces of one template. They are held as
    one tensor; :obj:`dataset[i].pos` is a view of it. The tensor may be that of a file mapped to
    memory, of which only the meshes in use are read: :meth:`read` takes some of them.

    Indexing by a slice, list or tensor gives the data set of those meshes alone, as in every
    :class:`torch_geometric.data.Dataset`; :attr:`vertices`, labels and :meth:`split` follow.

    Args:
        vertices (torch.Tensor): Meshes :obj:`[M, N, 3]` in metres (float32), in sorted order.
        template (tuple): Vertices :obj:`[N, 3]` in metres and faces :obj:`[F, 3]` (int64).
        labels (dict, optional): For each known one of :obj:`"name"`, :obj:`"subject"`,
            :obj:`"expression"` and :obj:`"frame"`, one value per mesh. (default: :obj:`None`)
        root (str, optional): The folder of stored files. (default: :obj:`None`)
        transform (callable, optional): Applied to a :class:`~torch_geometric.data.Data` object at
            every access. (default: :obj:`None`)
    """

    unit = "m"
    r"""The unit of the files; the meshes are held in metres."""

    default_split = "interpolation"
    r"""The kind of :meth:`split` that the experiments of the paper use."""

    def __init__(
        self,
        vertices: Tensor,
        template: tuple[ndarray, ndarray],
        labels: Mapping[str, Sequence[Any]] | None = None,
        root: str | None = None,
        transform: Callable | None = None,
    ):
        super().__init__(root, transform)
        self.template = template
        self._vertices = vertices
        self._face = torch.from_numpy(np.ascontiguousarray(template[1].T))
        self._labels = labels or {}

    @property
    def vertices(self) -> Tensor:
        r"""All meshes as one tensor :obj:`[M, N, 3]` in metres: the stored one, or of a subset a
        copy."""
        return self._vertices if self._indices is None else self._vertices[list(self._indices)]

    @property
    def vertices_shape(self) -> list[int]:
        r"""The shape :obj:`[M, N, C]` of :attr:`vertices`, of which none is read."""
        return [len(self), *self._vertices.shape[1:]]

    def read(self, index: Tensor) -> Tensor:
        r"""Some meshes as a tensor :obj:`[B, N, C]` in metres, in memory, each through
        :obj:`transform`."""
        indices = self.indices()
        x = self._vertices[[indices[i] for i in index.tolist()]]
        if self.transform is None:
            return x
        return torch.stack([self._transformed(mesh) for mesh in x])

    def _transformed(self, mesh: Tensor) -> Tensor:
        features = mesh[:, 3:] if mesh.size(1) > 3 else None
        data = self.transform(Data(pos=mesh[:, :3], face=self._face, x=features))
        return data.pos if data.x is None else torch.cat([data.pos, data.x], dim=-1)

    @property
    def pos(self) -> Tensor:
        r"""The coordinates :obj:`[M, N, 3]` of all meshes, as PyG names them."""
        return self.vertices[..., :3]

    @property
    def face(self) -> Tensor:
        r"""The faces :obj:`[3, F]` that all meshes share, as PyG names them."""
        return self._face

    @property
    def name(self) -> list[str] | None:
        r"""The file of every mesh, relative to the folder, or :obj:`None`."""
        return self._label("name")

    @property
    def subject(self) -> list[str] | None:
        r"""The subject of every mesh, or :obj:`None` if unknown."""
        return self._label("subject")

    @property
    def expression(self) -> list[str] | None:
        r"""The expression of every mesh, or :obj:`None` if unknown."""
        return self._label("expression")

    @property
    def frame(self) -> list[int] | None:
        r"""The place of every mesh in its sequence, or :obj:`None` if unknown."""
        return self._label("frame")

    def _label(self, key: str) -> list | None:
        values = self._labels.get(key)
        return None if values is None else [values[i] for i in self.indices()]

    def len(self) -> int:
        return self._vertices.size(0)

    def get(self, idx: int) -> Data:
        labels = {key: values[idx] for key, values in self._labels.items()}
        mesh = self._vertices[idx]
        further = {"x": mesh[:, 3:]} if mesh.size(1) > 3 else {}
        return Data(pos=mesh[:, :3], face=self._face, **further, **labels)

    def split(
        self,
        kind: str | None = None,
        *,
        expression: str | None = None,
        subject: str | None = None,
        names: Sequence[str] | None = None,
    ) -> Split:
        r"""The splits of the published experiments, in the order of the meshes. Validation is never
        cut from the test part.

        1. :obj:`"interpolation"`: of every 100 meshes the first 11 are test, the next 10
        validation. Fewer than 100 meshes are one such block in proportion, rounded up: of 30, the
        first 4 and the next 3.

        2. :obj:`"extrapolation"`: all meshes of :obj:`expression` are test.

        3. :obj:`"identity"`: all meshes of :obj:`subject` are test.

        4. :obj:`"sequence"`: of every 10 sequences, that is expressions of a subject, the first is
        test and the second validation. Meshes side by side in a sequence are almost the same.

        5. :obj:`"independent"`: of every 100 meshes the first 10 are test; for meshes that are
        drawn one by one.

        6. :obj:`"listed"`: the meshes of :obj:`names` are test.

        But for the first and fourth, of every 100 remaining meshes the first 10 are validation.

        Args:
            kind (str, optional): One of these. If :obj:`None`, :attr:`default_split`.
                (default: :obj:`None`)
            expression (str, optional): The expression held out. (default: :obj:`None`)
            subject (str, optional): The subject held out. (default: :obj:`None`)
            names (list, optional): The names of test meshes, as in :attr:`name`.
                (default: :obj:`None`)

        Raises:
            ValueError: If the kind, expression, subject or a name is unknown, or a part would be
                empty.
        """
        kind = self.default_split if kind is None else kind
        if kind not in KINDS:
            raise ValueError(f"Expected 'kind' to be one of {', '.join(KINDS)} (got {kind!r})")
        if kind != "extrapolation" and expression is not None:
            raise ValueError(f"Expected no 'expression' for kind={kind!r} (got {expression!r})")
        if kind != "identity" and subject is not None:
            raise ValueError(f"Expected no 'subject' for kind={kind!r} (got {subject!r})")
        if kind != "listed" and names is not None:
            raise ValueError(f"Expected no 'names' for kind={kind!r} (got {len(names)})")

        if kind == "interpolation":
            is_test, is_val = of_every(100, len(self), 11, 10)
        elif kind == "sequence":
            sequence = self._sequences()
            parts = of_every(10, int(sequence.max()) + 1, 1, 1)
            is_test, is_val = (part[sequence] for part in parts)
        else:
            if kind == "extrapolation":
                is_test = self._held_out("expression", expression)
            elif kind == "identity":
                is_test = self._held_out("subject", subject)
            elif kind == "independent":
                (is_test,) = of_every(100, len(self), 10)
            else:
                is_test = self._listed(names)
            rest = (~is_test).nonzero().flatten()
            is_val = torch.zeros_like(is_test)
            is_val[rest[of_every(100, len(rest), 10)[0]]] = True
        index = torch.arange(len(self))
        split = Split(index[~is_test & ~is_val], index[is_val], index[is_test])
        if any(len(part) == 0 for part in split):
            raise ValueError(
                f"Expected enough meshes for three parts (got {len(self)}, that is "
                f"{len(split.train)} for training, {len(split.val)} for validation and "
                f"{len(split.test)} for test)"
            )
        return split

    def _listed(self, names: Sequence[str] | None) -> Tensor:
        known = self.name
        if known is None or names is None:
            raise ValueError("Expected meshes with known 'name', and 'names' of some (got none)")
        unknown = set(names).difference(known)
        if unknown:
            raise ValueError(
                f"Expected 'names' of meshes such as {known[0]!r} (got {min(unknown)!r} and "
                f"{len(unknown) - 1} other unknown ones)"
            )
        test = set(names)
        return torch.tensor([name in test for name in known])

    def _sequences(self) -> Tensor:
        # The number of the sequence of every mesh, in sorted order.
        if self.subject is None or self.expression is None:
            raise ValueError("Expected meshes with known 'subject' and 'expression' (got none)")
        sequences = list(zip(self.subject, self.expression, strict=True))
        place = {sequence: i for i, sequence in enumerate(sorted(set(sequences)))}
        return torch.tensor([place[sequence] for sequence in sequences])

    def _held_out(self, key: str, value: str | None) -> Tensor:
        labels = self._label(key)
        if labels is None:
            raise ValueError(f"Expected meshes with known '{key}' (got none)")
        if value not in labels:
            raise ValueError(f"Expected '{key}' to be one of {sorted(set(labels))} (got {value!r})")
        return torch.tensor([label == value for label in labels])


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


def as_meshes(meshes: Any) -> Tensor | MeshDataset:
    r"""Meshes in any form as one tensor :obj:`[M, N, C]` of single precision, or as the data set
    that they are.

    Args:
        meshes (torch.Tensor, MeshDataset, numpy.ndarray or list): Floating point meshes
            :obj:`[M, N, C]`, or :class:`~torch_geometric.data.Data` objects of the same vertices
            and faces, with coordinates :obj:`pos` and further features :obj:`x`.

    Raises:
        TypeError: If they are in another form, or not floating point.
        ValueError: If a :class:`~torch_geometric.data.Data` object differs from the first.
    """
    if isinstance(meshes, MeshDataset):
        return meshes
    if isinstance(meshes, ndarray):
        meshes = torch.from_numpy(np.ascontiguousarray(meshes))
    if isinstance(meshes, list | tuple) and meshes and all(isinstance(m, Data) for m in meshes):
        meshes = torch.stack([_features(i, data, meshes[0]) for i, data in enumerate(meshes)])
    if not isinstance(meshes, Tensor):
        raise TypeError(
            f"Expected meshes as a tensor, an array, a MeshDataset or a list of Data "
            f"(got {type(meshes).__name__})"
        )
    if not meshes.is_floating_point():
        raise TypeError(f"Expected floating point meshes (got {meshes.dtype})")
    return meshes.float()


def _features(i: int, data: Data, first: Data) -> Tensor:
    if data.pos is None or data.pos.shape != first.pos.shape:
        got = None if data.pos is None else list(data.pos.shape)
        raise ValueError(
            f"Expected 'pos' of shape {list(first.pos.shape)} in every mesh (got {got} in mesh {i})"
        )
    faces = data.face, first.face
    if (faces[0] is None) != (faces[1] is None) or (
        faces[0] is not None and not torch.equal(*faces)
    ):
        raise ValueError(f"Expected the faces of the first mesh in every one (got others in {i})")
    return data.pos if data.x is None else torch.cat([data.pos, data.x.to(data.pos)], dim=-1)


def check_meshes(
    name: str,
    x: Tensor | MeshDataset,
    num_vertices: int | None = None,
    in_channels: int | None = None,
) -> None:
    r"""Checks the shape of meshes and that they are finite; those of a data set are checked when
    they are read.

    Raises:
        ValueError: If the meshes are not of shape :obj:`[M, N, C]`, or not finite.
    """
    shape = list(x.vertices_shape if isinstance(x, MeshDataset) else x.shape)
    if len(shape) != 3 or shape[2] < 3 or 0 in shape:
        raise ValueError(f"Expected {name} of shape [M, N, 3] (got {shape})")
    if num_vertices not in (None, shape[1]):
        raise ValueError(
            f"Expected {name} of {num_vertices} vertices as the template has (got {shape[1]})"
        )
    if in_channels not in (None, shape[2]):
        raise ValueError(
            f"Expected {name} of {in_channels} features a vertex as the model has (got {shape[2]})"
        )
    if isinstance(x, Tensor):
        check_finite(name, x, torch.arange(len(x)))


def check_finite(name: str, x: Tensor, index: Tensor) -> Tensor:
    r"""Meshes that are all finite; :obj:`index` are their numbers for the message."""
    finite = torch.isfinite(x).flatten(1).all(dim=1).cpu()
    if not finite.all():
        first = int(index[~finite].min())
        raise ValueError(f"Expected finite {name} (got NaN or infinity in mesh {first})")
    return x


def blocks(x: Tensor | MeshDataset, size: int) -> Iterator[Tensor]:
    r"""Meshes in blocks of a size, in order."""
    for index in torch.arange(len(x)).split(size):
        yield x.read(index) if isinstance(x, MeshDataset) else x[index[0] : index[-1] + 1]
