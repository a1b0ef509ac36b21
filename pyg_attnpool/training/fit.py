r"""Fitting a morphable model, from its arguments to the best weights."""

from __future__ import annotations

import copy
import ctypes
import gc
import logging
import os
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from filelock import FileLock, Timeout
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from pyg_attnpool.datasets.mesh_dataset import (
    MeshDataset,
    as_meshes,
    blocks,
    check_finite,
    check_meshes,
    of_every,
)
from pyg_attnpool.files import digest, replacing
from pyg_attnpool.metrics import warn_millimetres
from pyg_attnpool.models import MorphableModel
from pyg_attnpool.models.storage import describe
from pyg_attnpool.training.data import BLOCK, MeshData
from pyg_attnpool.training.module import Loss, MeshTraining, Optimizer, check_checkpoint

# What `fit` tells the trainer itself.
OWN = ("max_epochs", "enable_checkpointing", "num_sanity_val_steps", "default_root_dir")


def fit(
    model: MorphableModel,
    train: Any,
    val: Any = None,
    *,
    output: str | Path | None = None,
    epochs: int = 30,
    batch_size: int = 16,
    optimizer: Optimizer = "one_cycle",
    lr: float | None = None,
    loss: Loss | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    logger: Any = None,
    seed: int = 0,
    resume: bool = False,
    compile: bool | None = None,
    freeze: bool = False,
    **trainer: Any,
) -> MorphableModel:
    r"""Trains a morphable model. It is left with the weights of its best validation error, and with
    mean and standard deviation, in metres, and latent statistics of the training meshes.

    A network with a method :obj:`fit` of its own, such as :class:`~pyg_attnpool.models.PCA`, is
    fitted by that to all training meshes; the other arguments do not matter to it. One with a
    method :obj:`fit_modes`, such as :class:`~pyg_attnpool.models.ModalAutoencoder`, has its linear
    path fitted first, and stays at this start if no epoch is better on the validation meshes.

    Args:
        model (MorphableModel): The model.
        train (torch.Tensor, MeshDataset, numpy.ndarray or list): Training meshes
            :obj:`[M, N, C]` in metres: in memory, or a data set that is read while training, of
            which an epoch mixes blocks of neighbours.
        val (torch.Tensor, MeshDataset, numpy.ndarray or list, optional): Validation meshes. If
            :obj:`None`, they are split from :obj:`train`: those of a data set by its own
            :meth:`~pyg_attnpool.datasets.MeshDataset.split`, whose test part is left alone; of
            other meshes the first 10 of every 100. (default: :obj:`None`)
        output (str or Path, optional): Folder of the checkpoints :obj:`best.ckpt` and
            :obj:`last.ckpt`, which are for resuming alone, and of the log
            :obj:`log/version_*/metrics.csv`. If :obj:`None`, nothing stays.
            (default: :obj:`None`)
        epochs (int, optional): The number of epochs. (default: :obj:`30`)
        batch_size (int, optional): Meshes per step, of each process. (default: :obj:`16`)
        optimizer (str or callable, optional): As in
            :class:`~pyg_attnpool.training.MeshTraining`. (default: :obj:`"one_cycle"`)
        lr (float, optional): Another learning rate. (default: :obj:`None`)
        loss (callable, optional): Takes output and target :obj:`[B, N, C]`, standardised, to a
            scalar. If :obj:`None`, the network's own method :obj:`training_loss`, or else the L1
            loss. (default: :obj:`None`)
        transform (callable, optional): Augments a batch :obj:`[B, N, C]` in metres, such as
            :func:`~pyg_attnpool.training.rigid_motion`. (default: :obj:`None`)
        callbacks (list, optional): Callbacks of Lightning beside those of :func:`fit`.
            (default: :obj:`()`)
        logger (optional): A logger of Lightning. If :obj:`None`, a CSV file.
            (default: :obj:`None`)
        seed (int, optional): Seed of the order of the meshes. (default: :obj:`0`)
        resume (bool, optional): Go on from :obj:`last.ckpt` where there is one, to the result of
            a run that was never interrupted. All other arguments must be the same, but for more
            epochs where the schedule allows. (default: :obj:`False`)
        compile (bool, optional): As in :class:`~pyg_attnpool.training.MeshTraining`.
            (default: :obj:`None`)
        freeze (bool, optional): If set to :obj:`True`, the model is frozen at the end.
            (default: :obj:`False`)
        **trainer (optional): Arguments of :class:`pytorch_lightning.Trainer`, such as
            :obj:`accelerator`, :obj:`devices`, :obj:`num_nodes`, :obj:`strategy` or
            :obj:`precision`.

    Returns:
        The model.

    Raises:
        TypeError: If an argument is of a wrong type or unknown to the trainer.
        ValueError: If meshes do not fit the model, a checkpoint is damaged or of another run,
            another training writes to the folder, or the loss is no longer finite.
    """
    start = time.perf_counter()
    if not isinstance(model, MorphableModel):
        raise TypeError(f"Expected a MorphableModel to fit (got {type(model).__name__})")
    train, val = as_meshes(train), None if val is None else as_meshes(val)
    closed = hasattr(model.autoencoder, "fit")
    if val is None and not closed:
        train, val = _split(train)
    for name, meshes in (("training meshes", train), ("validation meshes", val)):
        if meshes is not None:
            check_meshes(name, meshes, model.num_vertices, model.in_channels)
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"Expected positive '{name}' (got {value})")
    if not isinstance(seed, int):
        raise TypeError(f"Expected an integer 'seed' (got {seed!r})")
    refused = [name for name in OWN if name in trainer]
    if refused:
        raise TypeError(f"Expected other arguments of the trainer (got {refused}, which fit sets)")
    for block in blocks(train, BLOCK):
        warn_millimetres("training meshes", block)
        break

    if closed:
        meshes = train if isinstance(train, Tensor) else train.read(torch.arange(len(train)))
        model.autoencoder.fit(meshes.to(model.mean))
        model.summary = {"meshes": len(train), "seconds": _rounded(time.perf_counter() - start)}
    else:
        mean, std = _standardization(train, getattr(model.autoencoder, "standardized", True))
        before = {
            name: value.clone()
            for name, value in model.state_dict().items()
            if name in dict(model.named_buffers())
        }
        model.set_statistics(mean.to(model.mean), std.to(model.std))
        settings = {
            "template": digest({"template": model.template.numpy(force=True)})[:16],
            "model": describe(model.autoencoder),
            "epochs": epochs,
            "batch_size": batch_size,
            "seed": seed,
            "meshes": len(train),
            "statistics": digest({"mean": mean.numpy(), "std": std.numpy()})[:16],
            "precision": trainer.get("precision", "32-true"),
        }
        try:
            module = MeshTraining(model, optimizer, lr, loss, transform, settings, compile)
            start_mm = _fit_modes(model, train, val)
            start_state = copy.deepcopy(model.state_dict())
            with _folder(output) as folder:
                data = MeshData(train, val, batch_size, seed)
                best = _train(module, data, folder, epochs, callbacks, logger, resume, trainer)
        except BaseException:
            with torch.no_grad():
                for name, value in before.items():
                    model.get_buffer(name).copy_(value)
            raise
        if start_mm is not None and not best["val_mm"] < start_mm:
            model.load_state_dict(start_state)
            best["val_mm"] = start_mm
        model.summary = {
            "meshes": len(train),
            "epochs": epochs,
            "steps": best["steps"],
            "batch size": batch_size,
            "optimizer": module.settings["optimizer"],
            "learning rate": module.lr,
            "seed": seed,
            "validation error (mm)": _rounded(best["val_mm"]),
            "seconds": _rounded(time.perf_counter() - start),
            "torch": torch.__version__,
        }
    model.set_latent_statistics(train)
    return model.freeze() if freeze else model


def _fit_modes(
    model: MorphableModel, train: Tensor | MeshDataset, val: Tensor | MeshDataset
) -> float | None:
    # The validation error of the linear path alone, where there is one: the start of training.
    if not hasattr(model.autoencoder, "fit_modes"):
        return None
    model.autoencoder.fit_modes(
        lambda: (model.standardize(block.to(model.mean)) for block in blocks(train, BLOCK))
    )
    return model.evaluate(val)["mean"]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _train(
    module: MeshTraining,
    data: MeshData,
    folder: Path,
    epochs: int,
    callbacks: Sequence[pl.Callback],
    logger: Any,
    resume: bool,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    keep_freed_memory()
    last, best = folder / "last.ckpt", folder / "best.ckpt"
    resume = resume and last.exists()
    if resume:
        check_checkpoint(module, load_checkpoint(last))
    plugins = arguments.pop("plugins", None) or []
    plugins = [*plugins] if isinstance(plugins, list | tuple) else [plugins]
    arguments = {
        "accelerator": "auto",
        "devices": 1,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
        **arguments,
    }
    best_of = ModelCheckpoint(folder, "best", monitor="val_mm", enable_version_counter=False)
    bars = [_ProgressBar(refresh_rate=10, leave=True)] if _shows(arguments, callbacks) else []
    trainer = pl.Trainer(
        max_epochs=epochs,
        logger=CSVLogger(folder, name="log") if logger is None else logger,
        callbacks=[
            best_of,
            # Of the end of an epoch, not of the validation within it: resuming starts the next.
            ModelCheckpoint(
                folder, "last", save_on_train_epoch_end=True, enable_version_counter=False
            ),
            *bars,
            *callbacks,
        ],
        num_sanity_val_steps=0,
        plugins=[*plugins, _WholeCheckpoints()],
        **arguments,
    )
    # Only now that every argument is known to be good.
    if not resume and trainer.is_global_zero:
        for path in (last, best):
            path.unlink(missing_ok=True)
    with warnings.catch_warnings():
        # The meshes are on the device already; workers would only copy them.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        # Lightning's own use of torch.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer.fit(module, data, ckpt_path=last if resume else None, weights_only=True)
    checkpoint = load_checkpoint(best)
    module.load_state_dict(checkpoint["state_dict"])
    score = best_of.best_model_score
    return {"steps": trainer.global_step, "val_mm": float("nan") if score is None else score.item()}


def _shows(arguments: dict[str, Any], callbacks: Sequence[pl.Callback]) -> bool:
    own = any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks)
    return arguments.get("enable_progress_bar", True) and not own


def load_checkpoint(path: Path) -> dict[str, Any]:
    r"""Reads a checkpoint file. One that is damaged, also by a single bit, is a
    :class:`ValueError`."""
    try:
        # PyTorch does not look at the checksums of its archive.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"another checksum of {broken}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as e:  # torch raises many types, none of which names the file
        raise ValueError(f"Expected a whole checkpoint in {path} (got {e})") from e
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"Expected a training checkpoint in {path} (got something else)")
    return checkpoint


class _WholeCheckpoints(TorchCheckpointIO):
    # Written beside their target and renamed: a kill leaves the last whole one.
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        with replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


@contextmanager
def _folder(output: str | Path | None) -> Iterator[Path]:
    # The folder of a training, which no other training writes to meanwhile. The system releases
    # the lock of a process that is killed.
    if output is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("LOCAL_RANK", 0)) > 0 or int(os.environ.get("NODE_RANK", 0)) > 0:
        yield folder  # the first process of the training holds the lock
        return
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise ValueError(
            f"Expected a folder that no training writes to (got {folder}, where one is running)"
        ) from e
    try:
        yield folder
    finally:
        lock.release()
        (folder / ".lock").unlink(missing_ok=True)


def _split(meshes: Tensor | MeshDataset) -> tuple[Any, Any]:
    if isinstance(meshes, MeshDataset):
        parts = meshes.split()
        return meshes[parts.train], meshes[parts.val]
    (is_val,) = of_every(100, len(meshes), 10)
    if is_val.all():
        raise ValueError(f"Expected meshes for training and validation (got {len(meshes)})")
    return meshes[~is_val], meshes[is_val]


def _standardization(
    x: Tensor | MeshDataset, wanted: bool | Literal["uniform"]
) -> tuple[Tensor, Tensor]:
    # Mean and standard deviation of every feature in one pass, block by block (Chan, Golub &
    # LeVeque): squares are taken about the mean of their block, never of sums that nearly cancel.
    count, mean, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    largest = torch.tensor(0.0)
    for block in blocks(x, BLOCK):
        check_finite("training meshes", block, torch.arange(count, count + len(block)))
        num, block = len(block), block.double()
        center = block.mean(dim=0)
        away, total = center - mean, count + num
        squares = squares + ((block - center) ** 2).sum(dim=0) + away**2 * (count * num / total)
        mean = mean + away * (num / total)
        largest = torch.maximum(block.abs().amax(dim=0), largest.to(block))
        count = total
    std = (squares / count).sqrt()
    if wanted == "uniform":  # one for the coordinates of all vertices, one for each further feature
        variance = std.square().mean(dim=0)
        variance[:3] = variance[:3].mean()
        std = variance.sqrt().expand_as(std).clone()
    # Rounding alone makes the deviation of a still feature about 1e-7 of its value. It is divided
    # by one.
    std = std.masked_fill(std <= 1e-6 * largest.clamp(min=std.max()), 1.0)
    mean, std = mean.float().cpu(), std.float().cpu()
    return (mean, std) if wanted else (torch.zeros_like(mean), torch.ones_like(std))


def quiet_lightning() -> None:
    r"""Spares a script Lightning's lines on which devices there are and what else it sells."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


def keep_freed_memory() -> None:
    r"""Lets the C library keep what a training step frees, on Linux: the next step needs it again,
    and the system would clear every page of it first. What is free now is given back, lest one
    training after another adds the gaps that it left."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):  # that of GNU
        gc.collect()
        libc.malloc_trim(0)
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 25)


class _ProgressBar(TQDMProgressBar):
    # One line per epoch; validation takes a second or two and ends in its `val_mm`.
    def init_validation_tqdm(self) -> Any:
        bar = super().init_validation_tqdm()
        bar.disable = True
        return bar
