from pyg_attnpool.models.autoencoder import AutoencoderConfig, MeshAutoencoder
from pyg_attnpool.models.coma import coma
from pyg_attnpool.models.morphable import MorphableModel
from pyg_attnpool.models.neural3dmm import neural3dmm
from pyg_attnpool.models.pca import PCA

__all__ = [
    "PCA",
    "AutoencoderConfig",
    "MeshAutoencoder",
    "MorphableModel",
    "coma",
    "neural3dmm",
]
