from pyg_attnpool import models, nn
from pyg_attnpool.export import freeze_attention
from pyg_attnpool.mapping import Mapping
from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.nn import AttentionPool, AttentionUnpool, MappingPool, SpiralConv, StaticChebConv

__version__ = "0.1.0"

__all__ = [
    "AttentionPool",
    "AttentionUnpool",
    "Mapping",
    "MappingPool",
    "MeshHierarchy",
    "SpiralConv",
    "StaticChebConv",
    "__version__",
    "freeze_attention",
    "models",
    "nn",
]
