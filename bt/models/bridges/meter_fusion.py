"""METER with a fusion of all uni-modal layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bt.models.bridges.none import NoBridge
from bt.models.checks import check_range
from bt.models.heads import init_new


class MeterFusionBridge(NoBridge):
    """No bridge, but the last uni-modal state is joined by all lower ones before the projection:
    f_N + sum_{i<N} softmax_i(W f_i + b) * f_i, elementwise (METER's appendix; official meter_module.py, meter_fusion).
    """

    # Official groups: the gates train at the base rate.
    parameters_at_base = ("gate.",)

    def __init__(self, width: int, layers: int, uni_width: int, depth: int, init_std: float = 0.02):
        super().__init__(width, layers)
        check_range("bridge.init_std", init_std, above=0)
        self.states = depth
        self.gate = nn.Linear(uni_width, uni_width)
        init_new(self.gate, init_std)

    def merge(self, uni: list[Tensor]) -> list[Tensor]:
        lower = torch.stack(uni[:-1])
        return [uni[-1] + (torch.softmax(self.gate(lower), dim=0) * lower).sum(dim=0)]
