r"""Walks through the latent space of a morphable model, as section 4.7 of the `"Learning Feature
Aggregation for Deep 3D Morphable Models" <https://arxiv.org/abs/2105.02173>`_ paper defines
them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyg_attnpool.arguments import as_floats, as_integer
from pyg_attnpool.metrics import evaluating
from pyg_attnpool.units import one_warning

if TYPE_CHECKING:
    from pyg_attnpool.models import MorphableModel

BLOCK = 64  # meshes decoded at a time


@torch.no_grad()
def interpolate(model: MorphableModel, a: Any, b: Any, steps: int) -> Tensor:
    r"""The meshes between two:

    .. math::
        \mathrm{dec} \left( (1 - t) \, \mathbf{z}_a + t \, \mathbf{z}_b \right), \qquad
        t = 0, \tfrac{1}{\textrm{steps} - 1}, \ldots, 1

    Args:
        model (MorphableModel): The model.
        a (torch.Tensor or numpy.ndarray): The mesh :obj:`[N, C]` in metres or the latent code
            :obj:`[latent_channels]` to start from, or a batch of either.
        b (torch.Tensor or numpy.ndarray): The one to end with, likewise; one mesh goes with every
            mesh of a batch.
        steps (int): The number of meshes, both ends among them.

    Returns:
        Meshes :obj:`[steps, N, C]` in metres, of a batch :obj:`[B, steps, N, C]`.

    Raises:
        TypeError: If something is no floating point tensor or array, or :obj:`steps` no integer.
        ValueError: If there are fewer than two steps, a shape does not fit, or a number is not
            finite.

    Example:
        >>> model.interpolate(meshes[0], meshes[1], steps=5).shape
        torch.Size([5, 642, 3])
    """
    steps = as_integer("steps", steps, least=2)
    (za, zb), single = as_codes(model, a=a, b=b)
    t = torch.linspace(0, 1, steps, device=za.device, dtype=za.dtype).view(-1, 1)
    return _decoded(model, (1 - t) * za.unsqueeze(1) + t * zb.unsqueeze(1), single)


@torch.no_grad()
def extrapolate(
    model: MorphableModel, neutral: Any, x: Any, alphas: Sequence[float] | Tensor
) -> Tensor:
    r"""Meshes with more or less of what sets a mesh apart from a neutral one:

    .. math::
        \mathrm{dec} \left( \mathbf{z}_n + \alpha \, (\mathbf{z}_x - \mathbf{z}_n) \right)

    Args:
        model (MorphableModel): The model.
        neutral (torch.Tensor or numpy.ndarray): The neutral mesh or code, as in
            :func:`interpolate`.
        x (torch.Tensor or numpy.ndarray): The mesh or code to exaggerate.
        alphas (list or torch.Tensor): Factors :math:`\alpha`: zero is the neutral mesh, one the
            other, above one more and below zero the opposite.

    Returns:
        Meshes :obj:`[len(alphas), N, C]` in metres, of a batch :obj:`[B, len(alphas), N, C]`.

    Raises:
        TypeError: If something is no floating point tensor or array, or a factor no number.
        ValueError: If there is no factor, a shape does not fit, or a number is not finite.

    Example:
        >>> model.extrapolate(meshes[0], meshes[1], alphas=[-0.5, 1.5]).shape
        torch.Size([2, 642, 3])
    """
    try:
        alpha = torch.as_tensor(alphas, dtype=model.mean.dtype, device=model.mean.device)
    except (OverflowError, RuntimeError, TypeError, ValueError) as e:
        raise TypeError(f"Expected 'alphas' as a list of numbers (got {alphas!r})") from e
    if alpha.dim() != 1 or len(alpha) == 0 or not torch.isfinite(alpha).all():
        raise ValueError(f"Expected 'alphas' as a list of finite numbers (got {alphas!r})")
    (zn, zx), single = as_codes(model, neutral=neutral, x=x)
    zn, zx = zn.unsqueeze(1), zx.unsqueeze(1)
    return _decoded(model, zn + alpha.view(-1, 1) * (zx - zn), single)


@torch.no_grad()
def transfer(
    model: MorphableModel, source_neutral: Any, source: Any, target_neutral: Any
) -> Tensor:
    r"""The target with the deformation of the source, such as one person's face with another's
    expression:

    .. math::
        \mathrm{dec} \left( \mathbf{z}_{\textrm{target neutral}} + \mathbf{z}_{\textrm{source}} -
        \mathbf{z}_{\textrm{source neutral}} \right)

    Args:
        model (MorphableModel): The model.
        source_neutral (torch.Tensor or numpy.ndarray): The undeformed source, a mesh or code as in
            :func:`interpolate`.
        source (torch.Tensor or numpy.ndarray): The deformed source.
        target_neutral (torch.Tensor or numpy.ndarray): The undeformed target.

    Returns:
        A mesh :obj:`[N, C]` in metres, of a batch :obj:`[B, N, C]`.

    Raises:
        TypeError: If something is no floating point tensor or array.
        ValueError: If a shape does not fit, or a number is not finite.

    Example:
        >>> model.transfer(meshes[0], meshes[1], meshes[2]).shape
        torch.Size([642, 3])
    """
    codes, single = as_codes(
        model, source_neutral=source_neutral, source=source, target_neutral=target_neutral
    )
    zs, z, zt = codes
    return _decoded(model, zt + (z - zs), single)


@torch.no_grad()
def sample(model: MorphableModel, n: int, generator: torch.Generator | None = None) -> Tensor:
    r"""New meshes, from the Gaussian of the latent codes of the training meshes.

    Args:
        model (MorphableModel): The model.
        n (int): The number of meshes.
        generator (torch.Generator, optional): The source of chance; the same seed gives the same
            codes on every device. If :obj:`None`, torch's own. (default: :obj:`None`)

    Returns:
        Meshes :obj:`[n, N, C]` in metres.

    Raises:
        TypeError: If :obj:`n` is no integer, or :obj:`generator` none of torch.
        ValueError: If :obj:`n` is not positive.

    Example:
        >>> model.sample(4, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([4, 642, 3])
    """
    n = as_integer("n", n, least=1)
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"Expected a torch.Generator as 'generator' (got {generator!r})")
    device = "cpu" if generator is None else generator.device
    axes = latent_axes(model)
    # Of single precision whatever the model is cast to, so that a seed stands for the same codes.
    white = torch.randn(
        n, model.latent_channels, generator=generator, device=device, dtype=torch.float
    )
    return _decoded(model, model.latent_mean + white.to(axes) @ axes.t(), False)


def latent_axes(model: MorphableModel) -> Tensor:
    r"""The principal axes of the latent codes of the training meshes, each times the standard
    deviation along it, as columns :obj:`[latent_channels, latent_channels]` from large to small:
    :math:`\mathbf{A} \mathbf{A}^{\top}` is their covariance. An axis without variance is zero.

    Example:
        >>> from pyg_attnpool.latent import latent_axes
        >>> axes = latent_axes(model)
        >>> torch.allclose(axes @ axes.t(), model.latent_cov, atol=1e-5)
        True
    """
    variance, axes = torch.linalg.eigh(model.latent_cov.double())
    variance = variance.masked_fill(variance <= 1e-10 * variance.max(), 0)
    return (axes * variance.sqrt()).flip(1).to(model.latent_cov.dtype)


@one_warning()
def as_codes(model: MorphableModel, **inputs: Any) -> tuple[list[Tensor], bool]:
    r"""Meshes :obj:`[N, C]` or :obj:`[B, N, C]` and codes :obj:`[latent_channels]` or
    :obj:`[B, latent_channels]`, by name, as codes :obj:`[B, latent_channels]` of one batch, and
    whether none of them was a batch. An input of the template's shape :obj:`[N, C]` is a mesh,
    also where a code is as long as a vertex.

    Raises:
        TypeError: If one is no floating point tensor or array.
        ValueError: If a shape does not fit, or a number is not finite.

    Example:
        >>> from pyg_attnpool.latent import as_codes
        >>> (a, b), single = as_codes(model, a=meshes[0], b=model.latent_mean)
        >>> a.shape, b.shape, single
        (torch.Size([1, 3]), torch.Size([1, 3]), True)
    """
    codes = {}
    single = True
    for name, x in inputs.items():
        x = as_floats(f"'{name}'", x)
        mesh, code = tuple(model.mean.shape), tuple(model.latent_mean.shape)
        shape = tuple(x.shape)
        one = shape in (mesh, code)
        if not one and (shape[1:] not in (mesh, code) or shape[0] == 0):
            raise ValueError(
                f"Expected '{name}' to be a mesh {list(mesh)} of the model's template or a code "
                f"{list(code)}, or a batch of either (got shape {list(shape)})"
            )
        if not torch.isfinite(x).all():
            raise ValueError(f"Expected finite '{name}' (got NaN or infinity)")
        single = single and one
        x = (x.unsqueeze(0) if one else x).to(model.mean.device, model.mean.dtype)
        if x.dim() == 3:
            with evaluating(model):
                x = torch.cat([model.encode(part) for part in x.split(BLOCK)])
        codes[name] = x
    size = max(len(z) for z in codes.values())
    for name, z in codes.items():
        if len(z) not in (1, size):
            raise ValueError(f"Expected one or {size} of '{name}' as of the others (got {len(z)})")
    return [z.expand(size, -1) for z in codes.values()], single


def _decoded(model: MorphableModel, z: Tensor, single: bool) -> Tensor:
    # Codes [B, ..., latent_channels] to meshes [B, ..., N, C].
    with evaluating(model):
        meshes = torch.cat([model.decode(part) for part in z.reshape(-1, z.size(-1)).split(BLOCK)])
    meshes = meshes.view(*z.shape[:-1], *meshes.shape[1:])
    return meshes[0] if single else meshes
