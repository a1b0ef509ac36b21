r"""The model card: what a folder of a model tells people, and Hugging Face shows."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from pyg_attnpool.models.autoencoder import MeshAutoencoder
from pyg_attnpool.models.modal import ModalAutoencoder
from pyg_attnpool.models.pca import PCA
from pyg_attnpool.nn.mapping_pool import MappingPool
from pyg_attnpool.nn.resolver import name_of

if TYPE_CHECKING:
    from pyg_attnpool.models.morphable import MorphableModel


def card(model: MorphableModel, name: str) -> str:
    r"""The card of a model that is called :obj:`name`, in Markdown."""
    # Principal components are as much of a model as what it has learned.
    linear = (m.components for m in model.modules() if isinstance(m, PCA))
    num_parameters = sum(p.numel() for p in (*model.parameters(), *linear))
    rows = {
        "architecture": _architecture(model.autoencoder),
        "vertices, faces": f"{model.num_vertices:,}, {len(model.faces):,}",
        "features of a vertex": ", ".join([str(model.in_channels), *model.features]),
        "latent size": str(model.latent_channels),
        "parameters": f"{num_parameters:,}",
        "unit of mesh files": model.unit,
        **{key.replace("_", " "): _told(value) for key, value in model.summary.items()},
    }
    known = str(model.summary.get("license", ""))  # an identifier, as Hugging Face has it
    license = f"license: {known}\n" if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", known) else ""
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: pyg_attnpool
{license}tags:
- 3d
- mesh
- morphable-model
---

# {name}

A 3D morphable model made with pyg_attnpool.

| | |
|---|---|
{table}

```python
from pyg_attnpool import MorphableModel

model = MorphableModel.from_pretrained("{name}")
meshes = model.decode(model.latent_mean.unsqueeze(0))       # [1, N, {model.in_channels}] in metres
model.write_mesh("mean.ply", meshes[0])
```
"""


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def _architecture(autoencoder: Module) -> str:
    if isinstance(autoencoder, ModalAutoencoder):
        modal = autoencoder.config
        frozen = all(isinstance(pool, MappingPool) for pool in autoencoder.unpools)
        return (
            f"principal components bent by perceptrons, {modal.modes} more of level {modal.level}, "
            f"aggregation {name_of(modal.pool)}{', frozen' * frozen}"
        )
    if not isinstance(autoencoder, MeshAutoencoder):
        return type(autoencoder).__name__
    config = asdict(autoencoder.config)
    conv, down, up = (name_of(config[key]) for key in ("conv", "down", "up"))
    frozen = all(isinstance(p, MappingPool) for p in [*autoencoder.pools, *autoencoder.unpools])
    pools = down if down == up else f"{down} down, {up} up"
    return f"mesh autoencoder, convolution {conv}, aggregation {pools}{', frozen' * frozen}"
