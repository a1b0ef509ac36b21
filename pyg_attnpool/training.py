r"""Training of mesh autoencoders with PyTorch Lightning (extra :obj:`train`)."""

import ctypes
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from pyg_attnpool.datasets import MeshDataset
from pyg_attnpool.mesh import MeshHierarchy

try:
    import pytorch_lightning as pl
    import torchmetrics
    from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
    from pytorch_lightning.loggers import CSVLogger
except ImportError as e:
    raise ImportError(
        f"'pyg_attnpool.training' requires '{e.name}': install it with "
        f'`pip install "pyg_attnpool[train]"`'
    ) from e

# Meshes beside each other that are read together, and how many such blocks at a time: in the order
# of an epoch these 4,096 meshes, less than half a gigabyte, mix.
BLOCK, MIXED = 64, 64

RECIPES = {"paper": 8e-3, "neural3dmm": 1e-3, "fast": 3e-3}  # and their learning rates


class Standardized(torch.nn.Module):
    r"""An autoencoder of metres around one of standardised coordinates: every coordinate of every
    vertex is centred by its mean and divided by its standard deviation over the training set.
    Shipped as one module, so that whoever has the model has its units.

    Args:
        model (torch.nn.Module): An autoencoder with :meth:`encode` and :meth:`decode`.
        mean (torch.Tensor): The mean mesh :obj:`[N, 3]` in metres.
        std (torch.Tensor): The standard deviation of every coordinate :obj:`[N, 3]` in metres.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: torch.nn.Module, mean: Tensor, std: Tensor):
        super().__init__()
        if mean.dim() != 2 or mean.shape != std.shape or not (std > 0).all():
            raise ValueError(
                f"Expected 'mean' and positive 'std' of shape [N, 3] "
                f"(got {list(mean.shape)} and {list(std.shape)})"
            )
        self.model = model
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    @classmethod
    def from_meshes(cls, model: torch.nn.Module, x: Tensor | MeshDataset) -> "Standardized":
        r"""With the statistics of training meshes :obj:`[M, N, 3]` in metres, in one pass over
        them. A coordinate that never moves is divided by one.

        Raises:
            ValueError: If there are no meshes or a coordinate is not finite.
        """
        _check_meshes("training meshes", x)
        mean, std, largest = _statistics(x)
        # Rounding alone makes the deviation of a still coordinate about 1e-7 of its value.
        still = std <= 1e-6 * largest.clamp(min=std.max())
        return cls(model, mean, std.masked_fill(still, 1.0))

    def standardize(self, x: Tensor) -> Tensor:
        r"""Metres to standardised coordinates."""
        return (x - self.mean) / self.std

    def encode(self, x: Tensor) -> Tensor:
        r"""Meshes :obj:`[B, N, 3]` in metres to latent codes :obj:`[B, latent_channels]`."""
        return self.model.encode(self.standardize(x))

    def decode(self, z: Tensor) -> Tensor:
        r"""Latent codes :obj:`[B, latent_channels]` to meshes :obj:`[B, N, 3]` in metres."""
        return self.model.decode(z) * self.std + self.mean

    def forward(self, x: Tensor) -> Tensor:
        r"""Reconstructs meshes :obj:`[B, N, 3]` in metres."""
        return self.decode(self.encode(x))


class VertexError(torchmetrics.Metric):
    r"""The Euclidean distance of every vertex to where it should be, in millimetres for meshes in
    metres: mean, standard deviation and median over all vertices of all meshes."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("distances", default=[], dist_reduce_fx="cat")

    def update(self, out: Tensor, x: Tensor):
        self.distances.append(1000 * (out - x).norm(dim=-1).flatten())

    def compute(self) -> dict[str, Tensor]:
        d = torchmetrics.utilities.dim_zero_cat(self.distances).double().sort().values
        n = d.numel()
        median = (d[(n - 1) // 2] + d[n // 2]) / 2
        return {"mean": d.mean(), "std": d.std(correction=0), "median": median}


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, x: Tensor | MeshDataset, batch_size: int = 64
) -> dict[str, float]:
    r"""The error of a model on meshes it has not seen.

    Args:
        model (torch.nn.Module): An autoencoder of metres with :meth:`encode` and :meth:`decode`,
            such as :class:`Standardized` or :class:`~pyg_attnpool.models.PCA`.
        x (torch.Tensor or MeshDataset): Test meshes :obj:`[M, N, 3]` in metres.
        batch_size (int, optional): Meshes reconstructed at a time. (default: :obj:`64`)

    Returns:
        :obj:`mean`, :obj:`std` and :obj:`median` of the per-vertex distance in millimetres, and
        :obj:`alive`, the number of latent dimensions that vary over the meshes: those whose
        standard deviation exceeds a thousandth of the largest.
    """
    _check_meshes("test meshes", x)
    device = next(model.buffers()).device
    training = model.training
    model.eval()
    metric, codes = VertexError().to(device), []
    for batch in _blocks(x, batch_size):
        batch = batch.to(device)
        codes.append(model.encode(batch))
        metric.update(model.decode(codes[-1]), batch)
    model.train(training)
    spread = torch.cat(codes).std(dim=0, correction=0)
    alive = int((spread > 1e-3 * spread.max()).sum())
    return {**{name: value.item() for name, value in metric.compute().items()}, "alive": alive}


class MeshTraining(pl.LightningModule):
    r"""The training of a :class:`Standardized` autoencoder: L1 loss on standardised coordinates,
    validation error in millimetres.

    Args:
        model (Standardized): The model.
        recipe (str, optional): :obj:`"paper"`: SGD with momentum 0.9, weight decay 5e-4, learning
            rate 8e-3, times 0.99 per epoch. :obj:`"neural3dmm"`, the published recipe of spiral
            models: Adam with weight decay 5e-5, learning rate 1e-3, times 0.99 per epoch.
            :obj:`"fast"`: Adam with a one-cycle learning rate up to 3e-3, which gets most of the
            quality in few epochs. (default: :obj:`"fast"`)
        lr (float, optional): Another learning rate. (default: :obj:`None`)
        settings (dict, optional): What else makes up a run; stored in every checkpoint, and one of
            other settings is refused. (default: :obj:`None`)
        compile (bool, optional): Whether :func:`torch.compile` takes the forward and backward pass,
            on a GPU into CUDA graphs. If :obj:`None`, it does on a GPU: there a step is bound by
            the launches of its kernels, while on a CPU the layers' own operations are the faster
            ones. (default: :obj:`None`)
    """

    def __init__(
        self,
        model: Standardized,
        recipe: str = "fast",
        lr: float | None = None,
        settings: dict[str, Any] | None = None,
        compile: bool | None = None,
    ):
        super().__init__()
        if recipe not in RECIPES:
            raise ValueError(f"Expected 'recipe' to be one of {list(RECIPES)} (got {recipe!r})")
        self.model = model
        self.recipe = recipe
        self.lr = RECIPES[recipe] if lr is None else lr
        self.settings = {"recipe": recipe, "lr": self.lr, **(settings or {})}
        self.val_error = torchmetrics.MeanMetric(nan_strategy="disable")
        self.compile_step = compile
        self.compiled_loss: Callable[[Tensor], Tensor] | None = None

    def loss(self, x: Tensor) -> Tensor:
        r"""The L1 loss of meshes :obj:`[B, N, 3]` in metres, on standardised coordinates."""
        target = self.model.standardize(x)
        return (self.model.model(target) - target).abs().mean()

    def on_train_start(self):
        gpu = self.device.type == "cuda"
        if gpu if self.compile_step is None else self.compile_step:
            self.compiled_loss = torch.compile(
                self.loss, mode="reduce-overhead" if gpu else None, dynamic=False
            )

    def training_step(self, x: Tensor, step: int) -> Tensor:
        if self.compiled_loss is None:
            loss = self.loss(x)
        else:
            torch.compiler.cudagraph_mark_step_begin()
            loss = self.compiled_loss(x).clone()  # the next replay writes over it
        # On a GPU every look at the loss waits for it: there the validation error has to tell.
        if loss.device.type == "cpu":
            self._check_finite("loss", loss)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def _check_finite(self, name: str, value: Tensor):
        if not torch.isfinite(value):
            raise ValueError(
                f"Expected a finite {name} (got {value.item()} at step {self.global_step}): lower "
                f"the learning rate {self.lr}, or check the meshes; the last good epoch is in "
                f"{self.trainer.checkpoint_callback.dirpath}"
            )

    def validation_step(self, x: Tensor, step: int):
        self.val_error.update(1000 * (self.model(x) - x).norm(dim=-1).mean(), x.size(0))

    def on_validation_epoch_end(self):
        error = self.val_error.compute()
        self.val_error.reset()
        self._check_finite("validation error", error)
        self.log("val_mm", error, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        if self.recipe != "fast":
            if self.recipe == "paper":
                optimizer: torch.optim.Optimizer = torch.optim.SGD(
                    self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4, fused=True
                )
            else:
                optimizer = torch.optim.Adam(
                    self.parameters(), lr=self.lr, weight_decay=5e-5, fused=True
                )
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
            return {"optimizer": optimizer, "lr_scheduler": scheduler}
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]):
        checkpoint["settings"] = self.settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]):
        check_checkpoint(self, checkpoint)


def check_checkpoint(module: MeshTraining, checkpoint: dict[str, Any]):
    r"""Raises a :class:`ValueError` if a checkpoint is of another template, model or run."""
    stored = checkpoint.get("settings")
    if stored != module.settings:
        raise ValueError(f"Expected a checkpoint of a run with {module.settings} (got {stored})")
    have = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in checkpoint["state_dict"].items()}
    if have != got:
        name = min(set(have.items()) ^ set(got.items()))[0]
        raise ValueError(
            f"Expected a checkpoint of this model, with '{name}' of shape {have.get(name)} "
            f"(got {got.get(name)})"
        )


def load_checkpoint(path: Path) -> dict[str, Any]:
    r"""Reads a checkpoint file; one that is damaged is a :class:`ValueError`."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as e:  # torch raises many types, none of which names the file
        raise ValueError(f"Expected a whole checkpoint in {path} (got {e})") from e
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"Expected a training checkpoint in {path} (got something else)")
    return checkpoint


def quiet_lightning():
    r"""Spares a script Lightning's lines on which devices there are and what else it sells."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


def keep_freed_memory():
    r"""Lets the C library keep what a training step frees, on Linux: the next step needs it again,
    and the system would clear every page of it first. What is free now is given back, lest one
    training after another adds the gaps that it left."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # that of GNU
        gc.collect()
        libc.malloc_trim(0)
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 25)


class _ProgressBar(TQDMProgressBar):
    # One line per epoch; validation takes a second or two and ends in its `val_mm`.
    def init_validation_tqdm(self):
        bar = super().init_validation_tqdm()
        bar.disable = True
        return bar


class _Meshes(Dataset):
    # Indexed by a whole batch at a time: one gather, no collation.
    def __init__(self, x: Tensor | MeshDataset):
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> Tensor:
        if isinstance(self.x, MeshDataset):
            return _check_finite("meshes", self.x.read(index), index)
        return self.x[index]


class _Batches(DistributedSampler):
    # The order of an epoch follows from seed and epoch alone, so a resumed run repeats it. It is
    # cut into one piece for each process; Lightning leaves samplers of this class alone.
    def __init__(
        self,
        x: Tensor | MeshDataset,
        batch_size: int,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(range(len(x)), world_size, rank)
        self.mapped = isinstance(x, MeshDataset)
        self.device = torch.device("cpu") if self.mapped else x.device
        self.batch_size = batch_size
        self.order_seed = seed

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        # Lazily: when it resumes, Lightning makes the iterator before it sets the epoch.
        num = len(self.dataset)
        order = torch.arange(num)
        if self.order_seed is not None:
            generator = torch.Generator().manual_seed(100_003 * self.order_seed + self.epoch)
            if self.mapped:
                order = _in_blocks(num, generator)
            else:
                order = torch.randperm(num, generator=generator)
        # As many for each process: the first ones again where that does not come out even.
        order = order[torch.arange(self.total_size) % num]
        order = order.chunk(self.num_replicas)[self.rank].to(self.device)  # once an epoch
        yield from order.split(self.batch_size)


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
    64 blocks. Several processes read disjoint parts.

    Args:
        train (torch.Tensor or MeshDataset): Training meshes :obj:`[M, N, 3]` in metres.
        val (torch.Tensor or MeshDataset): Validation meshes :obj:`[V, N, 3]` in metres.
        batch_size (int, optional): Meshes per step, of each process. (default: :obj:`16`)
        seed (int, optional): Seed of the order of the meshes. (default: :obj:`0`)
    """

    def __init__(
        self,
        train: Tensor | MeshDataset,
        val: Tensor | MeshDataset,
        batch_size: int = 16,
        seed: int = 0,
    ):
        super().__init__()
        _check_meshes("training meshes", train)
        _check_meshes("validation meshes", val)
        self.train, self.val = train, val
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str):
        device = self.trainer.strategy.root_device
        if isinstance(self.train, Tensor):
            self.train = self.train.to(device)
        if isinstance(self.val, Tensor):
            self.val = self.val.to(device)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, self.batch_size, self.seed)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val, 64, None)

    def _loader(self, x: Tensor | MeshDataset, batch_size: int, seed: int | None) -> DataLoader:
        processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = _Batches(x, batch_size, seed, *processes)
        return DataLoader(_Meshes(x), batch_size=None, sampler=sampler)


def fit(
    model: torch.nn.Module,
    hierarchy: MeshHierarchy,
    train: Tensor | MeshDataset,
    val: Tensor | MeshDataset,
    output: str | Path,
    recipe: str = "fast",
    epochs: int = 30,
    batch_size: int = 16,
    lr: float | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    compile: bool | None = None,
    precision: str = "32-true",
) -> Standardized:
    r"""Trains an autoencoder and returns it with the weights of its best validation error.

    Args:
        model (torch.nn.Module): The autoencoder of standardised coordinates.
        hierarchy (MeshHierarchy): The hierarchy it was built on.
        train (torch.Tensor or MeshDataset): Training meshes :obj:`[M, N, 3]` in metres, in memory
            or read while training as by :class:`MeshData`; the standardisation comes from these
            alone.
        val (torch.Tensor or MeshDataset): Validation meshes :obj:`[V, N, 3]` in metres.
        output (str or Path): Folder for the checkpoints :obj:`best.ckpt` and :obj:`last.ckpt` and
            the log :obj:`log/version_*/metrics.csv`.
        recipe (str, optional): :obj:`"paper"`, :obj:`"neural3dmm"` or :obj:`"fast"`, see
            :class:`MeshTraining`. (default: :obj:`"fast"`)
        epochs (int, optional): The number of epochs. (default: :obj:`30`)
        batch_size (int, optional): Meshes per step. (default: :obj:`16`)
        lr (float, optional): Another learning rate than the recipe's. (default: :obj:`None`)
        seed (int, optional): Seed of the order of the meshes. (default: :obj:`0`)
        device (str, optional): A Lightning accelerator such as :obj:`"cpu"` or :obj:`"cuda"`.
            (default: :obj:`"auto"`)
        resume (bool, optional): Go on from :obj:`last.ckpt` where there is one, to the result of
            a run that was never interrupted; all other arguments must be the same.
            (default: :obj:`False`)
        compile (bool, optional): As in :class:`MeshTraining`. (default: :obj:`None`)
        precision (str, optional): A precision of Lightning such as :obj:`"bf16-mixed"`.
            (default: :obj:`"32-true"`)

    Raises:
        ValueError: If meshes do not fit the hierarchy, a checkpoint is damaged or of another
            model, or the loss is no longer finite.
    """
    for name, x in (("training meshes", train), ("validation meshes", val)):
        num_vertices = _check_meshes(name, x)
        if num_vertices != hierarchy.num_vertices[0]:
            raise ValueError(
                f"Expected {name} of {hierarchy.num_vertices[0]} vertices as the template has "
                f"(got {num_vertices})"
            )
    if min(epochs, batch_size) < 1:
        raise ValueError(
            f"Expected positive 'epochs' and 'batch_size' (got {epochs} and {batch_size})"
        )
    output = Path(output)
    settings = {
        "template": hierarchy.hash,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "meshes": len(train),
        "precision": precision,
    }
    module = MeshTraining(Standardized.from_meshes(model, train), recipe, lr, settings, compile)
    keep_freed_memory()
    last, best = output / "last.ckpt", output / "best.ckpt"
    if resume and last.exists():
        check_checkpoint(module, load_checkpoint(last))
    else:
        for path in (last, best):
            path.unlink(missing_ok=True)
    trainer = pl.Trainer(
        accelerator=device,
        devices=1,
        max_epochs=epochs,
        logger=CSVLogger(output, name="log"),
        precision=precision,
        log_every_n_steps=1,
        callbacks=[
            ModelCheckpoint(output, "best", monitor="val_mm", enable_version_counter=False),
            # Of the end of an epoch, not of the validation within it: resuming starts the next.
            ModelCheckpoint(
                output, "last", save_on_train_epoch_end=True, enable_version_counter=False
            ),
            _ProgressBar(refresh_rate=10, leave=True),
        ],
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        # The meshes are on the device already; workers would only copy them.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        # Lightning's own use of torch.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer.fit(
            module,
            MeshData(train, val, batch_size, seed),
            ckpt_path=last if resume and last.exists() else None,
            weights_only=True,
        )
    module.load_state_dict(load_checkpoint(best)["state_dict"])
    return module.model


def _check_meshes(name: str, x: Tensor | MeshDataset) -> int:
    # Those of a data set are checked when they are read.
    if isinstance(x, MeshDataset):
        shape = [len(x), len(x.template[0]), 3]
    else:
        shape = list(x.shape)
    if len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ValueError(f"Expected {name} of shape [M, N, 3] (got {shape})")
    if isinstance(x, Tensor):
        _check_finite(name, x, torch.arange(len(x)))
    return shape[1]


def _check_finite(name: str, x: Tensor, index: Tensor) -> Tensor:
    finite = torch.isfinite(x).flatten(1).all(dim=1).cpu()
    if not finite.all():
        first = int(index[~finite].min())
        raise ValueError(f"Expected finite {name} (got NaN or infinity in mesh {first})")
    return x


def _blocks(x: Tensor | MeshDataset, size: int) -> Iterator[Tensor]:
    for index in torch.arange(len(x)).split(size):
        yield x.read(index) if isinstance(x, MeshDataset) else x[index[0] : index[-1] + 1]


def _statistics(x: Tensor | MeshDataset) -> tuple[Tensor, Tensor, Tensor]:
    # Mean, standard deviation and largest absolute value of every coordinate in one pass, block by
    # block (Chan, Golub & LeVeque): squares are taken about the mean of their block, never of sums
    # that nearly cancel.
    count, mean, squares, largest = 0, 0.0, 0.0, torch.tensor(0.0)
    for block in _blocks(x, BLOCK):
        _check_finite("training meshes", block, torch.arange(count, count + len(block)))
        num, block = len(block), block.double()
        center = block.mean(dim=0)
        away, total = center - mean, count + num
        squares = squares + ((block - center) ** 2).sum(dim=0) + away**2 * (count * num / total)
        mean = mean + away * (num / total)
        largest = torch.maximum(block.abs().amax(dim=0), largest.to(block))
        count = total
    return mean.float(), (squares / count).sqrt().float(), largest.float()
