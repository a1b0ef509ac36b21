from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Torch takes seconds to import, so a name is imported when it is asked for: the command line shows
# its help, and refuses wrong arguments, before that.
_ROOMS = {"Mapping": "mapping", "MeshHierarchy": "mesh", "MorphableModel": "models"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("models", "nn"):
        return import_module(f"{__name__}.{name}")
    value = getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'nn')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
