import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from pyg_attnpool.files import replacing
from pyg_attnpool.nn.attention_pool import AttentionPool
from pyg_attnpool.nn.cheb_conv import StaticChebConv
from pyg_attnpool.ops.backend import decompositions

# Of an export, relative to the largest output: rounding in another order, of which half precision,
# and a search whose end is hardly decided, make more.
TOLERANCE, ROUNDINGS = 1e-5, 10
NEARBY = 8  # inputs a rounding away, where an output seems to depend on it


Model = Module | Callable[[Tensor], Tensor]


def export(model: Model, example: Tensor, path: str | Path) -> float:
    r"""Writes a model by the ending of the file, :obj:`.pt2` (:meth:`export_torch`) or :obj:`.onnx`
    (:meth:`export_onnx`). A method of a model, such as :obj:`model.decode`, is exported alone.

    Raises:
        ValueError: If the ending is another one, or as these do.

    Example:
        >>> from pyg_attnpool.export import export
        >>> difference = export(model, meshes[:1], "model.pt2")
    """
    writers = {".pt2": export_torch, ".onnx": export_onnx}
    suffix = Path(path).suffix.lower()
    if suffix not in writers:
        raise ValueError(
            f"Expected a file name ending in one of {list(writers)}, or of a MorphableModel in "
            f"'.html' (got {path})"
        )
    return writers[suffix](model, example, path)


def export_torch(model: Model, example: Tensor, path: str | Path) -> float:
    r"""Writes a model as a :obj:`torch.export` program (:obj:`.pt2`) of ATen operators alone:
    :obj:`torch.export.load(path).module()` runs it where this package is not installed.

    The file is loaded again and compared with the model on random data of two other batch sizes;
    only one that agrees takes its name.

    Args:
        model (torch.nn.Module or callable): Any module of one tensor to one tensor, or a method of
            one such as :obj:`model.encode` or :obj:`model.decode`, without attention layers; see
            :func:`~pyg_attnpool.nn.freeze`. It is exported as it computes after
            :meth:`~torch.nn.Module.eval`.
        example (torch.Tensor): An input, such as meshes :obj:`[B, N, 3]`. The first dimension is
            the batch and stays free; no values are stored.
        path (str or Path): The file to write.

    Returns:
        The largest difference to the model, relative to its largest output.

    Raises:
        ValueError: If the model holds attention layers, or the example is no such input.
        RuntimeError: If the program differs from the model by more than 1e-5, ten roundings of its
            type where that is half precision, or ten times what the model itself loses to its
            double where that is more.
        OSError: If the file could not be written whole.

    Example:
        >>> from pyg_attnpool.export import export_torch
        >>> difference = export_torch(model.decode, model.latent_mean[None], "decoder.pt2")
        >>> torch.export.load("decoder.pt2").module()(torch.zeros(1, 3)).shape
        torch.Size([1, 642, 3])
    """
    model = _evaluating(model, example)
    program = _program(model, example, spmm=_bag)
    program.example_inputs = ((example.new_zeros(0, *example.shape[1:]),), {})  # of no meshes
    with replacing(path) as temporary, _quiet():
        # PyTorch's own writer tells of a full disk by a RuntimeError.
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        temporary.write_bytes(buffer.getvalue())
        return _compare(model, torch.export.load(temporary).module(), example, path)


def export_onnx(model: Model, example: Tensor, path: str | Path) -> float:
    r"""Writes a model as an ONNX file of standard operators, with one input :obj:`x` and one output
    :obj:`out` (extra :obj:`export`).

    The file is run in :obj:`onnxruntime` and compared as by :func:`export_torch`.

    Args:
        model (torch.nn.Module or callable): As in :func:`export_torch`.
        example (torch.Tensor): As in :func:`export_torch`.
        path (str or Path): The file to write.

    Returns:
        The largest difference to the model, relative to its largest output.

    Raises:
        ImportError: If :obj:`onnxruntime` or :obj:`onnxscript` is missing.
        ValueError: As :func:`export_torch` does, or if the model is in bfloat16.
        RuntimeError: As :func:`export_torch` does.

    Example:
        >>> from pyg_attnpool.export import export_onnx
        >>> difference = export_onnx(model.decode, model.latent_mean[None], "decoder.onnx")
    """
    model = _evaluating(model, example)
    if example.dtype == torch.bfloat16:
        raise ValueError(
            "Expected a model in float16 or single precision for ONNX (got torch.bfloat16, which "
            "onnxruntime does not run on a CPU)"
        )
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
        from onnx_ir.passes.common import DeduplicateInitializersPass

        from pyg_attnpool.onnx_solvers import SOLVERS
    except ImportError as e:
        raise ImportError(
            f"'export_onnx' requires '{e.name}': install it with "
            f'`pip install "pyg_attnpool[export]"`'
        ) from e
    program = _program(_padded(model), example, spmm=_gather, spiral_conv=_gather_spirals)
    with replacing(path) as temporary, _quiet():
        onnx_program = torch.onnx.export(
            program,
            input_names=["x"],
            output_names=["out"],
            dynamic_shapes=({0: "batch"},),
            custom_translation_table=SOLVERS,
            verbose=False,
        )
        assert onnx_program is not None  # as it is asked for no file
        # Every call of a layer has folded its own copy of the pattern.
        DeduplicateInitializersPass(size_limit=2**40)(onnx_program.model)
        onnx_program.save(temporary, external_data=False)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])

        def run(x: Tensor) -> Tensor:
            (out,) = session.run(None, {"x": x.numpy(force=True)})
            return torch.from_numpy(out).to(x.device)

        return _compare(model, run, example, path)


class _Method(Module):
    # A method of a module as a module.
    def __init__(self, module: Module, name: str):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.module, self.name)(x)


def _evaluating(model: Model, example: Tensor) -> Module:
    owner = getattr(model, "__self__", None)
    if not isinstance(model, Module):
        if not isinstance(owner, Module):
            raise TypeError(f"Expected a module, or a method of one (got {type(model).__name__})")
        model = _Method(owner, model.__name__)
    held = {
        name or "the model": type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, AttentionPool)
    }
    if held:
        raise ValueError(
            f"Expected a model without attention layers (got {held}): call `freeze(model)` first"
        )
    if not isinstance(example, Tensor) or example.dim() < 2 or example.numel() == 0:
        got = list(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"Expected an example of a batch of inputs (got {got})")
    if not example.is_floating_point():
        raise ValueError(f"Expected an example of floating point numbers (got {example.dtype})")
    tensors = (*model.parameters(), *model.buffers())
    kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if kinds and example.dtype not in kinds:
        raise ValueError(
            f"Expected an example of the model's type {sorted(map(str, kinds))} (got "
            f"{example.dtype})"
        )
    if not torch.isfinite(example).all():
        raise ValueError("Expected an example of finite numbers (got NaN or infinity)")
    return copy.deepcopy(model).eval()  # the caller's stays in its mode


def _program(
    model: Module, example: Tensor, **operators: Callable[..., Tensor]
) -> torch.export.ExportedProgram:
    # Zeros in place of the example, so that its values cannot reach a file; two of them, as
    # torch.export takes a batch of one for a constant.
    zeros = example.new_zeros(2, *example.shape[1:])
    # Earlier PyTorch guards against the largest integer of all.
    batch = torch.export.Dim("batch", min=1, max=2**31 - 1)
    with torch.no_grad(), _quiet():
        program = torch.export.export(
            model, (zeros,), dynamic_shapes=({0: batch},)
        ).run_decompositions(decompositions(**operators))
    # What only a backward pass reads, such as transposed patterns, would be most of the file. The
    # rest is copied: a view, such as a row of an edge_index, drags all of its storage along.
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    specs = []
    for node, spec in zip(nodes, program.graph_signature.input_specs, strict=True):
        if spec.target in program.constants:
            tensor = program.constants.pop(spec.target)
            if not node.users:
                program.graph.erase_node(node)
                continue
            program.constants[spec.target] = tensor.clone()
        specs.append(spec)
    program.graph_signature.input_specs = specs
    program.graph_module.recompile()
    return program


def _bag(
    rowptr: Tensor, col: Tensor, perm: Any, value: Tensor, x: Tensor, *transposed: Any
) -> Tensor:
    return torch.nn.functional.embedding_bag(
        col, x, rowptr, mode="sum", per_sample_weights=value, include_last_offset=True
    )


def _padded(model: Module) -> Module:
    # ONNX knows no sparse product. A product with a matrix that has as many entries in every row is
    # a gather and small dense products, so every row of a Laplacian is filled up with zeros.
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, StaticChebConv):
            lengths = layer.rowptr.diff()
            width, num_rows = int(lengths.max()), len(lengths)
            row = torch.repeat_interleave(lengths)
            entry = row * width + torch.arange(len(row), device=row.device) - layer.rowptr[row]
            layer.col = layer.col.new_zeros(num_rows * width).index_put((entry,), layer.col)
            padded = layer.laplacian.new_zeros(num_rows * width)
            layer.laplacian = padded.index_put((entry,), layer.laplacian)
            layer.rowptr = torch.arange(num_rows + 1, device=row.device) * width
    return model


def _gather(
    rowptr: Tensor, col: Tensor, perm: Any, value: Tensor, x: Tensor, *transposed: Any
) -> Tensor:
    num_rows = rowptr.size(0) - 1
    entries = x.index_select(0, col).view(num_rows, -1, x.size(1))
    return torch.matmul(value.view(num_rows, 1, -1), entries).squeeze(1)


def _gather_spirals(index: Tensor, *inputs: Any) -> Tensor:
    *_, x, weight, bias, _ = inputs
    length, channels, out_channels = weight.shape
    # A row of zeros stands for no vertex.
    vertex = torch.where(index < 0, x.size(0), index)
    if out_channels < channels:  # the narrower features are gathered
        steps = (torch.cat([y, y.new_zeros(1, *y.shape[1:])]) for y in (x @ w for w in weight))
        gathered = [y.index_select(0, vertex[:, i]) for i, y in enumerate(steps)]
        out = sum(gathered[1:], gathered[0])
    else:
        # Mesh by mesh, all steps of a spiral lie next to each other as they are gathered.
        rows = x.transpose(0, 1)
        rows = torch.cat([rows, rows.new_zeros(rows.size(0), 1, channels)], dim=1)
        rows = rows.index_select(1, vertex.flatten()).view(rows.size(0), -1, length * channels)
        out = (rows @ weight.flatten(0, 1)).transpose(0, 1)
    return out if bias is None else out + bias


@torch.no_grad()
def _compare(
    model: Module, run: Callable[[Tensor], Tensor], example: Tensor, path: str | Path
) -> float:
    # Data of the place and size of the example's, as activations may hide what is off elsewhere.
    spread = example.double().std(correction=0)
    scale = torch.where(spread > 0, spread, torch.ones_like(spread)).to(example.dtype)
    largest = 0.0
    for batch_size in (1, 2 * len(example) + 1):
        with torch.random.fork_rng(devices=[]):
            noise = torch.randn(batch_size, *example.shape[1:])
        x = example.double().mean(dim=0).to(example.dtype) + scale * noise.to(example)
        expected, out = model(x), run(x)
        difference = _difference(out, expected) if out.dtype == expected.dtype else float("inf")
        tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(expected.dtype).eps)
        if not difference <= tolerance:
            # A code that is searched for may be hardly decided by its mesh: roundings decide which
            # steps of the search are taken.
            tolerance = max(tolerance, ROUNDINGS * _by_rounding(model, x, expected))
        if not difference <= tolerance:
            raise RuntimeError(
                f"Expected an export that computes what the model computes, within {tolerance:g} "
                f"of its largest output (got a difference of {difference:g} for "
                f"{batch_size} inputs): {path} is not written"
            )
        largest = max(largest, difference)
    return largest


def _by_rounding(model: Module, x: Tensor, expected: Tensor) -> float:
    # How far the output is from that of double precision, or of inputs a rounding away.
    found = [copy.deepcopy(model).double()(x.double())]
    eps = torch.finfo(x.dtype).eps
    with torch.random.fork_rng(devices=[]):
        noise = torch.randn(NEARBY, *x.shape).to(x)
    found += [model(x * (1 + eps * part)) for part in noise]
    return max(_difference(out, expected) for out in found)


def _difference(out: Tensor, expected: Tensor) -> float:
    if out.shape != expected.shape:
        return float("inf")
    size = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return ((out.double() - expected.double()).abs().max() / size).item()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # What PyTorch says of itself, by version.
        for message in (
            ".*LeafSpec",
            "Attempted to insert a get_attr",
            ".* does not reference an nn",
            "Additional .* warnings suppressed about get_attr",
        ):
            warnings.filterwarnings("ignore", message=message)
        # The exporter tells of every library that is absent.
        logger = logging.getLogger("torch.onnx")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
