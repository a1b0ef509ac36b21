r"""Mean and standard deviation of meshes, by which they are standardised and recognised."""

import torch
from torch import Tensor

from pyg_attnpool.datasets.inputs import blocks, check_finite
from pyg_attnpool.datasets.mesh_dataset import MeshDataset

BLOCK = 64  # meshes in memory at a time


def statistics(name: str, x: Tensor | MeshDataset) -> tuple[Tensor, Tensor]:
    r"""Mean and standard deviation :obj:`[N, C]` of every feature in one pass, block by block
    (Chan, Golub & LeVeque): squares are taken about the mean of their block, never of sums that
    nearly cancel. The deviation of a feature that never moves is one, as it is divided by.

    Args:
        name (str): The name of the meshes in messages.
        x (torch.Tensor or MeshDataset): Meshes :obj:`[M, N, C]` in metres.

    Raises:
        ValueError: If a mesh is not finite.
    """
    count, mean, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    largest = torch.tensor(0.0)
    for block in blocks(x, BLOCK):
        check_finite(name, block, torch.arange(count, count + len(block)))
        num, block = len(block), block.double()
        center = block.mean(dim=0)
        away, total = center - mean, count + num
        squares = squares + ((block - center) ** 2).sum(dim=0) + away**2 * (count * num / total)
        mean = mean + away * (num / total)
        largest = torch.maximum(block.abs().amax(dim=0), largest.to(block))
        count = total
    std = (squares / count).sqrt()
    # Rounding alone makes the deviation of a still feature about 1e-7 of its value.
    std = std.masked_fill(std <= 1e-6 * largest.clamp(min=std.max()), 1.0)
    return mean.float().cpu(), std.float().cpu()
