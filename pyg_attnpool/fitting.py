r"""Fits a morphable model to observations: some vertices, landmarks, a point cloud or a scan.

All of them are maximum a posteriori estimates: the squared distances over the variance of the
noise, plus the squared Mahalanobis distance of the latent code from the codes of the training
meshes. Gauss-Newton steps minimise the sum. The latent code is small, so the decoder's Jacobian is
that of central differences, all decoded in one batch: they need nothing of the decoder but its
forward pass, and one decoder with all differences takes less time than the backward passes of a
few vertices.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch_geometric.data import Data

from pyg_attnpool.datasets.align import rotations
from pyg_attnpool.datasets.cache import progress_bar
from pyg_attnpool.latent import as_codes, latent_axes
from pyg_attnpool.mapping import Mapping
from pyg_attnpool.mesh import read_scan
from pyg_attnpool.mesh.closest import closest_points
from pyg_attnpool.mesh.normals import vertex_normals
from pyg_attnpool.metrics import evaluating, vertex_distances
from pyg_attnpool.units import metres, one_warning, warn_millimetres

if TYPE_CHECKING:
    from pyg_attnpool.models import MorphableModel

MotionKind = Literal["none", "rigid", "similarity"]
FREEDOM = {"none": 0, "rigid": 6, "similarity": 7}

NOISE = 0.001  # metres
BLOCK = 128  # meshes decoded at a time
MESHES = 16  # meshes fitted at a time
TOLERANCE = 1e-4  # a relative decrease of the objective that is small
SAMPLES = 2000  # points of a scan, and vertices of the model, that every step looks at
POSE_STEPS = 60  # of the search for a first pose
RIGID_STEPS = 10  # of a scan before the shape may change
FACING = 0.3  # cosine between normals below which points are no pair
TANGENTIAL = 0.1  # weight of a distance along the surface, relative to one across it


class Fit(NamedTuple):
    r"""The mesh of a model that fits observations. Of a batch, every entry begins with
    :obj:`B`.

    Example:
        >>> half = torch.arange(642) < 321  # the vertices that were seen
        >>> fit = model.fit_to(meshes[0], weight=half)
        >>> fit.mesh.shape, fit.converged
        (torch.Size([642, 3]), tensor(True))
    """

    mesh: Tensor
    r"""The mesh :obj:`[N, C]` in metres, where the observations are."""
    code: Tensor
    r"""The latent code :obj:`[latent_channels]`; decoded, it is the mesh in the model's own pose
    :math:`\mathbf{x}`."""
    rotation: Tensor
    r"""The rotation :math:`\mathbf{R}` :obj:`[3, 3]` of the motion :math:`s \, \mathbf{R}
    \mathbf{x} + \mathbf{t}` to the observations."""
    translation: Tensor
    r"""The translation :math:`\mathbf{t}` :obj:`[3]` in metres."""
    scale: Tensor
    r"""The scale :math:`s`."""
    residuals: Tensor
    r"""The distance in millimetres of every observed point to where the mesh has it, NaN where the
    weight is zero; of a scan, to the surface of the mesh."""
    converged: Tensor
    r"""Whether the last step was small and, of a scan, most of it is explained."""


@torch.no_grad()
@one_warning()
def fit_to(
    model: MorphableModel,
    observations: Any = None,
    *,
    weight: Any = None,
    landmarks: Any = None,
    motion: MotionKind | None = None,
    noise: float = NOISE,
    max_iterations: int = 50,
) -> Fit:
    r"""Fits a latent code, and a motion where asked for, to observations:

    .. math::
        \min_{\mathbf{z}, s, \mathbf{R}, \mathbf{t}} \; \frac{1}{\sigma^2} \sum_i w_i \left\|
        s \, \mathbf{R} \, \mathbf{x}_i(\mathbf{z}) + \mathbf{t} - \mathbf{y}_i \right\|^2 +
        (\mathbf{z} - \mathbf{\mu}_z)^{\top} \mathbf{\Sigma}_z^{-1} (\mathbf{z} - \mathbf{\mu}_z)

    where mean and covariance of the latent codes are those of the training meshes. Observations
    are one of

    1. a mesh of the template, :obj:`[N, 3]` or :obj:`[B, N, 3]`, of which :obj:`weight` says how
    much every vertex counts: the rest is completed

    2. :obj:`None`, with landmarks alone

    3. a point cloud, :obj:`Data(pos=points)`, with unit normals in :obj:`norm` where they are known

    4. a scan of any topology, :obj:`Data(pos=vertices, face=face)`, a tuple of vertices
    :obj:`[P, 3]` and faces :obj:`[F, 3]`

    5. a file of a scan or a point cloud in the unit of the model, as
    :func:`~pyg_attnpool.mesh.read_scan` takes

    Points of a scan meet the closest points of the model, and vertices of the model those of the
    scan, anew in every step. Pairs that lie far apart for the present state, face away from each
    other or end at an open boundary count little or nothing (Geman-McClure kernel). The first pose
    is that of the landmarks, or else the best of 60 rotations, the group of the icosahedron.

    Args:
        model (MorphableModel): The model.
        observations (torch.Tensor, numpy.ndarray, Data, tuple, str or Path, optional): As above, in
            metres; of a mesh the first three features count. (default: :obj:`None`)
        weight (torch.Tensor or numpy.ndarray, optional): Weights or a mask :obj:`[N]` or
            :obj:`[B, N]` of the vertices of a mesh. Where it is zero, a coordinate may be NaN.
            (default: :obj:`None`)
        landmarks (dict or tuple, optional): Positions :obj:`[3]` by vertex; or a tuple of vertices
            :obj:`[P]` and positions :obj:`[P, 3]` or :obj:`[B, P, 3]`. In the place of vertices, a
            :class:`~pyg_attnpool.Mapping` from vertices to points takes points on faces.
            (default: :obj:`None`)
        motion (str, optional): The motion that the model may make: :obj:`"none"`,
            :obj:`"rigid"` or :obj:`"similarity"`, which scales as well. If :obj:`None`, a point
            cloud or scan is rigid, and all else is none. (default: :obj:`None`)
        noise (float, optional): The standard deviation :math:`\sigma` of observations about the
            model in metres: the error of measurement and that of the model together. Larger means
            closer to the mean of the training codes. (default: :obj:`0.001`)
        max_iterations (int, optional): Gauss-Newton steps at most. (default: :obj:`50`)

    Returns:
        Mesh, code, motion, residuals, and whether the steps have converged.

    Raises:
        TypeError: If observations are none of these.
        ValueError: If a shape or an index does not fit, a number is not finite, or there are too
            few points for a motion.

    Example:
        >>> meshes = torch.rand(50, 4, 3)
        >>> template = meshes[0].numpy(), np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
        >>> model = MorphableModel.pca(template, 6).fit(meshes)
        >>> truth = model(meshes[:1])[0]
        >>> fit = model.fit_to(truth, weight=torch.tensor([1, 1, 0, 1]), noise=1e-5)
        >>> (fit.mesh - truth).abs().max() < 1e-3
        tensor(True)
    """
    if motion not in (None, *FREEDOM):
        raise ValueError(f"Expected 'motion' to be one of {list(FREEDOM)} (got {motion!r})")
    _check_settings(noise, max_iterations)
    known = [] if landmarks is None else [_landmarks(model, landmarks)]
    if isinstance(observations, Data | tuple | str | Path):
        if weight is not None:
            raise ValueError("Expected no 'weight' beside a scan (got one)")
        scan = _scan(model, observations, motion or "rigid")
        if known and len(known[0].position) > 1:
            raise ValueError(f"Expected landmarks of one scan (got {len(known[0].position)})")
        if known and motion != "none" and known[0].mapping.num_target < 3:
            raise ValueError(
                f"Expected at least three landmarks to start from (got "
                f"{known[0].mapping.num_target})"
            )
        with evaluating(model):
            return _fit_scan(model, scan, known, motion or "rigid", noise, max_iterations)
    if observations is not None:
        known.insert(0, _vertices(model, observations, weight))
    elif weight is not None:
        raise ValueError("Expected 'weight' of the vertices of a mesh (got no mesh)")
    if not known:
        raise ValueError("Expected observations or landmarks (got none)")
    if motion != "similarity":  # which brings any unit to that of the model
        for points in known:
            for position, weight in zip(points.position, points.weight, strict=True):
                warn_millimetres("observations", position[weight > 0])
    with evaluating(model):
        return _fit_points(_Decoder(model), known, motion or "none", noise, max_iterations)


@torch.no_grad()
@one_warning()
def edit(
    model: MorphableModel,
    x: Any,
    targets: dict[int, Any],
    keep: Any = None,
    *,
    noise: float = NOISE,
    max_iterations: int = 50,
) -> Fit:
    r"""Moves some vertices of a mesh and takes along what belongs to them in the model:

    .. math::
        \min_{\mathbf{z}} \; \frac{1}{\sigma^2} \left( \sum_{i} \left\| \mathbf{x}_i(\mathbf{z}) -
        \mathbf{y}_i \right\|^2 + \frac{m}{\sum_j w_j} \sum_j w_j \left\| \mathbf{x}_j(\mathbf{z}) -
        \mathbf{x}_j(\mathbf{z}_0) \right\|^2 \right) + (\mathbf{z} - \mathbf{z}_0)^{\top}
        \mathbf{\Sigma}_z^{-1} (\mathbf{z} - \mathbf{z}_0)

    for :math:`m` targets :math:`\mathbf{y}_i`, the code :math:`\mathbf{z}_0` of the mesh and the
    covariance of the codes of the training meshes.

    Args:
        model (MorphableModel): The model.
        x (torch.Tensor or numpy.ndarray): A mesh :obj:`[N, C]` in metres or a code
            :obj:`[latent_channels]`.
        targets (dict): By vertex the position :obj:`[3]` in metres to move it to.
        keep (torch.Tensor or numpy.ndarray, optional): A mask :obj:`[N]` of what must stay, or
            weights, which together count as much as the targets where they are zero and one. The
            targets are never among them. (default: :obj:`None`)
        noise (float, optional): How far from its target a vertex may end, :math:`\sigma` in metres:
            the smaller it is, the farther the code goes for it. (default: :obj:`0.001`)
        max_iterations (int, optional): Gauss-Newton steps at most. (default: :obj:`50`)

    Returns:
        The edited mesh and its code, and the residuals :obj:`[m]` of the targets.

    Raises:
        TypeError: If something is no floating point tensor or array.
        ValueError: If a shape or a vertex does not fit, or a number is not finite.

    Example:
        >>> moved = meshes[0, 7] + torch.tensor([0.0, 0.0, 0.005])  # by 5 mm
        >>> model.edit(meshes[0], {7: moved}).mesh.shape
        torch.Size([642, 3])
    """
    _check_settings(noise, max_iterations)
    (code,), single = as_codes(model, x=x)
    if not single:
        raise ValueError(f"Expected one mesh or code to edit (got a batch of {len(code)})")
    if not isinstance(targets, dict):
        raise TypeError(f"Expected 'targets' as positions by vertex (got {type(targets).__name__})")
    known = [_landmarks(model, targets)]
    with evaluating(model):
        if keep is not None:
            mesh = model.decode(code)[0, :, :3]
            kept = _vertices(model, mesh, keep, "keep")
            moved = torch.isin(kept.mapping.index[:, 0], known[0].mapping.index)
            stays = kept.weight.masked_fill(moved, 0)
            # The mean over what stays, not the sum: else a thousand vertices hold back one.
            scale = len(targets) / kept.weight.bool().sum()
            known.append(kept._replace(weight=scale * stays))
        return _fit_points(_Decoder(model, code[0]), known, "none", noise, max_iterations)


# What is observed ####################################################################


class _Points(NamedTuple):
    # Points of the template's surface and where they were observed, in double precision.
    mapping: Mapping  # from vertices to points
    position: Tensor  # [B, P, 3]
    weight: Tensor  # [B, P]
    single: bool


class _Scan(NamedTuple):
    points: ndarray  # [P, 3] in metres
    faces: ndarray | None  # [F, 3]
    normals: ndarray | None  # [P, 3], unit vectors
    boundary: ndarray  # [P], whether a point lies at an open boundary


def _check_settings(noise: float, max_iterations: int) -> None:
    if not isinstance(noise, int | float) or not 0 < noise < np.inf:
        raise ValueError(f"Expected a positive 'noise' in metres (got {noise!r})")
    if not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(f"Expected positive 'max_iterations' (got {max_iterations!r})")


def _tensor(name: str, x: Any, model: MorphableModel) -> Tensor:
    if isinstance(x, list | tuple):
        x = torch.stack([torch.as_tensor(row) for row in x]) if len(x) else torch.empty(0)
    x = torch.from_numpy(x) if isinstance(x, ndarray) else x
    if not isinstance(x, Tensor) or x.is_complex():
        raise TypeError(f"Expected {name} as a tensor or array (got {type(x).__name__})")
    return x.to(model.mean.device, torch.double)


def _vertices(
    model: MorphableModel, observations: Any, weight: Any, name: str = "weight"
) -> _Points:
    x = _tensor("observations", observations, model)
    n, c = model.mean.shape
    if x.dim() not in (2, 3) or x.size(-2) != n or x.size(-1) not in (3, c) or 0 in x.shape:
        raise ValueError(
            f"Expected a mesh [{n}, 3] or [B, {n}, 3] of the model's template (got "
            f"{list(x.shape)}): a point cloud is Data(pos=points), a scan (vertices, faces)"
        )
    position = x[..., :3].view(-1, n, 3)
    w = x.new_ones(n) if weight is None else _tensor(f"'{name}'", weight, model)
    if w.shape not in ((n,), position.shape[:2]):
        raise ValueError(
            f"Expected '{name}' of shape [{n}] or {list(position.shape[:2])} (got {list(w.shape)})"
        )
    w = w.expand(position.shape[:2])
    if not torch.isfinite(w).all() or (w < 0).any() or not (w > 0).any(dim=1).all():
        raise ValueError(
            f"Expected finite '{name}' of at least zero, some of each mesh above (got others)"
        )
    if not torch.isfinite(position[w > 0]).all():
        raise ValueError(
            f"Expected finite vertices (got NaN or infinity): those that are unknown need a "
            f"'{name}' of zero"
        )
    every = torch.arange(n, device=x.device).view(-1, 1)
    mapping = Mapping(every, torch.ones_like(every, dtype=torch.double), n)
    return _Points(mapping, position.masked_fill(w.unsqueeze(2) == 0, 0), w, x.dim() == 2)


def _landmarks(model: MorphableModel, landmarks: Any) -> _Points:
    if isinstance(landmarks, dict):
        landmarks = list(landmarks), list(landmarks.values())
    if not isinstance(landmarks, tuple) or len(landmarks) != 2:
        raise TypeError(
            f"Expected landmarks as positions by vertex or a tuple of vertices and positions (got "
            f"{type(landmarks).__name__})"
        )
    where, position = landmarks
    n = model.num_vertices
    position = _tensor("positions of landmarks", position, model)
    if isinstance(where, Mapping):
        mapping = where.to(model.mean.device, torch.double)
    else:
        index = torch.as_tensor(where, dtype=None if len(where) else torch.long)
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"Expected landmarks at vertices by number (got {index.dtype})")
        if index.dim() != 1 or len(index) == 0 or index.min() < 0 or index.max() >= n:
            raise ValueError(f"Expected landmarks at vertices from 0 to {n - 1} (got {where!r})")
        index = index.view(-1, 1).to(model.mean.device, torch.long)
        mapping = Mapping(index, torch.ones_like(index, dtype=torch.double), n)
    if mapping.num_source != n:
        raise ValueError(f"Expected landmarks on {n} vertices (got on {mapping.num_source})")
    shape = mapping.num_target, 3
    if position.dim() not in (2, 3) or position.shape[-2:] != shape or 0 in position.shape:
        raise ValueError(
            f"Expected positions of shape {list(shape)} of landmarks (got {list(position.shape)})"
        )
    if not torch.isfinite(position).all():
        raise ValueError("Expected finite positions of landmarks (got NaN or infinity)")
    batch = position.view(-1, *shape)
    return _Points(mapping, batch, torch.ones_like(batch[..., 0]), position.dim() == 2)


def _scan(model: MorphableModel, scan: Any, motion: MotionKind) -> _Scan:
    normals = None
    if isinstance(scan, str | Path):
        found, face, normals = read_scan(scan)
        scan = metres(model.unit) * found, face
    if isinstance(scan, Data):
        if scan.pos is None:
            raise ValueError("Expected the points 'pos' of a scan (got none)")
        normals = scan.norm if "norm" in scan else None
        scan = scan.pos, None if scan.face is None else scan.face.t()
    if len(scan) != 2:
        raise TypeError(f"Expected a scan of vertices and faces (got a tuple of {len(scan)})")
    points: ndarray = _array(scan[0])
    faces: ndarray | None = None if scan[1] is None else _array(scan[1])
    if points.ndim != 2 or points.shape[1] != 3 or len(points) < 3 or points.dtype.kind != "f":
        raise ValueError(
            f"Expected at least three points [P, 3] of a scan in floating point (got "
            f"{list(points.shape)} of {points.dtype})"
        )
    points = points.astype(np.float64)
    if not np.isfinite(points).all():
        raise ValueError("Expected finite points of a scan (got NaN or infinity)")
    boundary = np.zeros(len(points), dtype=bool)
    if faces is not None:
        if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype.kind not in "iu" or not len(faces):
            raise ValueError(
                f"Expected faces [F, 3] of vertices by number (got {faces.dtype} {faces.shape})"
            )
        if faces.min() < 0 or faces.max() >= len(points):
            raise ValueError(
                f"Expected faces of vertices from 0 to {len(points) - 1} (got {faces.min()} to "
                f"{faces.max()})"
            )
        faces = faces.astype(np.int64)
        boundary = _boundary(faces, len(points))
    if normals is not None:
        normals = _array(normals).astype(np.float64)
        if normals.shape != points.shape or not np.isfinite(normals).all():
            raise ValueError(f"Expected finite normals {list(points.shape)} (got others)")
        normals = _unit(normals)
    elif faces is not None:
        normals = vertex_normals(points, faces)
    if motion != "similarity":
        size, own = (np.ptp(x, axis=0).max() for x in (points, _array(model.template)))
        if not own / 50 < size < 50 * own:
            raise ValueError(
                f"Expected a scan in metres of about the size of the model, {own:.3g} (got "
                f"{size:.3g}, which looks like another unit)"
            )
    return _Scan(points, faces, normals, boundary)


def _array(x: Any) -> ndarray:
    return x.numpy(force=True) if isinstance(x, Tensor) else np.asarray(x)


def _boundary(faces: ndarray, num_vertices: int) -> ndarray:
    # Vertices at an edge of a single face.
    edges = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    edges, count = np.unique(edges, axis=0, return_counts=True)
    found = np.zeros(num_vertices, dtype=bool)
    found[edges[count == 1]] = True
    return found


def _unit(x: ndarray) -> ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-300)


# Shape and motion ####################################################################


class _Motion(NamedTuple):
    # y = s R x + t, in a batch and in double precision.
    rotation: Tensor  # [B, 3, 3]
    translation: Tensor  # [B, 3]
    scale: Tensor  # [B]

    def __matmul__(self, x: Tensor) -> Tensor:
        # Points [B, P, 3].
        return self.scale.view(-1, 1, 1) * (x @ self.rotation.mT) + self.translation.unsqueeze(1)

    def to(self, like: Tensor) -> _Motion:
        return _Motion(*[x.to(like) for x in self])

    def moved(self, step: Tensor, centre: Tensor) -> _Motion:
        # Turned by the first three numbers of a step about a centre, shifted by the next three,
        # scaled by the exponential of the seventh.
        if step.size(1) == 0:
            return self
        turn = torch.linalg.matrix_exp(_cross_matrix(step[:, :3]))
        factor = step[:, 6].exp() if step.size(1) > 6 else torch.ones_like(self.scale)
        arm = (turn @ (self.translation - centre).unsqueeze(2)).squeeze(2)
        return _Motion(
            turn @ self.rotation,
            factor.unsqueeze(1) * arm + centre + step[:, 3:6],
            factor * self.scale,
        )


def _identity(size: int, like: Tensor) -> _Motion:
    eye = torch.eye(3, dtype=torch.double, device=like.device)
    zero = eye.new_zeros(size, 3)
    return _Motion(eye.expand(size, 3, 3), zero, zero[:, 0] + 1)


def _procrustes(x: Tensor, y: Tensor, weight: Tensor, scale: bool) -> _Motion:
    # The motion of least squared distance from points [B, P, 3] to others (Umeyama, PAMI 1991).
    w = (weight / weight.sum(dim=1, keepdim=True)).unsqueeze(2)
    x_centre, y_centre = (w * x).sum(dim=1, keepdim=True), (w * y).sum(dim=1, keepdim=True)
    x, y = x - x_centre, y - y_centre
    turn = rotations(w * x, y)
    factor = x.new_ones(len(x))
    if scale:
        factor = (w * (x @ turn.mT) * y).sum(dim=(1, 2)) / (w * x * x).sum(dim=(1, 2)).clamp(1e-30)
        factor = factor.clamp(min=1e-3)
    translation = y_centre - factor.view(-1, 1, 1) * (x_centre @ turn.mT)
    return _Motion(turn, translation.squeeze(1), factor)


def _cross_matrix(v: Tensor) -> Tensor:
    # The matrices [..., 3, 3] of the cross product with vectors [..., 3].
    eye = torch.eye(3).to(v).expand(*v.shape, 3)
    return torch.linalg.cross(v.unsqueeze(-1).expand_as(eye), eye, dim=-2)


class _Decoder:
    # Meshes and their derivatives by white codes w: z = origin + A w, where the codes of the
    # training meshes have the covariance A A^T. The prior of w is its squared length, and a
    # dimension of the latent code that no training mesh uses is none of w.
    def __init__(self, model: MorphableModel, origin: Tensor | None = None):
        self.model = model
        axes = latent_axes(model)
        self.axes = axes[:, axes.square().sum(dim=0) > 0].double()
        self.origin = (model.latent_mean if origin is None else origin).double()
        self.size = self.axes.size(1)
        # The cube root of the precision balances rounding and curvature.
        self.step = torch.finfo(model.mean.dtype).eps ** (1 / 3)

    def code(self, w: Tensor) -> Tensor:
        return (self.origin + w @ self.axes.t()).to(self.model.mean.dtype)

    def __call__(self, w: Tensor) -> Tensor:
        # Coordinates and derivatives [B, N, 3, 1 + size] in double precision, for w [B, size].
        eye = self.step * torch.eye(self.size).to(w)
        offsets = torch.cat([torch.zeros_like(eye[:1]), eye, -eye])
        z = self.code(w.unsqueeze(1) + offsets).flatten(0, 1)
        # Not through the units: adding the mean would round the differences.
        decode = self.model.autoencoder.decode
        out = torch.cat([decode(part)[..., :3].double() for part in z.split(BLOCK)])
        out = self.model.std[:, :3].double() * out
        out = out.view(len(w), -1, *out.shape[1:]).movedim(1, -1)
        x, up, down = out.split([1, self.size, self.size], dim=-1)
        x = x + self.model.mean[:, :3].double().unsqueeze(-1)
        return torch.cat([x, (up - down) / (2 * self.step)], dim=-1)


class _State(NamedTuple):
    w: Tensor  # [B, size]
    motion: _Motion

    def moved(self, step: Tensor, centre: Tensor) -> _State:
        size = self.w.size(1)
        return _State(self.w + step[:, :size], self.motion.moved(step[:, size:], centre))


def _linearised(features: Tensor, state: _State, freedom: int) -> tuple[Tensor, Tensor, Tensor]:
    # Moved vertices [B, N, 3], their derivatives [B, N, 3, size + freedom] by a step, and the
    # centre [B, 3] that a step turns about, of coordinates and derivatives [B, N, 3, 1 + size].
    motion = state.motion
    y = motion @ features[..., 0]
    centre = y.mean(dim=1)
    turn = motion.scale.view(-1, 1, 1) * motion.rotation
    parts = [torch.einsum("bij,bpjd->bpid", turn, features[..., 1:])]
    if freedom:
        arm = y - centre.unsqueeze(1)
        eye = torch.eye(3).to(y).expand(*y.shape, 3)
        parts += [-_cross_matrix(arm), eye, arm.unsqueeze(-1)][: 2 if freedom == 6 else 3]
    return y, torch.cat(parts, dim=-1), centre


def _solve(hessian: Tensor, gradient: Tensor, damping: Tensor) -> Tensor:
    # A damped step (Marquardt). The floor leaves alone what nothing depends on.
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    floor = 1e-12 * diagonal.amax(dim=1, keepdim=True) + 1e-300
    return torch.linalg.solve(
        hessian + torch.diag_embed(damping.unsqueeze(1) * diagonal + floor), gradient
    )


# Points with known counterparts ######################################################


def _least_squares(
    points: _Points, moved: Tensor, jacobian: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # Second derivative and gradient of half the weighted squares of points, and the squares [B].
    offset = points.position - points.mapping @ moved
    weighted = points.weight.unsqueeze(2) * offset
    at = (points.mapping @ jacobian.flatten(2)).view(*offset.shape, -1)
    left = (points.weight.view(*points.weight.shape, 1, 1) * at).flatten(1, 2)
    gradient = (at.flatten(1, 2).mT @ weighted.flatten(1).unsqueeze(2)).squeeze(2)
    return left.mT @ at.flatten(1, 2), gradient, (weighted * offset).sum(dim=(1, 2))


def _equations(
    decoder: _Decoder, points: _Points, state: _State, freedom: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # With the prior of the code; and the centre that a step turns about.
    moved, jacobian, centre = _linearised(decoder(state.w), state, freedom)
    hessian, gradient, squares = _least_squares(points, moved, jacobian)
    objective = squares + state.w.square().sum(dim=1)
    return *_with_prior(hessian, gradient, state), objective, centre


def _with_prior(hessian: Tensor, gradient: Tensor, state: _State) -> tuple[Tensor, Tensor]:
    size = state.w.size(1)
    prior = torch.zeros_like(gradient)
    prior[:, :size] = 1
    gradient = gradient.clone()
    gradient[:, :size] -= state.w
    return hessian + torch.diag_embed(prior), gradient


def _levenberg_marquardt(
    decoder: _Decoder, points: _Points, state: _State, freedom: int, max_iterations: int
) -> tuple[_State, Tensor]:
    # The minimum, and whether it was reached.
    hessian, gradient, objective, centre = _equations(decoder, points, state, freedom)
    damping = torch.full_like(objective, 1e-6)
    converged = torch.zeros_like(objective, dtype=torch.bool)
    for _ in range(max_iterations):
        trial = state.moved(_solve(hessian, gradient, damping), centre)
        new = _equations(decoder, points, trial, freedom)
        better = (new[2] <= objective) & ~converged
        small = (objective - new[2]).abs() <= TOLERANCE * objective
        state = _where(better, trial, state)
        # At the minimum rounding decides whether a step is better: a small one ends either way.
        converged = converged | small
        hessian, gradient, objective, centre = (
            _choose(better, a, b)
            for a, b in zip(new, (hessian, gradient, objective, centre), strict=True)
        )
        # A decoder of ReLUs has kinks: after many good steps one bad step wants much damping.
        damping = torch.where(better, damping / 10, (10 * damping).clamp(min=1e-2))
        if converged.all():
            break
    return state, converged


def _choose(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b)


def _where(mask: Tensor, a: _State, b: _State) -> _State:
    motion = (_choose(mask, x, y) for x, y in zip(a.motion, b.motion, strict=True))
    return _State(_choose(mask, a.w, b.w), _Motion(*motion))


def _fit_points(
    decoder: _Decoder,
    known: list[_Points],
    motion: MotionKind,
    noise: float,
    max_iterations: int,
) -> Fit:
    # One fit per mesh of the batch. The residuals are those of the first points.
    size = max(len(points.position) for points in known)
    for points in known:
        if len(points.position) not in (1, size):
            raise ValueError(
                f"Expected observations of one or {size} meshes (got {len(points.position)})"
            )
    every = _joined(known, size, noise)
    seen = (every.weight > 0).sum(dim=1).min().item()
    if motion != "none" and seen < 3:
        raise ValueError(f"Expected at least three points for a motion (got {seen})")
    parts = []
    for i in range(0, size, MESHES):
        part = every._replace(
            position=every.position[i : i + MESHES], weight=every.weight[i : i + MESHES]
        )
        w = part.position.new_zeros(len(part.position), decoder.size)
        pose = _identity(len(w), w)
        if motion != "none":
            mean = (part.mapping @ decoder(w[:1])[..., 0]).expand_as(part.position)
            pose = _procrustes(mean, part.position, part.weight, motion == "similarity")
        state = _State(w, pose)
        parts.append(_levenberg_marquardt(decoder, part, state, FREEDOM[motion], max_iterations))
    states, converged = zip(*parts, strict=True)
    w = torch.cat([state.w for state in states])
    pose = _Motion(*map(torch.cat, zip(*(state.motion for state in states), strict=True)))
    mesh, code = _mesh(decoder, _State(w, pose))
    first = known[0]
    found = first.mapping @ mesh[..., :3].double()
    residuals = vertex_distances(found, first.position)
    residuals = residuals.masked_fill(first.weight == 0, torch.nan)
    pose = pose.to(mesh)
    fit = Fit(mesh, code, *pose, residuals.to(mesh), torch.cat(converged))
    return Fit(*[x[0] for x in fit]) if all(points.single for points in known) else fit


def _joined(known: list[_Points], size: int, noise: float) -> _Points:
    # All points as one, each weight over the variance of the noise.
    k = max(points.mapping.k for points in known)
    pad = torch.nn.functional.pad
    index = torch.cat([pad(p.mapping.index, (0, k - p.mapping.k)) for p in known])
    slots = torch.cat([pad(p.mapping.weight, (0, k - p.mapping.k)) for p in known])
    return _Points(
        Mapping(index, slots, known[0].mapping.num_source),
        torch.cat([p.position.expand(size, -1, -1) for p in known], dim=1),
        torch.cat([p.weight.expand(size, -1) for p in known], dim=1) / noise**2,
        False,
    )


def _mesh(decoder: _Decoder, state: _State) -> tuple[Tensor, Tensor]:
    # The moved meshes [B, N, C] and their codes.
    code = decoder.code(state.w)
    mesh = torch.cat([decoder.model.decode(part) for part in code.split(BLOCK)])
    coordinates = state.motion @ mesh[..., :3].double()
    return torch.cat([coordinates.to(mesh.dtype), mesh[..., 3:]], dim=-1), code


# Scans ###############################################################################


def _fit_scan(
    model: MorphableModel,
    scan: _Scan,
    known: list[_Points],
    motion: MotionKind,
    noise: float,
    max_iterations: int,
) -> Fit:
    decoder = _Decoder(model)
    matching = _Matching(scan, _array(model.faces), model.num_vertices)
    w = model.mean.new_zeros(1, decoder.size, dtype=torch.double)
    mean = decoder(w)[..., 0]
    state = _State(w, _identity(1, w))
    marks = _joined(known, 1, noise) if known else None
    if marks is not None and motion != "none":
        at = marks.mapping @ mean
        pose = _procrustes(at, marks.position, marks.weight, motion == "similarity")
        state = _State(w, pose)
    elif motion != "none":
        state = _State(w, matching.first_pose(_array(mean[0]), motion == "similarity"))
    if marks is not None:
        state, _ = _levenberg_marquardt(decoder, marks, state, FREEDOM[motion], max_iterations)

    # The pose of the mean shape first: else the shape makes up for the pose.
    rigid = RIGID_STEPS if marks is None and motion != "none" else 0
    reach, converged = np.inf, False
    for i in _steps(rigid + max_iterations):
        moved, jacobian, centre = _linearised(decoder(state.w), state, FREEDOM[motion])
        pairs = matching.pairs(_array(moved[0]))
        # Some two standard deviations, told by the median. The reach never grows again.
        reach = max(3 * noise, min(reach, 3 * pairs.median))
        hessian, gradient = pairs.equations(moved, jacobian, reach, max(reach / 3, noise))
        if marks is not None:
            further = _least_squares(marks, moved, jacobian)
            hessian, gradient = hessian + further[0], gradient + further[1]
        hessian, gradient = _with_prior(hessian, gradient, state)
        held = decoder.size if i < rigid else 0
        damping = hessian.new_full((1,), 1e-3)
        step = _solve(hessian[:, held:, held:], gradient[:, held:], damping)
        step = torch.nn.functional.pad(step, (held, 0))
        state = state.moved(step, centre)
        shift = (jacobian @ step.unsqueeze(2)).square().sum(dim=2).mean().sqrt().item()
        converged = i >= rigid and shift < 0.05 * noise
        if converged:
            break
    mesh, code = _mesh(decoder, state)
    distance = closest_points(scan.points, _array(mesh[0, :, :3].double()), matching.faces)[2]
    explained = float(np.mean(distance < 5 * noise)) > 0.5
    rotation, translation, scale = state.motion.to(mesh)
    return Fit(
        mesh[0],
        code[0],
        rotation[0],
        translation[0],
        scale[0],
        torch.from_numpy(1000 * distance).to(mesh),
        torch.tensor(converged and explained, device=mesh.device),
    )


def _steps(number: int) -> Iterator[int]:
    # The numbers of steps that may end early, with a bar once they take long.
    with progress_bar("Fitting (steps at most)", number, leave=False) as bar:
        for i in range(number):
            yield i
            bar.update()


class _Pairs(NamedTuple):
    # Points of the model, in barycentric coordinates, and their counterparts on a scan.
    corners: ndarray  # [Q, 3]
    weight: ndarray  # [Q, 3]
    target: ndarray  # [Q, 3]
    normal: ndarray  # [Q, 3]
    distance: ndarray  # [Q]
    median: float  # of the distances from the scan to the model

    def equations(
        self, moved: Tensor, jacobian: Tensor, reach: float, noise: float
    ) -> tuple[Tensor, Tensor]:
        near = self.distance < 3 * reach
        if not near.any():
            return _nothing(jacobian)
        index = torch.from_numpy(self.corners[near]).to(moved.device)
        weight, target, normal, distance = (
            torch.from_numpy(x[near]).to(moved)
            for x in (self.weight, self.target, self.normal, self.distance)
        )
        # The kernel of Geman and McClure. A distance along the surface counts little, so that the
        # surfaces may slide.
        kernel = (1 + (distance / reach) ** 2) ** -2 / noise**2
        mapping = Mapping(index, weight, moved.size(1))
        along = _Points(mapping, target.unsqueeze(0), TANGENTIAL * kernel.unsqueeze(0), True)
        hessian, gradient, _ = _least_squares(along, moved, jacobian)
        at = (mapping @ jacobian.flatten(2))[0].view(len(target), 3, -1)
        at = torch.einsum("qc,qcd->qd", normal, at)
        height = ((target - (mapping @ moved)[0]) * normal).sum(dim=1)
        weighted = ((1 - TANGENTIAL) * kernel.unsqueeze(1) * at).t()
        return hessian + weighted @ at, gradient + weighted @ height


def _nothing(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    size = jacobian.size(-1)
    return jacobian.new_zeros(1, size, size), jacobian.new_zeros(1, size)


class _Matching:
    # The pairs of a scan's points and a mesh's vertices with the closest points of the other one.
    def __init__(self, scan: _Scan, faces: ndarray, num_vertices: int):
        self.scan, self.faces = scan, faces
        self.boundary = _boundary(faces, num_vertices)
        rng = np.random.default_rng(0)
        self.used = np.sort(rng.permutation(np.unique(faces))[:SAMPLES])
        if scan.faces is None:
            self.tree = cKDTree(scan.points)
            chosen = np.sort(rng.permutation(len(scan.points))[:SAMPLES])
            self.points = scan.points[chosen]
            self.normals = None if scan.normals is None else scan.normals[chosen]
            return
        # Evenly on the surface, however its vertices are spread.
        corners = scan.points[scan.faces]
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        area = np.linalg.norm(normal, axis=1)
        face = rng.choice(len(area), SAMPLES, p=area / area.sum())
        weight = rng.dirichlet(np.ones(3), SAMPLES)
        self.points = (weight[:, :, None] * corners[face]).sum(axis=1)
        self.normals = _unit(normal[face])

    def pairs(self, vertices: ndarray) -> _Pairs:
        own, scan = vertex_normals(vertices, self.faces), self.scan
        # From the scan to the mesh.
        face, weight, distance = closest_points(self.points, vertices, self.faces)
        index = self.faces[face]
        normal = _unit((weight[:, :, None] * own[index]).sum(axis=1))
        valid = ~_at_boundary(self.boundary[index], weight)
        if self.normals is not None:
            valid &= (normal * self.normals).sum(axis=1) > FACING
        there = index[valid], weight[valid], self.points[valid], normal[valid], distance[valid]
        # From the mesh to the scan.
        used, facing = vertices[self.used], own[self.used]
        if scan.faces is None:
            distance, hit = self.tree.query(used)
            target, valid = scan.points[hit], np.ones(len(used), dtype=bool)
            normal = facing if scan.normals is None else scan.normals[hit]
        else:
            face, weight, distance = closest_points(used, scan.points, scan.faces)
            hit = scan.faces[face]
            target = (weight[:, :, None] * scan.points[hit]).sum(axis=1)
            valid = ~_at_boundary(scan.boundary[hit], weight)
            assert scan.normals is not None  # those of its faces
            normal = _unit((weight[:, :, None] * scan.normals[hit]).sum(axis=1))
        valid &= (normal * facing).sum(axis=1) > FACING
        index = np.repeat(self.used[:, None], 3, axis=1)
        weight = np.repeat([[1.0, 0.0, 0.0]], len(index), axis=0)
        back = index[valid], weight[valid], target[valid], normal[valid], distance[valid]
        median = float(np.median(there[-1])) if len(there[-1]) else np.inf
        index, weight, target, normal, distance = (
            np.concatenate(both) for both in zip(there, back, strict=True)
        )
        return _Pairs(index, weight, target, normal, distance, median)

    def first_pose(self, vertices: ndarray, scale: bool) -> _Motion:
        # By iterated closest points from many rotations, of some 300 points. It is the scan that
        # moves, so that one search tree serves all starts: p = R (points - middle) + t.
        own, tree = vertex_normals(vertices, self.faces), cKDTree(vertices)
        some = slice(None, None, max(1, len(self.points) // 300))
        points = self.points[some]
        middle = points.mean(axis=0)
        points = points - middle
        factor = np.linalg.norm(vertices.std(axis=0)) / np.linalg.norm(points.std(axis=0))
        factor = factor if scale else 1.0
        points = factor * points
        # No rotation is farther than 45 degrees from one of these 60.
        turn = Rotation.create_group("I").as_matrix()
        shift = np.repeat(vertices.mean(axis=0)[None], len(turn), axis=0)
        largest = 0.1 * np.linalg.norm(np.ptp(vertices, axis=0))
        for _ in range(POSE_STEPS):
            arm = points @ turn.swapaxes(1, 2)
            p = arm + shift[:, None]
            distance, hit = tree.query(p)
            normal, offset = own[hit], vertices[hit] - p
            facing = np.ones(distance.shape, dtype=bool)
            if self.normals is not None:
                facing = (normal * (self.normals[some] @ turn.swapaxes(1, 2))).sum(axis=2) > 0
            reach = 3 * np.median(distance, axis=1, keepdims=True) + 1e-9 * largest
            kernel = np.where(facing, 1, 0.1) / (1 + (distance / reach) ** 2) ** 2
            # The cost of where the last step has led: what lies far or faces away is no better
            # than the largest distance.
            cost = np.where(facing, np.minimum(distance, largest), largest).mean(axis=1)
            # Point to plane: damped, since a sphere may turn as it likes.
            a = np.concatenate([np.cross(arm, normal), normal], axis=2)
            weighted = (kernel[..., None] * a).swapaxes(1, 2)
            hessian = weighted @ a
            diagonal = np.einsum("sii->si", hessian)
            diagonal += 0.01 * diagonal + 1e-30
            gradient = weighted @ (normal * offset).sum(axis=2)[..., None]
            step = np.linalg.solve(hessian, gradient)[..., 0]
            last = turn, shift
            turn = Rotation.from_rotvec(step[:, :3]).as_matrix() @ turn
            shift = shift + step[:, 3:]
        best = cost.argmin()
        back = last[0][best].T / factor
        found = last[0][best].T, middle - back @ last[1][best], np.array(1 / factor)
        return _Motion(*(torch.from_numpy(x).unsqueeze(0) for x in found))


def _at_boundary(boundary: ndarray, weight: ndarray) -> ndarray:
    # Whether points of faces lie at an open boundary, where what was closest may go on.
    return np.all(boundary | (weight < 1e-6), axis=1)
