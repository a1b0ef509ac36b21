from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import Module

from pyg_attnpool.arguments import as_floats, as_integer
from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.mesh.io import as_template, in_single_precision, properties
from pyg_attnpool.models.coma import coma
from pyg_attnpool.models.compiled import compiled_decoder, compiled_encoder
from pyg_attnpool.models.modal import modal
from pyg_attnpool.models.neural3dmm import neural3dmm
from pyg_attnpool.models.pca import PCA
from pyg_attnpool.nn.base import IndexedModule
from pyg_attnpool.nn.freeze import freeze
from pyg_attnpool.ops.backend import readable
from pyg_attnpool.units import metres, one_warning, warn_millimetres

if TYPE_CHECKING:
    from pyg_attnpool.fitting import Fit

Template = str | Path | tuple[ndarray, ndarray] | MeshHierarchy


class MorphableModel(IndexedModule):
    r"""A morphable model of registered meshes: an autoencoder with its template, its units and the
    statistics of its training meshes. Meshes go in and come out in metres.

    .. math::
        \mathbf{z} = \mathrm{enc}\left( \frac{\mathbf{x} - \mathbf{\mu}}{\mathbf{\sigma}} \right),
        \qquad
        \hat{\mathbf{x}} = \mathbf{\mu} + \mathbf{\sigma} \cdot \mathrm{dec}(\mathbf{z})

    where mean :math:`\mathbf{\mu}` and standard deviation :math:`\mathbf{\sigma}` of every feature
    of every vertex are those of the training meshes. :meth:`fit` sets them.

    Args:
        autoencoder (torch.nn.Module): A network of standardised features with :meth:`encode`
            :obj:`[B, N, C] -> [B, latent_channels]` and :meth:`decode`, such as
            :class:`~pyg_attnpool.models.MeshAutoencoder`, :class:`~pyg_attnpool.models.PCA` or
            your own.
        template (MeshHierarchy, tuple, str or Path, optional): The hierarchy, the vertices
            :obj:`[N, 3]` in metres and faces :obj:`[F, 3]`, or a mesh file in :obj:`unit`. May be
            left out where the autoencoder has a :obj:`hierarchy`. (default: :obj:`None`)
        unit (str, optional): The unit of mesh files, :obj:`"m"`, :obj:`"cm"` or :obj:`"mm"`, which
            :meth:`write_mesh` writes in. (default: :obj:`"m"`)

    Raises:
        TypeError: If the autoencoder has no :meth:`encode` and :meth:`decode`.
        ValueError: If there is no template, it does not fit the autoencoder, or is too far from
            the origin for single precision.

    Example:
        >>> import numpy as np
        >>> vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]])
        >>> faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
        >>> meshes = torch.from_numpy(vertices).float() + 0.01 * torch.randn(20, 4, 3)
        >>> model = MorphableModel.pca((vertices, faces), latent_channels=2).fit(meshes)
        >>> model.decode(model.latent_mean.unsqueeze(0)).shape
        torch.Size([1, 4, 3])
    """

    mean: Tensor
    std: Tensor
    latent_mean: Tensor
    latent_cov: Tensor
    template: Tensor
    r"""The template's vertices :obj:`[N, 3]` in metres."""
    faces: Tensor
    r"""The template's faces :obj:`[F, 3]`."""

    def __init__(self, autoencoder: Module, template: Template | None = None, unit: str = "m"):
        super().__init__()
        missing = [name for name in ("encode", "decode") if not hasattr(autoencoder, name)]
        if missing:
            raise TypeError(
                f"Expected an autoencoder with 'encode' and 'decode' (got "
                f"{type(autoencoder).__name__} without {missing})"
            )
        scale = metres(unit)
        if template is None:
            template = getattr(autoencoder, "hierarchy", None)
        if template is None:
            raise ValueError(
                "Expected a 'template' for an autoencoder without hierarchy (got None)"
            )
        vertices, faces, hierarchy = _template(template, scale)
        hierarchy = getattr(autoencoder, "hierarchy", hierarchy)
        if hierarchy is not None and len(hierarchy.vertices[0]) != len(vertices):
            raise ValueError(
                f"Expected a template of {len(hierarchy.vertices[0])} vertices as the "
                f"autoencoder's hierarchy has (got {len(vertices)})"
            )
        self.autoencoder: Any = autoencoder  # encode and decode are not those of every Module
        self.hierarchy = hierarchy
        self.unit = unit
        self.summary: dict[str, Any] = {}
        r"""The record of the training, as JSON holds it."""
        self._features: tuple[str, ...] = ()
        config = getattr(autoencoder, "config", None)
        own = getattr(autoencoder, "mean", None)
        in_channels = own.size(-1) if own is not None else getattr(config, "in_channels", 3)
        dtype = torch.get_default_dtype()
        if dtype == torch.float32:
            in_single_precision("a template", vertices)
        coordinates = torch.from_numpy(vertices).to(dtype)
        warn_millimetres("a template", coordinates)
        # Until there are training meshes, the model is about its template.
        mean = torch.zeros(len(vertices), in_channels, dtype=dtype)
        if getattr(autoencoder, "standardized", True):
            mean[:, :3] = coordinates
        self.register_buffer("mean", mean)
        self.register_buffer("std", torch.ones_like(mean))
        self.register_buffer("template", coordinates)
        self.register_index("faces", torch.from_numpy(faces.copy()), (len(faces), 3), len(vertices))
        latent_channels = self._latent_channels()
        self.register_buffer("latent_mean", torch.zeros(latent_channels, dtype=dtype))
        self.register_buffer("latent_cov", torch.eye(latent_channels, dtype=dtype))

    def _latent_channels(self) -> int:
        if hasattr(self.autoencoder, "latent_channels"):
            return int(self.autoencoder.latent_channels)
        with torch.no_grad():
            return self.autoencoder.encode(self.mean.new_zeros(1, *self.mean.shape)).size(1)

    @classmethod
    def coma(
        cls,
        template: Template,
        latent_channels: int = 8,
        pool: Any = "attention",
        unit: str = "m",
        **kwargs: Any,
    ) -> MorphableModel:
        r"""A model around :func:`~pyg_attnpool.models.coma`, the spectral autoencoder.

        Args:
            template (MeshHierarchy, tuple, str or Path): As in :class:`MorphableModel`; of a mesh,
                the hierarchy is made.
            latent_channels (int, optional): Size of the latent code. (default: :obj:`8`)
            pool (str, optional): The aggregation, as in :func:`~pyg_attnpool.models.coma`.
                (default: :obj:`"attention"`)
            unit (str, optional): As in :class:`MorphableModel`. (default: :obj:`"m"`)
            **kwargs (optional): Additional arguments of :func:`~pyg_attnpool.models.coma`.

        Raises:
            FileNotFoundError: If there is no such template file.
            TypeError: If an argument is unknown.
            ValueError: If an argument is out of range, channels are not as many as the levels, or
                the template is no mesh.

        Example:
            >>> MorphableModel.coma(hierarchy, latent_channels=3, channels=(8, 8))
            MorphableModel(MeshAutoencoder, num_vertices=642, latent_channels=3, unit='m')
        """
        return cls(coma(_hierarchy(template, unit), pool, latent_channels, **kwargs), unit=unit)

    @classmethod
    def neural3dmm(
        cls,
        template: Template,
        latent_channels: int = 8,
        pool: Any = "attention",
        unit: str = "m",
        **kwargs: Any,
    ) -> MorphableModel:
        r"""A model around :func:`~pyg_attnpool.models.neural3dmm`, the spiral autoencoder. The
        arguments are those of :meth:`coma` and of that function.

        Raises:
            FileNotFoundError, TypeError, ValueError: As :meth:`coma` does.

        Example:
            >>> MorphableModel.neural3dmm(hierarchy, latent_channels=3, channels=(8, 8))
            MorphableModel(MeshAutoencoder, num_vertices=642, latent_channels=3, unit='m')
        """
        network = neural3dmm(_hierarchy(template, unit), pool, latent_channels, **kwargs)
        return cls(network, unit=unit)

    @classmethod
    def modal(
        cls,
        template: Template,
        latent_channels: int = 8,
        pool: Any = "attention",
        unit: str = "m",
        **kwargs: Any,
    ) -> MorphableModel:
        r"""A model around :func:`~pyg_attnpool.models.modal`, principal components bent by
        perceptrons. The arguments are those of :meth:`coma`, and those of
        :class:`~pyg_attnpool.models.modal.ModalConfig`.

        Raises:
            FileNotFoundError, TypeError, ValueError: As :meth:`coma` does, or if there is no such
                level.

        Example:
            >>> MorphableModel.modal(hierarchy, latent_channels=3, modes=16)
            MorphableModel(ModalAutoencoder, num_vertices=642, latent_channels=3, unit='m')
        """
        latent_channels = as_integer("latent_channels", latent_channels, least=1)
        network = modal(_hierarchy(template, unit), pool, latent_channels, **kwargs)
        return cls(network, unit=unit)

    @classmethod
    def pca(
        cls,
        template: Template,
        latent_channels: int = 8,
        unit: str = "m",
        in_channels: int = 3,
    ) -> MorphableModel:
        r"""A model around :class:`~pyg_attnpool.models.PCA`, the linear one.

        Args:
            template (MeshHierarchy, tuple, str or Path): As in :class:`MorphableModel`.
            latent_channels (int, optional): The number of components. (default: :obj:`8`)
            unit (str, optional): As in :class:`MorphableModel`. (default: :obj:`"m"`)
            in_channels (int, optional): The features of a vertex. (default: :obj:`3`)

        Raises:
            FileNotFoundError: If there is no such template file.
            ValueError: If an argument is out of range, or the template is no mesh.

        Example:
            >>> MorphableModel.pca(template, latent_channels=3).fit(meshes)
            MorphableModel(PCA, num_vertices=642, latent_channels=3, unit='m')
        """
        vertices, faces, hierarchy = _template(template, metres(unit))
        network = PCA.empty(len(vertices), latent_channels, in_channels)
        return cls(network, hierarchy or (vertices, faces), unit)

    @property
    def num_vertices(self) -> int:
        r"""The number of vertices :math:`N`."""
        return self.mean.size(0)

    @property
    def in_channels(self) -> int:
        r"""The number of features :math:`C` of a vertex; the first three are coordinates."""
        return self.mean.size(1)

    @property
    def features(self) -> tuple[str, ...]:
        r"""The names of the features beyond coordinates, which :meth:`write_mesh` writes by them:
        :obj:`"color"` and :obj:`"normal"` of three channels, and others of one. :meth:`fit` takes
        them from the training meshes; of arrays, set them. Without names, :obj:`()`.

        Raises:
            TypeError: If they are set to something else than strings.
            ValueError: If they are of another number of channels, or a name stands twice.

        Example:
            >>> colored = MorphableModel.pca(template, 3, in_channels=6)
            >>> colored.features = ["color"]
            >>> colored.features
            ('color',)
        """
        return self._features

    @features.setter
    def features(self, names: Sequence[str]) -> None:
        channels = len(properties(names))
        if channels not in (0, self.in_channels - 3):
            raise ValueError(
                f"Expected 'features' of the {self.in_channels - 3} channels beyond coordinates "
                f"(got {channels} of {list(names)})"
            )
        self._features = tuple(names)

    @property
    def latent_channels(self) -> int:
        r"""The size of the latent code."""
        return self.latent_mean.size(0)

    @property
    def num_parameters(self) -> int:
        r"""The number of values that training finds: the parameters of the autoencoder, and mean
        and components of :class:`~pyg_attnpool.models.PCA`."""
        linear = [m for m in self.autoencoder.modules() if isinstance(m, PCA)]
        values = [*self.autoencoder.parameters(), *(b for m in linear for b in m.buffers())]
        return sum(value.numel() for value in values)

    @property
    def latent_std(self) -> Tensor:
        r"""The standard deviation :obj:`[latent_channels]` of the codes of the training meshes."""
        return self.latent_cov.diagonal().clamp(min=0).sqrt()

    # Using it ########################################################################

    def standardize(self, x: Tensor) -> Tensor:
        r"""Meshes :obj:`[B, N, C]` in metres to the standardised features of the network.

        Example:
            >>> untrained = MorphableModel.coma(hierarchy, channels=(8, 8))
            >>> untrained.standardize(untrained.template).abs().max()
            tensor(0.)
        """
        return (x - self.mean) / self.std

    def encode(self, x: Tensor) -> Tensor:
        r"""Meshes :obj:`[B, N, C]` in metres to latent codes :obj:`[B, latent_channels]`.

        A frozen model on the CPU encodes in one compiled call, as :meth:`decode` does. On the CPU,
        meshes of the size of millimetres get a warning; a GPU is not waited for.

        Raises:
            TypeError: If the meshes are no floating point tensor or array.
            ValueError: If their shape does not fit.

        Example:
            >>> model.encode(meshes).shape
            torch.Size([24, 3])
        """
        x = self._checked("meshes", x, self.mean.shape)
        if _has_values(x):
            warn_millimetres("meshes", x)
            if not torch.is_grad_enabled():
                compiled = compiled_encoder(self)
                if compiled is not None:
                    return compiled(x)
        return self.autoencoder.encode(self.standardize(x))

    def decode(self, z: Tensor) -> Tensor:
        r"""Latent codes :obj:`[B, latent_channels]` to meshes :obj:`[B, N, C]` in metres.

        A frozen model on the CPU decodes in one compiled call where no gradient is asked for
        (:obj:`with torch.no_grad()`), several times faster for single meshes.

        Raises:
            TypeError: If the codes are no floating point tensor or array.
            ValueError: If their shape does not fit.

        Example:
            >>> model.decode(torch.zeros(2, 3)).shape
            torch.Size([2, 642, 3])
        """
        z = self._checked("latent codes", z, self.latent_mean.shape)
        if not torch.is_grad_enabled() and _has_values(z):
            compiled = compiled_decoder(self)
            if compiled is not None:
                return compiled(z)
        return self.autoencoder.decode(z) * self.std + self.mean

    def forward(self, x: Tensor) -> Tensor:
        r"""Reconstructs meshes :obj:`[B, N, C]` in metres.

        Raises:
            TypeError, ValueError: As :meth:`encode` does.

        Example:
            >>> (model(meshes) - meshes).abs().max() < 1e-6  # one way to stretch a sphere
            tensor(True)
        """
        return self.decode(self.encode(x))

    def _checked(self, name: str, x: Any, shape: torch.Size) -> Tensor:
        device = x.device if isinstance(x, Tensor) else self.mean.device
        x = as_floats(name, x).to(device)
        if x.dim() != len(shape) + 1 or x.shape[1:] != shape:
            raise ValueError(f"Expected {name} of shape {['B', *shape]} (got {list(x.shape)})")
        return x.to(self.mean.dtype)

    def evaluate(self, meshes: Any, batch_size: int = 64) -> dict[str, Any]:
        r"""The error on meshes that the model has not seen.

        Args:
            meshes (torch.Tensor, MeshDataset, numpy.ndarray or list): Test meshes :obj:`[M, N, C]`
                in metres.
            batch_size (int, optional): Meshes reconstructed at a time. (default: :obj:`64`)

        Returns:
            :obj:`mean`, :obj:`std` and :obj:`median` of the distance of a vertex to where it
            should be, in millimetres; :obj:`alive`, the number of latent dimensions that vary; and
            of more than three features :obj:`features`, the mean absolute error of each further
            one in its own unit.

        Raises:
            TypeError: If the meshes are in another form, or not floating point.
            ValueError: If they do not fit the model, or are not finite.

        Example:
            >>> model.evaluate(meshes)["mean"] < 1e-3
            True
        """
        from pyg_attnpool.metrics import reconstruction_error

        return reconstruction_error(self, meshes, batch_size)

    def interpolate(self, a: Any, b: Any, steps: int) -> Tensor:
        r"""The meshes between two meshes or codes; see :func:`pyg_attnpool.latent.interpolate`.

        Raises:
            TypeError, ValueError: As that function does.

        Example:
            >>> model.interpolate(meshes[0], meshes[1], steps=5).shape
            torch.Size([5, 642, 3])
        """
        from pyg_attnpool.latent import interpolate

        return interpolate(self, a, b, steps)

    def extrapolate(self, neutral: Any, x: Any, alphas: Sequence[float] | Tensor) -> Tensor:
        r"""Meshes with more or less of what sets :obj:`x` apart from :obj:`neutral`; see
        :func:`pyg_attnpool.latent.extrapolate`.

        Raises:
            TypeError, ValueError: As that function does.

        Example:
            >>> model.extrapolate(meshes[0], meshes[1], alphas=[-0.5, 1.5]).shape
            torch.Size([2, 642, 3])
        """
        from pyg_attnpool.latent import extrapolate

        return extrapolate(self, neutral, x, alphas)

    def transfer(self, source_neutral: Any, source: Any, target_neutral: Any) -> Tensor:
        r"""The target with the deformation of the source; see
        :func:`pyg_attnpool.latent.transfer`.

        Raises:
            TypeError, ValueError: As that function does.

        Example:
            >>> model.transfer(meshes[0], meshes[1], meshes[2]).shape
            torch.Size([642, 3])
        """
        from pyg_attnpool.latent import transfer

        return transfer(self, source_neutral, source, target_neutral)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        r"""New meshes from the Gaussian of the training codes; see
        :func:`pyg_attnpool.latent.sample`.

        Raises:
            TypeError, ValueError: As that function does.

        Example:
            >>> model.sample(4).shape
            torch.Size([4, 642, 3])
        """
        from pyg_attnpool.latent import sample

        return sample(self, n, generator)

    def edit(self, x: Any, targets: dict[int, Any], keep: Any = None, **kwargs: Any) -> Fit:
        r"""The mesh of the model that is close to another one, with some vertices moved; see
        :func:`pyg_attnpool.fitting.edit`.

        Raises:
            TypeError, ValueError: As that function does.

        Example:
            >>> moved = meshes[0, 7] + torch.tensor([0.0, 0.0, 0.005])  # by 5 mm
            >>> model.edit(meshes[0], {7: moved}).mesh.shape
            torch.Size([642, 3])
        """
        from pyg_attnpool.fitting import edit

        return edit(self, x, targets, keep, **kwargs)

    def fit_to(self, observations: Any = None, **kwargs: Any) -> Fit:
        r"""The mesh of the model that fits some vertices, landmarks, a point cloud or a scan; see
        :func:`pyg_attnpool.fitting.fit_to`.

        Raises:
            TypeError, ValueError: As that function does.

        Example:
            >>> seen = torch.arange(642) < 400
            >>> fitted = model.fit_to(meshes[0], weight=seen, noise=1e-5)
            >>> (fitted.mesh - meshes[0]).abs().max() < 1e-4
            tensor(True)
        """
        from pyg_attnpool.fitting import fit_to

        return fit_to(self, observations, **kwargs)

    def write_mesh(self, path: str | Path, vertices: Tensor) -> None:
        r"""Writes one mesh with the template's faces, in the unit of the model's files.

        Args:
            path (str or Path): The file, in a format of
                :meth:`~pyg_attnpool.mesh.write_mesh`.
            vertices (torch.Tensor): A mesh :obj:`[N, C]` in metres. Further features are written to
                PLY files alone, by the names in :attr:`features`, else as :obj:`feature_3` and so
                on; colours as bytes, so that they are cut to what is from 0 to 1.

        Raises:
            OSError: If the file could not be written whole.
            TypeError: If the mesh is no floating point tensor or array.
            ValueError: If the shape does not fit, or as :meth:`~pyg_attnpool.mesh.write_mesh` does.

        Example:
            >>> model.write_mesh("mean.ply", model.decode(model.latent_mean[None])[0])
        """
        from pyg_attnpool.mesh import write_mesh

        vertices = as_floats("a mesh", vertices).unsqueeze(0)
        (x,) = self._checked("a mesh", vertices, self.mean.shape)
        warn_millimetres("a mesh", x)
        array = x.numpy(force=True).astype(np.float64)
        names = self.features or [f"feature_{i}" for i in range(3, array.shape[1])]
        ends = np.cumsum([3, *(len(properties([name])) for name in names)])
        further = {n: array[:, i:j] for n, i, j in zip(names, ends, ends[1:], strict=False)}
        if "color" in further:
            further["color"] = np.rint(255 * further["color"].clip(0, 1)).astype(np.uint8)
        coordinates = array[:, :3] / metres(self.unit)
        write_mesh(path, coordinates, self.faces.numpy(force=True), further)

    # Making it #######################################################################

    def fit(self, train: Any, val: Any = None, **kwargs: Any) -> MorphableModel:
        r"""Trains the model and leaves it with the weights of its best validation error and the
        statistics of the training meshes; see :func:`pyg_attnpool.training.fit` for all arguments
        (extra :obj:`train`).

        Args:
            train (torch.Tensor, MeshDataset, numpy.ndarray or list): Training meshes
                :obj:`[M, N, C]` in metres.
            val (torch.Tensor, MeshDataset, numpy.ndarray or list, optional): Validation meshes. If
                :obj:`None`, they are split from :obj:`train`. (default: :obj:`None`)
            **kwargs (optional): Arguments of :func:`pyg_attnpool.training.fit`, such as
                :obj:`output` and :obj:`epochs`.

        Returns:
            The model itself.

        Raises:
            ImportError, TypeError, ValueError: As that function does.

        Example:
            >>> MorphableModel.pca(template, 3).fit(meshes).summary["meshes"]
            24
        """
        from pyg_attnpool.training import fit

        return fit(self, train, val, **kwargs)

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        r"""Sets mean and standard deviation :obj:`[N, C]` of the training meshes, in metres.

        Raises:
            TypeError: If they are no floating point tensors or arrays.
            ValueError: If the shapes do not fit, or a standard deviation is not positive.

        Example:
            >>> untrained = MorphableModel.coma(hierarchy, channels=(8, 8))
            >>> untrained.set_statistics(meshes.mean(dim=0), meshes.std(dim=0) + 1e-6)
        """
        mean, std = as_floats("'mean'", mean), as_floats("'std'", std)
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != self.mean.shape:
                raise ValueError(
                    f"Expected '{name}' of shape {list(self.mean.shape)} (got {list(value.shape)})"
                )
        if not ((std > 0) & torch.isfinite(std)).all() or not torch.isfinite(mean).all():
            raise ValueError("Expected a finite 'mean' and a positive 'std' (got others)")
        self.mean.copy_(mean)
        self.std.copy_(std)

    @torch.no_grad()
    def set_latent_statistics(self, meshes: Any, batch_size: int = 64) -> None:
        r"""Sets mean and covariance of the latent codes to those of meshes :obj:`[M, N, C]`, in
        metres, which gives sampling and sliders their scale.

        Raises:
            TypeError: If the meshes are in another form, or not floating point.
            ValueError: If they do not fit the model, or are not finite.

        Example:
            >>> untrained = MorphableModel.coma(hierarchy, channels=(8, 8))
            >>> untrained.set_latent_statistics(meshes)
        """
        from pyg_attnpool.metrics import encode_all

        codes = encode_all(self, meshes, batch_size).double()
        self.latent_mean.copy_(codes.mean(dim=0))
        self.latent_cov.copy_(torch.atleast_2d(torch.cov(codes.t(), correction=0)))

    def freeze(self) -> MorphableModel:
        r"""Replaces learned aggregation by the matrices it has learned, in place
        (:func:`pyg_attnpool.nn.freeze`). The model computes what it computed.

        Returns:
            The model itself.

        Raises:
            ValueError: If a layer holds a number that is not finite.

        Example:
            >>> untrained = MorphableModel.coma(hierarchy, channels=(8, 8))
            >>> before = untrained.num_parameters
            >>> untrained.freeze().num_parameters < before
            True
        """
        freeze(self.autoencoder)
        return self

    # Sending it ######################################################################

    def save(self, folder: str | Path, compact: bool = False) -> None:
        r"""Writes the model to one folder (:mod:`pyg_attnpool.models.storage`), which takes the
        place of an older one as a whole.

        Args:
            folder (str or Path): The folder.
            compact (bool, optional): If set to :obj:`True`, large weights are rounded to half
                precision, for a folder of half the size. What is loaded computes in the type of the
                model. (default: :obj:`False`)

        Raises:
            NotADirectoryError: If a file is in its place.
            OSError: If it could not be written whole.
            ValueError: If the model holds numbers that are not finite or of several types, or the
                folder holds something else than a model.

        Example:
            >>> model.save("my_model")
        """
        from pyg_attnpool.models.storage import save

        save(self, folder, compact)

    @classmethod
    def load(cls, folder: str | Path, autoencoder: Module | None = None) -> MorphableModel:
        r"""Reads a model that :meth:`save` has written, onto the CPU.

        Args:
            folder (str or Path): The folder, or that of a run of the command line around it.
            autoencoder (torch.nn.Module, optional): A network of your own class, which the folder
                holds the weights of but not the code. (default: :obj:`None`)

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If something is damaged, of a later version, or does not fit; the message
                names the first that differs.

        Example:
            >>> model.save("my_model")
            >>> torch.equal(MorphableModel.load("my_model")(meshes), model(meshes))
            True
        """
        from pyg_attnpool.models.storage import load

        return load(folder, autoencoder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        revision: str | None = None,
        token: str | None = None,
        autoencoder: Module | None = None,
    ) -> MorphableModel:
        r"""Reads a model from a folder, one that comes with the package, or one from the
        `Hugging Face Hub <https://huggingface.co>`_ (extra :obj:`hub`), of which a copy stays in
        its cache and serves without a connection.

        Args:
            source (str or Path): :obj:`"faces"`, :obj:`"bodies"` or :obj:`"hands"` of latent size
                8, :obj:`"faces-32"`, :obj:`"bodies-32"` or :obj:`"hands-32"`; a folder of
                :meth:`save`, :obj:`"./faces"` where it has such a name; or :obj:`"owner/name"` of a
                repository.
            revision (str, optional): A branch, tag or commit of the repository; by default its
                newest. (default: :obj:`None`)
            token (str, optional): A token for private repositories; by default that of a login.
                (default: :obj:`None`)
            autoencoder (torch.nn.Module, optional): As in :meth:`load`. (default: :obj:`None`)

        Raises:
            ConnectionError: If the Hub does not answer, and there is no copy.
            ImportError: If the extra :obj:`hub` is missing.
            ValueError: If there is no such repository, or as :meth:`load` does.

        Example:
            >>> model.save("my_model")
            >>> MorphableModel.from_pretrained("my_model")
            MorphableModel(PCA, num_vertices=642, latent_channels=3, unit='m')
            >>> MorphableModel.from_pretrained("hands").num_vertices
            1609
            >>> MorphableModel.from_pretrained("owner/name")  # doctest: +SKIP
        """
        from pyg_attnpool.models.hub import from_pretrained

        return from_pretrained(source, revision, token, autoencoder)

    def push_to_hub(
        self,
        repository: str,
        private: bool = False,
        token: str | None = None,
        message: str = "A morphable model",
    ) -> str:
        r"""Writes the model to a repository of the Hugging Face Hub (extra :obj:`hub`), which is
        made where there is none.

        Args:
            repository (str): Its :obj:`"owner/name"`.
            private (bool, optional): Whether a new one is private. (default: :obj:`False`)
            token (str, optional): A token that may write; by default that of a login.
                (default: :obj:`None`)
            message (str, optional): What the commit says. (default: :obj:`"A morphable model"`)

        Returns:
            The commit.

        Raises:
            ConnectionError: If the Hub does not answer, or refuses.
            ImportError: If the extra :obj:`hub` is missing.
            ValueError: If the name is none of a repository, or as :meth:`save` does.

        Example:
            >>> model.push_to_hub("owner/name", private=True)  # doctest: +SKIP
        """
        from pyg_attnpool.models.hub import push_to_hub

        return push_to_hub(self, repository, private, token, message)

    @one_warning()
    def export(self, path: str | Path, **kwargs: Any) -> float:
        r"""Writes the frozen model as one file that runs without this package: :obj:`.pt2`
        (:func:`torch.export`) or :obj:`.onnx`, meshes :obj:`[B, N, C]` in metres to their
        reconstructions, or :obj:`.html`, a page with sliders. The model itself stays as it is.

        Args:
            path (str or Path): The file.
            **kwargs (optional): Of a page, the arguments of
                :func:`pyg_attnpool.visualize.viewer.write_viewer`, such as :obj:`meshes`.

        Returns:
            The largest difference to the model, relative to its largest output, or of a page to
            the size of the template.

        Raises:
            ImportError: If what ONNX needs is missing (extra :obj:`export`).
            OSError: If the file could not be written whole.
            RuntimeError: If the file would compute something else than the model.
            ValueError: If the ending is unknown, or the model cannot become such a file.

        Example:
            >>> model.export("page.html", meshes=meshes[:2]) < 1e-4
            True
        """
        if Path(path).suffix.lower() == ".html":
            from pyg_attnpool.visualize.viewer import write_viewer

            return write_viewer(self, path, **kwargs)
        from pyg_attnpool.export import export

        example = self.mean + self.std * torch.linspace(-1, 1, 2, device=self.mean.device).view(
            2, 1, 1
        )
        return export(copy.deepcopy(self).freeze(), example, path, **kwargs)

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}({self.autoencoder.__class__.__name__}, "
            f"num_vertices={self.num_vertices}, latent_channels={self.latent_channels}, "
            f"unit={self.unit!r})"
        )


def _template(template: Template, scale: float) -> tuple[ndarray, ndarray, MeshHierarchy | None]:
    # Vertices in metres, faces, and the hierarchy where there is one.
    if isinstance(template, MeshHierarchy):
        return template.vertices[0], template.faces[0], template
    vertices, faces = as_template(template)
    # Files are in the unit of the model, arrays in metres.
    return (scale if isinstance(template, str | Path) else 1) * vertices, faces, None


def _hierarchy(template: Template, unit: str) -> MeshHierarchy:
    vertices, faces, hierarchy = _template(template, metres(unit))
    return hierarchy or MeshHierarchy.from_template((vertices, faces))


def _has_values(x: Tensor) -> bool:
    # Not where a look waits for a GPU.
    return readable(x) and x.is_cpu and x.numel() > 0
