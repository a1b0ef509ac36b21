r"""The solver: Gauss-Newton steps on the latent code and the motion of a model.

The latent code is small, so the decoder's Jacobian is that of central differences, all decoded in
one batch: they need nothing of the decoder but its forward pass, and one decoder with all
differences takes less time than the backward passes of a few vertices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyg_attnpool.datasets.align import rotations
from pyg_attnpool.fitting.observations import Points
from pyg_attnpool.latent import latent_axes
from pyg_attnpool.mapping import Mapping
from pyg_attnpool.metrics import vertex_distances

if TYPE_CHECKING:
    from pyg_attnpool.models import MorphableModel

MotionKind = Literal["none", "rigid", "similarity"]
FREEDOM = {"none": 0, "rigid": 6, "similarity": 7}

BLOCK = 128  # meshes decoded at a time
MESHES = 16  # meshes fitted at a time
TOLERANCE = 1e-4  # a relative decrease of the objective that is small
POOR = 2  # times the noise: residuals of a fit that is tried again from elsewhere
SAMPLES, RESTARTS = 64, 3  # codes of the prior that are looked at, and that a fit starts from
FAR = 10  # standard deviations of a code from the mean that explains nothing any more


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
    r"""Whether the last step was small and, but for an edit, the code is within ten standard
    deviations of those of the training meshes; of a scan, whether it explains most of it, too."""


class Motion(NamedTuple):
    r"""The motions :math:`s \, \mathbf{R} \mathbf{x} + \mathbf{t}` of a batch, in double
    precision."""

    rotation: Tensor  # [B, 3, 3]
    translation: Tensor  # [B, 3]
    scale: Tensor  # [B]

    def __matmul__(self, x: Tensor) -> Tensor:
        # Points [B, P, 3].
        return self.scale.view(-1, 1, 1) * (x @ self.rotation.mT) + self.translation.unsqueeze(1)

    def to(self, like: Tensor) -> Motion:
        return Motion(*[x.to(like) for x in self])

    def moved(self, step: Tensor, centre: Tensor) -> Motion:
        # Turned by the first three numbers of a step about a centre, shifted by the next three,
        # scaled by the exponential of the seventh.
        if step.size(1) == 0:
            return self
        turn = torch.linalg.matrix_exp(_cross_matrix(step[:, :3]))
        factor = step[:, 6].exp() if step.size(1) > 6 else torch.ones_like(self.scale)
        arm = (turn @ (self.translation - centre).unsqueeze(2)).squeeze(2)
        return Motion(
            turn @ self.rotation,
            factor.unsqueeze(1) * arm + centre + step[:, 3:6],
            factor * self.scale,
        )


def no_motion(size: int, like: Tensor) -> Motion:
    r"""The motion that leaves everything where it is."""
    eye = torch.eye(3, dtype=torch.double, device=like.device)
    zero = eye.new_zeros(size, 3)
    return Motion(eye.expand(size, 3, 3), zero, zero[:, 0] + 1)


def procrustes(x: Tensor, y: Tensor, weight: Tensor, scale: bool) -> Motion:
    r"""The motion of least squared distance from points :obj:`[B, P, 3]` to others (Umeyama, PAMI
    1991)."""
    w = (weight / weight.sum(dim=1, keepdim=True)).unsqueeze(2)
    x_centre, y_centre = (w * x).sum(dim=1, keepdim=True), (w * y).sum(dim=1, keepdim=True)
    x, y = x - x_centre, y - y_centre
    for part, centre in ((x, x_centre), (y, y_centre)):
        spread = (w * part * part).sum(dim=(1, 2))
        if not (spread > 1e-20 * centre.square().sum(dim=(1, 2))).all():
            raise ValueError("Expected points at different places for a motion (got all at one)")
    turn = rotations(w * x, y)
    factor = x.new_ones(len(x))
    if scale:
        factor = (w * (x @ turn.mT) * y).sum(dim=(1, 2)) / (w * x * x).sum(dim=(1, 2)).clamp(1e-30)
        factor = factor.clamp(min=1e-3)
    translation = y_centre - factor.view(-1, 1, 1) * (x_centre @ turn.mT)
    return Motion(turn, translation.squeeze(1), factor)


def _cross_matrix(v: Tensor) -> Tensor:
    # The matrices [..., 3, 3] of the cross product with vectors [..., 3].
    eye = torch.eye(3).to(v).expand(*v.shape, 3)
    return torch.linalg.cross(v.unsqueeze(-1).expand_as(eye), eye, dim=-2)


class Decoder:
    r"""Meshes and their derivatives by white codes :math:`\mathbf{w}`: :math:`\mathbf{z} =
    \mathbf{z}_0 + \mathbf{A} \mathbf{w}`, where the codes of the training meshes have the
    covariance :math:`\mathbf{A} \mathbf{A}^{\top}`. The prior of :math:`\mathbf{w}` is its squared
    length, and a dimension of the latent code that no training mesh uses is none of
    :math:`\mathbf{w}`.

    Args:
        model (MorphableModel): The model.
        origin (torch.Tensor, optional): The code :math:`\mathbf{z}_0`. If :obj:`None`, the mean of
            those of the training meshes. (default: :obj:`None`)
        vertices (torch.Tensor, optional): The vertices :obj:`[N]` that are asked for. If
            :obj:`None`, all of them. (default: :obj:`None`)
    """

    def __init__(
        self, model: MorphableModel, origin: Tensor | None = None, vertices: Tensor | None = None
    ):
        self.model = model
        rows = slice(None) if vertices is None else vertices
        self.mean, self.std = (x[rows, :3].double() for x in (model.mean, model.std))
        self._decode = _decode_at(model.autoencoder, rows)
        axes = latent_axes(model)
        self.axes = axes[:, axes.square().sum(dim=0) > 0].double()
        self.origin = (model.latent_mean if origin is None else origin).double()
        self.size = self.axes.size(1)
        if self.size == 0:
            raise ValueError("Expected latent codes of training meshes that vary (got none)")
        # The cube root of the precision balances rounding and curvature.
        self.step = torch.finfo(model.mean.dtype).eps ** (1 / 3)

    def code(self, w: Tensor) -> Tensor:
        return (self.origin + w @ self.axes.t()).to(self.model.mean.dtype)

    def vertices(self, w: Tensor) -> Tensor:
        # Coordinates [B, N, 3] in double precision, for w [B, size].
        return self._from_mean(self.code(w)) + self.mean

    def _from_mean(self, z: Tensor) -> Tensor:
        return self.std * torch.cat([self._decode(part).double() for part in z.split(BLOCK)])

    def __call__(self, w: Tensor) -> Tensor:
        # Coordinates and derivatives [B, N, 3, 1 + size] in double precision, for w [B, size].
        eye = self.step * torch.eye(self.size).to(w)
        offsets = torch.cat([torch.zeros_like(eye[:1]), eye, -eye])
        z = self.code(w.unsqueeze(1) + offsets).flatten(0, 1)
        # Not through the units: adding the mean would round the differences.
        out = self._from_mean(z)
        out = out.view(len(w), -1, *out.shape[1:]).movedim(1, -1)
        x, up, down = out.split([1, self.size, self.size], dim=-1)
        x = x + self.mean.unsqueeze(-1)
        return torch.cat([x, (up - down) / (2 * self.step)], dim=-1)


def _decode_at(network: Any, rows: Tensor | slice) -> Callable[[Tensor], Tensor]:
    # Coordinates of some vertices, by the network's own way to decode these alone where it has one.
    # A class derived from it may decode otherwise.
    owner = {
        name: next((c for c in type(network).__mro__ if name in vars(c)), None)
        for name in ("decode", "decode_at")
    }
    if isinstance(rows, Tensor) and owner["decode"] is owner["decode_at"]:
        if "decode" not in vars(network):
            some = network.decode_at(rows)
            return lambda z: some(z)[..., :3]
    return lambda z: network.decode(z)[:, rows, :3]


class State(NamedTuple):
    r"""White codes and motions, which the steps change."""

    w: Tensor  # [B, size]
    motion: Motion

    def moved(self, step: Tensor, centre: Tensor) -> State:
        size = self.w.size(1)
        return State(self.w + step[:, :size], self.motion.moved(step[:, size:], centre))


def linearised(features: Tensor, state: State, freedom: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Moved vertices :obj:`[B, N, 3]`, their derivatives :obj:`[B, N, 3, size + freedom]` by a
    step, and the centre :obj:`[B, 3]` that a step turns about, of coordinates and derivatives
    :obj:`[B, N, 3, 1 + size]`."""
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


def damped_step(hessian: Tensor, gradient: Tensor, damping: Tensor) -> Tensor:
    r"""A damped step (Marquardt)."""
    # The floor leaves alone what nothing depends on.
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    floor = 1e-12 * diagonal.amax(dim=1, keepdim=True) + 1e-300
    return torch.linalg.solve(
        hessian + torch.diag_embed(damping.unsqueeze(1) * diagonal + floor), gradient
    )


def least_squares(points: Points, moved: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Second derivative and gradient of half the weighted squares of points, and the squares
    :obj:`[B]`."""
    offset = points.position - points.mapping @ moved
    weighted = points.weight.unsqueeze(2) * offset
    at = (points.mapping @ jacobian.flatten(2)).view(*offset.shape, -1)
    left = (points.weight.view(*points.weight.shape, 1, 1) * at).flatten(1, 2)
    gradient = (at.flatten(1, 2).mT @ weighted.flatten(1).unsqueeze(2)).squeeze(2)
    return left.mT @ at.flatten(1, 2), gradient, (weighted * offset).sum(dim=(1, 2))


def _equations(
    decoder: Decoder, points: Points, state: State, freedom: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # With the prior of the code; and the centre that a step turns about.
    moved, jacobian, centre = linearised(decoder(state.w), state, freedom)
    hessian, gradient, squares = least_squares(points, moved, jacobian)
    objective = squares + state.w.square().sum(dim=1)
    return *with_prior(hessian, gradient, state), objective, centre


def with_prior(hessian: Tensor, gradient: Tensor, state: State) -> tuple[Tensor, Tensor]:
    r"""Second derivative and gradient together with those of the prior of the code."""
    size = state.w.size(1)
    prior = torch.zeros_like(gradient)
    prior[:, :size] = 1
    gradient = gradient.clone()
    gradient[:, :size] -= state.w
    return hessian + torch.diag_embed(prior), gradient


def levenberg_marquardt(
    decoder: Decoder, points: Points, state: State, freedom: int, max_iterations: int
) -> tuple[State, Tensor]:
    r"""The minimum for points with known counterparts, and whether it was reached."""
    hessian, gradient, objective, centre = _equations(decoder, points, state, freedom)
    damping = torch.full_like(objective, 1e-6)
    converged = torch.zeros_like(objective, dtype=torch.bool)
    for _ in range(max_iterations):
        trial = state.moved(damped_step(hessian, gradient, damping), centre)
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


def _where(mask: Tensor, a: State, b: State) -> State:
    motion = (_choose(mask, x, y) for x, y in zip(a.motion, b.motion, strict=True))
    return State(_choose(mask, a.w, b.w), Motion(*motion))


def likely(w: Tensor) -> Tensor:
    r"""Whether white codes :obj:`[B, size]` are within reach of those of the training meshes."""
    return (w.abs() < FAR).all(dim=1)


def fit_points(
    model: MorphableModel,
    origin: Tensor | None,
    known: list[Points],
    motion: MotionKind,
    noise: float,
    max_iterations: int,
) -> Fit:
    r"""One fit per mesh of the batch: of observations from the mean code on and, where that leaves
    much, from other codes of the prior; of an edit from its origin on. The residuals are those of
    the first points."""
    size = max(len(points.position) for points in known)
    for points in known:
        if len(points.position) not in (1, size):
            raise ValueError(
                f"Expected observations of one or {size} meshes (got {len(points.position)})"
            )
    every, vertices = _seen(joined(known, size, noise))
    decoder = Decoder(model, origin, vertices)
    seen = (every.weight > 0).sum(dim=1).min().item()
    if motion != "none" and seen < 3:
        raise ValueError(f"Expected at least three points for a motion (got {seen})")
    parts = []
    for i in range(0, size, MESHES):
        part = _meshes(every, list(range(i, min(i + MESHES, size))))
        w = part.position.new_zeros(len(part.position), decoder.size)
        mean = decoder.vertices(w[:1]).expand(len(w), -1, -1)
        start = State(w, _closest_motion(part, mean, motion))
        found = levenberg_marquardt(decoder, part, start, FREEDOM[motion], max_iterations)
        if origin is None:
            found = _restarted(decoder, part, found, motion, noise, max_iterations)
        parts.append(found)
    states, converged = zip(*parts, strict=True)
    w = torch.cat([state.w for state in states])
    pose = Motion(*map(torch.cat, zip(*(state.motion for state in states), strict=True)))
    mesh, code = decoded(decoder, State(w, pose))
    first = known[0]
    at = first.mapping @ mesh[..., :3].double()
    residuals = vertex_distances(at, first.position)
    residuals = residuals.masked_fill(first.weight == 0, torch.nan)
    ended = torch.cat(converged)
    if origin is None:
        ended = ended & likely(w)
    fit = Fit(mesh, code, *pose.to(mesh), residuals.to(mesh), ended)
    return Fit(*[x[0] for x in fit]) if all(points.single for points in known) else fit


def _seen(points: Points) -> tuple[Points, Tensor]:
    # The points that count, by the vertices that they lie on: the others need not be decoded.
    counts = (points.weight > 0).any(dim=0)
    index, slots = points.mapping.index[counts], points.mapping.weight[counts]
    vertices, index = index.unique(return_inverse=True)
    mapping = Mapping(index.view_as(slots), slots, len(vertices))
    return Points(mapping, points.position[:, counts], points.weight[:, counts], False), vertices


def _closest_motion(points: Points, x: Tensor, motion: MotionKind) -> Motion:
    # That of meshes [B, N, 3] to points.
    if motion == "none":
        return no_motion(len(x), x)
    scale = motion == "similarity"
    return procrustes(points.mapping @ x, points.position, points.weight, scale)


def _restarted(
    decoder: Decoder,
    points: Points,
    found: tuple[State, Tensor],
    motion: MotionKind,
    noise: float,
    max_iterations: int,
) -> tuple[State, Tensor]:
    # Fits that leave much are tried again from the closest of some codes of the prior: where a
    # decoder is curved, the way from the mean may end in a wrong valley.
    state, converged = found
    squares, objective = _left(points, decoder.vertices(state.w), state)
    poor = (squares > 3 * (POOR * noise) ** 2 * points.weight.sum(dim=1)).nonzero()[:, 0]
    if len(poor) == 0:
        return found
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(SAMPLES, decoder.size, generator=generator, dtype=torch.double).to(state.w)
    samples = decoder.vertices(w)
    for i in poor.tolist():
        many = _meshes(points, [i] * SAMPLES)
        starts = State(w, _closest_motion(many, samples, motion))
        _, cost = _left(many, samples, starts)
        starts = _chosen(starts, cost.topk(RESTARTS, largest=False).indices.tolist())
        few = _meshes(points, [i] * RESTARTS)
        ends, ended = levenberg_marquardt(decoder, few, starts, FREEDOM[motion], max_iterations)
        _, cost = _left(few, decoder.vertices(ends.w), ends)
        least = int(cost.argmin())
        if cost[least] < objective[i]:
            this = torch.arange(len(converged), device=converged.device) == i
            state = _where(this, _chosen(ends, [least]), state)
            converged = torch.where(this, ended[least], converged)
    return state, converged


def _meshes(points: Points, index: list[int]) -> Points:
    return points._replace(position=points.position[index], weight=points.weight[index])


def _chosen(state: State, index: list[int]) -> State:
    return State(state.w[index], Motion(*(x[index] for x in state.motion)))


def _left(points: Points, x: Tensor, state: State) -> tuple[Tensor, Tensor]:
    # The weighted squares of moved meshes [B, N, 3], without and with those of the code.
    offset = points.position - points.mapping @ (state.motion @ x)
    squares = (points.weight.unsqueeze(2) * offset * offset).sum(dim=(1, 2))
    return squares, squares + state.w.square().sum(dim=1)


def joined(known: list[Points], size: int, noise: float) -> Points:
    r"""All points as one, each weight over the variance of the noise."""
    k = max(points.mapping.k for points in known)
    pad = torch.nn.functional.pad
    index = torch.cat([pad(p.mapping.index, (0, k - p.mapping.k)) for p in known])
    slots = torch.cat([pad(p.mapping.weight, (0, k - p.mapping.k)) for p in known])
    return Points(
        Mapping(index, slots, known[0].mapping.num_source),
        torch.cat([p.position.expand(size, -1, -1) for p in known], dim=1),
        torch.cat([p.weight.expand(size, -1) for p in known], dim=1) / noise**2,
        False,
    )


def decoded(decoder: Decoder, state: State) -> tuple[Tensor, Tensor]:
    r"""The moved meshes :obj:`[B, N, C]` and their codes."""
    code = decoder.code(state.w)
    mesh = torch.cat([decoder.model.decode(part) for part in code.split(BLOCK)])
    coordinates = state.motion @ mesh[..., :3].double()
    return torch.cat([coordinates.to(mesh.dtype), mesh[..., 3:]], dim=-1), code
