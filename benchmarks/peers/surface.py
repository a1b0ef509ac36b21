r"""What a mean distance hides: how the surface of a reconstruction differs from the true one."""

import torch
from torch import Tensor


def normal_angle(out: Tensor, x: Tensor, faces: Tensor) -> Tensor:
    r"""The mean angle in degrees between the normals of faces of meshes :obj:`[B, N, 3]`."""
    cosine = torch.nn.functional.cosine_similarity(_normals(out, faces), _normals(x, faces), dim=-1)
    return torch.rad2deg(cosine.clamp(-1, 1).acos()).mean()


def edge_error(out: Tensor, x: Tensor, faces: Tensor) -> Tensor:
    r"""The mean difference of edge lengths of meshes :obj:`[B, N, 3]`, as a share of the mean
    length."""
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    found, true = ((mesh[:, edges[:, 0]] - mesh[:, edges[:, 1]]).norm(dim=-1) for mesh in (out, x))
    return (found - true).abs().mean() / true.mean()


def roughness(out: Tensor, x: Tensor, faces: Tensor) -> Tensor:
    r"""How far vertices stand from the mean of their neighbours, where 1 is as far as in the true
    meshes: spikes are above it, what is smoothed away below."""
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    edges = torch.cat([edges, edges.flip(1)]).unique(dim=0)
    degree = edges[:, 0].bincount(minlength=x.size(1)).clamp(min=1).unsqueeze(-1)

    def away(mesh: Tensor) -> Tensor:
        mean = torch.zeros_like(mesh).index_add(1, edges[:, 0], mesh[:, edges[:, 1]]) / degree
        return (mesh - mean).norm(dim=-1).mean()

    return away(out) / away(x)


def _normals(mesh: Tensor, faces: Tensor) -> Tensor:
    a, b, c = (mesh[:, faces[:, i]] for i in range(3))
    return torch.linalg.cross(b - a, c - a)
