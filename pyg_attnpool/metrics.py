r"""Errors of morphable models, in millimetres."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyg_attnpool.datasets.inputs import as_meshes, blocks, check_meshes

if TYPE_CHECKING:
    from pyg_attnpool.models import MorphableModel

LARGEST = 20.0  # metres about the centre, beyond which coordinates look like millimetres


def vertex_distances(out: Tensor, x: Tensor) -> Tensor:
    r"""The Euclidean distance of every vertex to where it should be, in millimetres.

    Args:
        out (torch.Tensor): Meshes :obj:`[B, N, C]` in metres; the first three features count.
        x (torch.Tensor): The true meshes :obj:`[B, N, C]`.

    Returns:
        Distances :obj:`[B, N]`.

    Example:
        >>> vertex_distances(torch.zeros(1, 1, 3), torch.tensor([[[0.003, 0.0, 0.004]]])).item()
        5.0
    """
    return 1000 * (out[..., :3] - x[..., :3]).norm(dim=-1)


@torch.no_grad()
def reconstruction_error(
    model: MorphableModel, meshes: Any, batch_size: int = 64
) -> dict[str, Any]:
    r"""The error of a model on meshes; see :meth:`MorphableModel.evaluate`.

    Args:
        model (MorphableModel): The model.
        meshes (torch.Tensor, MeshDataset, numpy.ndarray or list): Meshes :obj:`[M, N, C]` in
            metres.
        batch_size (int, optional): Meshes reconstructed at a time. (default: :obj:`64`)

    Returns:
        :obj:`mean`, :obj:`std` and exact :obj:`median` of the distance in millimetres over all
        vertices of all meshes; :obj:`alive`, the number of latent dimensions whose standard
        deviation exceeds a thousandth of the largest; of more than three features
        :obj:`features`, the mean absolute error of each further one in its own unit.

    Raises:
        TypeError: If the model has no unit.
    """
    meshes = _prepared(model, "test meshes", meshes)
    distances, codes, further = [], [], []
    with _Evaluating(model):
        for block in blocks(meshes, batch_size):
            x = block.to(model.mean.device, model.mean.dtype)
            codes.append(model.encode(x))
            out = model.decode(codes[-1])
            distances.append(vertex_distances(out, x).flatten())
            further.append((out[..., 3:] - x[..., 3:]).abs().double().mean(dim=1))
    d = torch.cat(distances).double().sort().values
    n = d.numel()
    spread = torch.cat(codes).std(dim=0, correction=0)
    found: dict[str, Any] = {
        "mean": d.mean().item(),
        "std": d.std(correction=0).item(),
        "median": ((d[(n - 1) // 2] + d[n // 2]) / 2).item(),
        "alive": int((spread > 1e-3 * spread.max()).sum()),
    }
    if model.in_channels > 3:
        found["features"] = torch.cat(further).mean(dim=0).tolist()
    return found


@torch.no_grad()
def encode_all(model: MorphableModel, meshes: Any, batch_size: int = 64) -> Tensor:
    r"""The latent codes :obj:`[M, latent_channels]` of meshes :obj:`[M, N, C]` in metres."""
    meshes = _prepared(model, "meshes", meshes)
    with _Evaluating(model):
        device, dtype = model.mean.device, model.mean.dtype
        return torch.cat([model.encode(x.to(device, dtype)) for x in blocks(meshes, batch_size)])


def warn_millimetres(name: str, x: Tensor) -> bool:
    r"""Says in one warning line where coordinates of a model of metres look like millimetres."""
    largest = (x[..., :3] - x[..., :3].mean(dim=-2, keepdim=True)).abs().amax().item()
    if largest > LARGEST:
        warnings.warn(
            f"Expected {name} in metres (got coordinates {largest:.0f} away from their centre, "
            f"which look like millimetres: divide by 1000, or read files with unit='mm')",
            stacklevel=3,
        )
    return largest > LARGEST


def _prepared(model: MorphableModel, name: str, meshes: Any) -> Any:
    if not hasattr(model, "unit"):
        raise TypeError(
            f"Expected a MorphableModel, whose errors have a unit (got {type(model).__name__}): "
            f"wrap the network as MorphableModel(network, template)"
        )
    meshes = as_meshes(meshes)
    check_meshes(name, meshes, model.num_vertices, model.in_channels)
    return meshes


class _Evaluating:
    # A model in evaluation mode, and back in the mode that it had.
    def __init__(self, model: torch.nn.Module):
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *args: object) -> None:
        self.model.train(self.training)
