r"""PyTorch's check of custom operators, by version."""

import inspect

import torch

TOLERANT = "rtol" in inspect.signature(torch.library.opcheck).parameters
WITHOUT_VALUES = ("test_schema", "test_autograd_registration", "test_faketensor")


def opcheck(operator, args, **tolerance):
    r"""Earlier PyTorch compares traced values within its own tolerance alone: where another one is
    needed, it checks the rest."""
    if tolerance and not TOLERANT:
        torch.library.opcheck(operator, args, test_utils=WITHOUT_VALUES)
    else:
        torch.library.opcheck(operator, args, **tolerance)
