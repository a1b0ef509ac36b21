r"""How an operation reaches its backend: compiled code on a CPU, Triton on a GPU, or PyTorch."""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyg_attnpool.ops import _cpu

Out = TypeVar("Out")

TRITON = importlib.util.find_spec("triton") is not None

# Asked in every call of an operator, and so looked up once.
_transformed = torch._C._are_functorch_transforms_active
_tracing = torch._C._is_tracing
_num_modes = torch._C._len_torch_dispatch_stack
_batch_of_gradients = torch._C._functorch.is_legacy_batchedtensor
_PLAIN = Tensor, torch.nn.Parameter


def on_cpu(tensor: Tensor) -> bool:
    r"""Whether the compiled operations take the tensor. A tensor that is traced has no values, so
    they do not."""
    return _cpu.AVAILABLE and tensor.is_cpu and type(tensor) in _PLAIN and not composing()


def on_gpu(tensor: Tensor) -> bool:
    r"""Whether the Triton kernels take the tensor."""
    return TRITON and tensor.is_cuda and not composing()


def composing() -> bool:
    r"""Whether every operation must be one of PyTorch's own, which can be differentiated forward,
    batched, traced and counted: in the function transforms of :mod:`torch.func`, in forward mode,
    in :func:`torch.jit.trace`, and under a dispatch mode, as that of a FLOP counter."""
    if _transformed():
        return True
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or _tracing() or _num_modes() > 0


@contextmanager
def outside() -> Iterator[None]:
    r"""Leaves the transforms and dispatch modes of :func:`composing` for the length of a block, in
    which a module may change itself."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.utils._python_dispatch import _disable_current_modes

    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield


def own_types(tensor: Tensor) -> AbstractContextManager[Any]:
    r"""Leaves autocast for the length of a block, which picks its types itself. It knows no tensors
    without values."""
    if tensor.is_meta:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    r"""The type to compute in: single precision for half precision, else the type itself.

    >>> at_least_single(torch.bfloat16), at_least_single(torch.float64)
    (torch.float32, torch.float64)

    Raises:
        TypeError: If the type is complex, whose imaginary part would be lost.
    """
    if dtype.is_complex:
        raise TypeError(f"Expected real numbers (got {dtype})")
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def single(tensor: Tensor) -> Tensor:
    r"""The tensor as the compiled operations take it: contiguous, in single or double
    precision."""
    return tensor.to(at_least_single(tensor.dtype)).contiguous()


class Operator(Generic[Out]):
    r"""A function that :func:`torch.compile` and :func:`torch.export` take for one operator.

    On tensors that are traced it is a :func:`torch.library.custom_op`. On plain tensors it is a
    :class:`torch.autograd.Function` instead, whose call costs a fraction: a layer calls several
    operators, and on small levels it does little else. Where only PyTorch's own operations will do
    (:func:`composing`), it is the function itself.

    It is made by :func:`operator` and called with arguments by position.

    Attributes:
        composed (callable): The function itself. Called with tensors that are traced, it leaves
            PyTorch's operations in the trace, which differentiate themselves.
        overload (torch._ops.OpOverload): The operator as exported programs hold it.
    """

    def __init__(self, name: str, function: Callable[..., Out], mutates_args: Sequence[str] = ()):
        functools.update_wrapper(self, function)
        self.composed = function
        self._name = name
        self._eager = function
        self._custom = torch.library.custom_op(
            f"pyg_attnpool::{name}", function, mutates_args=mutates_args
        )
        self.overload = getattr(torch.ops.pyg_attnpool, name).default

    def __call__(self, *args: Any) -> Out:
        if torch.compiler.is_compiling():
            return self.composed(*args) if _transformed() else self._custom(*args)
        if _transformed():
            return self.composed(*args)
        for arg in args:
            # With `is_grads_batched`, PyTorch calls the operator for each gradient of a batch.
            if isinstance(arg, Tensor) and (not plain(arg) or _batch_of_gradients(arg)):
                return self._custom(*args)
        return self.composed(*args) if composing() else self._eager(*args)

    def register_fake(self, fake: Callable[..., Out]) -> Callable[..., Out]:
        r"""Sets the function that gives the shapes of the output; see
        :meth:`torch.library.CustomOpDef.register_fake`."""
        return self._custom.register_fake(fake)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[[Any, Any, Out], None]
    ) -> None:
        r"""Sets the backward pass; see :meth:`torch.library.CustomOpDef.register_autograd`."""
        self._custom.register_autograd(backward, setup_context=setup_context)
        function = self.composed

        # `setup_context` is called here. As a method of the class, PyTorch would bind the
        # signature of `forward` at every call.
        def forward(ctx: Any, *args: Any) -> Out:
            output = function(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        made: Any = type(self._name, (torch.autograd.Function,), methods)
        self._eager = made.apply


_decompositions: dict[Any, Callable[..., Any]] = {}


def operator(
    name: str, mutates_args: Sequence[str] = (), decomposes: bool = False
) -> Callable[[Callable[..., Out]], Operator[Out]]:
    r"""Makes a function an :class:`Operator`. The annotations of its arguments become the
    operator's schema.

    Args:
        name (str): The name in :obj:`torch.ops.pyg_attnpool`.
        mutates_args (list, optional): As in :func:`torch.library.custom_op`.
            (default: :obj:`()`)
        decomposes (bool, optional): If set to :obj:`True`, :func:`decompositions` lists the
            operator. (default: :obj:`False`)
    """

    def decorate(function: Callable[..., Out]) -> Operator[Out]:
        made = Operator(name, function, mutates_args)
        if decomposes:
            _decompositions[made.overload] = made.composed
        return made

    return decorate


def decompositions(**others: Callable[..., Any]) -> dict[Any, Callable[..., Any]]:
    r"""The operators that a model without attention layers runs, each with the PyTorch operations
    that compute the same: what :meth:`torch.export.ExportedProgram.run_decompositions` takes.

    Args:
        **others (callable): Other functions for some of the operators, by name, such as
            :obj:`spmm`. They take the operator's arguments.

    Raises:
        ValueError: If a name is that of no such operator.

    >>> torch.ops.pyg_attnpool.cheb_conv.default in decompositions()
    True
    """
    table = dict(_decompositions)
    named = {overload._opname: overload for overload in table}
    for name, function in others.items():
        if name not in named:
            raise ValueError(f"Expected an operator of {sorted(named)} (got '{name}')")
        table[named[name]] = function
    return table


def plain(arg: Any) -> bool:
    r"""Whether an argument has values. Tracing replaces tensors by objects without; an argument
    that is no tensor always has."""
    return not isinstance(arg, Tensor) or (type(arg) in _PLAIN and not arg.is_meta)


def readable(*tensors: Tensor) -> bool:
    r"""Whether an operation may look at the values of tensors: they have some, and nothing records
    what it does with them."""
    recorded = composing() or torch.compiler.is_compiling()
    return not recorded and all(plain(tensor) for tensor in tensors)


def has_version(tensor: Tensor) -> bool:
    r"""Whether a tensor is one of values, and no batch of buffers, as that of an ensemble."""
    return plain(tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
