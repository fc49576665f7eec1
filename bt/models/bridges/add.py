"""BridgeTower's bridge."""

from __future__ import annotations

from torch import Tensor

from bt.models.bridges.base import PairwiseBridge


class AddBridge(PairwiseBridge):
    """x + y (paper, eq. 7-10, and definition (a) of its ablation; official LinkTower)."""

    def mix(self, layer: int, uni: Tensor, own: Tensor) -> Tensor:
        return uni + own
