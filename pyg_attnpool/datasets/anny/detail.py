r"""What scans have and blends of smooth shapes have not: folds, tissue that bulges, a surface of
one's own, and noise."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray
from scipy.sparse import csr_matrix, diags
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu
from scipy.spatial import cKDTree

from pyg_attnpool.mesh.normals import vertex_normals

# Part of every stored file with detail: raised with every change of the displacements made here.
DETAIL_GENERATOR = 1


@dataclass(frozen=True)
class Detail:
    r"""How much of each kind of detail a set made from Anny has, where 1 is the strength that the
    set was made with and 0 leaves the kind out.

    Args:
        folds (float, optional): Folds and wrinkles, which grow where the skin is compressed.
            (default: :obj:`1.0`)
        tissue (float, optional): Soft tissue that keeps its volume, muscles that swell as joints
            bend, and flesh that lags behind. (default: :obj:`1.0`)
        identity (float, optional): The fine surface of every subject. (default: :obj:`1.0`)
        noise (float, optional): Noise of the sensor and of the registration.
            (default: :obj:`1.0`)

    Raises:
        ValueError: If a strength is negative or not finite.

    Example:
        >>> Detail(noise=0)
        Detail(folds=1.0, tissue=1.0, identity=1.0, noise=0)
    """

    folds: float = 1.0
    tissue: float = 1.0
    identity: float = 1.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"Expected a finite '{name}' of at least 0 (got {value!r})")

    def __str__(self) -> str:
        return "-".join(f"{value:g}" for value in astuple(self))


class Scale(NamedTuple):
    r"""The lengths of a part of the body, in metres."""

    wavelength: float
    r"""Of the middle fold; the others have two thirds to one and a half times of it."""

    thickness: float
    r"""Of the tissue beneath the skin."""

    identity: float
    r"""Standard deviation of the surface of a subject."""

    sensor: float
    r"""Standard deviation of noise along normals."""

    sliding: float
    r"""Standard deviation of vertices along the surface, in either direction."""

    pull: float = 0.0
    r"""Standard deviation of the matrix that makes the motion of a vertex a subject's own. It is no
    length, and 0 where bones turn the skin."""


# For one camera system (3dMDface) with dense registration, White et al. ("Sources of variation in
# the 3dMDface and Vectra H1 3D facial imaging systems", Scientific Reports 10, 2020) bound the
# error by 0.44 mm. Noise and sliding together are 0.17 mm here. Bodies are scanned from farther
# away: three times as much for them is assumed, as are all other lengths.
FACES = Scale(0.016, 0.004, 0.0003, 0.0001, 0.0001, 0.2)
HANDS = Scale(0.010, 0.003, 0.0002, 0.0001, 0.0001)
BODIES = Scale(0.060, 0.015, 0.0010, 0.0003, 0.0003)


class Muscle(NamedTuple):
    r"""Flesh that swells as a joint bends."""

    bones: tuple[str, ...]
    side: tuple[float, float, float]
    r"""Where it is, as seen from the bone, along the axes of the template."""

    joint: str
    degrees: tuple[float, float]
    r"""Between which it swells."""

    height: float
    r"""How far at most, in metres."""


WAVES = 24
ONSET = 0.01  # the compression at which skin begins to fold
TAKEN = 0.3  # of the compression; the rest makes the skin thicker
OCTAVES = 4  # of the surface of a subject


class Surface(NamedTuple):
    r"""What the skin of a subject is like: fields on the vertices of the template."""

    own: ndarray  # [N], displacement along normals
    thickness: ndarray  # [N]
    phase: ndarray  # [WAVES, N]
    share: ndarray  # [WAVES, N]
    pull: ndarray  # [N, 3, 3]


class Skin:
    r"""Adds detail to meshes of a template.

    *Folds.* Skin that cannot be compressed buckles: a sine of wave vector :math:`\mathbf{q}` and
    amplitude :math:`a` takes up a compression :math:`e` along it where :math:`a = 2 \sqrt{e} /
    |\mathbf{q}|`. The compression of a vertex along a wave comes from the Cauchy-Green tensor
    :math:`\mathbf{C}` between a subject's neutral mesh and the posed one,
    :math:`e = 1 - (\mathbf{q}^{\top} \mathbf{C} \mathbf{q})^{1/2} / |\mathbf{q}|`. Of several
    waves each takes a share, the more the more the skin is compressed along it, so that crests lie
    across the compression. They stay in their places on the skin, which are each subject's own.

    *Tissue.* Where the area of the skin is :math:`J` times that of the neutral mesh, tissue of
    thickness :math:`h` that keeps its volume is :math:`h / J` thick.

    *Identity.* Beside a fine surface, every subject has its own way to move: a matrix that varies
    over the face turns and stretches how far a vertex has gone from the neutral mesh.

    *Fields.* Whatever varies over the surface is a Matérn field, white noise :math:`\mathbf{w}`
    smoothed by :math:`(\mathbf{M} + l^2 \mathbf{S})^{-1} \mathbf{M}^{1/2} \mathbf{w}` twice, with
    mass and stiffness of the template (Lindgren, Rue & Lindström, "An explicit link between
    Gaussian fields and Gaussian Markov random fields", 2011). The surface of a subject is a sum
    of such fields, of half the length and half the height each.

    Args:
        vertices (numpy.ndarray): The template's :obj:`[N, 3]`, in metres.
        faces (numpy.ndarray): Its faces :obj:`[F, 3]`.
        scale (Scale): Its lengths.
        detail (Detail): How much of each kind.
        seed (int): Seed of everything random.
    """

    def __init__(
        self,
        vertices: ndarray,
        faces: ndarray,
        scale: Scale,
        detail: Detail,
        seed: int,
    ):
        self.vertices, self.faces, self.scale, self.detail = vertices, faces, scale, detail
        self.mass, self.stiffness = operators(vertices, faces)
        self.solvers: dict[float, Any] = {}
        edges = _edges(faces, len(vertices))
        self.average = diags(1 / np.maximum(edges.sum(axis=1).A1, 1)) @ edges
        normals = vertex_normals(vertices, faces)
        length = np.linalg.norm(vertices[faces] - vertices[np.roll(faces, 1, axis=1)], axis=-1)
        # The mean edge around a vertex: a higher fold would turn faces over.
        around = _to_vertices(
            np.column_stack([length.mean(axis=1), np.ones(len(faces))]), faces, len(vertices)
        )
        self.highest = 0.3 * self._smoothed(around[:, 0] / np.maximum(around[:, 1], 1))
        # Without eyes and tongue, which are parts of their own.
        _, part = connected_components(edges, directed=False)
        self.skin = (part == np.bincount(part).argmax()).astype(float)
        self.exposed = self._exposed(normals)
        self.seed = seed
        # The waves that all subjects share; streams apart from those of shapes and motion.
        rng = self._rng(0)
        direction = rng.standard_normal((WAVES, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        length = scale.wavelength * 1.5 ** rng.uniform(-1, 1, (WAVES, 1))
        self.waves = 2 * np.pi / length * direction
        along = self.waves[:, None] - (self.waves @ normals.T)[..., None] * normals
        number = np.linalg.norm(along, axis=-1)
        # A wave that meets the skin steeply is a much longer one there, and left out.
        self.along = along / np.maximum(number, 1e-9)[..., None]
        self.number = np.maximum(number, 1e-9)
        self.flat = np.clip(3 * number / np.linalg.norm(self.waves, axis=1)[:, None] - 2, 0, 1)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def subject(self, s: int) -> Surface:
        r"""The skin of a subject, by its number."""
        rng, scale, n = self._rng(1, s), self.scale, len(self.vertices)
        own = np.zeros(n)
        for octave in range(OCTAVES):
            own += self.field(rng, 3 * scale.wavelength / 2**octave)[0] / 2**octave
        own *= scale.identity / np.sqrt(np.mean(own**2))
        thickness = scale.thickness * np.exp(0.4 * self.field(rng, 3 * scale.wavelength)[0])
        phase = 2 * np.pi * rng.random((WAVES, 1)) + self.field(rng, 2 * scale.wavelength, WAVES)
        share = np.exp(self.field(rng, 2 * scale.wavelength, WAVES)) * self.flat
        share /= share.sum(axis=0) + 1e-3
        pull = scale.pull * self.field(rng, 4 * scale.wavelength, 9).T.reshape(-1, 3, 3)
        return Surface(own, thickness, phase + self.waves @ self.vertices.T, share, pull)

    def __call__(
        self,
        meshes: ndarray,
        neutral: ndarray,
        surface: Surface,
        key: tuple[int, ...],
        bulges: ndarray | float = 0.0,
        jiggle: ndarray | float = 0.0,
    ) -> ndarray:
        r"""Meshes :obj:`[B, N, 3]` with detail.

        Args:
            meshes (numpy.ndarray): Meshes of a subject, in metres.
            neutral (numpy.ndarray): The same subject's :obj:`[N, 3]`, or one for each mesh.
            surface (Surface): Its skin.
            key (tuple): Numbers that the noise depends on.
            bulges (numpy.ndarray, optional): Displacement :obj:`[B, N]` of muscles along normals,
                in metres. (default: :obj:`0.0`)
            jiggle (numpy.ndarray, optional): Displacement :obj:`[B, N, 3]` of flesh.
                (default: :obj:`0.0`)
        """
        detail, exposed = self.detail, self.exposed
        if detail.identity and self.scale.pull:
            pull = detail.identity * np.einsum("nij,bnj->bni", surface.pull, meshes - neutral)
            meshes = meshes + self.skin[:, None] * pull
        normals = np.stack([vertex_normals(mesh, self.faces) for mesh in meshes])
        neutrals = np.broadcast_to(neutral, meshes.shape)
        tensor = np.stack([self._strain(x, x0) for x, x0 in zip(meshes, neutrals, strict=True)])
        out = exposed * detail.identity * surface.own + np.zeros(meshes.shape[:2])
        if detail.tissue:
            out += detail.tissue * (exposed * self._swollen(tensor, surface.thickness) + bulges)
        if detail.folds:
            out += detail.folds * exposed * self._folded(tensor, surface)
        moved = meshes + out[..., None] * normals + detail.tissue * jiggle
        if detail.noise:
            moved += detail.noise * self._noise(self._rng(2, *key), normals)
        return moved

    def muscle(self, weights: ndarray, side: ndarray) -> ndarray:
        r"""The shape :obj:`[N]` of a muscle, 1 where it is highest.

        Args:
            weights (numpy.ndarray): How much of every vertex belongs to its bones, :obj:`[N]`.
            side (numpy.ndarray): The direction in which it lies.
        """
        normals = vertex_normals(self.vertices, self.faces)
        facing = np.maximum(normals @ (side / np.linalg.norm(side)), 0)
        shape = self._smoothed(weights * facing, 6)
        return shape / shape.max()

    def field(self, rng: np.random.Generator, length: float, num: int = 1) -> ndarray:
        r"""Random fields :obj:`[num, N]` that vary over a length, of mean square one."""
        if length not in self.solvers:
            self.solvers[length] = splu((self.mass + length**2 / 8 * self.stiffness).tocsc())
        white = np.sqrt(self.mass.diagonal())[:, None] * rng.standard_normal(
            (len(self.vertices), num)
        )
        solver = self.solvers[length]
        found = solver.solve(self.mass @ solver.solve(white)).T
        return found / np.sqrt(np.mean(found**2, axis=1, keepdims=True))

    def _strain(self, x: ndarray, neutral: ndarray) -> ndarray:
        # Twice Green's strain, C - 1, of every vertex, [N, 3, 3]. Unlike C itself it vanishes for a
        # rigid motion where the skin is curved, too.
        a, b = (
            np.stack([mesh[self.faces[:, i]] - mesh[self.faces[:, 0]] for i in (1, 2)], axis=-1)
            for mesh in (neutral, x)
        )
        area = np.linalg.norm(np.cross(a[..., 0], a[..., 1]), axis=1)
        gram = a.transpose(0, 2, 1) @ a
        # Slivers have no direction to speak of.
        size = np.trace(gram, axis1=1, axis2=2)[:, None, None]
        back = np.linalg.solve(gram + (1e-6 * size + 1e-20) * np.eye(2), a.transpose(0, 2, 1))
        tensor = back.transpose(0, 2, 1) @ (b.transpose(0, 2, 1) @ b - gram) @ back
        tensor = np.clip(tensor, -4, 4) * area[:, None, None]
        total = _to_vertices(np.column_stack([tensor.reshape(-1, 9), area]), self.faces, len(x))
        total = self._smoothed(total)
        return (total[:, :9] / np.maximum(total[:, 9:], 1e-12)).reshape(-1, 3, 3)

    def _swollen(self, tensor: ndarray, thickness: ndarray) -> ndarray:
        ratio = np.sqrt(np.clip(np.linalg.det(np.eye(3) + tensor), 0.04, 25))
        return thickness * np.tanh((1 / ratio - 1) / 0.6) * 0.6

    def _folded(self, tensor: ndarray, surface: Surface) -> ndarray:
        q = self.along
        strain = np.einsum("bnij,wni,wnj->wbn", tensor, q, q, optimize=True)
        compression = np.maximum(1 - ONSET - np.sqrt(np.maximum(1 + strain, 0)), 0)
        most = compression.max(axis=0)
        # Waves along which the skin is compressed most take up most.
        share = surface.share[:, None] * compression**2
        share *= TAKEN * most / np.maximum(share.sum(axis=0), 1e-12)
        height = 2 * np.sqrt(share) / self.number[:, None]
        out = (height * np.cos(surface.phase)[:, None]).sum(axis=0)
        return self.highest * np.tanh(out / self.highest)

    def _noise(self, rng: np.random.Generator, normals: ndarray) -> ndarray:
        num, scale = len(normals), self.scale
        sensor = rng.standard_normal(normals.shape[:2])
        sliding = self.field(rng, scale.wavelength, 3 * num).reshape(num, 3, -1).transpose(0, 2, 1)
        sliding -= (sliding * normals).sum(axis=-1, keepdims=True) * normals
        return scale.sensor * sensor[..., None] * normals + scale.sliding * sliding

    def _smoothed(self, x: ndarray, steps: int = 2) -> ndarray:
        for _ in range(steps):
            x = (x + self.average @ x) / 2
        return x

    def _exposed(self, normals: ndarray) -> ndarray:
        # 1 on skin and 0 where it faces other skin: inside a mouth nothing is scanned.
        x = self.vertices
        pairs = cKDTree(x).query_pairs(self.scale.wavelength, output_type="ndarray")
        pairs = np.concatenate([pairs, pairs[:, ::-1]])
        between = x[pairs[:, 1]] - x[pairs[:, 0]]
        ahead = (between * normals[pairs[:, 0]]).sum(axis=1)
        facing = (normals[pairs[:, 0]] * normals[pairs[:, 1]]).sum(axis=1) < -0.3
        hidden = facing & (ahead > 0.7 * np.linalg.norm(between, axis=1))
        exposed = self.skin.copy()
        exposed[pairs[hidden, 0]] = 0
        return self.skin * self._smoothed(exposed, 3)


def _edges(faces: ndarray, num: int) -> csr_matrix:
    pairs = faces.ravel(), np.roll(faces, 1, axis=1).ravel()
    ones = np.ones(faces.size)
    edges = csr_matrix((ones, pairs), (num, num))
    return ((edges + edges.T) > 0).astype(float).tocsr()


def _to_vertices(x: ndarray, faces: ndarray, num: int) -> ndarray:
    # Sums over faces [F] or [F, C] at their vertices.
    rows = np.repeat(np.arange(len(faces)), 3)
    return csr_matrix((np.ones(faces.size), (faces.ravel(), rows)), (num, len(faces))) @ x


def operators(vertices: ndarray, faces: ndarray) -> tuple[csr_matrix, csr_matrix]:
    r"""Lumped mass and cotangent stiffness of a surface, :obj:`[N, N]` each.

    Args:
        vertices (numpy.ndarray): Vertices :obj:`[N, 3]`.
        faces (numpy.ndarray): Faces :obj:`[F, 3]`.
    """
    n = len(vertices)
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    area = np.maximum(area, 1e-6 * area.mean())
    mass = diags(_to_vertices(area / 3, faces, n))
    stiffness = csr_matrix((n, n))
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        u, v = (vertices[faces[:, m]] - vertices[faces[:, i]] for m in (j, k))
        # Of an obtuse angle the cotangent is negative, with which a field could overshoot.
        cotangent = np.clip((u * v).sum(axis=1) / (2 * area), 0, 20) / 2
        weight = csr_matrix((cotangent, (faces[:, j], faces[:, k])), (n, n))
        weight = weight + weight.T
        stiffness = stiffness + diags(weight.sum(axis=1).A1) - weight
    return mass.tocsr(), stiffness.tocsr()
