r"""Fits to scans: pairs of closest points, found anew in every step of the solver."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import Tensor

from pyg_attnpool.datasets.cache import progress
from pyg_attnpool.fitting.observations import Points, Scan, as_array, at_open_edges, unit_vectors
from pyg_attnpool.fitting.solver import (
    FREEDOM,
    Decoder,
    Fit,
    Motion,
    MotionKind,
    State,
    damped_step,
    decoded,
    joined,
    least_squares,
    levenberg_marquardt,
    linearised,
    no_motion,
    procrustes,
    with_prior,
)
from pyg_attnpool.mapping import Mapping
from pyg_attnpool.mesh.closest import closest_points
from pyg_attnpool.mesh.normals import vertex_normals

if TYPE_CHECKING:
    from pyg_attnpool.models import MorphableModel

SAMPLES = 2000  # points of a scan, and vertices of the model, that every step looks at
POSE_STEPS = 60  # of the search for a first pose
RIGID_STEPS = 10  # of a scan before the shape may change
FACING = 0.3  # cosine between normals below which points are no pair
TANGENTIAL = 0.1  # weight of a distance along the surface, relative to one across it


def fit_scan(
    model: MorphableModel,
    scan: Scan,
    known: list[Points],
    motion: MotionKind,
    noise: float,
    max_iterations: int,
) -> Fit:
    r"""The fit of a mesh to a scan, which starts from landmarks where they are known."""
    decoder = Decoder(model)
    matching = _Matching(scan, as_array(model.faces), model.num_vertices)
    w = model.mean.new_zeros(1, decoder.size, dtype=torch.double)
    mean = decoder(w)[..., 0]
    state = State(w, no_motion(1, w))
    marks = joined(known, 1, noise) if known else None
    if marks is not None and motion != "none":
        at = marks.mapping @ mean
        pose = procrustes(at, marks.position, marks.weight, motion == "similarity")
        state = State(w, pose)
    elif motion != "none":
        state = State(w, matching.first_pose(as_array(mean[0]), motion == "similarity"))
    if marks is not None:
        state, _ = levenberg_marquardt(decoder, marks, state, FREEDOM[motion], max_iterations)

    # The pose of the mean shape first: else the shape makes up for the pose.
    rigid = RIGID_STEPS if marks is None and motion != "none" else 0
    reach, converged = np.inf, False
    for i in progress(range(rigid + max_iterations), "Fitting (steps at most)", leave=False):
        moved, jacobian, centre = linearised(decoder(state.w), state, FREEDOM[motion])
        pairs = matching.pairs(as_array(moved[0]))
        # Some two standard deviations, told by the median. The reach never grows again.
        reach = max(3 * noise, min(reach, 3 * pairs.median))
        hessian, gradient = pairs.equations(moved, jacobian, reach, max(reach / 3, noise))
        if marks is not None:
            further = least_squares(marks, moved, jacobian)
            hessian, gradient = hessian + further[0], gradient + further[1]
        hessian, gradient = with_prior(hessian, gradient, state)
        held = decoder.size if i < rigid else 0
        damping = hessian.new_full((1,), 1e-3)
        step = damped_step(hessian[:, held:, held:], gradient[:, held:], damping)
        step = torch.nn.functional.pad(step, (held, 0))
        state = state.moved(step, centre)
        shift = (jacobian @ step.unsqueeze(2)).square().sum(dim=2).mean().sqrt().item()
        converged = i >= rigid and shift < 0.05 * noise
        if converged:
            break
    mesh, code = decoded(decoder, state)
    distance = closest_points(scan.points, as_array(mesh[0, :, :3].double()), matching.faces)[2]
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
        along = Points(mapping, target.unsqueeze(0), TANGENTIAL * kernel.unsqueeze(0), True)
        hessian, gradient, _ = least_squares(along, moved, jacobian)
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
    def __init__(self, scan: Scan, faces: ndarray, num_vertices: int):
        self.scan, self.faces = scan, faces
        self.boundary = at_open_edges(faces, num_vertices)
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
        self.normals = unit_vectors(normal[face])

    def pairs(self, vertices: ndarray) -> _Pairs:
        own, scan = vertex_normals(vertices, self.faces), self.scan
        # From the scan to the mesh.
        face, weight, distance = closest_points(self.points, vertices, self.faces)
        index = self.faces[face]
        normal = unit_vectors((weight[:, :, None] * own[index]).sum(axis=1))
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
            normal = unit_vectors((weight[:, :, None] * scan.normals[hit]).sum(axis=1))
        valid &= (normal * facing).sum(axis=1) > FACING
        index = np.repeat(self.used[:, None], 3, axis=1)
        weight = np.repeat([[1.0, 0.0, 0.0]], len(index), axis=0)
        back = index[valid], weight[valid], target[valid], normal[valid], distance[valid]
        median = float(np.median(there[-1])) if len(there[-1]) else np.inf
        index, weight, target, normal, distance = (
            np.concatenate(both) for both in zip(there, back, strict=True)
        )
        return _Pairs(index, weight, target, normal, distance, median)

    def first_pose(self, vertices: ndarray, scale: bool) -> Motion:
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
        return Motion(*(torch.from_numpy(x).unsqueeze(0) for x in found))


def _at_boundary(boundary: ndarray, weight: ndarray) -> ndarray:
    # Whether points of faces lie at an open boundary, where what was closest may go on.
    return np.all(boundary | (weight < 1e-6), axis=1)
