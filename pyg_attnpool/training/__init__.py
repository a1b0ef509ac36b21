r"""Training of morphable models with PyTorch Lightning (extra :obj:`train`)."""

try:
    import pytorch_lightning  # noqa: F401
    import torchmetrics  # noqa: F401
except ImportError as e:
    raise ImportError(
        f"'pyg_attnpool.training' requires '{e.name}': install it with "
        f'`pip install "pyg_attnpool[train]"`'
    ) from e

from pyg_attnpool.training.augment import jitter, rigid_motion
from pyg_attnpool.training.data import MeshData
from pyg_attnpool.training.fit import fit, quiet_lightning
from pyg_attnpool.training.module import MeshTraining

__all__ = ["MeshData", "MeshTraining", "fit", "jitter", "quiet_lightning", "rigid_motion"]
