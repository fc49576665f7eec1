"""Visual entailment: does an image entail a sentence (SNLI-VE; official compute_snli)."""

from __future__ import annotations

from torch import Tensor

from bt.models.bridgetower import Need
from bt.models.checks import check_range
from bt.models.heads import ClassifierHead
from bt.tasks.base import Context, Shared
from bt.tasks.classifier import Classifier, class_names


class SNLIVE(Classifier):
    """Cross-entropy over the data set's classes on the fused [CLS] pair, mean over pairs.

    hidden_scale: hidden width of the head over its input, 2 * width; the official code takes integers alone.
    """

    def __init__(self, context: Context, weight: float = 1.0, hidden_scale: float = 2, layers: int = 2):
        check_range("SNLIVE.hidden_scale", hidden_scale, above=0)
        super().__init__("snli_ve", class_names(context, "snli_ve"), weight)
        in_width = 2 * context.width
        self.head = ClassifierHead(in_width, int(in_width * hidden_scale), len(self.classes), layers)

    def logits(self, shared: Shared) -> Tensor:
        return self.head(shared.tower.fuse(shared.images, shared.texts, shared.batch.pairs, Need(cls=True)).cls)
