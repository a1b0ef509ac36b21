r"""The published formulas as one would write them today with the operations of PyTorch alone: what
the speed scripts compare with. Every layer takes the parameters of one of ours."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, ModuleList

from pyg_attnpool import AttentionPool, AttentionUnpool, Mapping, SpiralConv, StaticChebConv
from pyg_attnpool.models import MeshAutoencoder
from pyg_attnpool.models.autoencoder import ACTIVATIONS
from pyg_attnpool.nn import MappingPool


class PlainAttention(Module):
    r"""Attention with all scores, and the mapping as a dense matrix."""

    def __init__(self, layer: AttentionPool | AttentionUnpool):
        super().__init__()
        self.num_source, self.k = layer.num_source, layer.k
        self.query, self.key = layer.query, layer.key
        self.fusion_weight, self.log_beta = layer.fusion_weight, layer.log_beta
        prior = Mapping(layer.prior_index, layer.prior_weight, layer.num_source).to_dense()
        self.register_buffer("prior", prior)

    def forward(self, x: Tensor) -> Tensor:
        score = F.normalize(self.query, dim=-1) @ F.normalize(self.key, dim=-1).t()
        index = score.topk(self.k, dim=-1).indices
        if self.log_beta is None:
            kept = score.clamp(min=1e-25) * torch.zeros_like(score).scatter(1, index, 1.0)
            attention = kept / kept.sum(dim=-1, keepdim=True)
        else:
            outside = torch.full_like(score, -torch.inf).scatter(1, index, 0.0)
            attention = (self.log_beta.exp() * score + outside).softmax(dim=-1)
        return (self.fusion_weight * attention + (1 - self.fusion_weight) * self.prior) @ x


class PlainMapping(Module):
    r"""A fixed mapping by messages along its entries."""

    def __init__(self, layer: MappingPool):
        super().__init__()
        self.num_target = layer.num_target
        (self.source, self.target), weight = layer.mapping().to_edge_index()
        self.register_buffer("weight", weight.unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        messages = self.weight * x.index_select(1, self.source)
        return x.new_zeros(x.size(0), self.num_target, x.size(2)).index_add(
            1, self.target, messages
        )


class PlainChebConv(Module):
    r"""Chebyshev convolution by messages along the edges."""

    def __init__(self, layer: StaticChebConv):
        super().__init__()
        self.lins, self.bias = layer.lins, layer.bias
        self.row = torch.repeat_interleave(layer.rowptr.diff())
        self.col = layer.col
        self.register_buffer("norm", layer.laplacian.unsqueeze(1))

    def propagate(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(1, self.row, self.norm * x.index_select(1, self.col))

    def forward(self, x: Tensor) -> Tensor:
        terms = [x, self.propagate(x)]
        out = self.lins[0](terms[0]) + self.lins[1](terms[1])
        for lin in self.lins[2:]:
            terms.append(2 * self.propagate(terms[-1]) - terms[-2])
            out = out + lin(terms[-1])
        return out if self.bias is None else out + self.bias


class PlainSpiralConv(Module):
    r"""Spiral convolution on gathered neighbours, a vertex of zeros where a spiral has none."""

    def __init__(self, layer: SpiralConv):
        super().__init__()
        self.lin = layer.lin
        self.spirals = layer.spirals.where(layer.spirals >= 0, layer.num_nodes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 1))
        steps = x.index_select(1, self.spirals.flatten())
        return self.lin(steps.view(x.size(0), self.spirals.size(0), -1))


PLAIN = {
    AttentionPool: PlainAttention,
    AttentionUnpool: PlainAttention,
    MappingPool: PlainMapping,
    StaticChebConv: PlainChebConv,
    SpiralConv: PlainSpiralConv,
}


class PlainAutoencoder(Module):
    r"""The autoencoder with a copy of every layer in its plain form."""

    def __init__(self, model: MeshAutoencoder):
        super().__init__()
        model = copy.deepcopy(model)
        for name, child in model.named_children():
            if isinstance(child, ModuleList):
                child = ModuleList(PLAIN[type(layer)](layer) for layer in child)
            setattr(self, name, PLAIN[type(child)](child) if type(child) in PLAIN else child)
        config = model.config
        names = config.activation, config.latent_activation, config.expand_activation
        self.activation, self.latent_activation, self.expand_activation = (
            ACTIVATIONS[name] for name in names
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv, pool in zip(self.down_convs, self.pools, strict=True):
            x = pool(self.activation(conv(x)))
        z = self.latent_activation(self.to_latent(x.flatten(1)))
        x = self.expand_activation(self.from_latent(z)).view_as(x)
        for conv, unpool in zip(self.up_convs, self.unpools, strict=True):
            x = self.activation(conv(unpool(x)))
        return self.out_conv(x)
