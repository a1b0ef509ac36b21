from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from pyg_attnpool.files import digest, read_arrays, replacing
from pyg_attnpool.mapping import Mapping
from pyg_attnpool.mesh.closest import barycentric_mapping
from pyg_attnpool.mesh.io import as_template, check_mesh, edges
from pyg_attnpool.mesh.qem import FewestVertices, decimate
from pyg_attnpool.mesh.spiral import reference_vertices, spiral_sequences

VERSION = 1  # of the file
RECIPE = 2  # of making a hierarchy from a template, as a cache must know


class MeshHierarchy:
    r"""A template mesh, its coarser levels, and the mappings between them as precomputed by quadric
    error metric (QEM) simplification. Level 0 is the template.

    :obj:`down[l]` takes features of level :math:`l` to level :math:`l + 1` by selecting the kept
    vertices; :obj:`up[l]` takes them back, each vertex from the closest point on the coarse
    surface in barycentric coordinates, a kept vertex from itself.

    Usually made by :meth:`from_template`.

    Args:
        vertices (list): The vertices :obj:`[n_l, 3]` of every level (numpy).
        faces (list): The faces :obj:`[F_l, 3]` of every level (numpy).
        down (list): The mapping from every level to the next coarser one, as :class:`Mapping` or
            any matrix that :meth:`Mapping.from_matrix` takes.
        up (list): The mapping from the next coarser level to every level.

    Raises:
        ValueError: If levels are not valid meshes or mappings do not fit them.

    Example:
        >>> hierarchy = MeshHierarchy.from_template(template, factors=[4, 4])
        >>> hierarchy.num_vertices, hierarchy.down[0], hierarchy.up[0]
        ([642, 161, 41], Mapping(642, 161, k=1), Mapping(161, 642, k=3))
    """

    def __init__(
        self,
        vertices: Sequence[ndarray],
        faces: Sequence[ndarray],
        down: Sequence[Mapping],
        up: Sequence[Mapping],
    ):
        steps = len(vertices) - 1
        if steps < 1 or (len(faces), len(down), len(up)) != (steps + 1, steps, steps):
            raise ValueError(
                f"Expected at least two levels, each with vertices and faces, and mappings between "
                f"them (got {len(vertices)} vertices, {len(faces)} faces, {len(down)} down and "
                f"{len(up)} up)"
            )
        levels = [check_mesh(v, f) for v, f in zip(vertices, faces, strict=True)]
        self.vertices = [v for v, _ in levels]
        self.faces = [f for _, f in levels]
        self.down = [Mapping.from_matrix(m).detach() for m in down]
        self.up = [Mapping.from_matrix(m).detach() for m in up]
        for level, (fine, coarse) in enumerate(
            zip(self.num_vertices, self.num_vertices[1:], strict=False)
        ):
            d, u = self.down[level], self.up[level]
            got = (d.num_source, d.num_target, u.num_source, u.num_target)
            if got != (fine, coarse, coarse, fine):
                raise ValueError(
                    f"Expected mappings between {fine} and {coarse} vertices at level {level} "
                    f"(got {d} down and {u} up)"
                )

    @classmethod
    def from_template(
        cls,
        template: str | Path | tuple[ndarray, ndarray],
        num_vertices: Sequence[int] | None = None,
        factors: Sequence[float] | None = None,
        cache: str | Path | None = None,
    ) -> MeshHierarchy:
        r"""Simplifies a template level by level (:meth:`~pyg_attnpool.mesh.qem.decimate`).

        Components stay as long as the counts allow. Where :obj:`factors` lead below the fewest
        vertices that the components need, all factors shrink alike until the coarsest level has
        these; :obj:`num_vertices` are kept to, and components end. Both give a warning.

        Args:
            template (str, Path or tuple): A mesh file, or vertices :obj:`[N, 3]` and faces
                :obj:`[F, 3]`: an orientable manifold with or without boundary, of any number of
                components.
            num_vertices (list, optional): The vertex count of every coarser level.
                (default: :obj:`None`)
            factors (list, optional): In its place, how many times fewer vertices every level has
                than the one before, rounded up. (default: :obj:`[4, 4, 4, 4]`)
            cache (str or Path, optional): A folder that keeps the hierarchy under a hash of
                template and counts, for the next time. (default: :obj:`None`)

        Raises:
            ValueError: If the mesh is not valid, or the counts do not descend or are too low.
        """
        vertices, faces = check_mesh(*as_template(template))
        counts = _counts(len(vertices), num_vertices, factors)

        path = None
        if cache is not None:
            name = _source(vertices, faces, [RECIPE, num_vertices is None, *counts])
            path = Path(cache) / f"hierarchy-{name[:16]}.npz"
            if path.exists():
                try:
                    hierarchy = cls.load(path)
                    got = hierarchy.vertices[0], hierarchy.faces[0]
                    if len(hierarchy.down) == len(counts) - 1 and all(
                        map(np.array_equal, got, (vertices, faces))
                    ):
                        return hierarchy
                except ValueError as e:
                    warnings.warn(f"{e}; made again from the template", stacklevel=2)

        all_vertices, all_faces, down, up = [vertices], [faces], [], []
        for index, coarse_faces in _decimated(vertices, faces, counts, num_vertices is None):
            fine, coarse = all_vertices[-1], all_vertices[-1][index]
            down.append(
                Mapping(
                    torch.from_numpy(index).unsqueeze(1),
                    torch.ones(len(index), 1, dtype=torch.float64),
                    len(fine),
                )
            )
            slots, weight = barycentric_mapping(fine, coarse, coarse_faces)
            slots[index], weight[index] = np.arange(len(index))[:, None], [1, 0, 0]
            up.append(Mapping(torch.from_numpy(slots), torch.from_numpy(weight), len(index)))
            all_vertices.append(coarse)
            all_faces.append(coarse_faces)
        hierarchy = cls(all_vertices, all_faces, down, up)
        if path is not None:
            hierarchy.save(path)
        return hierarchy

    @property
    def num_vertices(self) -> list[int]:
        r"""The vertex count of every level."""
        return [len(v) for v in self.vertices]

    @property
    def hash(self) -> str:
        r"""A hash of all levels and mappings: models of equal hashes are exchangeable."""
        return digest(self._arrays())

    def edge_index(self, level: int) -> Tensor:
        r"""The edges :obj:`[2, E]` of a level in both directions, sorted, without duplicates."""
        return torch.from_numpy(edges(self.faces[level]).T.copy())

    def positions(self, level: int) -> Tensor:
        r"""The vertices :obj:`[n_l, 3]` of a level, centred by the template's mean and divided by
        its standard deviation per axis (float32)."""
        template = self.vertices[0]
        std = template.std(axis=0)
        std[std == 0] = 1  # a flat template
        return torch.from_numpy((self.vertices[level] - template.mean(axis=0)) / std).float()

    def spirals(
        self,
        level: int,
        hops: int = 1,
        dilation: int = 1,
        length: int | None = None,
        reference: Sequence[int] | None = None,
        truncate: bool = False,
        fill: str | int | None = None,
    ) -> Tensor:
        r"""The spirals :obj:`[n_l, L]` of a level, see
        :meth:`~pyg_attnpool.mesh.spiral_sequences`. Reference vertices are those of the template;
        on a coarser level the vertices nearest to them take their place."""
        template, vertices = self.vertices[0], self.vertices[level]
        nearest = [
            int(np.linalg.norm(vertices - template[r], axis=1).argmin())
            for r in reference_vertices(template, self.faces[0], reference)
        ]
        spirals = spiral_sequences(
            vertices, self.faces[level], hops, nearest, dilation, length, truncate, fill
        )
        return torch.from_numpy(spirals)

    def save(self, path: str | Path) -> None:
        r"""Writes the hierarchy to an :obj:`.npz` file, under a temporary name first."""
        arrays = self._arrays()
        with replacing(Path(path)) as temporary, open(temporary, "wb") as f:
            content: dict[str, Any] = {
                "version": np.array(VERSION),
                "source": np.array(self._source()),
                "hash": np.array(digest(arrays)),
                **arrays,
            }
            np.savez_compressed(f, **content)

    @classmethod
    def load(cls, path: str | Path) -> MeshHierarchy:
        r"""Reads a hierarchy written by :meth:`save`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is of another version, damaged, or something else.
        """
        arrays = read_arrays(path, "a whole mesh hierarchy")
        try:
            version = int(arrays.pop("version"))
            source, stored = str(arrays.pop("source")), str(arrays.pop("hash"))
        except KeyError as e:
            raise ValueError(f"Expected a mesh hierarchy in {path} (got a file without {e})") from e
        except (TypeError, ValueError) as e:
            raise ValueError(f"Expected a whole mesh hierarchy in {path} (got: {e})") from e
        if version != VERSION:
            raise ValueError(
                f"Expected a mesh hierarchy of version {VERSION} in {path} (got {version}): make "
                f"it again from the template"
            )
        if stored != digest(arrays):
            raise ValueError(f"Expected a whole mesh hierarchy in {path} (got a damaged one)")
        steps = sum(name.startswith("down_index") for name in arrays)

        def mapping(name: str, level: int) -> Mapping:
            index, weight = (
                torch.from_numpy(arrays[f"{name}_{part}{level}"]) for part in ("index", "weight")
            )
            num_source = len(arrays[f"vertices{level + (name == 'up')}"])
            return Mapping(index, weight, num_source)

        hierarchy = cls(
            [arrays[f"vertices{level}"] for level in range(steps + 1)],
            [arrays[f"faces{level}"] for level in range(steps + 1)],
            [mapping("down", level) for level in range(steps)],
            [mapping("up", level) for level in range(steps)],
        )
        if source != hierarchy._source():
            raise ValueError(f"Expected a whole mesh hierarchy in {path} (got a damaged one)")
        return hierarchy

    def _source(self) -> str:
        return _source(self.vertices[0], self.faces[0], self.num_vertices)

    def _arrays(self) -> dict[str, ndarray]:
        arrays = {}
        for level, (vertices, faces) in enumerate(zip(self.vertices, self.faces, strict=True)):
            arrays[f"vertices{level}"], arrays[f"faces{level}"] = vertices, faces
        for name, mappings in (("down", self.down), ("up", self.up)):
            for level, mapping in enumerate(mappings):
                arrays[f"{name}_index{level}"] = mapping.index.numpy(force=True)
                arrays[f"{name}_weight{level}"] = mapping.weight.numpy(force=True)
        return arrays

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.num_vertices})"


def _counts(
    num_vertices: int, wanted: Sequence[int] | None, factors: Sequence[float] | None
) -> list[int]:
    # The vertex counts of all levels.
    if wanted is not None and factors is not None:
        raise ValueError("Expected either 'num_vertices' or 'factors' (got both)")
    wanted = None if wanted is None else _listed("num_vertices", wanted, Integral, "integers")
    factors = None if factors is None else _listed("factors", factors, Real, "numbers")
    counts = [num_vertices]
    if wanted is None:
        for factor in [4, 4, 4, 4] if factors is None else factors:
            if not 1 < factor < np.inf:
                raise ValueError(f"Expected finite 'factors' above 1 (got {factor})")
            counts.append(int(np.ceil(counts[-1] / factor)))
    else:
        # A list may name the template's own count first, as `num_vertices` of a hierarchy does.
        wanted = [int(n) for n in wanted]
        counts += wanted[1:] if wanted[:1] == counts else wanted
    if len(counts) < 2 or (wanted is not None and min(counts) < 3):
        raise ValueError(
            f"Expected at least one coarser level, of at least three vertices each (got {counts})"
        )
    return counts


def _listed(name: str, given: Any, kind: type, words: str) -> list[Any]:
    listed = list(given) if isinstance(given, Iterable) else [None]
    if not all(isinstance(n, kind) for n in listed):
        raise TypeError(f"Expected '{name}' to be a list of {words} (got {given!r})")
    return listed


def _shrunk(counts: Sequence[int], least: int) -> list[int]:
    # As many levels, by factors of one power less each, down to the fewest vertices.
    power = np.log(least / counts[0]) / np.log(counts[-1] / counts[0])
    shrunk = [counts[0], *(int(np.ceil(counts[0] * (n / counts[0]) ** power)) for n in counts[1:])]
    shrunk[-1] = least
    for level in reversed(range(1, len(counts) - 1)):
        shrunk[level] = max(shrunk[level], shrunk[level + 1] + 1)
    if shrunk[1] >= counts[0]:
        raise ValueError(
            f"Expected at most {max(counts[0] - least, 0)} coarser levels of a template of "
            f"{counts[0]} vertices, down to {least} (got {len(counts) - 1})"
        )
    return shrunk


def _decimated(
    vertices: ndarray, faces: ndarray, counts: list[int], by_factors: bool
) -> list[tuple[ndarray, ndarray]]:
    if not by_factors:
        return decimate(vertices, faces, counts[1:])
    asked = counts
    counts = counts if counts[-1] >= 3 else _shrunk(counts, 3)
    while True:
        try:
            levels = decimate(vertices, faces, counts[1:], False)
            break
        except FewestVertices as e:
            counts = _shrunk(counts, max(e.least, counts[-1] + 1))
    if counts != asked:
        warnings.warn(
            f"The factors lead to levels of {asked[1:]} vertices, fewer than collapses of edges "
            f"leave: the levels have {counts[1:]}",
            stacklevel=3,
        )
    return levels


def _source(vertices: ndarray, faces: ndarray, counts: Sequence[int]) -> str:
    levels = np.array([VERSION, *counts])
    return digest({"vertices": vertices, "faces": faces, "levels": levels})
