from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module

from pyg_attnpool.ops.backend import at_least_single

MOMENTUM = 0.95
BETAS = (0.9, 0.999)
EPS = 1e-8


class Muon(torch.optim.Optimizer):
    r"""Momentum that is made orthogonal for the weights of fully connected layers (`Muon
    <https://kellerjordan.github.io/posts/muon/>`_), and Adam for all other parameters

    .. math::
        \mathbf{M} &\leftarrow \mu \mathbf{M} + (1 - \mu) \mathbf{G}, \qquad
        \mathbf{U} \mathbf{\Sigma} \mathbf{V}^{\top} = \mu \mathbf{M} + (1 - \mu) \mathbf{G}

        \mathbf{W} &\leftarrow \mathbf{W} -
        0.2 \sqrt{\max(n, m)} \, \eta \, \mathbf{U} \mathbf{V}^{\top}

    so that all directions of a weight :math:`[n, m]` learn at one rate, by steps of the size of
    Adam's (`Liu et al. <https://arxiv.org/abs/2502.16982>`_). Five steps of Newton and Schulz take
    the place of the decomposition. (PyTorch has it from version 2.9 on.)

    Args:
        module (torch.nn.Module): Whose parameters to train.
        lr (float): The rate of the weights of fully connected layers.
        adam_lr (float): That of all other parameters.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> layer(torch.ones(3)).sum().backward()
        >>> [len(group["params"]) for group in Muon(layer, 1e-2, 3e-3).param_groups]
        [1, 1]
    """

    def __init__(self, module: Module, lr: float, adam_lr: float) -> None:
        weights = [m.weight for m in module.modules() if isinstance(m, Linear)]
        known = {id(weight) for weight in weights}
        others = [p for p in module.parameters() if id(p) not in known]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in found if p.requires_grad], "lr": rate, "orthogonal": orthogonal}
            for found, rate, orthogonal in ((weights, lr, True), (others, adam_lr, False))
        ]
        super().__init__([group for group in groups if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        r"""One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._orthogonal if group["orthogonal"] else self._adam
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * update(p.grad, self.state[p]))
        return loss

    @staticmethod
    def _orthogonal(grad: Tensor, state: dict[str, Any]) -> Tensor:
        momentum = state.setdefault("momentum", torch.zeros_like(grad))
        momentum.lerp_(grad, 1 - MOMENTUM)
        ahead = grad.lerp(momentum, MOMENTUM)
        return 0.2 * max(grad.shape) ** 0.5 * orthogonalized(ahead)

    @staticmethod
    def _adam(grad: Tensor, state: dict[str, Any]) -> Tensor:
        for name in ("first", "second"):
            state.setdefault(name, torch.zeros_like(grad))
        state["steps"] = state.get("steps", 0) + 1
        state["first"].lerp_(grad, 1 - BETAS[0])
        state["second"].lerp_(grad.square(), 1 - BETAS[1])
        first, second = (
            state[name] / (1 - beta ** state["steps"])
            for name, beta in zip(("first", "second"), BETAS, strict=True)
        )
        return first / (second.sqrt() + EPS)


def orthogonalized(x: Tensor, steps: int = 5) -> Tensor:
    r"""About the orthogonal factor :math:`\mathbf{U} \mathbf{V}^{\top}` of a matrix: its singular
    values, which start at most at one, come to lie between 0.7 and 1.2.

    Args:
        x (torch.Tensor): A matrix :obj:`[n, m]`.
        steps (int, optional): Steps of the iteration of Newton and Schulz. (default: :obj:`5`)

    Example:
        >>> found = torch.linalg.svdvals(orthogonalized(torch.diag(torch.tensor([3.0, 1.0]))))
        >>> bool(found.min() > 0.6 and found.max() < 1.3)
        True
    """
    tall, dtype = x.size(0) > x.size(1), x.dtype
    x = (x.t() if tall else x).to(at_least_single(dtype))
    x = x / x.norm().clamp(min=1e-7)
    # The coefficients have the largest slope at zero for which values near one stay there.
    a, b, c = 3.4445, -4.7750, 2.0315
    if x.size(1) < 2 * x.size(0):
        for _ in range(steps):
            gram = x @ x.t()
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    else:
        # Every step multiplies by a polynomial of the first Gram matrix. These are the small
        # factors: of a layer of all vertices, the long side is read twice in all.
        first = gram = x @ x.t()
        factor = torch.eye(len(x), dtype=x.dtype, device=x.device)
        for step in range(steps):
            if step > 0:
                gram = factor @ first @ factor
            change = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            factor = torch.addmm(factor, change, factor, beta=a)
        x = factor @ x
    x = x.to(dtype)
    return x.t() if tall else x
