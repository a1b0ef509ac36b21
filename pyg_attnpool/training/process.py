r"""The process of a training: its memory, its random numbers and its log."""

import ctypes
import gc
import logging
import random
import sys
from contextlib import suppress

import numpy as np
import torch


def keep_freed_memory() -> None:
    r"""Lets the C library keep what a training step frees, on Linux: the next step needs it again,
    and the system would clear every page of it first. What is free now is given back, lest one
    training after another adds the gaps that it left. :func:`~pyg_attnpool.training.fit` calls it.

    Example:
        >>> from pyg_attnpool.training import keep_freed_memory
        >>> keep_freed_memory()  # before a training loop of your own
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):  # that of GNU
        gc.collect()
        libc.malloc_trim(0)
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 25)


def seed_process(*numbers: int) -> None:
    r"""Seeds the global generators of Python, NumPy and PyTorch, from which augmentations draw,
    with one or more non-negative numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def quiet_lightning() -> None:
    r"""Spares a script Lightning's lines on which devices there are and what else it sells."""
    with suppress(ImportError):
        import pytorch_lightning  # noqa: F401  # its import sets the level
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
