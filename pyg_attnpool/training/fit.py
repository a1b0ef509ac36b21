r"""Fitting a morphable model, from its arguments to the best weights."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyg_attnpool.arguments import as_integer
from pyg_attnpool.datasets.inputs import as_meshes, blocks, check_meshes
from pyg_attnpool.datasets.mesh_dataset import MeshDataset
from pyg_attnpool.datasets.splits import of_every
from pyg_attnpool.files import digest
from pyg_attnpool.mesh.io import properties
from pyg_attnpool.models import MorphableModel
from pyg_attnpool.models.autoencoder import divergence, is_variational
from pyg_attnpool.training.folder import LAST, architecture, check_data, load_last, locked
from pyg_attnpool.training.process import seed_process
from pyg_attnpool.training.statistics import BLOCK, statistics
from pyg_attnpool.units import one_warning, warn_millimetres

if TYPE_CHECKING:
    from pyg_attnpool.training.lightning import pl
    from pyg_attnpool.training.module import Loss, Optimizer

COLLAPSED = 0.01  # nats, of a channel that tells nothing of a mesh


@one_warning()
def fit(
    model: MorphableModel,
    train: Any,
    val: Any = None,
    *,
    output: str | Path | None = None,
    epochs: int = 30,
    batch_size: int = 16,
    optimizer: Optimizer | None = None,
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
    mean and standard deviation, in metres, latent statistics and the names of features of the
    training meshes. A training that fails leaves the model, and the checkpoints of an earlier run,
    as they were.

    A network with a method :obj:`fit` of its own, such as :class:`~pyg_attnpool.models.PCA`, is
    fitted by that to all training meshes; the arguments of a trainer do not matter to it, and
    Lightning need not be installed. One with a method :obj:`fit_modes`, such as
    :class:`~pyg_attnpool.models.modal.ModalAutoencoder`, has its linear path fitted first, and
    stays at this start if no epoch is better on the validation meshes.

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
            :class:`~pyg_attnpool.training.MeshTraining`. (default: :obj:`None`)
        lr (float, optional): Another learning rate. (default: :obj:`None`)
        loss (callable, optional): Takes output and target :obj:`[B, N, C]`, standardised, to a
            scalar. If :obj:`None`, the network's own method :obj:`training_loss`, or else the L1
            loss. (default: :obj:`None`)
        transform (callable, optional): Augments a batch :obj:`[B, N, C]` in metres, such as
            :func:`~pyg_attnpool.training.rigid_motion`. Its draws from the global generators of
            Python, NumPy or PyTorch depend on seed, epoch and process alone.
            (default: :obj:`None`)
        callbacks (list, optional): Callbacks of Lightning beside those of :func:`fit`.
            (default: :obj:`()`)
        logger (optional): A logger of Lightning. If :obj:`None`, a CSV file.
            (default: :obj:`None`)
        seed (int, optional): Seed of the order of the meshes and of augmentation.
            (default: :obj:`0`)
        resume (bool, optional): Go on from :obj:`last.ckpt` where there is one, to the result of
            a run that was never interrupted. The model, the meshes and all other arguments must be
            the same, but for more epochs where the schedule allows. (default: :obj:`False`)
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
        ImportError: If a network is to be trained and the extra :obj:`train` is missing.
        TypeError: If an argument is of a wrong type or unknown to the trainer.
        ValueError: If meshes do not fit the model, a checkpoint is damaged or of another run,
            another training writes to the folder, or the loss is no longer finite.

    Example:
        >>> import numpy as np
        >>> from pyg_attnpool.models import MorphableModel
        >>> template = np.eye(4, 3), np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
        >>> meshes = torch.randn(20, 4, 3)
        >>> model = fit(MorphableModel.pca(template, latent_channels=2), meshes)
        >>> model.summary["meshes"]
        20
    """
    begin = time.perf_counter()
    if not isinstance(model, MorphableModel):
        raise TypeError(f"Expected a MorphableModel to fit (got {type(model).__name__})")
    if output is not None and (not isinstance(output, str | Path) or str(output) == ""):
        raise TypeError(f"Expected a folder as 'output' (got {output!r})")
    for name, value in (("resume", resume), ("freeze", freeze), ("compile", compile)):
        if not isinstance(value, bool) and not (name == "compile" and value is None):
            raise TypeError(f"Expected '{name}' to be True or False (got {value!r})")
    epochs, seed = as_integer("epochs", epochs, least=1), as_integer("seed", seed, least=0)
    batch_size = as_integer("batch_size", batch_size, least=1)
    fits_itself = hasattr(model.autoencoder, "fit")
    train, val = _prepared(model, train, val, split=not fits_itself)
    features = _features(model, train, val)
    if fits_itself:
        with _as_it_was_on_errors(model):
            _set_statistics(model, *statistics("training meshes", train))
            meshes = train if isinstance(train, Tensor) else train.read(torch.arange(len(train)))
            model.autoencoder.fit(model.standardize(meshes.to(model.mean)))
            model.set_latent_statistics(train)
        model.features = features
        model.summary = {"meshes": len(train), "seconds": _rounded(time.perf_counter() - begin)}
        return model.freeze() if freeze else model

    most = min(len(train), model.mean.numel()) - 1
    if hasattr(model.autoencoder, "fit_modes") and model.latent_channels > most:
        raise ValueError(
            f"Expected at most {most} latent channels, fewer than training meshes and features "
            f"(got {model.latent_channels})"
        )
    from pyg_attnpool.training.data import MeshData
    from pyg_attnpool.training.lightning import pl
    from pyg_attnpool.training.module import MeshTraining
    from pyg_attnpool.training.run import make_trainer, run, schedule

    settings = {
        "model": architecture(model.autoencoder),
        "epochs": epochs,
        "batch_size": batch_size,
        "meshes": {"training": len(train), "validation": len(val)},
    }
    module = MeshTraining(model, optimizer, lr, loss, transform, settings, seed, compile)
    data = MeshData(train, val, batch_size, seed)
    with tempfile.TemporaryDirectory() as temporary, pl.utilities.seed.isolate_rng():
        folder = Path(temporary if output is None else output)
        batches = -(-len(train) // batch_size), -(-len(val) // batch_size)
        lightning = make_trainer(folder, epochs, batches, callbacks, logger, trainer)
        module.settings.update(schedule(lightning))
        # Every argument is known to be good. The first process of a training holds its lock.
        first = lightning.is_global_zero
        with locked(folder) if first else nullcontext(), _as_it_was_on_errors(model):
            resume = resume and (folder / LAST).exists()
            last = load_last(folder, module.check_checkpoint) if resume else None
            seed_process(seed)  # for data sets whose `transform` is random
            module.data = _describe(model, train, val)
            if last is not None:
                check_data(last, module.data)
            mean_and_std = module.data["training meshes"]
            _set_statistics(model, mean_and_std["mean"], mean_and_std["std"])
            start = _fit_modes(model, train, val)
            best, val_mm = run(lightning, module, data, resume)
            module.load_state_dict(best["state_dict"])
            if start is not None and not val_mm < start[0]:
                val_mm = start[0]
                model.load_state_dict(start[1])
            model.set_latent_statistics(train)
    model.features = features
    model.summary = {
        **_told(model, train),
        "meshes": len(train),
        "epochs": epochs,
        "steps": lightning.global_step,
        "batch size": batch_size,
        "optimizer": module.settings["optimizer"],
        "learning rate": module.lr,
        "seed": seed,
        "validation error (mm)": _rounded(val_mm),
        "seconds": _rounded(time.perf_counter() - begin),
        "torch": torch.__version__,
    }
    return model.freeze() if freeze else model


def epochs_for(steps: int, num_meshes: int, batch_size: int = 16) -> int:
    r"""The fewest whole epochs that have a number of steps, or a few more, for :meth:`fit`.

    Args:
        steps (int): The number of steps.
        num_meshes (int): The number of training meshes.
        batch_size (int, optional): Meshes per step. (default: :obj:`16`)

    Raises:
        ValueError: If one of them is not positive.

    Example:
        >>> from pyg_attnpool.training import epochs_for
        >>> epochs_for(100, num_meshes=500)  # an epoch has 32 steps
        4
    """
    if min(steps, num_meshes, batch_size) < 1:
        raise ValueError(
            f"Expected positive numbers of steps, meshes and meshes per step (got {steps}, "
            f"{num_meshes} and {batch_size})"
        )
    return -(-steps // -(-num_meshes // batch_size))


def _prepared(model: MorphableModel, train: Any, val: Any, split: bool) -> tuple[Any, Any]:
    # Meshes that fit the model, as a tensor or a data set; without validation meshes, split.
    train, val = as_meshes(train), None if val is None else as_meshes(val)
    if val is None and split:
        check_meshes("training meshes", train, model.num_vertices, model.in_channels)
        train, val = _split(train)
    for name, meshes in (("training meshes", train), ("validation meshes", val)):
        if meshes is not None:
            check_meshes(name, meshes, model.num_vertices, model.in_channels)
            warn_millimetres(name, next(blocks(meshes, BLOCK)))
    return train, val


def _split(meshes: Tensor | MeshDataset) -> tuple[Any, Any]:
    if isinstance(meshes, MeshDataset):
        parts = meshes.split()
        return meshes[parts.train], meshes[parts.val]
    (is_val,) = of_every(100, len(meshes), 10)
    if is_val.all():
        raise ValueError(f"Expected meshes for training and validation (got {len(meshes)})")
    return meshes[~is_val], meshes[is_val]


def _features(model: MorphableModel, train: Any, val: Any) -> tuple[str, ...]:
    # The names of features beyond coordinates. A `transform` that makes others has none for them.
    names = [
        meshes.features
        for meshes in (train, val)
        if isinstance(meshes, MeshDataset)
        and len(properties(meshes.features)) == model.in_channels - 3
    ]
    if len(set(names)) > 1:
        raise ValueError(
            f"Expected validation meshes of the features {list(names[0])} as training meshes have "
            f"(got {list(names[1])})"
        )
    return names[0] if names else model.features


def _describe(model: MorphableModel, train: Any, val: Any) -> dict[str, Any]:
    # What a run is about beside its settings; the statistics check that all meshes are finite.
    template = {"vertices": model.template, "faces": model.faces}
    found: dict[str, Any] = {
        "template": digest({name: x.numpy(force=True) for name, x in template.items()})[:16],
        "hierarchy": None if model.hierarchy is None else model.hierarchy.hash[:16],
    }
    for name, meshes in (("training meshes", train), ("validation meshes", val)):
        mean, std = statistics(name, meshes)
        found[name] = {"mean": mean, "std": std}
    return found


def _set_statistics(model: MorphableModel, mean: Tensor, std: Tensor) -> None:
    wanted = getattr(model.autoencoder, "standardized", True)
    # One for the coordinates of all vertices, one for each other feature.
    variance = std.double().square().mean(dim=0)
    variance[:3] = variance[:3].mean()
    if not wanted:  # coordinates in metres, and other features such that they vary as much
        mean, std = torch.zeros_like(mean), (variance / variance[0]).sqrt().expand_as(std).to(std)
    elif wanted == "uniform":
        std = variance.sqrt().expand_as(std).to(std)
    model.set_statistics(mean.to(model.mean), std.to(model.std))


def _fit_modes(model: MorphableModel, train: Any, val: Any) -> tuple[float, dict] | None:
    # The start of training where there is a linear path: its validation error, and the state.
    if not hasattr(model.autoencoder, "fit_modes"):
        return None
    model.autoencoder.fit_modes(
        lambda: (model.standardize(block.to(model.mean)) for block in blocks(train, BLOCK))
    )
    return model.evaluate(val)["mean"], copy.deepcopy(model.state_dict())


@contextmanager
def _as_it_was_on_errors(model: MorphableModel) -> Iterator[None]:
    # A training that fails leaves the model with the weights and statistics that it had.
    state, training = copy.deepcopy(model.state_dict()), model.training
    try:
        yield
    except BaseException:
        model.load_state_dict(state)
        model.train(training)
        raise


@torch.no_grad()
def _told(model: MorphableModel, meshes: Any) -> dict[str, Any]:
    # How much the codes of a variational network tell, and which channels tell nothing.
    network = model.autoencoder
    if not is_variational(network):
        return {}
    total = torch.zeros(model.latent_channels, dtype=torch.double)
    for block in blocks(meshes, BLOCK):
        x = model.standardize(block.to(model.mean))
        total += divergence(*network.posterior(x)).sum(dim=0).double().cpu()
    told = (total / len(meshes)).tolist()
    collapsed = sum(nats < COLLAPSED for nats in told)
    if collapsed:
        warnings.warn(
            f"{collapsed} of {len(told)} latent channels have collapsed: their codes are those of "
            f"the prior, whatever the mesh. A smaller kl_weight, a longer kl_warmup or free_bits "
            f"help",
            stacklevel=3,
        )
    return {
        "KL of latent channels (nats)": [_rounded(nats) for nats in told],
        "collapsed latent channels": collapsed,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
