from __future__ import annotations

import re
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy import ndarray
from tqdm import tqdm

from pyg_attnpool.datasets.mesh_dataset import MeshDataset
from pyg_attnpool.files import digest, replacing

# Part of every stored file: raised with every change of the meshes made here.
GENERATOR = 1

NUM_SUBJECTS = 12

# Actions that stir unasked with every expression.
INVOLUNTARY = ("brow", "cheekSquint", "eyeSquint", "mouthDimple", "mouthPress", "noseSneer")

# The peak of every expression in Anny's facial actions. "*" stands for both sides, "+" for the one
# that a subject prefers. "jawPitch" is a rotation of the jaw bone in degrees.
EXPRESSIONS = {
    "bareteeth": {
        "mouthUpperUp*": 1.1,
        "mouthLowerDown*": 1.3,
        "mouthStretch*": 0.7,
        "mouthSmile*": 0.2,
        "noseSneer*": 0.4,
        "cheekSquint*": 0.3,
    },
    "cheeks_in": {"cheekPuff": -0.55, "mouthPucker": 0.6, "mouthDimple*": 0.3, "browDown*": 0.1},
    "eyebrow": {"browInnerUp": 1.2, "browOuterUp*": 1.2, "eyeWide*": 0.7, "mouthPress*": 0.1},
    "high_smile": {
        "mouthSmile*": 0.75,
        "cheekSquint*": 0.7,
        "eyeSquint*": 0.5,
        "mouthUpperUp*": 0.4,
        "mouthDimple*": 0.3,
    },
    "lips_back": {
        "mouthRollUpper": 0.8,
        "mouthRollLower": 0.9,
        "mouthPress*": 0.4,
        "jawPitch": 1.0,
    },
    "lips_up": {"mouthUpperUp*": 1.0, "noseSneer*": 0.8, "mouthShrugUpper": 0.5, "eyeSquint*": 0.3},
    "mouth_down": {
        "mouthFrown*": 1.0,
        "mouthLowerDown*": 0.6,
        "mouthShrugLower": 0.4,
        "mouthStretch*": 0.3,
        "browDown*": 0.3,
    },
    "mouth_extreme": {
        "jawOpen": 0.6,
        "mouthStretch*": 0.8,
        "mouthUpperUp*": 0.6,
        "mouthLowerDown*": 0.6,
        "eyeSquint*": 0.6,
        "noseSneer*": 0.4,
        "browDown*": 0.4,
        "jawPitch": 2.0,
    },
    "mouth_middle": {"mouthPucker": 1.0, "mouthFunnel": 0.4, "mouthPress*": 0.2, "browDown*": 0.2},
    "mouth_open": {"jawOpen": 0.6, "mouthFunnel": 0.3, "browInnerUp": 0.2, "jawPitch": 2.0},
    "mouth_side": {
        "mouth+": 1.0,
        "jaw+": 0.6,
        "mouthSmile+": 0.2,
        "eyeSquint+": 0.4,
        "cheekSquint+": 0.3,
    },
    "mouth_up": {
        "mouthShrugLower": 1.0,
        "mouthShrugUpper": 0.9,
        "mouthFrown*": 0.3,
        "mouthPucker": 0.3,
        "browInnerUp": 0.2,
    },
}


class AnnyFaces(MeshDataset):
    r"""Faces of 12 subjects in 12 extreme expressions, laid out as the COMA data set is: every
    expression is a smooth sequence from neutral to its peak and back. They are made on this
    computer, from the `Anny <https://arxiv.org/abs/2511.03589>`_ model of the package :obj:`anny`
    (Apache-2.0, on CC0 data of MakeHuman), and stored for the next time. No network is needed.

    A mesh has 4,538 vertices and 9,014 faces: the skin of head and neck with the inside of the
    mouth, the tongue and two eyeballs. It faces :math:`+z` with :math:`+y` up, in metres, and every
    subject's neutral face has its mean at the origin. Subjects differ by phenotype, 129 local
    changes of shape and their style of moving; neither depends on :obj:`frames`. Meshes are ordered
    by subject, expression and frame.

    Args:
        root (str or Path): The folder to store the data set in, as
            :obj:`processed/anny_faces_frames{frames}_seed{seed}.npz`. A file that is damaged or of
            another version of this generator is made again.
        frames (int, optional): Meshes per sequence; :obj:`20` makes 2,880 meshes (157 MB),
            :obj:`140` makes 20,160 (1.1 GB), the size of COMA. (default: :obj:`20`)
        seed (int, optional): Seed of the subjects and their motion. (default: :obj:`0`)
        transform (callable, optional): As in :class:`MeshDataset`. (default: :obj:`None`)

    Raises:
        ImportError: If the data set is to be made and :obj:`anny` is not installed.
        ValueError: If :obj:`frames` is not positive or :obj:`seed` negative.
    """

    def __init__(
        self,
        root: str | Path,
        frames: int = 20,
        seed: int = 0,
        transform: Callable | None = None,
    ):
        if frames < 1 or seed < 0:
            raise ValueError(
                f"Expected positive 'frames' and a 'seed' of at least 0 (got {frames} and {seed})"
            )
        root = Path(root).expanduser()
        path = root / "processed" / f"anny_faces_frames{frames}_seed{seed}.npz"
        arrays = _load(path, frames, seed)
        if arrays is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A sequence is little work: where cores are shared, more threads take three times as
            # long.
            num_threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                arrays = _make(frames, seed, path.parent)
            finally:
                torch.set_num_threads(num_threads)
            _save(path, arrays)
            num_meshes, num_vertices, _ = arrays["vertices"].shape
            print(
                f"Made {num_meshes:,} meshes of {num_vertices:,} vertices, "
                f"{path.stat().st_size / 1e6:.0f} MB in {path}"
            )
        expressions = list(EXPRESSIONS)
        sequences = [(f"{s:02d}", e) for s in range(NUM_SUBJECTS) for e in expressions]
        labels = {
            "subject": [s for s, _ in sequences for _ in range(frames)],
            "expression": [e for _, e in sequences for _ in range(frames)],
            "frame": [i for _ in sequences for i in range(frames)],
        }
        template = arrays["template"], arrays["faces"]
        vertices = torch.from_numpy(arrays["vertices"])
        super().__init__(vertices, template, labels, str(root), transform)


def _make(frames: int, seed: int, folder: Path) -> dict[str, ndarray]:
    # 'frames' decides where the sequences are sampled, never what is drawn for them.
    time = (np.arange(frames) + 0.5) / frames
    row = 0
    with tqdm(total=NUM_SUBJECTS * len(EXPRESSIONS), desc="Loading Anny") as progress:
        head = _Head(folder)
        progress.set_description("Making faces")
        num_vertices = len(head.model.template_vertices)
        vertices = np.empty((progress.total * frames, num_vertices, 3), dtype=np.float32)
        for s in range(NUM_SUBJECTS):
            rng = np.random.default_rng([seed, s, 0])
            shape = _draw_shape(head, rng)
            style = np.exp(0.12 * rng.standard_normal(len(head.actions)))
            side = "Left" if rng.random() < 0.5 else "Right"
            center = head(shape)[0].mean(axis=0)
            for e, peak in enumerate(EXPRESSIONS.values(), start=1):
                rng = np.random.default_rng([seed, s, e])
                motion = _draw_motion(head, rng, _spell_out(peak, side), style, time)
                vertices[row : row + frames] = head(shape, *motion) - center
                row += frames
                progress.update()
    adult = head(_average_adult(head))[0]
    return {
        "generator": np.array(GENERATOR),
        "frames": np.array(frames),
        "seed": np.array(seed),
        "vertices": vertices,
        "template": adult - adult.mean(axis=0),
        "faces": head.faces,
    }


def _spell_out(peak: dict[str, float], side: str) -> dict[str, float]:
    sides = {"*": ("Left", "Right"), "+": (side,)}
    return {
        name.rstrip("*+") + suffix: value
        for name, value in peak.items()
        for suffix in sides.get(name[-1], ("",))
    }


class _Head:
    # Anny's head as a function from arrays to an array of vertices.
    def __init__(self, folder: Path):
        self.model = _load_anny(folder)
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


def _average_adult(head: _Head) -> dict[str, ndarray]:
    phenotypes = np.full((1, len(head.model.phenotype_labels)), 0.5)
    phenotypes[:, head.model.phenotype_labels.index("age")] = 0.7
    return {
        "phenotypes": phenotypes,
        "local_changes": np.zeros((1, len(head.model.local_change_labels))),
    }


def _draw_shape(head: _Head, rng: np.random.Generator) -> dict[str, ndarray]:
    drawn = {
        "gender": rng.uniform(0.05, 0.95),
        "age": rng.uniform(0.62, 0.95),
        "muscle": rng.uniform(0.3, 0.7),
        "weight": rng.uniform(0.25, 0.8),
        "height": rng.uniform(0.4, 0.6),
        "proportions": rng.uniform(0.3, 0.9),
        **dict(zip(("african", "asian", "caucasian"), rng.dirichlet(np.ones(3)), strict=True)),
    }
    shape = _average_adult(head)
    for name, value in drawn.items():
        shape["phenotypes"][:, head.model.phenotype_labels.index(name)] = value

    # Every change of the head moves its vertices by about 2 mm at most; the two sides move alike.
    common = {}
    for i, name in enumerate(head.model.local_change_labels):
        value, own = rng.standard_normal(2)
        part = re.fullmatch(r"([lr]-)?((cheek|chin|ear|eye|forehead|head|mouth|neck|nose).*)", name)
        if part is None or re.search(r"^(head|neck)-trans|^(mouth|nose)-trans-out", name):
            continue
        if part[1]:
            value = common.setdefault(part[2], value) + 0.2 * own
        reach = head.reach[name]
        shape["local_changes"][:, i] = np.clip(value, -2, 2) * min(0.3, 0.002 / reach)
    return shape


def _draw_motion(
    head: _Head,
    rng: np.random.Generator,
    peak: dict[str, float],
    style: ndarray,
    time: ndarray,
) -> tuple[ndarray, dict[str, ndarray]]:
    start, top, turn, end = rng.uniform([0.06, 0.4, 0.52, 0.85], [0.15, 0.48, 0.6, 0.94])
    strength = rng.uniform(0.8, 1.05)

    def bump(lag: float) -> ndarray:
        return _smoothstep((time - lag - start) / (top - start)) * _smoothstep(
            (end - time + lag) / (end - turn)
        )

    def wobble(size: float) -> ndarray:
        return sum(size * rng.standard_normal() / k * np.sin(np.pi * k * time) for k in (1, 2, 3))

    actions = np.zeros((len(time), len(head.actions)))
    for i, name in enumerate(head.actions):
        lag = np.clip(0.02 * rng.standard_normal(), -0.05, 0.05)
        co_movement = 0.06 * abs(rng.standard_normal()) * bump(lag) + wobble(0.02)
        if name.startswith(INVOLUNTARY):
            actions[:, i] += co_movement
        actions[:, i] += strength * style[i] * peak.get(name, 0) * bump(lag)
    angles = {
        "head": np.stack([wobble(1.2), wobble(0.6), wobble(1.2)], axis=1),
        "jaw": np.stack([wobble(0.5), wobble(0.2), wobble(0.3)], axis=1),
    }
    angles["jaw"][:, 0] += strength * peak.get("jawPitch", 0) * bump(0)
    return actions, angles


def _smoothstep(x: ndarray) -> ndarray:
    x = np.clip(x, 0, 1)
    return x**3 * (10 + x * (6 * x - 15))


def _load_anny(folder: Path):
    try:
        import anny
        import anny.models.full_model as source
        import anny.paths
    except ImportError as e:
        raise ImportError(
            f"Making 'AnnyFaces' requires '{e.name}': install it with "
            f'`pip install "pyg_attnpool[data]"`'
        ) from e

    # Anny keeps 0.7 GB of intermediate results in the home folder, and reads its 1,136 text files
    # number by number, which takes most of a minute. Skinning by 'lbs' leaves warp alone.
    cache, slow = anny.paths.get_anny_cache_path(), source.load_blend_shape
    with tempfile.TemporaryDirectory(dir=folder, prefix=".anny-") as temporary:
        try:
            anny.paths.set_anny_cache_path(temporary)
            source.load_blend_shape = _load_blend_shape
            return anny.Anny(
                rig="makehuman-head",
                topology="head",
                local_changes="all",
                facial_actions="all",
                phenotypes="all",
                phenotype_blendshapes="original",
                skinning_method="lbs",
            )
        finally:
            anny.paths.set_anny_cache_path(cache)
            source.load_blend_shape = slow


def _load_blend_shape(filename, vertices_count, world_transformation, dtype):
    # What anny's function of this name returns. Some files are empty.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input contained no data.*")
        rows = torch.from_numpy(np.loadtxt(filename).reshape(-1, 4))
    offset = torch.zeros(vertices_count, 3, dtype=dtype)
    offset[rows[:, 0].long()] = rows[:, 1:].to(dtype)
    return world_transformation.apply(offset)


def _save(path: Path, arrays: dict[str, ndarray]):
    with replacing(path) as temporary:
        np.savez(temporary, **arrays, sha256=np.array(digest(arrays)))


def _load(path: Path, frames: int, seed: int) -> dict[str, ndarray] | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if str(arrays.pop("sha256")) != digest(arrays):
            raise ValueError("another checksum")
        made = tuple(int(arrays[name]) for name in ("generator", "frames", "seed"))
    except (BadZipFile, EOFError, KeyError, OSError, ValueError, zlib.error) as e:
        print(f"{path} is damaged ({e}) and made again")
        return None
    if made != (GENERATOR, frames, seed):
        print(f"{path} is of another generator or other parameters and made again")
        return None
    return arrays
