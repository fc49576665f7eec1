"""Means over an evaluation, exact over batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from bt.engine.distributed import gather_objects


class Means:
    """Weighted means by name; a name may be missing on some ranks or batches (a question type that did not occur)."""

    def __init__(self, device: torch.device):
        self.device = device
        self.metrics: dict[str, MeanMetric] = {}

    def _metric(self, name: str) -> MeanMetric:
        if name not in self.metrics:
            # fp64: a fp32 sum over a million questions loses the digits that a report shows. NaN is not left out.
            self.metrics[name] = MeanMetric(nan_strategy="error").to(self.device).set_dtype(torch.float64)
        return self.metrics[name]

    def add(self, name: str, values: Tensor, weights: Tensor | float = 1.0) -> None:
        """values: (n,) or scalar; weights: the same shape, or one number for all."""
        if values.numel():
            self._metric(name).update(values.double(), weights)

    def compute(self) -> dict[str, float]:
        """The means over all ranks, sorted by name; every rank must call it."""
        names = sorted(set().union(*gather_objects(list(self.metrics))))
        values = {}
        for name in names:
            metric = self._metric(name)
            if not metric.update_called:
                metric.update(0.0, 0.0)  # a rank without values still takes part in the sum
            values[name] = float(metric.compute())
        return values
