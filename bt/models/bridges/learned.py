"""Bridges with linear maps of [x; y], x the previous cross-modal output and y the uni-modal state.

At base size (width 768, five bridges for each modality) they have 11.8 M parameters (gate, linear) and 35.4 M (MLPs),
as the paper's ablation lists them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bt.models.bridges.base import PairwiseBridge
from bt.models.checks import check_range
from bt.models.heads import init_new


class _Mapped(PairwiseBridge):
    """maps: for each layer from the second on, the map of [x; y] that `make` returns."""

    def __init__(self, width: int, layers: int, norm_eps: float = 1e-5, init_std: float = 0.02):
        super().__init__(width, layers, norm_eps)
        check_range("bridge.init_std", init_std, above=0)
        self.maps = nn.ModuleList(self.make(width) for _ in range(layers - 1))
        init_new(self.maps, init_std)

    def make(self, width: int) -> nn.Module:
        return nn.Linear(2 * width, width)

    def mapped(self, layer: int, uni: Tensor, own: Tensor) -> Tensor:
        return self.maps[layer - 1](torch.cat([own, uni], dim=-1))


class LinearBridge(_Mapped):
    """W [x; y] (paper, definition (e))."""

    def mix(self, layer: int, uni: Tensor, own: Tensor) -> Tensor:
        return self.mapped(layer, uni, own)


class GateBridge(_Mapped):
    """a x + (1 - a) y, a = sigmoid(W [x; y]), a value for each entry (paper, definition (d))."""

    def mix(self, layer: int, uni: Tensor, own: Tensor) -> Tensor:
        return torch.lerp(uni, own, torch.sigmoid(self.mapped(layer, uni, own)))


class MLPBridge(_Mapped):
    """W2 GELU(W1 [x; y]), W1 from 2D to 2D (paper, definition (f))."""

    def make(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def mix(self, layer: int, uni: Tensor, own: Tensor) -> Tensor:
        return self.mapped(layer, uni, own)


class ResidualMLPBridge(MLPBridge):
    """x + y + W2 GELU(W1 [x; y]) (paper, definition (i)).

    W2 is 0 at the start, so that training begins with the bridge "add"; the paper marks these two maps with a star.
    """

    def __init__(self, width: int, layers: int, norm_eps: float = 1e-5, init_std: float = 0.02):
        super().__init__(width, layers, norm_eps, init_std)
        for part in self.maps:
            nn.init.zeros_(part[-1].weight)

    def mix(self, layer: int, uni: Tensor, own: Tensor) -> Tensor:
        return uni + own + self.mapped(layer, uni, own)
