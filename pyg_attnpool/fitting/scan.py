r"""Fits to scans: pairs of closest points, found anew in every step of the solver."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
import torch
from numpy import ndarray
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import Tensor
from tqdm import tqdm

from pyg_attnpool.datasets.cache import progress_bar
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
    likely,
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
STARTS = 3  # poses at most that a fit starts from
NEARLY = 1.25  # cost of a further start at most, relative to the best pose's
APART = np.radians(20)  # between the rotations of two starts
FIRST_NOISE = 3  # that a fit expects, relative to the median distance of the mean shape
LESS_NOISE = 0.3  # than before, once steps are small
MOST_STEPS = 5  # until a fit expects less noise
TRIAL_STEPS = 10  # of the shape, after which the best start is chosen
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
    marks = joined(known, 1, noise) if known else None
    if motion == "none":
        poses = [no_motion(1, w)]
    elif marks is not None:
        at = marks.mapping @ mean
        poses = [procrustes(at, marks.position, marks.weight, motion == "similarity")]
    else:
        poses = matching.first_poses(as_array(mean[0]), motion == "similarity")
    states = [State(w, pose) for pose in poses]
    if marks is not None:
        fitted = levenberg_marquardt(decoder, marks, states[0], FREEDOM[motion], max_iterations)
        states = [fitted[0]]
    # The pose of the mean shape first: else the shape makes up for the pose.
    rigid = RIGID_STEPS if marks is None and motion != "none" else 0
    descents = [_Descent(decoder, matching, marks, motion, noise, s, rigid) for s in states]
    trial = min(TRIAL_STEPS, max_iterations) if len(descents) > 1 else 0
    most = len(descents) * (rigid + trial) + max_iterations - trial
    with progress_bar("Fitting (steps at most)", most, leave=False) as bar:
        for descent in descents:
            descent.run(rigid + trial, bar)
        # What none of them can explain is all the same, so that their costs compare.
        bound = 5 * min(descent.expected for descent in descents)
        best = descents[0]
        if len(descents) > 1:
            best = min(descents, key=lambda descent: descent.cost(bound))
        best.run(max_iterations - trial, bar)
    mesh, code = decoded(decoder, best.state)
    distance = closest_points(scan.points, as_array(mesh[0, :, :3].double()), matching.faces)[2]
    explained = bool(np.median(distance) < 5 * noise)
    rotation, translation, scale = (x[0] for x in best.state.motion.to(mesh))
    residuals = torch.from_numpy(1000 * distance).to(mesh)
    reached = best.converged and explained and bool(likely(best.state.w))
    converged = torch.tensor(reached, device=mesh.device)
    return Fit(mesh[0], code[0], rotation, translation, scale, residuals, converged)


class _Descent:
    # Steps of a fit from one pose. The noise that it expects begins with what the mean shape leaves
    # of the scan and shrinks whenever steps are small, or after some of them, as pairs may change
    # for ever: far from the scan, pairs are wrong, and the shape would follow each of them.
    def __init__(
        self,
        decoder: Decoder,
        matching: _Matching,
        marks: Points | None,
        motion: MotionKind,
        noise: float,
        state: State,
        rigid: int,
    ):
        self.decoder, self.matching, self.marks = decoder, matching, marks
        self.freedom, self.noise, self.state = FREEDOM[motion], noise, state
        self.rigid = rigid  # steps before the shape may change
        self.expected = self.reach = np.inf
        self.since = 0  # steps since it shrank
        self.converged = False

    def run(self, steps: int, bar: tqdm[NoReturn]) -> None:
        for _ in range(steps):
            if self.converged:
                return
            self._step()
            bar.update()

    def _step(self) -> None:
        state = self.state
        moved, jacobian, centre = linearised(self.decoder(state.w), state, self.freedom)
        pairs = self.matching.pairs(as_array(moved[0]))
        if self.rigid or self.expected == np.inf:
            median = pairs.median if np.isfinite(pairs.median) else 0.0  # without any pair
            self.expected = max(self.noise, FIRST_NOISE * median)
        # Some two standard deviations, told by the median. The reach never grows again.
        self.reach = max(3 * self.expected, min(self.reach, 3 * pairs.median))
        hessian, gradient = pairs.equations(moved, jacobian, self.reach)
        if self.marks is not None:
            further = least_squares(self.marks, moved, jacobian)
            hessian, gradient = hessian + further[0], gradient + further[1]
        hessian, gradient = with_prior(hessian, gradient, state)
        held = self.decoder.size if self.rigid else 0
        damping = hessian.new_full((1,), 1e-3)
        step = damped_step(hessian[:, held:, held:], gradient[:, held:], damping)
        step = torch.nn.functional.pad(step, (held, 0))
        self.state = state.moved(step, centre)
        if self.rigid:
            self.rigid -= 1
            return
        shift = (jacobian @ step.unsqueeze(2)).square().sum(dim=2).mean().sqrt().item()
        self.converged = self.expected == self.noise and shift < 0.05 * self.noise
        self.since += 1
        if shift < 0.1 * self.expected or self.since == MOST_STEPS:
            self.expected, self.since = max(self.noise, LESS_NOISE * self.expected), 0

    def cost(self, most: float) -> float:
        # What a fit leaves of the scan, on average.
        mesh, _ = decoded(self.decoder, self.state)
        return self.matching.left(as_array(mesh[0, :, :3].double()), most)


class _Pairs(NamedTuple):
    # Points of the model, in barycentric coordinates, and their counterparts on a scan.
    corners: ndarray  # [Q, 3]
    weight: ndarray  # [Q, 3]
    target: ndarray  # [Q, 3]
    normal: ndarray  # [Q, 3]
    distance: ndarray  # [Q]
    median: float  # of the distances from the scan to the model

    def equations(self, moved: Tensor, jacobian: Tensor, reach: float) -> tuple[Tensor, Tensor]:
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
        kernel = (1 + (distance / reach) ** 2) ** -2 / (reach / 3) ** 2
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
        index, weight, distance, normal, valid = self._on_mesh(vertices, own)
        valid &= ~_at_boundary(self.boundary[index], weight)
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

    def left(self, vertices: ndarray, most: float) -> float:
        # The mean distance from the scan to a mesh. It is the largest where a point's counterpart
        # faces away.
        own = vertex_normals(vertices, self.faces)
        _, _, distance, _, facing = self._on_mesh(vertices, own)
        return float(np.where(facing, np.minimum(distance, most), most).mean())

    def _on_mesh(
        self, vertices: ndarray, own: ndarray
    ) -> tuple[ndarray, ndarray, ndarray, ndarray, ndarray]:
        # The closest points of a mesh to the scan's: their corners, barycentric coordinates,
        # distances and normals, and whether both face the same way.
        face, weight, distance = closest_points(self.points, vertices, self.faces)
        index = self.faces[face]
        normal = unit_vectors((weight[:, :, None] * own[index]).sum(axis=1))
        facing = np.ones(len(distance), dtype=bool)
        if self.normals is not None:
            facing = (normal * self.normals).sum(axis=1) > FACING
        return index, weight, distance, normal, facing

    def first_poses(self, vertices: ndarray, scale: bool) -> list[Motion]:
        # By iterated closest points from many rotations, of some 300 points. The best pose, and
        # others that are nearly as good: which is right, only the shape will tell. It is the scan
        # that moves, so that one search tree serves all rotations: p = R (points - middle) + t.
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
        turn, shift = last
        order = [i for i in cost.argsort() if cost[i] <= NEARLY * cost.min()]
        starts: list[int] = []
        for i in order:
            between = Rotation.from_matrix(turn[starts] @ turn[i].T).magnitude()
            if len(starts) < STARTS and np.all(between > APART):
                starts.append(i)
        back = turn[starts].swapaxes(1, 2) / factor
        shift = middle - (back @ shift[starts, :, None])[..., 0]
        found = turn[starts].swapaxes(1, 2), shift, np.full(len(starts), 1 / factor)
        poses = Motion(*map(torch.from_numpy, found))
        return [Motion(*[x[i : i + 1] for x in poses]) for i in range(len(starts))]


def _at_boundary(boundary: ndarray, weight: ndarray) -> ndarray:
    # Whether points of faces lie at an open boundary, where what was closest may go on.
    return np.all(boundary | (weight < 1e-6), axis=1)
