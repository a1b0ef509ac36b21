from pyg_attnpool.models.autoencoder import AutoencoderConfig, MeshAutoencoder
from pyg_attnpool.models.coma import coma
from pyg_attnpool.models.modal import ModalAutoencoder, ModalConfig, modal
from pyg_attnpool.models.morphable import MorphableModel
from pyg_attnpool.models.neural3dmm import neural3dmm
from pyg_attnpool.models.pca import PCA

__all__ = [
    "PCA",
    "AutoencoderConfig",
    "MeshAutoencoder",
    "ModalAutoencoder",
    "ModalConfig",
    "MorphableModel",
    "coma",
    "modal",
    "neural3dmm",
]
