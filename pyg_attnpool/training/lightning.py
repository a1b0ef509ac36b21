r"""PyTorch Lightning, or the line that installs it."""

try:
    import pytorch_lightning as pl
    import torchmetrics
except ImportError as e:
    raise ImportError(
        f"Training a network requires '{e.name}': install it with "
        f'`pip install "pyg_attnpool[train]"`'
    ) from e

__all__ = ["pl", "torchmetrics"]
