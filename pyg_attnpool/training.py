r"""Training of mesh autoencoders with PyTorch Lightning (extra :obj:`train`)."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

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
    def from_meshes(cls, model: torch.nn.Module, x: Tensor) -> "Standardized":
        r"""With the statistics of training meshes :obj:`[M, N, 3]` in metres. A coordinate that
        never moves is divided by one.

        Raises:
            ValueError: If there are no meshes or a coordinate is not finite.
        """
        _check_meshes("training meshes", x)
        mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
        # Rounding alone makes the deviation of a still coordinate about 1e-7 of its value.
        still = std <= 1e-6 * x.abs().amax(dim=0).clamp(min=std.max())
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
def evaluate(model: torch.nn.Module, x: Tensor, batch_size: int = 64) -> dict[str, float]:
    r"""The error of a model on meshes it has not seen.

    Args:
        model (torch.nn.Module): An autoencoder of metres with :meth:`encode` and :meth:`decode`,
            such as :class:`Standardized` or :class:`~pyg_attnpool.models.PCA`.
        x (torch.Tensor): Test meshes :obj:`[M, N, 3]` in metres.
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
    for batch in x.split(batch_size):
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
    """

    def __init__(
        self,
        model: Standardized,
        recipe: str = "fast",
        lr: float | None = None,
        settings: dict[str, Any] | None = None,
    ):
        super().__init__()
        if recipe not in RECIPES:
            raise ValueError(f"Expected 'recipe' to be one of {list(RECIPES)} (got {recipe!r})")
        self.model = model
        self.recipe = recipe
        self.lr = RECIPES[recipe] if lr is None else lr
        self.settings = {"recipe": recipe, "lr": self.lr, **(settings or {})}
        self.val_error = torchmetrics.MeanMetric()

    def training_step(self, x: Tensor, step: int) -> Tensor:
        target = self.model.standardize(x)
        loss = (self.model.model(target) - target).abs().mean()
        # On a GPU every look at the loss waits for it, so look only when it is logged anyway.
        if step % self.trainer.log_every_n_steps == 0 and not torch.isfinite(loss):
            raise ValueError(
                f"Expected a finite loss (got {loss.item()} at step {self.global_step}): lower the "
                f"learning rate {self.lr}, or check the meshes; the last good epoch is in "
                f"{self.trainer.checkpoint_callback.dirpath}"
            )
        self.log("train_loss", loss)
        return loss

    def validation_step(self, x: Tensor, step: int):
        self.val_error.update(1000 * (self.model(x) - x).norm(dim=-1).mean(), x.size(0))

    def on_validation_epoch_end(self):
        error = self.val_error.compute()
        self.val_error.reset()
        if not torch.isfinite(error):
            raise ValueError(f"Expected a finite validation error (got {error.item()})")
        self.log("val_mm", error, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        if self.recipe != "fast":
            if self.recipe == "paper":
                optimizer: torch.optim.Optimizer = torch.optim.SGD(
                    self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4
                )
            else:
                optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, weight_decay=5e-5)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
            return {"optimizer": optimizer, "lr_scheduler": scheduler}
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
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


class _ProgressBar(TQDMProgressBar):
    # One line per epoch; validation takes a second or two and ends in its `val_mm`.
    def init_validation_tqdm(self):
        bar = super().init_validation_tqdm()
        bar.disable = True
        return bar


class _Meshes(Dataset):
    # Indexed by a whole batch at a time: one gather, no collation.
    def __init__(self, x: Tensor):
        self.x = x

    def __len__(self) -> int:
        return self.x.size(0)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.x[index.to(self.x.device)]


class _Batches(Sampler):
    # The order of an epoch follows from seed and epoch alone, so a resumed run repeats it.
    def __init__(self, num_meshes: int, batch_size: int, seed: int | None):
        self.num_meshes = num_meshes
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int):  # called by Lightning
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_meshes // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        # Lazily: when it resumes, Lightning makes the iterator before it sets the epoch.
        order = torch.arange(self.num_meshes)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(100_003 * self.seed + self.epoch)
            order = torch.randperm(self.num_meshes, generator=generator)
        yield from order.split(self.batch_size)


class MeshData(pl.LightningDataModule):
    r"""Training and validation meshes as one tensor each on the device of the trainer, batches
    drawn there without worker processes.

    Args:
        train (torch.Tensor): Training meshes :obj:`[M, N, 3]` in metres.
        val (torch.Tensor): Validation meshes :obj:`[V, N, 3]` in metres.
        batch_size (int, optional): Meshes per step. (default: :obj:`16`)
        seed (int, optional): Seed of the order of the meshes. (default: :obj:`0`)
    """

    def __init__(self, train: Tensor, val: Tensor, batch_size: int = 16, seed: int = 0):
        super().__init__()
        _check_meshes("training meshes", train)
        _check_meshes("validation meshes", val)
        self.train, self.val = train, val
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str):
        device = self.trainer.strategy.root_device
        self.train, self.val = self.train.to(device), self.val.to(device)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, self.batch_size, self.seed)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val, 64, None)

    def _loader(self, x: Tensor, batch_size: int, seed: int | None) -> DataLoader:
        return DataLoader(_Meshes(x), batch_size=None, sampler=_Batches(len(x), batch_size, seed))


def fit(
    model: torch.nn.Module,
    hierarchy: MeshHierarchy,
    train: Tensor,
    val: Tensor,
    output: str | Path,
    recipe: str = "fast",
    epochs: int = 30,
    batch_size: int = 16,
    lr: float | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
) -> Standardized:
    r"""Trains an autoencoder and returns it with the weights of its best validation error.

    Args:
        model (torch.nn.Module): The autoencoder of standardised coordinates.
        hierarchy (MeshHierarchy): The hierarchy it was built on.
        train (torch.Tensor): Training meshes :obj:`[M, N, 3]` in metres; the standardisation
            comes from these alone.
        val (torch.Tensor): Validation meshes :obj:`[V, N, 3]` in metres.
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

    Raises:
        ValueError: If meshes do not fit the hierarchy, a checkpoint is damaged or of another
            model, or the loss is no longer finite.
    """
    for name, x in (("training meshes", train), ("validation meshes", val)):
        _check_meshes(name, x)
        if x.size(1) != hierarchy.num_vertices[0]:
            raise ValueError(
                f"Expected {name} of {hierarchy.num_vertices[0]} vertices as the template has "
                f"(got {x.size(1)})"
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
    }
    module = MeshTraining(Standardized.from_meshes(model, train), recipe, lr, settings)
    last, best = output / "last.ckpt", output / "best.ckpt"
    if resume and last.exists():
        check_checkpoint(module, load_checkpoint(last))
    else:
        for path in (last, best):
            path.unlink(missing_ok=True)
    steps_per_epoch = -(-len(train) // batch_size)
    trainer = pl.Trainer(
        accelerator=device,
        devices=1,
        max_epochs=epochs,
        logger=CSVLogger(output, name="log"),
        log_every_n_steps=min(10, steps_per_epoch),
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


def _check_meshes(name: str, x: Tensor):
    if x.dim() != 3 or x.size(2) != 3 or x.numel() == 0:
        raise ValueError(f"Expected {name} of shape [M, N, 3] (got {list(x.shape)})")
    finite = torch.isfinite(x).flatten(1).all(dim=1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise ValueError(f"Expected finite {name} (got NaN or infinity in mesh {first})")
