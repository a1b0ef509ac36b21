from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from pyg_attnpool.datasets.cache import Source, stored
from pyg_attnpool.datasets.mesh_dataset import MeshDataset

# Meshes posed at a time: all of a sequence at once would take gigabytes.
CHUNK = 32


class AnnyMeshes(MeshDataset):
    r"""What the data sets made from the `Anny <https://arxiv.org/abs/2511.03589>`_ model have in
    common: they are made on this computer, block after block, and stored for the next time.

    Args:
        root (str or Path): The folder to store the data set in.
        kind (str): What the names of its files begin with.
        generator (int): The version of the generator.
        size (dict): The number of meshes, or of meshes per sequence, by its name.
        seed (int): Seed of everything random.
        source (callable): Returns the source of the blocks, given a folder for temporary files.
        labels (dict): As in :class:`MeshDataset`.
        transform (callable, optional): As in :class:`MeshDataset`. (default: :obj:`None`)
        mapped (bool, optional): As in :meth:`~pyg_attnpool.datasets.cache.stored`.
            (default: :obj:`True`)

    Raises:
        ValueError: If :obj:`size` is not positive or :obj:`seed` negative.
    """

    def __init__(
        self,
        root: str | Path,
        kind: str,
        generator: int,
        size: dict[str, int],
        seed: int,
        source: Callable[[Path], Source],
        labels: Mapping[str, Sequence[Any]],
        transform: Callable | None = None,
        mapped: bool = True,
    ):
        ((name, number),) = size.items()
        if number < 1 or seed < 0:
            raise ValueError(
                f"Expected positive '{name}' and a 'seed' of at least 0 (got {number} and {seed})"
            )
        root = Path(root).expanduser()
        path = root / "processed" / f"{kind}_{name}{number}_seed{seed}.npz"
        # A block is little work: where cores are shared, more threads take three times as long.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            arrays = stored(
                path,
                {"generator": generator, **size, "seed": seed},
                lambda: source(path.parent),
                f"Making {type(self).__name__.removeprefix('Anny').lower()}",
                mapped=mapped,
            )
        finally:
            torch.set_num_threads(num_threads)
        vertices = torch.from_numpy(arrays["vertices"])
        super().__init__(
            vertices, (arrays["template"], arrays["faces"]), labels, str(root), transform
        )


def sequence_labels(
    subjects: Sequence[str], expressions: Sequence[str], frames: int
) -> dict[str, list[Any]]:
    r"""Subject, expression and frame of every mesh, where every subject has a sequence of every
    expression."""
    every = [(s, e, i) for s in subjects for e in expressions for i in range(frames)]
    return {
        "subject": [s for s, _, _ in every],
        "expression": [e for _, e, _ in every],
        "frame": [i for _, _, i in every],
    }


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


def smoothstep(x: ndarray) -> ndarray:
    r"""From 0 to 1, with two derivatives that vanish at both."""
    x = np.clip(x, 0, 1)
    return x**3 * (10 + x * (6 * x - 15))


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
