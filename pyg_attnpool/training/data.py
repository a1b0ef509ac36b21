r"""Meshes as batches: in memory on the device of the trainer, or read while training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from pyg_attnpool.arguments import as_integer
from pyg_attnpool.datasets.inputs import check_finite, check_meshes
from pyg_attnpool.datasets.mesh_dataset import MeshDataset
from pyg_attnpool.training.lightning import pl

# Meshes beside each other that are read together, and how many such blocks at a time: in the order
# of an epoch these 4,096 meshes, less than half a gigabyte, mix.
BLOCK, MIXED = 64, 64


class _Meshes(Dataset):
    # Indexed by a whole batch at a time: one gather, no collation.
    def __init__(self, x: Tensor | MeshDataset):
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> Tensor:
        if isinstance(self.x, MeshDataset):
            if len(index) == 0:  # which a transform of PyG cannot stack
                return self.x.read(torch.zeros(1, dtype=torch.long))[:0]
            return check_finite("meshes", self.x.read(index), index)
        return self.x[index]


class _Batches(DistributedSampler):
    # The order of an epoch follows from seed and epoch alone, so a resumed run repeats it. A batch
    # of all processes together is one of a single process, cut into a piece for each; Lightning
    # leaves samplers of this class alone.
    def __init__(
        self,
        x: Tensor | MeshDataset,
        batch_size: int,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(cast(Dataset, range(len(x))), world_size, rank)
        self.num_meshes = len(x)
        self.mapped = isinstance(x, MeshDataset)
        self.device = torch.device("cpu") if self.mapped else x.device
        self.batch_size = batch_size
        self.order_seed = seed

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        # Lazily: when it resumes, Lightning makes the iterator before it sets the epoch.
        num = self.num_meshes
        order = torch.arange(num)
        if self.order_seed is not None:
            generator = torch.Generator().manual_seed(100_003 * self.order_seed + self.epoch)
            if self.mapped:
                order = _in_blocks(num, generator)
            else:
                order = torch.randperm(num, generator=generator)
            # Gradients are averaged, so each process has as many meshes: the first ones again
            # where that does not come out even. Each mesh is validated once.
            order = order[torch.arange(self.total_size) % num]
        for batch in order.to(self.device).split(self.batch_size * self.num_replicas):
            yield batch.tensor_split(self.num_replicas)[self.rank]


def _in_blocks(num: int, generator: torch.Generator) -> Tensor:
    # A random order in which meshes that are beside each other in a file are read about together.
    blocks = torch.arange(num).split(BLOCK)
    order = torch.cat([blocks[i] for i in torch.randperm(len(blocks), generator=generator)])
    parts = order.split(MIXED * BLOCK)
    return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts])


class MeshData(pl.LightningDataModule):
    r"""Training and validation meshes, each as one tensor on the device of the trainer, batches
    drawn there without worker processes, or as a data set of mapped vertices, for more than memory
    holds: of that, an epoch reads blocks of 64 neighbours in random order, and mixes the meshes of
    64 blocks. Several processes read disjoint parts of every batch; where their number does not
    divide that of the training meshes, up to that many are read twice.

    Args:
        train (torch.Tensor or MeshDataset): Training meshes :obj:`[M, N, 3]` in metres.
        val (torch.Tensor or MeshDataset): Validation meshes :obj:`[V, N, 3]` in metres.
        batch_size (int, optional): Meshes per step, of each process. (default: :obj:`16`)
        seed (int, optional): Seed of the order of the meshes. (default: :obj:`0`)

    Example:
        >>> from pyg_attnpool.training import MeshData
        >>> data = MeshData(meshes[:16], meshes[16:], batch_size=8)
        >>> trainer.fit(module, data)  # doctest: +SKIP
    """

    def __init__(
        self,
        train: Tensor | MeshDataset,
        val: Tensor | MeshDataset,
        batch_size: int = 16,
        seed: int = 0,
    ):
        super().__init__()
        check_meshes("training meshes", train)
        check_meshes("validation meshes", val)
        self.train, self.val = train, val
        self.batch_size = as_integer("batch_size", batch_size, least=1)
        self.seed = as_integer("seed", seed, least=0)

    def setup(self, stage: str) -> None:
        r"""Takes meshes that are tensors to the device of the trainer."""
        assert self.trainer is not None  # which calls this
        device = self.trainer.strategy.root_device
        if isinstance(self.train, Tensor):
            self.train = self.train.to(device)
        if isinstance(self.val, Tensor):
            self.val = self.val.to(device)

    def train_dataloader(self) -> DataLoader:
        r"""Batches of training meshes, in an order that depends on seed and epoch alone."""
        return self._loader(self.train, self.batch_size, self.seed)

    def val_dataloader(self) -> DataLoader:
        r"""Batches of 64 validation meshes, in order."""
        return self._loader(self.val, 64, None)

    def _loader(self, x: Tensor | MeshDataset, batch_size: int, seed: int | None) -> DataLoader:
        processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = _Batches(x, batch_size, seed, *processes)
        # With a generator of its own it leaves the global one to augmentation, which must resume.
        generator = torch.Generator()
        return DataLoader(_Meshes(x), batch_size=None, sampler=sampler, generator=generator)
