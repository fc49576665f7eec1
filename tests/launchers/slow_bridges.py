"""A plug-in: BridgeTower's bridge that takes its time without using the processor, so that jobs can be interrupted."""

import time

from bt.models.bridges.add import AddBridge


class SlowBridge(AddBridge):
    def __init__(self, width: int, layers: int, seconds: float, norm_eps: float):
        super().__init__(width, layers, norm_eps)
        self.seconds = seconds

    def forward(self, layer, uni, rows, own, other):
        if own is None:
            time.sleep(self.seconds / 2)  # there is one for each modality
        return super().forward(layer, uni, rows, own, other)
