r"""The two ways to fit a model: to observations, and to an edit of its own shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch_geometric.data import Batch, Data

from pyg_attnpool.arguments import as_integer
from pyg_attnpool.fitting.observations import (
    Points,
    observed_landmarks,
    observed_scan,
    observed_vertices,
)
from pyg_attnpool.fitting.scan import fit_scan
from pyg_attnpool.fitting.solver import FREEDOM, Fit, MotionKind, fit_points
from pyg_attnpool.latent import as_codes
from pyg_attnpool.metrics import evaluating
from pyg_attnpool.units import one_warning, warn_millimetres

if TYPE_CHECKING:
    from pyg_attnpool.models import MorphableModel

NOISE = 0.001  # metres
SCANS = (Data, tuple, str, Path)  # the forms of a scan


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

    6. a :class:`~torch_geometric.data.Batch` or a list of several of the last three, which are
    fitted one after the other; the residuals of the shorter ones end in NaN

    A fit to vertices or landmarks starts from the mean code. If it leaves more than twice the
    noise, it is tried again from the closest three of some codes of the prior; the best counts.

    Points of a scan meet the closest points of the model, and vertices of the model those of the
    scan, anew in every step. Pairs that lie far apart for the present state, face away from each
    other or end at an open boundary count little or nothing (Geman-McClure kernel). The first pose
    is that of the landmarks, or else the best of 60 rotations, the group of the icosahedron; where
    others are nearly as good, up to three are tried for some steps. A fit expects more noise at
    first, and less from then on (graduated non-convexity). A fit to a scan shows a bar on standard
    error once it takes two seconds.

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
    known = [] if landmarks is None else [observed_landmarks(model, landmarks)]
    if isinstance(observations, Batch):
        observations = observations.to_data_list()
    several = isinstance(observations, list) and isinstance(next(iter(observations), None), SCANS)
    if several or isinstance(observations, SCANS):
        if weight is not None:
            raise ValueError("Expected no 'weight' beside a scan (got one)")
        every = observations if several else [observations]
        other = [type(scan).__name__ for scan in every if not isinstance(scan, SCANS)]
        if other:
            raise TypeError(f"Expected a list of scans alone (got {other[0]} among them)")
        scans = [observed_scan(model, scan, motion == "similarity") for scan in every]
        marks = _landmarks_of(known[0], len(scans), motion) if known else [[]] * len(scans)
        with evaluating(model):
            fits = [
                fit_scan(model, scan, own, motion or "rigid", noise, max_iterations)
                for scan, own in zip(scans, marks, strict=True)
            ]
        return _stacked(fits) if several else fits[0]
    if observations is not None:
        known.insert(0, observed_vertices(model, observations, weight))
    elif weight is not None:
        raise ValueError("Expected 'weight' of the vertices of a mesh (got no mesh)")
    if not known:
        raise ValueError("Expected observations or landmarks (got none)")
    if motion != "similarity":  # which brings any unit to that of the model
        for points in known:
            for position, weight in zip(points.position, points.weight, strict=True):
                warn_millimetres("observations", position[weight > 0])
    with evaluating(model):
        return fit_points(model, None, known, motion or "none", noise, max_iterations)


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
        \mathbf{y}_i \right\|^2 + \frac{m}{n} \sum_j w_j \left\| \mathbf{x}_j(\mathbf{z}) -
        \mathbf{x}_j(\mathbf{z}_0) \right\|^2 \right) + (\mathbf{z} - \mathbf{z}_0)^{\top}
        \mathbf{\Sigma}_z^{-1} (\mathbf{z} - \mathbf{z}_0)

    for :math:`m` targets :math:`\mathbf{y}_i`, the :math:`n` vertices that have a weight, the code
    :math:`\mathbf{z}_0` of the mesh and the covariance of the codes of the training meshes.

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
    known = [observed_landmarks(model, targets)]
    with evaluating(model):
        if keep is not None:
            mesh = model.decode(code)[0, :, :3]
            kept = observed_vertices(model, mesh, keep, "keep")
            moved = torch.isin(kept.mapping.index[:, 0], known[0].mapping.index)
            stays = kept.weight.masked_fill(moved, 0)
            # The mean over what stays, not the sum: else a thousand vertices hold back one.
            scale = len(targets) / kept.weight.bool().sum()
            known.append(kept._replace(weight=scale * stays))
        return fit_points(model, code[0], known, "none", noise, max_iterations)


def _landmarks_of(known: Points, num_scans: int, motion: MotionKind | None) -> list[list[Points]]:
    if len(known.position) != num_scans:
        raise ValueError(
            f"Expected landmarks of {num_scans} scan{'s' if num_scans > 1 else ''} (got of "
            f"{len(known.position)})"
        )
    if motion != "none" and known.mapping.num_target < 3:
        raise ValueError(
            f"Expected at least three landmarks to start from (got {known.mapping.num_target})"
        )
    pairs = zip(known.position.split(1), known.weight.split(1), strict=True)
    return [[known._replace(position=position, weight=weight)] for position, weight in pairs]


def _stacked(fits: list[Fit]) -> Fit:
    residuals = [fit.residuals for fit in fits]
    others = [name for name in Fit._fields if name != "residuals"]
    return Fit(
        residuals=pad_sequence(residuals, batch_first=True, padding_value=torch.nan),
        **{name: torch.stack([getattr(fit, name) for fit in fits]) for name in others},
    )


def _check_settings(noise: float, max_iterations: int) -> None:
    if not isinstance(noise, int | float) or not 0 < noise < np.inf:
        raise ValueError(f"Expected a positive 'noise' in metres (got {noise!r})")
    as_integer("max_iterations", max_iterations, least=1)
