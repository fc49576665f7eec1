"""METER: no bridge."""

from __future__ import annotations

from torch import Tensor

from bt.models.bridges.base import Bridge


class NoBridge(Bridge):
    """Layer 0 reads the last uni-modal state as it is, every other layer the previous output (METER, official
    meter_module.py). It has no parameters: METER has no LayerNorm before the first layer either.
    """

    states = 1

    def __init__(self, width: int, layers: int):
        super().__init__()

    def forward(
        self, layer: int, uni: list[Tensor], rows: Tensor | None, own: Tensor | None, other: Tensor | None
    ) -> Tensor:
        return uni[-1] if own is None else own
