from pyg_attnpool import models, nn
from pyg_attnpool.mapping import Mapping
from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.models import MorphableModel
from pyg_attnpool.nn import (
    AttentionPool,
    AttentionUnpool,
    MappingPool,
    SpiralConv,
    StaticChebConv,
    freeze,
    freeze_attention,
    swap_pooling,
)

__version__ = "0.2.0.dev0"

__all__ = [
    "AttentionPool",
    "AttentionUnpool",
    "Mapping",
    "MappingPool",
    "MeshHierarchy",
    "MorphableModel",
    "SpiralConv",
    "StaticChebConv",
    "__version__",
    "freeze",
    "freeze_attention",
    "models",
    "nn",
    "swap_pooling",
]
