"""Bridges that weigh the two states elementwise: few or no parameters beside the norms.

x is the previous cross-modal output, y the uni-modal state. Every weight starts so that both count the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bt.models.bridges.base import PairwiseBridge


class MultiplyBridge(PairwiseBridge):
    """x * y, elementwise (paper, definition (b) of the ablation)."""

    def mix(self, layer: int, uni: Tensor, own: Tensor) -> Tensor:
        return uni * own


class ScaledAddBridge(PairwiseBridge):
    """a y + x with a learned number a for each layer, 1 at the start (transformers' BridgeTowerLinkTower,
    scaled_add)."""

    def __init__(self, width: int, layers: int, norm_eps: float = 1e-5):
        super().__init__(width, layers, norm_eps)
        self.scale = nn.Parameter(torch.ones(layers - 1))

    def mix(self, layer: int, uni: Tensor, own: Tensor) -> Tensor:
        return uni * self.scale[layer - 1] + own


class InterpolateBridge(PairwiseBridge):
    """(1 - b) y + b x with a learned number b for each layer, 0.5 at the start (transformers' BridgeTowerLinkTower,
    interpolate)."""

    def __init__(self, width: int, layers: int, norm_eps: float = 1e-5):
        super().__init__(width, layers, norm_eps)
        self.share = nn.Parameter(torch.full((layers - 1,), 0.5))

    def mix(self, layer: int, uni: Tensor, own: Tensor) -> Tensor:
        return uni * (1 - self.share[layer - 1]) + own * self.share[layer - 1]


class VectorBridge(PairwiseBridge):
    """a x + (1 - a) y with a learned vector a of the width for each layer, 0.5 at the start (paper, definition (c))."""

    def __init__(self, width: int, layers: int, norm_eps: float = 1e-5):
        super().__init__(width, layers, norm_eps)
        self.share = nn.Parameter(torch.full((layers - 1, width), 0.5))

    def mix(self, layer: int, uni: Tensor, own: Tensor) -> Tensor:
        return torch.lerp(uni, own, self.share[layer - 1])
