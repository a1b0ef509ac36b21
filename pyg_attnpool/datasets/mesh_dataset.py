from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch_geometric.data import Data, Dataset

from pyg_attnpool.datasets.splits import Split, split_meshes


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
        transform (callable, optional): Takes a :class:`~torch_geometric.data.Data` object with
            coordinates :obj:`pos`, faces :obj:`face`, further features :obj:`x` and the labels to
            another one: once at every access by :obj:`dataset[i]` or :meth:`read`. It may write to
            what it is given. :attr:`vertices` are without it. (default: :obj:`None`)

    Example:
        >>> dataset = MeshDataset(torch.rand(30, 3, 3), (np.eye(3), np.array([[0, 1, 2]])))
        >>> [len(part) for part in dataset.split()]
        [23, 3, 4]
        >>> dataset[0]
        Data(pos=[3, 3], face=[3, 1])

    Raises:
        TypeError: If :obj:`transform` cannot be called.
    """

    unit = "m"
    r"""The unit of the files; the meshes are held in metres."""

    features: tuple[str, ...] = ()
    r"""The names of features beyond coordinates, where they are known, as those of
    :class:`RegisteredMeshes`."""

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
        if transform is not None and not callable(transform):
            raise TypeError(f"Expected a callable 'transform' (got {type(transform).__name__})")
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
        r"""The shape :obj:`[M, N, C]` of all meshes as :meth:`read` gives them."""
        if self.transform is None or len(self) == 0:
            return [len(self), *self._vertices.shape[1:]]
        return [len(self), *self.read(torch.tensor([0])).shape[1:]]

    def read(self, index: Tensor) -> Tensor:
        r"""Some meshes as a tensor :obj:`[B, N, C]` in metres, in memory, each through
        :obj:`transform`.

        Raises:
            TypeError: If :obj:`transform` returns something else than a
                :class:`~torch_geometric.data.Data` object.
            ValueError: If it makes one mesh another shape than the others.
        """
        if self.transform is None:
            indices = self.indices()
            return self._vertices[[indices[i] for i in index.tolist()]]
        meshes = [self[i] for i in index.tolist()]
        for data in meshes:
            if not isinstance(data, Data):
                raise TypeError(
                    f"Expected a 'transform' that returns Data (got {type(data).__name__})"
                )
        return stacked(meshes).to(self._vertices)

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
        r"""The number of all meshes, of which a subset has some."""
        return self._vertices.size(0)

    def get(self, idx: int) -> Data:
        r"""One of all meshes, before :obj:`transform`."""
        labels = {key: values[idx] for key, values in self._labels.items()}
        mesh, face = self._vertices[idx], self._face
        if self.transform is not None:
            mesh, face = mesh.clone(), face.clone()
        further = {"x": mesh[:, 3:]} if mesh.size(1) > 3 else {}
        return Data(pos=mesh[:, :3], face=face, **further, **labels)

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
        return split_meshes(
            self.default_split if kind is None else kind,
            len(self),
            {key: self._label(key) for key in ("name", "subject", "expression")},
            expression,
            subject,
            names,
        )


def stacked(meshes: Sequence[Data]) -> Tensor:
    r"""Meshes of the same vertices and faces as one tensor :obj:`[M, N, C]`: coordinates, then
    further features.

    Raises:
        ValueError: If a mesh differs from the first.
    """
    return torch.stack([_features(i, data, meshes[0]) for i, data in enumerate(meshes)])


def _features(i: int, data: Data, first: Data) -> Tensor:
    if first.pos is None or data.pos is None or data.pos.shape != first.pos.shape:
        expected, got = (None if p is None else list(p.shape) for p in (first.pos, data.pos))
        raise ValueError(
            f"Expected 'pos' of shape {expected or '[N, 3]'} in every mesh (got {got} in mesh {i})"
        )
    faces = data.face, first.face
    if (faces[0] is None) != (faces[1] is None) or (
        faces[0] is not None and not torch.equal(*faces)
    ):
        raise ValueError(f"Expected the faces of the first mesh in every one (got others in {i})")
    if data.x is None:
        return data.pos
    shape = [len(data.pos), first.x.size(-1)] if first.x is not None else None
    if list(data.x.shape) != shape:
        raise ValueError(
            f"Expected further features 'x' of shape {shape} in every mesh "
            f"(got {list(data.x.shape)} in mesh {i})"
        )
    return torch.cat([data.pos, data.x.to(data.pos)], dim=-1)
