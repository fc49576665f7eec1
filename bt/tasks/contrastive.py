"""Contrast among text, image and fused pair, the loss of transformers' BridgeTowerForContrastiveLearning."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bt.engine.distributed import gather_rows
from bt.models.bridgetower import Encoded, Need
from bt.models.checks import check_range
from bt.models.heads import ITCHead
from bt.tasks.base import Context, Objective, Result, Shared
from bt.tasks.itc import no_targets, shared_target_loss


class Contrastive(Objective):
    """Mean of three one-directional terms: text to image, text to fused pair, image to fused pair; mean over pairs.

    Features are L2-normalised projections of the text's uni-modal [CLS], of the image's [CLS] as it enters the
    cross-modal encoder (projected, with the type embedding: the top of Encoded.states; ITC reads it before) and of the
    fused [CLS] pair; logits are their products times exp(logit_scale).
    The pairs of an image are targets of each other in equal shares, where transformers takes them for negatives; with
    one text per image in a batch both are the same.
    gather: also against the pairs of the other ranks, with gradients; transformers' loss is that of one device's batch.
    temperature: exp(-logit_scale) at the start.
    """

    head_parameters_at_base = ("logit_scale",)

    def __init__(
        self, context: Context, weight: float = 1.0, size: int = 512, temperature: float = 0.07, gather: bool = False
    ):
        check_range("Contrastive.size", size, at_least=1)
        check_range("Contrastive.temperature", temperature, above=0)
        super().__init__(weight, no_targets)
        self.gather = gather
        self.text_head = ITCHead(context.text_width, size)
        self.image_head = ITCHead(context.width, size)
        self.cross_head = ITCHead(2 * context.width, size)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def count(self, targets: dict[str, Tensor]) -> float:
        return len(targets["pair"])

    def note(self, pairs: int, ranks: int, accumulation: int) -> str:
        own, whole = pairs * (ranks if self.gather else 1) - 1, pairs * ranks * accumulation - 1
        return f"contrastive: {own} negatives per pair" + (f" of the step's {whole}" if own < whole else "")

    def image_features(self, images: Encoded) -> Tensor:
        """(images, size), L2-normalised; retrieval compares them by their dot product."""
        return self.image_head(images.states[-1][:, 0])

    def text_features(self, texts: Encoded) -> Tensor:
        """(texts, size), L2-normalised."""
        return self.text_head(texts.cls)

    def forward(self, shared: Shared, targets: dict[str, Tensor]) -> Result:
        image_rows, text_rows = shared.batch.pairs.unbind(1)
        texts = self.text_features(shared.texts)[text_rows]
        images = self.image_features(shared.images)[image_rows]
        fused = shared.tower.fuse(shared.images, shared.texts, shared.batch.pairs, Need(cls=True))
        cross = self.cross_head(fused.cls)
        ids = shared.batch.image_ids[image_rows]
        columns = images, cross, ids
        all_images, all_cross, all_ids = gather_rows(*columns) if self.gather and self.training else columns
        scale = self.logit_scale.exp()
        logits = {
            "text_to_image": texts @ all_images.T * scale,
            "text_to_cross": texts @ all_cross.T * scale,
            "image_to_cross": images @ all_cross.T * scale,
        }
        logits = {name: values.float() for name, values in logits.items()}
        same = ids[:, None] == all_ids[None, :]
        loss = sum(shared_target_loss(values, same) for values in logits.values()) / 3
        metrics = {
            f"{name}_accuracy": same.gather(1, values.argmax(1, keepdim=True)).squeeze(1).float()
            for name, values in logits.items()
        }
        return Result(loss, metrics, {"texts": texts, "images": images, "cross": cross, **logits})
