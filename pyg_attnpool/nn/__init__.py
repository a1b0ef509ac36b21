from pyg_attnpool.nn.attention_pool import AttentionPool, AttentionUnpool
from pyg_attnpool.nn.cheb_conv import StaticChebConv
from pyg_attnpool.nn.freeze import freeze, freeze_attention
from pyg_attnpool.nn.learned_pools import DiffPool, FullPool, WeightedPool
from pyg_attnpool.nn.mapping_pool import MappingPool
from pyg_attnpool.nn.resolver import convolution_resolver, pooling_resolver
from pyg_attnpool.nn.spiral_conv import SpiralConv
from pyg_attnpool.nn.swap import swap_pooling

__all__ = [
    "AttentionPool",
    "AttentionUnpool",
    "DiffPool",
    "FullPool",
    "MappingPool",
    "SpiralConv",
    "StaticChebConv",
    "WeightedPool",
    "convolution_resolver",
    "freeze",
    "freeze_attention",
    "pooling_resolver",
    "swap_pooling",
]
