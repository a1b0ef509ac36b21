r"""Training of morphable models. Networks are trained with PyTorch Lightning (extra :obj:`train`),
which is imported when the first one is; what fits itself, such as PCA, needs none."""

from typing import TYPE_CHECKING, Any

from pyg_attnpool.training.augment import jitter, rigid_motion
from pyg_attnpool.training.fit import epochs_for, fit
from pyg_attnpool.training.folder import load_checkpoint
from pyg_attnpool.training.process import keep_freed_memory, quiet_lightning

if TYPE_CHECKING:
    from pyg_attnpool.training.data import MeshData
    from pyg_attnpool.training.module import MeshTraining

__all__ = [
    "MeshData",
    "MeshTraining",
    "epochs_for",
    "fit",
    "jitter",
    "keep_freed_memory",
    "load_checkpoint",
    "quiet_lightning",
    "rigid_motion",
]


def __getattr__(name: str) -> Any:
    if name == "MeshData":
        from pyg_attnpool.training.data import MeshData

        return MeshData
    if name == "MeshTraining":
        from pyg_attnpool.training.module import MeshTraining

        return MeshTraining
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
