from pyg_attnpool import nn
from pyg_attnpool.mapping import Mapping
from pyg_attnpool.nn import AttentionPool, AttentionUnpool, MappingPool, StaticChebConv

__version__ = "0.1.0"

__all__ = [
    "AttentionPool",
    "AttentionUnpool",
    "Mapping",
    "MappingPool",
    "StaticChebConv",
    "__version__",
    "nn",
]
