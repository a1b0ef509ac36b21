from pyg_attnpool.nn.attention_pool import AttentionPool, AttentionUnpool
from pyg_attnpool.nn.cheb_conv import StaticChebConv
from pyg_attnpool.nn.learned_pools import DiffPool, FullPool, WeightedPool
from pyg_attnpool.nn.mapping_pool import MappingPool
from pyg_attnpool.nn.spiral_conv import SpiralConv

__all__ = [
    "AttentionPool",
    "AttentionUnpool",
    "DiffPool",
    "FullPool",
    "MappingPool",
    "SpiralConv",
    "StaticChebConv",
    "WeightedPool",
]
