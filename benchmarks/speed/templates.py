r"""Templates of any size, made from nothing, and models of them with random weights."""

import numpy as np
import torch
from scipy.spatial import ConvexHull

from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.models import PCA, ModalAutoencoder


def blob(num_vertices: int) -> tuple[np.ndarray, np.ndarray]:
    r"""A closed surface bent out of shape, of evenly spread vertices :obj:`[N, 3]`, and its faces
    :obj:`[F, 3]`."""
    i = np.arange(num_vertices)
    z = 1 - (2 * i + 1) / num_vertices
    angle = np.pi * (1 + 5**0.5) * i  # a Fibonacci lattice on the sphere
    ring = np.sqrt(1 - z**2)
    vertices = np.stack([ring * np.cos(angle), ring * np.sin(angle), z], axis=1)
    faces = ConvexHull(vertices).simplices.astype(np.int64)
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    inwards = (np.cross(b - a, c - a) * a).sum(axis=1) < 0
    faces[inwards] = faces[inwards][:, ::-1]
    x, y, z = vertices.T
    radius = 1 + 0.2 * np.sin(3 * x) * np.cos(4 * y) + 0.05 * np.sin(9 * z)
    return 0.1 * radius[:, None] * vertices * [1.0, 1.3, 0.8], faces


@torch.no_grad()
def random_model(model: MorphableModel, hierarchy: MeshHierarchy) -> MorphableModel:
    r"""The model with units and, where it begins without, with weights."""
    vertices = torch.from_numpy(hierarchy.vertices[0]).float()
    network = model.autoencoder
    if isinstance(network, PCA):
        network.mean.copy_(vertices)
        network.components.normal_(std=1e-3)
        return model
    if isinstance(network, ModalAutoencoder):
        for linear in (network.linear, network.modes):
            linear.components.normal_()
        for parameter in network.from_code.parameters():
            parameter.normal_(std=0.05)
    model.set_statistics(vertices, torch.full_like(vertices, 0.003))
    return model
