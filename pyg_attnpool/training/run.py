r"""Lightning's trainer, from its arguments to the best weights."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.profilers import Profiler
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from pyg_attnpool.training.data import MeshData
from pyg_attnpool.training.folder import BEST, LAST, load_checkpoint, plain, save_checkpoint
from pyg_attnpool.training.lightning import pl
from pyg_attnpool.training.module import MeshTraining
from pyg_attnpool.training.process import keep_freed_memory

# What `fit` tells the trainer itself.
OWN = (
    "max_epochs",
    "enable_checkpointing",
    "num_sanity_val_steps",
    "default_root_dir",
    "fast_dev_run",
    "barebones",
)

# Arguments of the trainer that it takes without a look, by what they have to be.
FLAGS = (
    *("benchmark", "deterministic", "detect_anomaly", "enable_model_summary"),
    *("enable_progress_bar", "inference_mode", "sync_batchnorm", "use_distributed_sampler"),
)
COUNTS = {  # and the least that they may be
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "max_steps": 1,
    "min_epochs": 0,
    "min_steps": 0,
    "reload_dataloaders_every_n_epochs": 0,
}
PARTS = ("limit_train_batches", "limit_val_batches", "val_check_interval", "overfit_batches")
NUMBERS = (*PARTS, "gradient_clip_val")

# What the result depends on, beside what `fit` tells it.
SCHEDULE = (
    "precision",
    "max_steps",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "check_val_every_n_epoch",
    "val_check_interval",
)


def make_trainer(
    folder: Path,
    epochs: int,
    batches: tuple[int, int],
    callbacks: Sequence[pl.Callback],
    logger: Any,
    arguments: dict[str, Any],
) -> pl.Trainer:
    r"""The trainer of a run, when every argument is known to be good; nothing is written yet.

    Args:
        folder (Path): The folder of checkpoints and of the log.
        epochs (int): The number of epochs.
        batches (tuple): The numbers of batches, of training and of validation.
        callbacks (list): Callbacks beside those of checkpoints and the progress bar.
        logger (optional): A logger of Lightning. If :obj:`None`, a CSV file.
        arguments (dict): Other arguments of :class:`pytorch_lightning.Trainer`.

    Raises:
        TypeError: If an argument is unknown or of a wrong type.
        ValueError: If arguments do not fit each other, or leave an epoch without validation.
    """
    if not isinstance(callbacks, list | tuple) or not all(
        isinstance(callback, pl.Callback) for callback in callbacks
    ):
        raise TypeError(f"Expected 'callbacks' to be a list of Lightning's (got {callbacks!r})")
    loggers = logger if isinstance(logger, list | tuple) else [logger]
    if not all(one is None or isinstance(one, bool | Logger) for one in loggers):
        raise TypeError(f"Expected 'logger' to be one of Lightning's (got {logger!r})")
    refused = [name for name in OWN if name in arguments]
    if refused:
        raise TypeError(f"Expected other arguments of the trainer (got {refused}, which fit sets)")
    _check(arguments)
    plugins = arguments.get("plugins") or []
    plugins = [*plugins] if isinstance(plugins, list | tuple) else [plugins]
    arguments = {
        "accelerator": "auto",
        "devices": 1,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
        # A program without a console has no stream to show it on.
        "enable_progress_bar": sys.stdout is not None,
        **arguments,
        "plugins": [*plugins, _Checkpoints(folder)],
    }
    bars = [_ProgressBar(refresh_rate=10, leave=True)] if _shows(arguments, callbacks) else []
    try:
        trainer = pl.Trainer(
            max_epochs=epochs,
            logger=CSVLogger(folder, name="log") if logger is None else logger,
            callbacks=[
                _Newest(folder, Path(BEST).stem, monitor="val_mm", enable_version_counter=False),
                # Of the end of an epoch, not of a validation within it: resuming starts the next.
                _Newest(
                    folder,
                    Path(LAST).stem,
                    save_on_train_epoch_end=True,
                    enable_version_counter=False,
                ),
                *bars,
                *callbacks,
            ],
            num_sanity_val_steps=0,
            default_root_dir=folder,
            **arguments,
        )
    except (TypeError, AttributeError) as e:
        raise TypeError(f"Expected arguments that Lightning's trainer takes (got: {e})") from e
    except (MisconfigurationException, ValueError, RuntimeError) as e:
        raise ValueError(f"Expected arguments that Lightning's trainer takes (got: {e})") from e
    every = trainer.check_val_every_n_epoch or 1
    if every > epochs:
        raise ValueError(
            f"Expected a validation within {epochs} epochs (got check_val_every_n_epoch={every})"
        )
    for name, num in zip(("limit_train_batches", "limit_val_batches"), batches, strict=True):
        limit, num = getattr(trainer, name), -(-num // trainer.world_size)
        if (num * limit if isinstance(limit, float) else limit) < 1:
            raise ValueError(
                f"Expected a batch to train on and one to validate (got {name}={limit} of {num})"
            )
    return trainer


def _check(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if value is None or (name == "max_steps" and value == -1):  # as many as there are
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and abs(value) >= 2**32 and value != math.inf:
            raise ValueError(f"Expected '{name}' below 2**32 (got a larger one)")
        if name in FLAGS and not isinstance(value, bool):
            if name != "deterministic" or value != "warn":
                raise TypeError(f"Expected '{name}' to be True or False (got {value!r})")
        if name in COUNTS and (isinstance(value, float) or not number):
            raise TypeError(f"Expected an integer '{name}' (got {value!r})")
        if name in COUNTS and value < COUNTS[name]:
            raise ValueError(f"Expected '{name}' of at least {COUNTS[name]} (got {value})")
        if name == "val_check_interval" and value and isinstance(value, str | timedelta | dict):
            continue  # a time
        if name in NUMBERS and not number:
            raise TypeError(f"Expected a number as '{name}' (got {value!r})")
        if name == "gradient_clip_val" and not 0 <= value < math.inf:
            raise ValueError(f"Expected a finite '{name}' of 0 or more (got {value})")
        if name in PARTS and not (0 <= value <= 1 if isinstance(value, float) else 0 <= value):
            raise ValueError(
                f"Expected '{name}' to be a number of batches, or a fraction of them up to 1.0 "
                f"(got {value})"
            )
        if name == "val_check_interval" and value == 0:
            raise ValueError(f"Expected a positive '{name}' (got {value})")
        if name == "profiler" and not isinstance(value, str | Profiler):
            raise TypeError(f"Expected '{name}' to be one of Lightning's (got {value!r})")


def schedule(trainer: pl.Trainer) -> dict[str, Any]:
    r"""The settings of a trainer which the result depends on."""
    found = {name: plain(getattr(trainer, name)) for name in SCHEDULE}
    return {**found, "processes": trainer.world_size}


def run(
    trainer: pl.Trainer, module: MeshTraining, data: MeshData, resume: bool
) -> tuple[dict[str, Any], float]:
    r"""Trains, from :obj:`last.ckpt` on if :obj:`resume`.

    Returns:
        The best checkpoint, and its validation error in millimetres.

    Raises:
        ValueError: If the loss is no longer finite, or no epoch was validated.
    """
    files, best_of = trainer.strategy.checkpoint_io, trainer.checkpoint_callback
    assert isinstance(files, _Checkpoints) and isinstance(best_of, ModelCheckpoint)
    files.has_best = resume
    keep_freed_memory()
    try:
        with _interruptible(trainer), warnings.catch_warnings():
            # The meshes are on the device already; workers would only copy them.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
            # Lightning's own use of torch.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            last = files.folder / LAST if resume else None
            trainer.fit(module, data, ckpt_path=last, weights_only=True)
        if not best_of.best_model_path:
            raise ValueError(
                f"Expected a validated epoch (got none in {trainer.global_step} steps): train for "
                f"longer"
            )
    except BaseException:
        if not best_of.best_model_path and isinstance(trainer.logger, CSVLogger):
            # A run without a single epoch leaves no trace.
            log = Path(trainer.logger.log_dir)
            shutil.rmtree(log, ignore_errors=True)
            with suppress(OSError):
                log.parent.rmdir()
        raise
    best = load_checkpoint(files.folder / BEST) if trainer.is_global_zero else {}
    best = trainer.strategy.broadcast(best)  # the other processes may not see the folder
    return best, best["callbacks"][best_of.state_key]["best_model_score"].item()


@contextmanager
def _interruptible(trainer: pl.Trainer) -> Iterator[None]:
    # Ctrl-C stays an interrupt: Lightning ends the process and has it ignore the next.
    here = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if here else None
    try:
        yield
    except SystemExit as e:
        if trainer.state.status == TrainerStatus.INTERRUPTED:
            raise KeyboardInterrupt from e
        raise
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


class _Checkpoints(TorchCheckpointIO):
    # Older checkpoints of the folder stay until the first epoch of this run is validated, whatever
    # ends the run before. From then on there is a best one wherever there is a last one.
    def __init__(self, folder: Path):
        super().__init__()
        self.folder = Path(os.path.realpath(folder))
        self.has_best = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        path, last = Path(path), self.folder / LAST
        if path == last and not self.has_best:
            return
        if path != self.folder / BEST or self.has_best:
            save_checkpoint(checkpoint, path)
            return
        save_checkpoint(checkpoint, path, lambda: last.unlink(missing_ok=True))
        self.has_best = True

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return load_checkpoint(path)


class _Newest(ModelCheckpoint):
    # Goes on where the folder has moved, too: Lightning would forget the best score.
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.dirpath is not None

        def here(path: str) -> str:
            return str(Path(self.dirpath or "") / Path(path).name) if path else path

        paths = {name: here(state_dict[name]) for name in state_dict if name.endswith("_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        moved = {**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath}
        super().load_state_dict(moved)


def _shows(arguments: dict[str, Any], callbacks: Sequence[pl.Callback]) -> bool:
    own = any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks)
    return arguments["enable_progress_bar"] and not own


class _ProgressBar(TQDMProgressBar):
    # One line per epoch; validation takes a second or two and ends in its `val_mm`.
    def init_validation_tqdm(self) -> Any:
        bar = super().init_validation_tqdm()
        bar.disable = True
        return bar
