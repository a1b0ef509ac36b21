from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, ModuleList

from pyg_attnpool.files import replacing
from pyg_attnpool.mapping import Mapping
from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.nn import AttentionPool, AttentionUnpool, MappingPool, SpiralConv, StaticChebConv
from pyg_attnpool.nn.learned_pools import (
    DiffPool,
    FullPool,
    WeightedPool,
    average_mapping,
    ring_mapping,
)

ENCODER_CHANNELS = (3, 16, 16, 16, 32)
DECODER_CHANNELS = (32, 32, 16, 16, 16, 3)
WIDER_ENCODER_CHANNELS = (3, 16, 32, 64, 128)
WIDER_DECODER_CHANNELS = (128, 64, 32, 32, 16, 3)

VERSION = 1  # of a saved model
FILES = ("hierarchy.npz", "weights.safetensors", "model.json")

POOLINGS = ("qem", "attention", "full", "diffpool", "average", "variant")
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "elu": torch.nn.functional.elu,
    None: lambda x: x,
}


class MeshAutoencoder(torch.nn.Module):
    r"""A convolutional autoencoder of registered meshes: convolution and pooling down a
    :class:`~pyg_attnpool.mesh.MeshHierarchy`, a fully connected layer to the latent code, and the
    same way back up.

    Level :math:`l` of the encoder convolves, activates and pools to level :math:`l + 1`; level
    :math:`l` of the decoder unpools from level :math:`l + 1`, convolves and activates; a last
    convolution without activation follows.

    Args:
        hierarchy (MeshHierarchy): The levels of the template.
        conv (str, optional): The convolution, :obj:`"cheb"`
            (:class:`~pyg_attnpool.nn.StaticChebConv`) or :obj:`"spiral"`
            (:class:`~pyg_attnpool.nn.SpiralConv`). (default: :obj:`"cheb"`)
        down (str, optional): The pooling (default: :obj:`"qem"`):

            1. :obj:`"qem"`: the hierarchy's own mapping

            2. :obj:`"attention"`: :class:`~pyg_attnpool.nn.AttentionPool` over it

            3. :obj:`"full"`: a matrix of parameters, :class:`~pyg_attnpool.nn.FullPool`

            4. :obj:`"diffpool"`: an assignment from the features,
            :class:`~pyg_attnpool.nn.DiffPool`

            5. :obj:`"average"`: equal weights over what simplification joined,
            :func:`~pyg_attnpool.nn.learned_pools.average_mapping`

            6. :obj:`"variant"`: trainable weights over the neighbours of the vertex that
            simplification kept, :class:`~pyg_attnpool.nn.WeightedPool`

        up (str, optional): The unpooling, likewise. If :obj:`None`, that of :obj:`down`.
            (default: :obj:`None`)
        encoder_channels (tuple, optional): The input channels and those after the convolution of
            each level. (default: :obj:`(3, 16, 16, 16, 32)`)
        decoder_channels (tuple, optional): The channels at the coarsest level, those after the
            convolution of each level from coarse to fine, and the output channels.
            (default: :obj:`(32, 32, 16, 16, 16, 3)`)
        latent_channels (int, optional): Size of the latent code. (default: :obj:`8`)
        activation (str, optional): The activation after every convolution but the last,
            :obj:`"relu"`, :obj:`"elu"` or :obj:`None`. (default: :obj:`"relu"`)
        latent_activation (str, optional): That of the latent code. A ReLU can kill a latent
            dimension for good. (default: :obj:`"relu"`)
        expand_activation (str, optional): That of the fully connected layer from the latent code
            back to the coarsest level. (default: :obj:`"relu"`)
        out_bias (bool, optional): If set to :obj:`True`, the last convolution learns a bias.
            (default: :obj:`False`)
        K (int, optional): Chebyshev filter size. (default: :obj:`6`)
        spirals (dict, optional): Arguments of :meth:`MeshHierarchy.spirals`, such as :obj:`hops`;
            a list holds one value per level. (default: :obj:`None`)
        down_kwargs (dict, optional): Arguments of :class:`~pyg_attnpool.nn.AttentionPool`, such as
            :obj:`k`, :obj:`init` or :obj:`prior=None` for attention alone, or of
            :class:`~pyg_attnpool.nn.DiffPool`. (default: :obj:`None`)
        up_kwargs (dict, optional): Arguments of :class:`~pyg_attnpool.nn.AttentionUnpool` or
            :class:`~pyg_attnpool.nn.DiffPool`. Where a level has fewer vertices than :obj:`k`, all
            are kept. (default: :obj:`None`)

    Shapes:
        - **input:** vertex features :math:`(B, N, 3)`
        - **output:** vertex features :math:`(B, N, 3)`
    """

    def __init__(
        self,
        hierarchy: MeshHierarchy,
        conv: str = "cheb",
        down: str = "qem",
        up: str | None = None,
        encoder_channels: Sequence[int] = ENCODER_CHANNELS,
        decoder_channels: Sequence[int] = DECODER_CHANNELS,
        latent_channels: int = 8,
        activation: str | None = "relu",
        latent_activation: str | None = "relu",
        expand_activation: str | None = "relu",
        out_bias: bool = False,
        K: int = 6,
        spirals: dict[str, Any] | None = None,
        down_kwargs: dict[str, Any] | None = None,
        up_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__()
        # What `save` needs to make the model again.
        self.hierarchy = hierarchy
        self.arguments = {
            "conv": conv,
            "down": down,
            "up": up,
            "encoder_channels": list(encoder_channels),
            "decoder_channels": list(decoder_channels),
            "latent_channels": latent_channels,
            "activation": activation,
            "latent_activation": latent_activation,
            "expand_activation": expand_activation,
            "out_bias": out_bias,
            "K": K,
            "spirals": spirals,
            "down_kwargs": down_kwargs,
            "up_kwargs": up_kwargs,
        }
        up = down if up is None else up
        num_vertices = hierarchy.num_vertices
        steps = len(num_vertices) - 1
        if conv not in ("cheb", "spiral"):
            raise ValueError(f"Expected 'conv' to be 'cheb' or 'spiral' (got {conv!r})")
        if len(encoder_channels) != steps + 1 or len(decoder_channels) != steps + 2:
            raise ValueError(
                f"Expected {steps + 1} 'encoder_channels' and {steps + 2} 'decoder_channels' for a "
                f"hierarchy of {steps + 1} levels (got {len(encoder_channels)} and "
                f"{len(decoder_channels)})"
            )
        if latent_channels < 1:
            raise ValueError(f"Expected 'latent_channels' to be positive (got {latent_channels})")
        chosen = {
            "activation": activation,
            "latent_activation": latent_activation,
            "expand_activation": expand_activation,
        }
        for name, value in chosen.items():
            if value not in ACTIVATIONS:
                raise ValueError(f"Expected '{name}' to be 'relu', 'elu' or None (got {value!r})")

        self.num_vertices = tuple(num_vertices)
        self.latent_channels = latent_channels
        self.activation = activation
        self.latent_activation = latent_activation
        self.expand_activation = expand_activation

        # A level serves a convolution of the encoder and one or two of the decoder.
        neighbours = [
            hierarchy.edge_index(level) if conv == "cheb" else _spirals(hierarchy, level, spirals)
            for level in range(steps)
        ]

        def make_conv(level: int, in_channels: int, out_channels: int, bias: bool = True):
            if conv == "spiral":
                return SpiralConv(in_channels, out_channels, neighbours[level], bias)
            return StaticChebConv(
                in_channels, out_channels, K, neighbours[level], num_vertices[level], bias
            )

        self.down_convs = ModuleList(
            make_conv(level, encoder_channels[level], encoder_channels[level + 1])
            for level in range(steps)
        )
        self.pools = ModuleList(
            _pooling(
                AttentionPool,
                down,
                hierarchy,
                level,
                level + 1,
                encoder_channels[level + 1],
                down_kwargs,
            )
            for level in range(steps)
        )
        self.to_latent = Linear(num_vertices[-1] * encoder_channels[-1], latent_channels)
        self.from_latent = Linear(latent_channels, num_vertices[-1] * decoder_channels[0])
        # From coarse to fine, in the order of use.
        self.unpools = ModuleList(
            _pooling(
                AttentionUnpool, up, hierarchy, level + 1, level, decoder_channels[i], up_kwargs
            )
            for i, level in enumerate(reversed(range(steps)))
        )
        self.up_convs = ModuleList(
            make_conv(level, decoder_channels[i], decoder_channels[i + 1])
            for i, level in enumerate(reversed(range(steps)))
        )
        self.out_conv = make_conv(0, decoder_channels[-2], decoder_channels[-1], out_bias)

    def encode(self, x: Tensor) -> Tensor:
        r"""Vertex features :obj:`[B, N, 3]` to latent codes :obj:`[B, latent_channels]`."""
        expected = self.num_vertices[0], self.down_convs[0].in_channels
        if x.dim() != 3 or x.shape[1:] != expected:
            raise ValueError(
                f"Expected vertices of shape [B, {expected[0]}, {expected[1]}] "
                f"(got {list(x.shape)})"
            )
        activation = ACTIVATIONS[self.activation]
        x = x.transpose(0, 1)
        for conv, pool in zip(self.down_convs, self.pools, strict=True):
            x = pool.rows(activation(conv.rows(x)))
        return ACTIVATIONS[self.latent_activation](self.to_latent(x.transpose(0, 1).flatten(1)))

    def decode(self, z: Tensor) -> Tensor:
        r"""Latent codes :obj:`[B, latent_channels]` to vertex features :obj:`[B, N, 3]`."""
        if z.dim() != 2 or z.size(1) != self.latent_channels:
            raise ValueError(
                f"Expected latent codes of shape [B, {self.latent_channels}] (got {list(z.shape)})"
            )
        activation = ACTIVATIONS[self.activation]
        x = ACTIVATIONS[self.expand_activation](self.from_latent(z))
        x = x.unflatten(1, (self.num_vertices[-1], -1)).transpose(0, 1)
        for conv, unpool in zip(self.up_convs, self.unpools, strict=True):
            x = activation(conv.rows(unpool.rows(x)))
        return self.out_conv.rows(x).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        r"""Reconstructs vertex features :obj:`[B, N, 3]`."""
        return self.decode(self.encode(x))

    def save(self, folder: str | Path):
        r"""Writes the model to a folder (extra :obj:`export`): its weights and mappings
        (:obj:`weights.safetensors`), its hierarchy (:obj:`hierarchy.npz`), and the arguments that
        make it from them (:obj:`model.json`), each under a temporary name until all are whole.

        Raises:
            ImportError: If :obj:`safetensors` is not installed.
            TypeError: If JSON cannot hold an argument, such as a tensor as :obj:`prior`.
        """
        safetensors = _import_safetensors()
        weights = safetensors.save(
            {
                # Copies, as the format refuses views of one storage.
                name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in self.state_dict().items()
            }
        )
        description = {
            "version": VERSION,
            "arguments": self.arguments,
            # As built, each of them would be learned.
            "frozen": self._frozen(),
            "hierarchy": self.hierarchy.hash,
            "weights": hashlib.sha256(weights).hexdigest(),
        }
        try:
            text = json.dumps(description, indent=2)
        except TypeError as e:
            raise TypeError(f"Expected arguments that JSON can hold (got: {e})") from e
        with ExitStack() as stack:
            paths = [stack.enter_context(replacing(Path(folder) / name)) for name in FILES]
            self.hierarchy.save(paths[0])
            paths[1].write_bytes(weights)
            paths[2].write_text(text + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> MeshAutoencoder:
        r"""Reads a model written by :meth:`save`, onto the CPU.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, of another version, or of another model than the
                others.
        """
        hierarchy_path, weights_path, path = (Path(folder) / name for name in FILES)
        try:
            description = json.loads(path.read_text())
            version = description["version"]
            arguments, frozen = description["arguments"], description["frozen"]
            expected_hierarchy, expected_weights = description["hierarchy"], description["weights"]
        except (ValueError, TypeError, KeyError) as e:
            raise ValueError(f"Expected a whole description of a model in {path} (got: {e})") from e
        if version != VERSION:
            raise ValueError(f"Expected a model of version {VERSION} in {path} (got {version})")
        hierarchy = MeshHierarchy.load(hierarchy_path)
        if hierarchy.hash != expected_hierarchy:
            raise ValueError(
                f"Expected the hierarchy {expected_hierarchy[:16]} of {path} in {hierarchy_path} "
                f"(got {hierarchy.hash[:16]})"
            )
        weights = weights_path.read_bytes()
        if (found := hashlib.sha256(weights).hexdigest()) != expected_weights:
            raise ValueError(
                f"Expected the weights {expected_weights[:16]} of {path} in {weights_path} "
                f"(got {found[:16]}, of another model or damaged)"
            )
        try:
            with torch.random.fork_rng(devices=[]):  # every initial value is replaced
                model = cls(hierarchy, **arguments)
                for name in frozen:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, model.get_submodule(name).freeze())
            state = _read_safetensors(weights)
            # Assigned, so that the type is the saved one; what is not in the file follows it.
            model.to(state["to_latent.weight"].dtype).load_state_dict(state, assign=True)
        except (TypeError, KeyError, AttributeError, RuntimeError) as e:
            raise ValueError(f"Expected a model that fits its weights in {path} (got: {e})") from e
        return model

    def _frozen(self) -> list[str]:
        fixed = ("qem", "average")
        down = self.arguments["down"]
        up = self.arguments["up"] or down
        return [
            f"{name}.{i}"
            for name, method in (("pools", down), ("unpools", up))
            for i, pool in enumerate(getattr(self, name))
            if method not in fixed and isinstance(pool, MappingPool)
        ]

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}(num_vertices={list(self.num_vertices)}, "
            f"latent_channels={self.latent_channels})"
        )


def _read_safetensors(content: bytes) -> dict[str, Tensor]:
    # A JSON header of its length before it, then the tensors. Read here, so that a saved model
    # loads with the core dependencies alone.
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
    dtypes |= {"BF16": torch.bfloat16, "I64": torch.int64}
    start = 8 + int.from_bytes(content[:8], "little")
    state = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            data = bytearray(content[begin:end])
            state[name] = torch.frombuffer(data, dtype=dtypes[entry["dtype"]]).view(entry["shape"])
    return state


def _import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as e:
        raise ImportError(
            "Saving models requires 'safetensors': install it with "
            '`pip install "pyg_attnpool[export]"`'
        ) from e
    return safetensors.torch


def _spirals(hierarchy: MeshHierarchy, level: int, options: dict[str, Any] | None) -> Tensor:
    # Reference vertices are of the template for all levels; other lists hold a value per level.
    steps = len(hierarchy.num_vertices) - 1
    kwargs = {}
    for name, value in (options or {}).items():
        if name != "reference" and isinstance(value, list | tuple):
            if len(value) != steps:
                raise ValueError(
                    f"Expected one '{name}' per level that is convolved, {steps} (got {value})"
                )
            value = value[level]
        kwargs[name] = value
    return hierarchy.spirals(level, **kwargs)


def _pooling(
    attention: type[AttentionPool] | type[AttentionUnpool],
    method: str,
    hierarchy: MeshHierarchy,
    source: int,
    target: int,
    channels: int,
    kwargs: dict[str, Any] | None,
) -> torch.nn.Module:
    if method not in POOLINGS:
        raise ValueError(f"Expected pooling by one of {POOLINGS} (got {method!r})")
    kwargs = dict(kwargs or {})
    if kwargs and method not in ("attention", "diffpool"):
        raise ValueError(f"Expected no pooling arguments with {method!r} (got {sorted(kwargs)})")
    num_source, num_target = (hierarchy.num_vertices[level] for level in (source, target))
    dtype = torch.get_default_dtype()
    if method == "full":
        return FullPool(num_source, num_target)
    if method == "diffpool":
        edge_index = hierarchy.edge_index(source)
        return DiffPool(channels, num_target, edge_index, num_source, **kwargs)
    level, upwards = min(source, target), source > target
    if method == "average":
        return MappingPool(average_mapping(hierarchy, level, upwards).to(dtype))
    if method == "variant":
        return WeightedPool(ring_mapping(hierarchy, level, upwards).to(dtype))
    prior: Mapping = hierarchy.down[source] if source < target else hierarchy.up[target]
    prior = prior.to(dtype)
    if method == "qem":
        return MappingPool(prior)
    kwargs = {"k": 2 if attention is AttentionPool else 32, "prior": prior, **kwargs}
    if kwargs["k"] is not None:
        kwargs["k"] = min(kwargs["k"], num_source)
    return attention(
        num_source,
        num_target,
        source_pos=hierarchy.positions(source),
        target_pos=hierarchy.positions(target),
        **kwargs,
    )
