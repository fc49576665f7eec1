"""Classes of images by the image encoder alone, after vision-language pre-training (CIFAR; official run_cifar.py)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from bt.errors import ConfigError, DataError
from bt.models.heads import init_new
from bt.tasks.base import Context, Shared
from bt.tasks.classifier import Classifier, class_names


class CIFAR(Classifier):
    """Cross-entropy of a linear map of the last layer's [CLS] after the encoder's final norm, mean over images.

    head: "trained", or "frozen" at its random start: the official code gives its optimizer the encoder's parameters
    alone. It also reports the accuracy of one rank's share of the images; here it is that of all.
    """

    fuses = False
    tower_parts = ("vision",)

    def __init__(self, context: Context, weight: float = 1.0, head: Literal["trained", "frozen"] = "trained"):
        if head not in ("trained", "frozen"):
            raise ConfigError(f"CIFAR.head={head}: allowed are trained, frozen")
        super().__init__("cifar", class_names(context, "cifar"), weight)
        self.head = nn.Linear(context.image_width, len(self.classes))
        init_new(self.head)
        self.head.requires_grad_(head == "trained")

    def logits(self, shared: Shared) -> Tensor:
        if not len(shared.batch.images):
            raise DataError("task cifar: the samples of data.dir have no images")
        cls = shared.tower.vision(shared.pixels, 1)[-1][:, 0]
        return self.head(cls.index_select(0, shared.batch.pairs[:, 0]))
