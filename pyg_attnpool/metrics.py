r"""Errors of morphable models, in millimetres, and what makes a good model of a class of shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyg_attnpool.arguments import as_floats, as_integer
from pyg_attnpool.datasets.inputs import as_meshes, blocks, check_meshes
from pyg_attnpool.units import one_warning, warn_millimetres

if TYPE_CHECKING:
    from pyg_attnpool.models import MorphableModel

KEPT = 1 << 24  # distances beyond which meshes are reconstructed again rather than all kept
DIGIT = 16  # bits
BLOCK = 64  # meshes whose size is looked at


def vertex_distances(out: Tensor, x: Tensor) -> Tensor:
    r"""The Euclidean distance of every vertex to where it should be, in millimetres.

    Args:
        out (torch.Tensor): Meshes :obj:`[B, N, C]` in metres; the first three features count.
        x (torch.Tensor): The true meshes :obj:`[B, N, C]`.

    Returns:
        Distances :obj:`[B, N]`.

    Example:
        >>> vertex_distances(torch.zeros(1, 1, 3), torch.tensor([[[0.003, 0.0, 0.004]]])).item()
        5.0
    """
    out, x = as_floats("'out'", out), as_floats("'x'", x)
    return 1000 * (out[..., :3] - x[..., :3]).norm(dim=-1)


@torch.no_grad()
@one_warning()
def reconstruction_error(
    model: MorphableModel, meshes: Any, batch_size: int = 64
) -> dict[str, Any]:
    r"""The error of a model on meshes; see :meth:`MorphableModel.evaluate`. Its memory does not
    grow with the meshes: of more than :obj:`KEPT` distances, the median is found by reconstructing
    the meshes again.

    Args:
        model (MorphableModel): The model.
        meshes (torch.Tensor, MeshDataset, numpy.ndarray or list): Meshes :obj:`[M, N, C]` in
            metres.
        batch_size (int, optional): Meshes reconstructed at a time. (default: :obj:`64`)

    Returns:
        :obj:`mean`, :obj:`std` and exact :obj:`median` of the distance in millimetres over all
        vertices of all meshes; :obj:`alive`, the number of latent dimensions whose standard
        deviation exceeds a thousandth of the largest; of more than three features
        :obj:`features`, the mean absolute error of each further one in its own unit.

    Raises:
        TypeError: If the model has no unit, or :obj:`batch_size` is no integer.
        ValueError: If the meshes do not fit the model, or :obj:`batch_size` is not positive.

    Example:
        >>> from pyg_attnpool.metrics import reconstruction_error
        >>> sorted(reconstruction_error(model, meshes))[:3]
        ['alive', 'mean', 'median']
    """
    meshes = _prepared(model, "test meshes", meshes)
    distances, codes, further = _Moments(), _Moments(), _Moments()
    ranks = _Ranks()
    with evaluating(model):
        for x, z, out in _reconstructed(model, meshes, batch_size):
            d = vertex_distances(out, x).flatten()
            distances.add(d)
            ranks.add(d)
            codes.add(z)
            further.add((out[..., 3:] - x[..., 3:]).abs().double().mean(dim=1))
        again = _all_distances(model, meshes, batch_size)
        low, high = ranks.values([(ranks.count - 1) // 2, ranks.count // 2], again)
    spread = codes.std
    found: dict[str, Any] = {
        "mean": distances.mean.item(),
        "std": distances.std.item(),
        "median": (low + high) / 2,
        "alive": int((spread > 1e-3 * spread.max()).sum()),
    }
    if model.in_channels > 3:
        found["features"] = further.mean.tolist()
    return found


@torch.no_grad()
@one_warning()
def error_quantiles(
    model: MorphableModel, meshes: Any, q: Sequence[float], batch_size: int = 64
) -> list[float]:
    r"""Quantiles of the error over all vertices of all meshes, in millimetres, exact and in memory
    that does not grow with the meshes: more of them than :obj:`KEPT` distances are reconstructed
    twice. Between two distances they are interpolated, as by :func:`numpy.quantile`.

    Args:
        model (MorphableModel): The model.
        meshes (torch.Tensor, MeshDataset, numpy.ndarray or list): Meshes :obj:`[M, N, C]` in
            metres.
        q (list): Shares of the distances from 0 to 1, such as 0.5 for the median.
        batch_size (int, optional): Meshes reconstructed at a time. (default: :obj:`64`)

    Raises:
        TypeError: If a share is no number.
        ValueError: If a share is not from 0 to 1.

    Example:
        >>> from pyg_attnpool.metrics import error_quantiles
        >>> median, worst = error_quantiles(model, meshes, [0.5, 1.0])
        >>> median <= worst
        True
    """
    shares = np.asarray(q)
    if shares.ndim != 1 or (len(shares) > 0 and shares.dtype.kind not in "fiu"):
        raise TypeError(f"Expected quantiles as a list of numbers (got {q!r})")
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"Expected quantiles from 0 to 1 (got {q!r})")
    meshes, ranks = _prepared(model, "meshes", meshes), _Ranks()
    again = _all_distances(model, meshes, batch_size)
    with evaluating(model):
        for d in again():
            ranks.add(d)
        places = [share * (ranks.count - 1) for share in shares.tolist()]
        below, above = [math.floor(place) for place in places], [math.ceil(p) for p in places]
        found = ranks.values(below + above, again)
    pairs = zip(found[: len(places)], found[len(places) :], places, strict=True)
    return [low + (high - low) * (place % 1) for low, high, place in pairs]


def _reconstructed(
    model: MorphableModel, meshes: Any, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    # Meshes, codes and reconstructions.
    for block in blocks(meshes, batch_size):
        x = block.to(model.mean.device, model.mean.dtype)
        z = model.encode(x)
        yield x, z, model.decode(z)


def _all_distances(
    model: MorphableModel, meshes: Any, batch_size: int
) -> Callable[[], Iterator[Tensor]]:
    def distances() -> Iterator[Tensor]:
        for x, _, out in _reconstructed(model, meshes, batch_size):
            yield vertex_distances(out, x).flatten()

    return distances


class _Moments:
    # Mean and standard deviation over the first dimension, block by block (Chan, Golub & LeVeque):
    # squares are taken about the mean of their block, never of sums that nearly cancel.
    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.tensor(0.0), torch.tensor(0.0)

    def add(self, values: Tensor) -> None:
        values, num = values.double(), len(values)
        mean = values.mean(dim=0)
        away, total = mean - self.mean.to(mean), self.count + num
        squares = (values - mean).square().sum(dim=0) + away**2 * (self.count * num / total)
        self.squares = self.squares.to(mean) + squares
        self.mean, self.count = self.mean.to(mean) + away * (num / total), total

    @property
    def std(self) -> Tensor:
        return (self.squares / self.count).sqrt()


class _Ranks:
    # The values at some ranks among many that are not negative, exactly and in constant memory.
    # Bits of floating point numbers are in the order of the numbers, so the values are found digit
    # by digit of sixteen bits, each by a histogram of all values that begin as they do (radix
    # selection). Up to KEPT values are simply sorted.
    def __init__(self) -> None:
        self.count, self.dtype = 0, torch.float32
        self.kept: list[Tensor] = []
        self.first: Tensor | None = None

    def add(self, values: Tensor) -> None:
        self.count, self.dtype = self.count + values.numel(), values.dtype
        self.kept.append(values)
        if self.first is not None or self.count > KEPT:
            for part in self.kept:
                count = _histogram(_bits(part) >> _shift(part.dtype))
                self.first = count if self.first is None else self.first + count
            self.kept = []

    def values(self, ranks: Sequence[int], again: Callable[[], Iterator[Tensor]]) -> list[float]:
        r"""The values at ranks from 0; :obj:`again` gives all of them once more."""
        if self.first is None:
            ordered = np.sort(torch.cat(self.kept).numpy(force=True))
            return ordered[list(ranks)].astype(np.float64).tolist()
        shift = _shift(self.dtype)
        found = [_digit(self.first, 0, rank) for rank in ranks]  # first bits, rank among the rest
        while shift > 0:
            shift -= DIGIT
            counts = {bits: torch.zeros_like(self.first) for bits, _ in found}
            for values in again():
                rest = _bits(values) >> shift
                for bits, count in counts.items():
                    count += _histogram(rest[rest >> DIGIT == bits] & ((1 << DIGIT) - 1))
            found = [_digit(counts[bits], bits, rank) for bits, rank in found]
        whole = torch.tensor([bits for bits, _ in found], dtype=torch.int64)
        if self.dtype == torch.float32:
            whole = whole.int()
        return whole.view(self.dtype).double().tolist()


def _shift(dtype: torch.dtype) -> int:
    return (torch.finfo(dtype).bits if dtype == torch.float64 else 32) - DIGIT


def _bits(values: Tensor) -> Tensor:
    # Without the sign, which NaN may have.
    if values.dtype == torch.float64:
        return values.view(torch.int64) & ((1 << 63) - 1)
    return values.float().view(torch.int32).long() & ((1 << 31) - 1)


def _histogram(digits: Tensor) -> Tensor:
    return torch.bincount(digits, minlength=1 << DIGIT)


def _digit(count: Tensor, bits: int, rank: int) -> tuple[int, int]:
    # The next digit of the value at a rank, and its rank among those that have this digit.
    total = count.cumsum(0)
    digit = min(int(torch.searchsorted(total, rank, right=True)), len(count) - 1)
    return (bits << DIGIT) | digit, rank - int(total[digit] - count[digit])


@torch.no_grad()
@one_warning()
def encode_all(model: MorphableModel, meshes: Any, batch_size: int = 64) -> Tensor:
    r"""The latent codes :obj:`[M, latent_channels]` of meshes :obj:`[M, N, C]` in metres."""
    meshes = _prepared(model, "meshes", meshes)
    with evaluating(model):
        device, dtype = model.mean.device, model.mean.dtype
        return torch.cat([model.encode(x.to(device, dtype)) for x in blocks(meshes, batch_size)])


def mean_distances(x: Tensor, y: Tensor) -> Tensor:
    r"""The mean distance of corresponding vertices between all pairs of meshes, in millimetres.

    Args:
        x (torch.Tensor): Meshes :obj:`[A, N, C]` in metres; the first three features count.
        y (torch.Tensor): Meshes :obj:`[B, N, C]`.

    Returns:
        Distances :obj:`[A, B]`.

    Example:
        >>> mean_distances(torch.zeros(1, 4, 3), torch.full((2, 4, 3), 0.003)).round(decimals=1)
        tensor([[5.2000, 5.2000]])
    """
    x, y = as_floats("'x'", x), as_floats("'y'", y)
    if x.dim() != 3 or y.dim() != 3 or x.shape[1:] != y.shape[1:] or 0 in (*x.shape, *y.shape):
        raise ValueError(
            f"Expected two sets of meshes of one shape [N, C] (got {list(x.shape)} and "
            f"{list(y.shape)})"
        )
    # Few pairs at a time: all differences of 100 to 2,000 faces would take 10 GB.
    size = max(1, (1 << 24) // x[0].numel())
    rows = [torch.cat([vertex_distances(a, part).mean(dim=1) for part in y.split(size)]) for a in x]
    return torch.stack(rows)


def generalisation(model: MorphableModel, meshes: Any, batch_size: int = 64) -> float:
    r"""How well a model describes meshes of its class that it has not seen: the mean distance of a
    vertex to where it should be, as in :meth:`MorphableModel.evaluate`. Small is good.

    This, :func:`specificity` and :func:`compactness` are those of `"Statistical Models of Shape"
    <https://doi.org/10.1007/978-1-84800-138-1>`_ (Davies, Twining & Taylor, 2008).

    Args:
        model (MorphableModel): The model.
        meshes (torch.Tensor, MeshDataset, numpy.ndarray or list): Unseen meshes :obj:`[M, N, C]` in
            metres.
        batch_size (int, optional): Meshes reconstructed at a time. (default: :obj:`64`)

    Returns:
        The error in millimetres.

    Example:
        >>> from pyg_attnpool.metrics import generalisation
        >>> generalisation(model, meshes) < 1e-2  # mm
        True
    """
    return reconstruction_error(model, meshes, batch_size)["mean"]


def specificity(samples: Tensor, meshes: Tensor) -> float:
    r"""Whether a model makes meshes of its class alone: the mean distance of a sample to the
    training mesh that is closest to it. Small is good, but zero means training meshes repeated.

    Args:
        samples (torch.Tensor): Meshes :obj:`[n, N, C]` that the model has made, in metres, as by
            :meth:`MorphableModel.sample`.
        meshes (torch.Tensor): Training meshes :obj:`[M, N, C]`.

    Returns:
        The distance in millimetres.

    Example:
        >>> meshes = torch.zeros(3, 5, 3)
        >>> specificity(meshes + torch.tensor([0.003, 0.0, 0.004]), meshes)
        5.0
    """
    return mean_distances(samples, meshes).amin(dim=1).mean().item()


@torch.no_grad()
@one_warning()
def compactness(model: MorphableModel, meshes: Any, batch_size: int = 64) -> Tensor:
    r"""How much of the variance of a model's meshes few directions hold: the cumulative variance
    along the principal directions of the reconstructed meshes. Large at the front is good. For PCA
    these are the sums of its eigenvalues.

    Args:
        model (MorphableModel): The model.
        meshes (torch.Tensor, MeshDataset, numpy.ndarray or list): Training meshes
            :obj:`[M, N, C]` in metres.
        batch_size (int, optional): Meshes reconstructed at a time. (default: :obj:`64`)

    Returns:
        Cumulative variance :obj:`[min(M, 3 N)]` in square millimetres, a vertex on average. The
        last entry is the variance of all.

    Example:
        >>> from pyg_attnpool.metrics import compactness
        >>> compactness(model, meshes).shape
        torch.Size([24])
    """
    meshes = _prepared(model, "training meshes", meshes)
    with evaluating(model):
        parts = blocks(meshes, batch_size)
        x = torch.cat([model(x.to(model.mean))[..., :3].flatten(1).double() for x in parts])
    values = torch.linalg.svdvals(1000 * (x - x.mean(dim=0)))
    return values.square().cumsum(dim=0) / (len(x) * model.num_vertices)


def diversity(samples: Tensor) -> float:
    r"""How different samples are: the mean distance between two of them, in millimetres. It says
    something beside that of real meshes.

    Args:
        samples (torch.Tensor): At least two meshes :obj:`[n, N, C]` in metres.

    Example:
        >>> diversity(torch.stack([torch.zeros(5, 3), torch.ones(5, 3)])) / 1000
        1.73205...
    """
    samples = _at_least_two("samples", samples)
    n = len(samples)
    return mean_distances(samples, samples).sum().item() / (n * (n - 1))


def coverage(samples: Tensor, meshes: Tensor) -> float:
    r"""The share of real meshes that are the closest one to some sample, from the `"Learning
    Representations and Generative Models for 3D Point Clouds" <https://arxiv.org/abs/1707.02392>`_
    paper. A model that forgets a part of its class does not cover it.

    Args:
        samples (torch.Tensor): Samples :obj:`[n, N, C]` in metres, best as many as meshes.
        meshes (torch.Tensor): Real meshes :obj:`[M, N, C]` that the model has not seen.

    Example:
        >>> x = torch.rand(4, 5, 3)
        >>> coverage(x, x), coverage(x[:1], x)
        (1.0, 0.25)
    """
    return mean_distances(samples, meshes).argmin(dim=1).unique().numel() / len(meshes)


def nearest_neighbor_accuracy(samples: Tensor, meshes: Tensor) -> float:
    r"""Whether samples can be told from real meshes: the accuracy of a classifier that gives each
    mesh the label of its nearest neighbour among all others (1-NNA), from the `"PointFlow"
    <https://arxiv.org/abs/1906.12320>`_ paper. One half is best; one means that they lie apart,
    less than one half that samples repeat real meshes.

    Args:
        samples (torch.Tensor): Samples :obj:`[n, N, C]` in metres.
        meshes (torch.Tensor): As many real meshes :obj:`[n, N, C]`.

    Raises:
        ValueError: If there are not equally many, at least two of each.

    Example:
        >>> x = torch.rand(4, 5, 3)
        >>> nearest_neighbor_accuracy(x, x + 10), nearest_neighbor_accuracy(x, x + 1e-3)
        (1.0, 0.0)
    """
    samples, meshes = _at_least_two("samples", samples), _at_least_two("meshes", meshes)
    if len(samples) != len(meshes):
        raise ValueError(
            f"Expected as many samples as meshes (got {len(samples)} and {len(meshes)}): the "
            f"larger set would attract more neighbours"
        )
    both = torch.cat([samples, meshes])
    nearest = mean_distances(both, both).fill_diagonal_(torch.inf).argmin(dim=1)
    real = torch.arange(len(both), device=both.device) >= len(samples)
    return (real[nearest] == real).double().mean().item()


def _at_least_two(name: str, x: Tensor) -> Tensor:
    x = as_floats(f"'{name}'", x)
    if x.dim() == 0 or len(x) < 2:
        raise ValueError(f"Expected at least two {name} (got {len(x) if x.dim() else 'a number'})")
    return x


@torch.no_grad()
@one_warning()
def generation(
    model: MorphableModel,
    train: Any,
    test: Any,
    n: int = 100,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    r"""All of these for a model, from :obj:`n` of its samples, as many training meshes and as many
    test meshes, evenly spread over each set.

    Args:
        model (MorphableModel): The model.
        train (torch.Tensor, MeshDataset, numpy.ndarray or list): Training meshes :obj:`[M, N, C]`
            in metres, all of which :func:`specificity` looks at.
        test (torch.Tensor, MeshDataset, numpy.ndarray or list): Unseen meshes.
        n (int, optional): The number of samples; no more than there are test meshes are taken.
            (default: :obj:`100`)
        generator (torch.Generator, optional): As in :meth:`MorphableModel.sample`.
            (default: :obj:`None`)

    Returns:
        By name :obj:`generalisation`, :obj:`specificity`, :obj:`diversity` and
        :obj:`diversity of test meshes` in millimetres, :obj:`compactness`, the share of the
        variance along the first principal direction (NaN of meshes that do not differ),
        :obj:`coverage` and :obj:`nearest neighbor accuracy`.

    Raises:
        TypeError: If :obj:`n` is no integer, or :obj:`generator` none of torch.
        ValueError: If there are fewer than two samples or test meshes, or meshes do not fit the
            model.

    Example:
        >>> from pyg_attnpool.metrics import generation
        >>> found = generation(model, meshes[:16], meshes[16:], n=8)
        >>> found["compactness"] <= 1
        True
    """
    n = as_integer("n", n, least=2)
    train, test = _prepared(model, "training meshes", train), _prepared(model, "test meshes", test)
    if len(test) < 2:
        raise ValueError(f"Expected at least two test meshes (got {len(test)})")
    n = min(n, len(test))
    device = model.mean.device
    samples = model.sample(n, generator=generator)
    (real,) = blocks(_spread(test, n), n)
    real = real.to(samples)
    closest = [mean_distances(samples, x.to(device)).amin(dim=1) for x in blocks(train, 1024)]
    variance = compactness(model, _spread(train, n))
    return {
        "generalisation": generalisation(model, test),
        "specificity": torch.stack(closest).amin(dim=0).mean().item(),
        "compactness": (variance[0] / variance[-1]).item(),
        "diversity": diversity(samples),
        "diversity of test meshes": diversity(real),
        "coverage": coverage(samples, real),
        "nearest neighbor accuracy": nearest_neighbor_accuracy(samples, real),
    }


def _spread(x: Any, n: int) -> Any:
    return x[torch.linspace(0, len(x) - 1, min(n, len(x))).long()]


def _prepared(model: MorphableModel, name: str, meshes: Any) -> Any:
    if not hasattr(model, "unit"):
        raise TypeError(
            f"Expected a MorphableModel, whose errors have a unit (got {type(model).__name__}): "
            f"wrap the network as MorphableModel(network, template)"
        )
    meshes = as_meshes(meshes)
    check_meshes(name, meshes, model.num_vertices, model.in_channels)
    warn_millimetres(name, next(blocks(meshes, BLOCK)))
    return meshes


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    r"""A model in evaluation mode, and afterwards back in the mode that it had."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
