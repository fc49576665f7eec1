"""A plug-in: BridgeTower's bridge that takes its time without using the processor, so that jobs can be interrupted."""

import time
from pathlib import Path

from bt.models.bridges.add import AddBridge


class SlowBridge(AddBridge):
    """seconds: what each step takes in addition, until the file `gate` is there; the numbers are AddBridge's."""

    def __init__(self, width: int, layers: int, seconds: float, gate: str, norm_eps: float):
        super().__init__(width, layers, norm_eps)
        self.seconds, self.gate = seconds, Path(gate)

    def forward(self, layer, uni, rows, own, other):
        if own is None and not self.gate.exists():
            time.sleep(self.seconds / 2)  # there is one for each modality
        return super().forward(layer, uni, rows, own, other)
