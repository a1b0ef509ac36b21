r"""The steps of an encoder or a decoder, run in one compiled call (csrc/plan.cpp)."""

from ctypes import Array, c_int64, c_void_p

import torch
from torch import Tensor

from pyg_attnpool.ops import _cpu
from pyg_attnpool.ops._cpu import CompiledStep

# As csrc/plan.cpp numbers them.
(STANDARDIZE, DENSE, DOTS, PRODUCT, CHEBYSHEV, TERMS, SPIRAL, PROJECT, CLENSHAW, PICK, FINISH) = (
    range(11)
)
ACTIVATIONS = {"relu": 1, "elu": 2, "silu": 3}
INPUT, OUTPUT = -1, -2  # in the place of a buffer


def available() -> bool:
    r"""Whether steps can be run: there is a compiled library."""
    return _cpu.AVAILABLE


def vector_size() -> int:
    r"""How many numbers the compiled steps take at a time, to which rows are filled up."""
    assert _cpu.library is not None
    return _cpu.library.plan_width()


def run_steps(steps: Array[CompiledStep], size: int, x: Tensor, out: Tensor) -> None:
    r"""Runs steps on every sample of a batch. They follow their pointers without a check.

    Args:
        steps (ctypes.Array): The steps.
        size (int): The numbers in the buffers of one sample.
        x (torch.Tensor): The input :obj:`[B, ...]`, contiguous and in single precision.
        out (torch.Tensor): The output :obj:`[B, ...]`, likewise.
    """
    assert _cpu.library is not None
    batch_size = x.size(0)
    threads = max(1, min(batch_size, torch.get_num_threads()))
    scratch = _cpu.workspace((threads * size,), torch.float32)
    _cpu.library.run_plan(
        len(steps),
        batch_size,
        x.numel() // max(1, batch_size),
        out.numel() // max(1, batch_size),
        size,
        threads,
        steps,
        x.data_ptr(),
        out.data_ptr(),
        scratch.data_ptr(),
    )


def checksum(tensors: list[Tensor]) -> int:
    r"""A number that changes with the values of contiguous tensors, in words of four bytes."""
    assert _cpu.library is not None
    words = (c_int64 * len(tensors))(*[t.numel() * t.element_size() // 4 for t in tensors])
    arrays = (c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
    return _cpu.library.checksum(len(tensors), words, arrays)
