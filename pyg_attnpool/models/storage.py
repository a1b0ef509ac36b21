r"""The one format of a morphable model on disk, a folder of

* :obj:`config.json`: version, architecture, template, unit, training, and the checksums of all
* :obj:`model.safetensors`: weights, mappings, statistics and the template
* :obj:`hierarchy.npz`: the levels of the template, where the architecture has any
* :obj:`README.md`: a model card

It is read with the core dependencies alone, and nothing in it is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Module

from pyg_attnpool.files import damage_named, replacing_folder, whole_folder
from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.models.autoencoder import AutoencoderConfig, MeshAutoencoder
from pyg_attnpool.models.card import card
from pyg_attnpool.models.modal import ModalAutoencoder, ModalConfig
from pyg_attnpool.models.pca import PCA
from pyg_attnpool.nn.base import check_index
from pyg_attnpool.nn.mapping_pool import MappingPool
from pyg_attnpool.nn.resolver import Query, name_of, pooling_resolver

if TYPE_CHECKING:
    from pyg_attnpool.models.morphable import MorphableModel

FORMAT = "pyg_attnpool.MorphableModel"
VERSION = 1
CONFIG, WEIGHTS, HIERARCHY, CARD = "config.json", "model.safetensors", "hierarchy.npz", "README.md"

# Of a compact folder: large tensors of a network with these names are in half precision.
ROUNDED, LARGE = (".weight", ".components"), 1024


def save(
    model: MorphableModel, folder: str | Path, compact: bool = False, name: str | None = None
) -> None:
    r"""Writes a model; see :meth:`MorphableModel.save`. The card calls it :obj:`name`, by default
    as the folder."""
    if not isinstance(compact, bool):
        raise TypeError(f"Expected 'compact' to be True or False (got {compact!r})")
    tensors = {
        # Copies, as the format refuses views of one storage.
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    _check_numbers(tensors)
    if compact:
        tensors = {name: _compact(name, tensor) for name, tensor in tensors.items()}
        _check_numbers(tensors, compact)
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "autoencoder": describe(model.autoencoder),
        "unit": model.unit,
        "features": list(model.features),
        "template": _template_hash(tensors),
        "hierarchy": None if model.hierarchy is None else model.hierarchy.hash,
        "training": model.summary,
        **({"compact": True} if compact else {}),
    }
    with replacing_folder(folder, _check_replaceable) as temporary:
        (temporary / WEIGHTS).write_bytes(safetensors.torch.save(tensors))
        if model.hierarchy is not None:
            model.hierarchy.save(temporary / HIERARCHY)
        (temporary / CARD).write_text(
            card(model, Path(os.path.realpath(folder)).name if name is None else name),
            encoding="utf-8",
        )
        config["files"] = {
            path.name: _digest(path.read_bytes()) for path in sorted(temporary.iterdir())
        }
        config["checksum"] = _checksum(config)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_replaceable(folder: Path) -> None:
    # The folder of an older model, and nothing else, may go.
    foreign = sorted({path.name for path in folder.iterdir()} - {CONFIG, WEIGHTS, HIERARCHY, CARD})
    if foreign:
        raise ValueError(
            f"Expected a folder of a model alone to replace at {folder} (got one with "
            f"{foreign[0]}): save to another, or to one within"
        )
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("format")
    except (OSError, ValueError, AttributeError) as e:
        found = repr(e)
    if found != FORMAT:
        raise ValueError(
            f"Expected a folder of a model to replace at {folder} (got another {CONFIG}: {found})"
        )


def load(folder: str | Path, autoencoder: Module | None = None) -> MorphableModel:
    r"""Reads a model; see :meth:`MorphableModel.load`."""
    from pyg_attnpool.models.morphable import MorphableModel

    inner = Path(folder) / "model"  # where a run of the command line has it
    if not (Path(folder) / CONFIG).exists() and (inner / CONFIG).exists():
        folder = inner
    folder = whole_folder(folder)
    config = _read_config(folder)
    # What fits its checksums may still be what somebody else has written.
    with damage_named(folder, "a model that fits its parts"):
        hierarchy = None
        if config["hierarchy"] is not None:
            hierarchy = MeshHierarchy.load(folder / HIERARCHY)
        tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
        compact = config.get("compact", False)
        _check_numbers(tensors, compact)
        if compact:
            kinds = {torch.half: tensors["mean"].dtype}
            kinds |= dict.fromkeys((torch.int16, torch.int32), torch.int64)
            tensors = {name: t.to(kinds.get(t.dtype, t.dtype)) for name, t in tensors.items()}
        if hierarchy is not None and hierarchy.hash != config["hierarchy"]:
            raise ValueError(f"another hierarchy, {hierarchy.hash[:16]}")
        if _template_hash(tensors) != config["template"]:
            raise ValueError("another template")
        network = _network(config["autoencoder"], hierarchy, tensors, autoencoder)
        num_vertices = len(tensors["template"])
        check_index("faces", tensors["faces"], ("F", 3), num_vertices)
        template = tensors["template"].double().numpy(), tensors["faces"].numpy()
        model = MorphableModel(network, hierarchy or template, config["unit"])
        _check_state(model, tensors)
        # Assigned, so that the type is the saved one; what is not in the file follows it.
        model.to(tensors["mean"].dtype).load_state_dict(tensors, assign=True)
        model.summary = dict(config["training"])
        model.features = config.get("features", ())  # which earlier versions did not write
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        if (folder / "model.json").exists():
            raise ValueError(
                f"Expected a morphable model in {folder} (got a folder of MeshAutoencoder.save of "
                f"version 0.1, which has no units: build its network, load its "
                f"weights.safetensors, and wrap it as MorphableModel(network))"
            )
        if (folder / "last.ckpt").exists():
            raise FileNotFoundError(
                f"Expected a morphable model in {folder} (got a training that was cut off): go on "
                f"with it by resume"
            )
        raise FileNotFoundError(f"Expected a morphable model in {folder} (got no {CONFIG})")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        format_, version = config["format"], config["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise ValueError(f"Expected the description of a model in {path} (got: {e!r})") from e
    if format_ != FORMAT:
        raise ValueError(f"Expected a model of format {FORMAT} in {path} (got {format_!r})")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(
            f"Expected a model of version {VERSION} or before in {path} (got {version!r}): a later "
            f"release of pyg_attnpool has written it"
        )
    stored = config.pop("checksum", None)
    if stored != _checksum(config):
        raise ValueError(f"Expected a whole {path} (got another checksum)")
    files = config.get("files")
    if not isinstance(files, dict):
        raise ValueError(f"Expected the files of a model in {path} (got {files!r})")
    for name, digest in files.items():
        if name not in (WEIGHTS, HIERARCHY, CARD):
            raise ValueError(f"Expected the files of a model in {path} (got {name!r})")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"Expected {name} in {folder} (got no such file)")
        # The card is for people, who may write on it.
        if name != CARD and _digest((folder / name).read_bytes()) != digest:
            raise ValueError(
                f"Expected a whole {folder / name} (got another checksum: it is damaged, or of "
                f"another model)"
            )
    return config


def _compact(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.int64:
        fits = tensor.numel() == 0 or tensor.abs().max() < 2**15
        return tensor.short() if fits else tensor.int()  # no template has 2**31 vertices
    rounded = name.startswith("autoencoder.") and name.endswith(ROUNDED)
    return tensor.half() if rounded and tensor.numel() >= LARGE else tensor


def _check_numbers(tensors: dict[str, Tensor], compact: bool = False) -> None:
    kind = tensors["mean"].dtype if "mean" in tensors else None
    for name, tensor in tensors.items():
        half = compact and tensor.dtype == torch.half
        if tensor.is_floating_point() and tensor.dtype != kind and not half:
            raise ValueError(f"Expected a model of {kind} (got {tensor.dtype} in '{name}')")
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"Expected a model of finite numbers (got NaN or infinity in '{name}')"
            )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _checksum(config: dict[str, Any]) -> str:
    return _digest(json.dumps(config, sort_keys=True).encode())


def _template_hash(tensors: dict[str, Tensor]) -> str:
    parts = (tensors["template"].double(), tensors["faces"].long())
    return _digest(b"".join(part.numpy().tobytes() for part in parts))


# Architectures ########################################################################


def describe(autoencoder: Module) -> dict[str, Any]:
    r"""The architecture of a network as JSON holds it: class and arguments, or of a class of your
    own its name."""
    if type(autoencoder) is PCA:
        shape = autoencoder.components.shape
        return {"type": "PCA", "latent_channels": shape[0], "in_channels": shape[2]}
    if type(autoencoder) in (MeshAutoencoder, ModalAutoencoder):
        config: Any = autoencoder.config
        values = {f.name: name_of(getattr(config, f.name)) for f in fields(config)}
        try:
            plain = json.loads(json.dumps(values, default=_plain))
            return {"type": type(autoencoder).__name__, **plain}
        except TypeError:
            pass  # of callables or tensors, which only its own code makes again
    return {"type": f"{type(autoencoder).__module__}.{type(autoencoder).__qualname__}"}


def _plain(value: Any) -> Any:
    # A number of NumPy as one that JSON knows.
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError


def _network(
    description: dict[str, Any],
    hierarchy: MeshHierarchy | None,
    tensors: dict[str, Tensor],
    autoencoder: Module | None,
) -> Module:
    description = dict(description)
    kind = description.pop("type")
    if autoencoder is not None:
        return autoencoder
    _check_sizes(description, tensors)
    if kind == "PCA":
        return PCA.empty(len(tensors["template"]), **description)
    if kind not in ("MeshAutoencoder", "ModalAutoencoder"):
        raise ValueError(
            f"a network of the class {kind}, whose code the folder does not hold: pass an instance "
            f"as MorphableModel.load(folder, autoencoder=...)"
        )
    if hierarchy is None:
        raise ValueError("a network without its hierarchy")
    with torch.random.fork_rng(devices=[]):  # every initial value is replaced
        if kind == "MeshAutoencoder":
            return _mesh_autoencoder(AutoencoderConfig(**description), hierarchy, tensors)
        return _modal_autoencoder(ModalConfig(**description), hierarchy, tensors)


def _check_sizes(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    # Layers are made before they are compared with the file. Their sizes and numbers cannot be
    # larger than those of its tensors.
    largest = max(len(tensors), *(size for t in tensors.values() for size in t.shape))
    values = [(name, value) for name, value in description.items() if name != "kl_warmup"]
    while values:
        name, value = values.pop()
        if isinstance(value, dict):
            values += value.items()
        elif isinstance(value, list):
            values += [(name, item) for item in value]
        elif isinstance(value, int) and abs(value) > largest:
            raise ValueError(f"'{name}' of {value} in a file of sizes up to {largest}")


def _mesh_autoencoder(
    config: AutoencoderConfig, hierarchy: MeshHierarchy, tensors: dict[str, Tensor]
) -> MeshAutoencoder:
    levels, published = len(hierarchy.down), config.variant == "published"
    up = config.down if config.up is None else config.up
    down, up = (_restored(query, levels, tensors, published) for query in (config.down, up))
    network = MeshAutoencoder(hierarchy, replace(config, down=down, up=up))
    network.config = config
    return network


def _modal_autoencoder(
    config: ModalConfig, hierarchy: MeshHierarchy, tensors: dict[str, Tensor]
) -> ModalAutoencoder:
    pool = _restored(config.pool, config.level, tensors)
    network = ModalAutoencoder(hierarchy, replace(config, pool=pool))
    network.config = config
    return network


def _restored(
    query: Query, levels: int, tensors: dict[str, Tensor], published: bool = False
) -> Callable[..., Module]:
    # What makes the layers of a network between so many levels. A layer that is fixed in the file
    # is made fixed, not learned first.
    def restored(
        hierarchy: MeshHierarchy,
        level: int,
        direction: Literal["down", "up"],
        in_channels: int,
        **kwargs: Any,
    ) -> Module:
        down = direction == "down"
        place = f"pools.{level}" if down else f"unpools.{levels - 1 - level}"
        place = f"autoencoder.{place}."
        index = tensors.get(place + "index")
        if index is None or place + "initial_weight" in tensors:
            return pooling_resolver(
                query, hierarchy, level, direction, in_channels, published, **kwargs
            )
        sizes = hierarchy.num_vertices[level : level + 2]
        num_source, num_target = sizes if down else sizes[::-1]
        check_index(place + "index", index, (num_target, "k"), num_source)
        return MappingPool.empty(num_source, num_target, index.size(1))

    return restored


def _check_state(model: Module, tensors: dict[str, Tensor]) -> None:
    # Earlier versions wrote scalars in the place of vectors of one number.
    expected = {name: tuple(t.shape) or (1,) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) or (1,) for name, t in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"no '{name}', which the architecture has")
        if name not in expected:
            raise ValueError(f"'{name}', which the architecture does not have")
        if expected[name] != found[name] and not name.endswith(("prior_index", "prior_weight")):
            raise ValueError(f"'{name}' of shape {list(found[name])}, not {list(expected[name])}")
