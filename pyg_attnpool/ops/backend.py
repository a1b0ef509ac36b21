r"""How an operation reaches its backend: compiled code on a CPU, Triton on a GPU, or PyTorch."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyg_attnpool.ops import _cpu

TRITON = importlib.util.find_spec("triton") is not None


def on_cpu(tensor: Tensor) -> bool:
    r"""Whether the compiled operations take the tensor, of which tracing holds no values."""
    return _cpu.AVAILABLE and tensor.device.type == "cpu" and plain(tensor)


def on_gpu(tensor: Tensor) -> bool:
    r"""Whether the Triton kernels take the tensor."""
    return TRITON and tensor.device.type == "cuda"


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    r"""The type in which values of half precision are multiplied and summed."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def operator(name: str, mutates_args: Sequence[str] = ()) -> Callable:
    r"""Makes a function an operator that :func:`torch.compile` and :func:`torch.export` do not look
    into, as :func:`torch.library.custom_op` does, with its :meth:`register_fake` and
    :meth:`register_autograd`; :obj:`composed` is the function, which on tensors without values
    forms it of PyTorch's operations where it can. On plain tensors it is a
    :class:`torch.autograd.Function` instead, whose call costs a fraction: a layer calls several,
    and on small levels does little else.

    Args:
        name (str): The name in :obj:`torch.ops.pyg_attnpool`.
        mutates_args (list, optional): As in :func:`torch.library.custom_op`.
            (default: :obj:`()`)
    """

    def decorate(function: Callable) -> Callable:
        custom = torch.library.custom_op(
            f"pyg_attnpool::{name}", function, mutates_args=mutates_args
        )
        eager = function

        def call(*args: Any) -> Any:
            traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
            if traced or not all(plain(arg) for arg in args):
                return custom(*args)
            return eager(*args)

        def register_autograd(backward: Callable, *, setup_context: Callable):
            nonlocal eager
            custom.register_autograd(backward, setup_context=setup_context)

            # Not as a method of its own: PyTorch would bind the signature at every call.
            def forward(ctx: Any, *args: Any) -> Any:
                output = function(*args)
                setup_context(ctx, args, output)
                return output

            methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
            eager = type(name, (torch.autograd.Function,), methods).apply

        call.composed = function
        call.register_fake = custom.register_fake
        call.register_autograd = register_autograd
        return call

    return decorate


def plain(arg: Any) -> bool:
    r"""Whether an argument is not what tracing puts in the place of a tensor, and has values."""
    if not isinstance(arg, Tensor):
        return True
    return type(arg) in (Tensor, torch.nn.Parameter) and not arg.is_meta
