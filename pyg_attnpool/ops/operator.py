from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


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
