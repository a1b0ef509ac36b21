r"""The models that are compared, and how each of them is trained."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from benchmarks.peers.networks import MLP, LSAConv, TokenMixer, VCConv, identity_expression_pca
from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.models import PCA, coma, modal, neural3dmm
from pyg_attnpool.training import epochs_for

BATCH_SIZE = 16
VALIDATIONS = 20  # of a run at least: a few meshes have hundreds of epochs


class Peer(NamedTuple):
    r"""How a network is made of hierarchy and latent size, and trained."""

    build: Callable[[MeshHierarchy, int], Module]
    trained: bool = True
    r"""Whether it is trained in steps, or else in closed form."""
    millimetres: bool = True
    r"""Whether the loss is the mean distance, or else the L1 loss of standardised coordinates."""

    optimizer: str | None = None
    r"""As in :meth:`MorphableModel.fit`: by default the network's own, or Adam."""
    rate_of: str | None = None
    r"""The peer of which this is one without a part, and whose rate it takes."""


def _pca(hierarchy: MeshHierarchy, latent: int) -> Module:
    return PCA.empty(hierarchy.num_vertices[0], latent)


def _neural3dmm(conv: Any = "spiral", pool: str = "qem", **kwargs: Any) -> Callable:
    def build(hierarchy: MeshHierarchy, latent: int) -> Module:
        return neural3dmm(hierarchy, pool, latent, conv=conv, **kwargs)

    return build


IDENTITY_EXPRESSION = "PCA of identity and of expression"

PEERS = {
    "PCA": Peer(_pca, False),
    IDENTITY_EXPRESSION: Peer(_pca, False),
    "MLP": Peer(MLP),
    "token mixer": Peer(TokenMixer),
    "MLP, Muon": Peer(MLP, optimizer="muon"),
    "token mixer, Muon": Peer(TokenMixer, optimizer="muon"),
    "SpiralNet++": Peer(_neural3dmm(conv_kwargs={"length": 9})),
    "LSA-Conv": Peer(_neural3dmm(LSAConv, conv_kwargs={}, out_bias=True)),
    "VC-Conv": Peer(_neural3dmm(VCConv, conv_kwargs={}, out_bias=True)),
    "CoMA, QEM": Peer(lambda h, n: coma(h, "qem", n), millimetres=False),
    "CoMA, attention": Peer(lambda h, n: coma(h, "attention", n), millimetres=False),
    "Neural3DMM, QEM": Peer(_neural3dmm(), millimetres=False),
    "Neural3DMM, attention": Peer(_neural3dmm(pool="attention"), millimetres=False),
    "modal": Peer(lambda h, n: modal(h, latent_channels=n)),
    "modal, QEM": Peer(lambda h, n: modal(h, "qem", n)),
    "modal, Adam": Peer(lambda h, n: modal(h, latent_channels=n), optimizer="one_cycle"),
    "modal, guessed codes": Peer(
        lambda h, n: modal(h, latent_channels=n, refinements=0), rate_of="modal"
    ),
    "modal, modes of all vertices": Peer(lambda h, n: modal(h, "qem", n, level=0), rate_of="modal"),
    "modal, level 2": Peer(lambda h, n: modal(h, latent_channels=n, level=2), rate_of="modal"),
    "modal, level 2, QEM": Peer(lambda h, n: modal(h, "qem", n, level=2), rate_of="modal"),
    "modal, no further modes": Peer(
        lambda h, n: modal(h, "qem", n, modes=0, level=0), rate_of="modal"
    ),
}


def steps_of(num_meshes: int, steps: int) -> tuple[int, int]:
    r"""The whole epochs in which there are at least so many steps, and their steps. Where not every
    epoch is validated, the last one is."""
    epochs = epochs_for(steps, num_meshes, BATCH_SIZE)
    if epochs >= 2 * VALIDATIONS:
        epochs = VALIDATIONS * -(-epochs // VALIDATIONS)
    return epochs, epochs * -(-num_meshes // BATCH_SIZE)


def train_peer(
    peer: Peer,
    hierarchy: MeshHierarchy,
    latent: int,
    train: Tensor,
    val: Tensor,
    epochs: int,
    lr: float,
    seed: int,
    **trainer: Any,
) -> MorphableModel:
    r"""A peer with the weights of its best validated epoch.

    Args:
        peer (Peer): One of :obj:`PEERS` that is trained.
        hierarchy (MeshHierarchy): The levels of the template.
        latent (int): Size of the latent code.
        train (torch.Tensor): Training meshes :obj:`[M, N, 3]`.
        val (torch.Tensor): Validation meshes.
        epochs (int): The number of epochs.
        lr (float): The highest rate of the one-cycle schedule.
        seed (int): Seed of weights and of the order of meshes.
        **trainer (optional): Further arguments of :meth:`MorphableModel.fit`.
    """
    torch.manual_seed(seed)
    model = MorphableModel(peer.build(hierarchy, latent), hierarchy)

    def distance_loss(out: Tensor, x: Tensor) -> Tensor:
        return ((out - x) * model.std).norm(dim=-1).mean()

    own = hasattr(model.autoencoder, "training_loss")
    return model.fit(
        train,
        val,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        optimizer=peer.optimizer,
        lr=lr,
        loss=distance_loss if peer.millimetres and not own else None,
        seed=seed,
        check_val_every_n_epoch=max(1, epochs // VALIDATIONS),
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        **trainer,
    )


def linear_peer(
    name: str,
    hierarchy: MeshHierarchy,
    latent: int,
    train: Tensor,
    val: Tensor,
    subjects: list[str] | None,
) -> MorphableModel | None:
    r"""A peer in closed form, or :obj:`None` where the meshes have no subjects that it needs."""
    if name != IDENTITY_EXPRESSION:
        return MorphableModel(_pca(hierarchy, latent), hierarchy).fit(train)
    if subjects is None:
        return None
    network = identity_expression_pca(train, subjects, val, latent)
    model = MorphableModel(network, hierarchy)
    model.set_latent_statistics(train)
    return model
