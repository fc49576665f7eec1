"""BridgeTower's bridge."""

from __future__ import annotations

from torch import Tensor, nn

from bt.models.bridges.base import Bridge
from bt.models.checks import check_range
from bt.models.gather import gather


class AddBridge(Bridge):
    """LayerNorm(uni-modal state l + previous cross-modal output), one norm per layer (paper, eq. 7-10; official
    LinkTower). Layer 0 has no previous output: LayerNorm(uni-modal state 0).
    """

    def __init__(self, width: int, layers: int, norm_eps: float = 1e-5):
        super().__init__()
        check_range("bridge.norm_eps", norm_eps, above=0)
        self.states = layers
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=norm_eps) for _ in range(layers))

    def forward(
        self, layer: int, uni: list[Tensor], rows: Tensor | None, own: Tensor | None, other: Tensor | None
    ) -> Tensor:
        if own is None:
            return self.norms[0](uni[0])
        return self.norms[layer](gather(uni[layer], rows) + own)
