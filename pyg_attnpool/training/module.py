r"""One training step, validation and optimisers of a morphable model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import l1_loss
from torch.nn.parameter import Parameter

from pyg_attnpool.arguments import as_integer
from pyg_attnpool.metrics import vertex_distances
from pyg_attnpool.models import MorphableModel
from pyg_attnpool.models.autoencoder import is_variational
from pyg_attnpool.models.modal import ModalAutoencoder
from pyg_attnpool.training.folder import check_settings, plain
from pyg_attnpool.training.lightning import pl, torchmetrics
from pyg_attnpool.training.muon import Muon
from pyg_attnpool.training.process import seed_process

# The learning rates of the optimisers that have a name.
RATES = {"one_cycle": 3e-3, "muon": 1e-2, "sgd": 8e-3, "adam": 1e-3}

# Whose rates depend on the number of all steps.
ONE_CYCLE = ("one_cycle", "muon")

# What a function as optimizer makes, among the settings of a run: two functions may have one name,
# as `<lambda>`.
MADE = "made optimizer"

Optimizer = str | Callable[[Iterable[Parameter]], torch.optim.Optimizer]
Loss = Callable[[Tensor, Tensor], Tensor]


class MeshTraining(pl.LightningModule):
    r"""The training of a :class:`~pyg_attnpool.models.MorphableModel`: a loss on standardised
    features, and the validation error in millimetres.

    Args:
        model (MorphableModel): The model, with the statistics of its training meshes.
        optimizer (str or callable, optional): One of

            1. :obj:`"one_cycle"`: Adam with a one-cycle learning rate up to 3e-3, which gets most
            of the quality in few epochs

            2. :obj:`"muon"`: :class:`~pyg_attnpool.training.muon.Muon` with a one-cycle learning
            rate up to 1e-2, which trains fully connected layers in fewer steps

            3. :obj:`"sgd"`, published for spectral models: SGD with momentum 0.9, weight decay
            5e-4, learning rate 8e-3, times 0.99 per epoch

            4. :obj:`"adam"`, published for spiral models: Adam with weight decay 5e-5, learning
            rate 1e-3, times 0.99 per epoch

            or a callable that makes an optimizer from parameters. If :obj:`None`, the network's own
            attribute :obj:`optimizer`, or else :obj:`"one_cycle"`. (default: :obj:`None`)
        lr (float, optional): Another learning rate. (default: :obj:`None`)
        loss (callable, optional): Takes output and target :obj:`[B, N, C]`, standardised, to a
            scalar. If :obj:`None`, the network's own method :obj:`training_loss`, or else the L1
            loss. (default: :obj:`None`)
        transform (callable, optional): Augments a batch :obj:`[B, N, C]` in metres, in training
            alone. (default: :obj:`None`)
        settings (dict, optional): Further settings of a run; stored in every checkpoint, and one of
            other settings is refused. (default: :obj:`None`)
        seed (int, optional): Seed of random augmentation, with the epoch and the number of the
            process. (default: :obj:`0`)
        compile (bool, optional): Whether :func:`torch.compile` takes the forward and backward pass,
            on a GPU into CUDA graphs. If :obj:`None`, it does on a GPU: there a step is bound by
            the launches of its kernels, while on a CPU the layers' own operations are the faster
            ones. (default: :obj:`None`)

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from pyg_attnpool.training import MeshData, MeshTraining
        >>> module = MeshTraining(MorphableModel.coma(hierarchy, channels=(8, 8)))
        >>> trainer = Trainer(max_epochs=300)
        >>> trainer.fit(module, MeshData(meshes[:16], meshes[16:]))  # doctest: +SKIP
    """

    steps: Tensor

    def __init__(
        self,
        model: MorphableModel,
        optimizer: Optimizer | None = None,
        lr: float | None = None,
        loss: Loss | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        settings: dict[str, Any] | None = None,
        seed: int = 0,
        compile: bool | None = None,
    ):
        super().__init__()
        if optimizer is None:
            optimizer = getattr(model.autoencoder, "optimizer", "one_cycle")
        if not callable(optimizer) and optimizer not in list(RATES):
            raise ValueError(
                f"Expected 'optimizer' to be one of {list(RATES)} or a callable (got {optimizer!r})"
            )
        if callable(optimizer) and lr is not None:
            raise ValueError(f"Expected no 'lr' beside an optimizer of your own (got {lr})")
        if lr is not None and (isinstance(lr, bool) or not isinstance(lr, int | float)):
            raise TypeError(f"Expected a number as 'lr' (got {lr!r})")
        if lr is not None and not 0 < lr < math.inf:
            raise ValueError(f"Expected a positive 'lr' (got {lr})")
        for name, function in (("loss", loss), ("transform", transform)):
            if function is not None and not callable(function):
                raise TypeError(f"Expected '{name}' to be callable (got {function!r})")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f"Expected a network with parameters to train (got "
                f"{type(model.autoencoder).__name__} without)"
            )
        seed = as_integer("seed", seed, least=0)
        self.model = model
        self.optimizer = optimizer
        self.lr = lr
        if isinstance(optimizer, str) and lr is None:
            self.lr = RATES[optimizer]
        own: Loss = getattr(model.autoencoder, "training_loss", l1_loss)
        self.loss_function = own if loss is None else loss
        self.transform = transform
        self.settings = {
            "optimizer": plain(optimizer),
            MADE: None if isinstance(optimizer, str) else _described(self._made(optimizer)),
            "lr": self.lr,
            "loss": plain(self.loss_function),
            "transform": plain(transform),
            "seed": seed,
            **(settings or {}),
        }
        self.data: dict[str, Any] = {}
        r"""Hashes and statistics of the data, stored in every checkpoint."""
        self.seed = seed
        # A tensor, which a compiled step does not take for a constant.
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.val_error = torchmetrics.MeanMetric(nan_strategy="disable")
        self.compile_step = compile
        self.compiled_loss: Callable[[Tensor], Tensor] | None = None

    def _made(self, optimizer: Callable[..., Any]) -> torch.optim.Optimizer:
        made = optimizer(self.parameters())
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(
                f"Expected 'optimizer' to make an optimizer (got {type(made).__name__})"
            )
        own = {id(parameter) for parameter in self.parameters()}
        held = [id(p) for group in made.param_groups for p in group["params"]]
        if not held or not own.issuperset(held):
            raise ValueError(
                f"Expected 'optimizer' to hold parameters of the model (got "
                f"{sum(p not in own for p in held)} others of {len(held)})"
            )
        return made

    def loss(self, x: Tensor) -> Tensor:
        r"""The loss of meshes :obj:`[B, N, C]` in metres."""
        target, network = self.model.standardize(x), self.model.autoencoder
        if isinstance(network, ModalAutoencoder) or is_variational(network):
            loss = network.objective(target, self.loss_function, self.steps)
        else:
            # A network of a user's own may have nothing but `encode` and `decode`.
            whole = type(network).forward is not torch.nn.Module.forward
            out = network(target) if whole else network.decode(network.encode(target))
            loss = self.loss_function(out, target)
        if not isinstance(loss, Tensor) or loss.dim() > 0 or not loss.requires_grad:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"Expected 'loss' to give a scalar with a gradient (got {got})")
        return loss

    def _transformed(self, x: Tensor) -> Tensor:
        assert self.transform is not None
        out = self.transform(x)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"Expected 'transform' to keep the shape {list(x.shape)} (got {got})")
        if not out.is_floating_point():
            raise TypeError(
                f"Expected 'transform' to give floating point numbers (got {out.dtype})"
            )
        return out.to(x)

    def on_train_start(self) -> None:
        r"""Compiles the loss where that was asked for."""
        gpu = self.device.type == "cuda"
        if gpu if self.compile_step is None else self.compile_step:
            self.compiled_loss = torch.compile(
                self.loss, mode="reduce-overhead" if gpu else None, dynamic=False
            )

    def training_step(self, x: Tensor, step: int) -> Tensor:
        r"""The loss of a batch :obj:`[B, N, C]` in metres, after augmentation."""
        if self.transform is not None:
            x = self._transformed(x)
        self.steps.fill_(self.global_step)
        if self.compiled_loss is None:
            loss = self.loss(x)
        else:
            torch.compiler.cudagraph_mark_step_begin()
            loss = self.compiled_loss(x).clone()  # the next replay writes over it
        # On a GPU every look at the loss waits for it: there the validation error has to tell.
        if loss.device.type == "cpu":
            self._check_finite("loss", loss)
        several = self.trainer.world_size > 1
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=several)
        return loss

    def _check_finite(self, name: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise ValueError(
                f"Expected a finite {name} (got {value.item()} at step {self.global_step}): lower "
                f"the learning rate {self.lr}, or check the meshes"
            )

    def validation_step(self, x: Tensor, step: int) -> None:
        r"""Adds the errors of a batch :obj:`[B, N, C]` in metres."""
        if len(x) == 0:  # the piece of a process where others have the last meshes
            return
        # Processes exchange sum and number, not the distances. One value a mesh: torchmetrics
        # ignores weights where it does not look for NaN.
        self.val_error.update(vertex_distances(self.model(x), x).mean(dim=1))

    def on_validation_epoch_end(self) -> None:
        r"""Logs the mean error of all validation meshes in millimetres, :obj:`val_mm`."""
        error = self.val_error.compute()
        self.val_error.reset()
        self._check_finite("validation error", error)
        self.log("val_mm", error, prog_bar=True)

    def configure_optimizers(self) -> Any:
        r"""The optimizer, and the schedule of its learning rate."""
        if not isinstance(self.optimizer, str):
            return self._made(self.optimizer)
        parameters, lr = self.parameters(), RATES[self.optimizer] if self.lr is None else self.lr
        optimizer: torch.optim.Optimizer
        if self.optimizer in ONE_CYCLE:
            if self.optimizer == "muon":
                optimizer = Muon(self.model, lr, RATES["one_cycle"])
            else:
                optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
            steps = int(self.trainer.estimated_stepping_batches)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                [group["lr"] for group in optimizer.param_groups],
                total_steps=steps,
                cycle_momentum=self.optimizer == "one_cycle",
            )
            schedule = {"scheduler": scheduler, "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                parameters, lr=lr, momentum=0.9, weight_decay=5e-4, fused=True
            )
        else:
            optimizer = torch.optim.Adam(parameters, lr=lr, weight_decay=5e-5, fused=True)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
        return {"optimizer": optimizer, "lr_scheduler": decay}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        r"""Adds the settings of the run and what its data are."""
        checkpoint["settings"], checkpoint["data"] = self.settings, self.data

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        r"""Refuses a checkpoint of another run, as :meth:`check_checkpoint` does."""
        self.check_checkpoint(checkpoint)

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        r"""Raises a :class:`ValueError` if a checkpoint is of another run, and names the first
        setting that differs. More epochs may follow where the learning rate does not depend on
        their number."""
        longer = self.optimizer not in ONE_CYCLE
        settings = dict(self.settings)
        if MADE not in (checkpoint.get("settings") or {}):
            del settings[MADE]  # earlier ones have the name of a function alone
        check_settings(checkpoint, settings, self.state_dict(), longer)

    def on_train_epoch_start(self) -> None:
        r"""Seeds augmentation by seed, epoch and process."""
        # A resumed run augments as one that was never interrupted, and each process on its own.
        seed_process(self.seed, self.current_epoch, self.global_rank)


def _described(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    groups = [
        {name: plain(value) for name, value in group.items() if not name.startswith("param")}
        for group in optimizer.param_groups
    ]
    further = {f"group {i}": group for i, group in enumerate(groups[1:], start=1)}
    return {"class": plain(type(optimizer)), **groups[0], **further}
