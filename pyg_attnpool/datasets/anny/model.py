from __future__ import annotations

import copy
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

# Meshes posed at a time: all of a sequence at once would take gigabytes.
CHUNK = 32


class AnnyModel:
    r"""Anny's model as a function from arrays to an array of vertices.

    Args:
        folder (Path): Where temporary files may be.
        name (str): The name of the data set, for errors.
        options (dict): The arguments of :class:`anny.Anny` that decide rig and topology.
    """

    def __init__(self, folder: Path, name: str, **options: Any):
        self.model = load_anny(folder, name, **options)
        self.actions = self.model.facial_action_labels
        self.faces = self.model.faces.numpy().astype(np.int64)
        # How far a full change of shape moves the vertex it moves most.
        reach = self.model.blendshapes.norm(dim=-1).amax(dim=1).tolist()
        labels = self.model.blendshape_labels
        self.reach = dict(zip((x.split(":")[1] for x in labels), reach, strict=True))

    def __call__(
        self,
        shape: dict[str, ndarray],
        actions: ndarray | None = None,
        angles: dict[str, ndarray] | None = None,
    ) -> ndarray:
        r"""Vertices :obj:`[B, N, 3]` in metres, :math:`x` to the left, :math:`y` up and :math:`z`
        to the front.

        Args:
            shape (dict): As of :meth:`average_adult`.
            actions (numpy.ndarray, optional): Facial actions :obj:`[B, A]`. (default: :obj:`None`)
            angles (dict, optional): The rotation vectors :obj:`[B, 3]` in degrees of bones, along
                Anny's axes. (default: :obj:`None`)
        """
        import roma

        pose = None
        if angles is not None:
            rotations = {
                bone: roma.rotvec_to_rotmat(torch.from_numpy(np.deg2rad(angle)))
                for bone, angle in angles.items()
            }
            pose = {
                bone: roma.Rigid(r, torch.zeros(len(r), 3, dtype=r.dtype)).to_homogeneous()
                for bone, r in rotations.items()
            }
        with torch.inference_mode():
            vertices = self.model(
                pose_parameters=pose,
                phenotype_kwargs=torch.from_numpy(shape["phenotypes"]),
                local_changes_kwargs=torch.from_numpy(shape["local_changes"]),
                facial_actions=None if actions is None else torch.from_numpy(actions),
            )["vertices"].numpy()
        # Anny's x, y, z point left, back and up; COMA's left, up and front.
        return vertices[..., [0, 2, 1]] * np.array([1.0, 1.0, -1.0])

    def keep(self, vertices: ndarray) -> None:
        r"""Leaves out all vertices but these, at no more than their part of the work."""
        model, kept = copy.copy(self.model), torch.from_numpy(vertices)
        model._buffers = {
            **model._buffers,
            "template_vertices": model.template_vertices[kept],
            "blendshapes": model.blendshapes[:, kept],
            "dense_vertex_bone_weights": model.dense_vertex_bone_weights[kept],
        }
        self.model = model

    def average_adult(self) -> dict[str, ndarray]:
        r"""The shape between all others."""
        phenotypes = np.full((1, len(self.model.phenotype_labels)), 0.5)
        phenotypes[:, self.model.phenotype_labels.index("age")] = 0.7
        return {
            "phenotypes": phenotypes,
            "local_changes": np.zeros((1, len(self.model.local_change_labels))),
        }

    def draw_shape(
        self,
        rng: np.random.Generator,
        ranges: dict[str, tuple[float, float]],
        changes: str,
        reach: float,
    ) -> dict[str, ndarray]:
        r"""A random adult.

        Args:
            rng (numpy.random.Generator): Where chance comes from.
            ranges (dict): The lowest and highest value of phenotypes.
            changes (str): A pattern that the names of local changes of shape match, without the
                side. The two sides change alike.
            reach (float): About how far a change moves vertices at most, in metres.
        """
        drawn = {name: rng.uniform(*between) for name, between in ranges.items()}
        races = "african", "asian", "caucasian"
        drawn.update(zip(races, rng.dirichlet(np.ones(3)), strict=True))
        shape = self.average_adult()
        for name, value in drawn.items():
            shape["phenotypes"][:, self.model.phenotype_labels.index(name)] = value
        common: dict[str, float] = {}
        for i, name in enumerate(self.model.local_change_labels):
            value, own = rng.standard_normal(2)
            side, part = re.findall(r"^([lr]-)?(.*)$", name)[0]
            if re.match(changes, part) is None or self.reach[name] == 0:
                continue
            if side:
                value = common.setdefault(part, value) + 0.2 * own
            largest = min(0.3, reach / self.reach[name])
            shape["local_changes"][:, i] = np.clip(value, -2, 2) * largest
        return shape


def load_anny(folder: Path, name: str, **options: Any) -> Any:
    r"""Anny's model of these options, in double precision."""
    try:
        import anny
        import anny.models.full_model as source
        import anny.paths
    except ImportError as e:
        raise ImportError(
            f"Making {name!r} requires '{e.name}': install it with "
            f'`pip install "pyg_attnpool[data]"`'
        ) from e

    # Anny keeps 0.7 GB of intermediate results in the home folder, and reads its 1,136 text files
    # number by number, which takes most of a minute. Skinning by 'lbs' leaves warp alone.
    cache, slow = anny.paths.get_anny_cache_path(), source.load_blend_shape
    with tempfile.TemporaryDirectory(dir=folder, prefix=".anny-") as temporary:
        try:
            anny.paths.set_anny_cache_path(temporary)
            source.load_blend_shape = load_blend_shape
            return anny.Anny(
                **options,
                local_changes="all",
                phenotypes="all",
                phenotype_blendshapes="original",
                skinning_method="lbs",
            )
        finally:
            anny.paths.set_anny_cache_path(cache)
            source.load_blend_shape = slow


def load_blend_shape(
    filename: Any, vertices_count: int, world_transformation: Any, dtype: torch.dtype
) -> torch.Tensor:
    r"""What Anny's function of this name returns, sooner. Some files are empty."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input contained no data.*")
        rows = torch.from_numpy(np.loadtxt(filename).reshape(-1, 4))
    offset = torch.zeros(vertices_count, 3, dtype=dtype)
    offset[rows[:, 0].long()] = rows[:, 1:].to(dtype)
    return world_transformation.apply(offset)
