"""Image-text contrast on uni-modal features (official compute_itc)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt.data.draft import Draft
from bt.engine.distributed import gather_rows
from bt.models.checks import check_range
from bt.models.heads import ITCHead
from bt.tasks.base import Context, Objective, Result, Shared

TEMPERATURE_RANGE = (0.001, 0.5)


def no_targets(draft: Draft) -> dict[str, Tensor]:
    """ITC reads the matching pairs of the batch and needs no draw; the tensor only carries their number."""
    return {"pair": torch.arange(len(draft.pairs))}


class ITC(Objective):
    """Both directions of the contrastive loss over the pairs of all ranks, mean over pairs.

    Rows are this rank's pairs, columns the pairs of all ranks, gathered with their gradients. An image that occurs in
    several pairs is a target of each of its texts, in equal shares (official fine-tuning objective; with one text per
    image this is the one-hot target of the official pre-training). Features: L2-normalised projections of the
    uni-modal last-layer [CLS], which are computed once per unique image and text.
    """

    # Official groups: the temperature trains at the base rate, with decay.
    head_parameters_at_base = ("temperature",)
    fuses = False

    def __init__(self, context: Context, weight: float = 1.0, size: int = 256, temperature: float = 0.07):
        check_range("ITC.size", size, at_least=1)
        check_range("ITC.temperature", temperature, above=0)
        super().__init__(weight, no_targets)
        self.text_head = ITCHead(context.text_width, size)
        self.image_head = ITCHead(context.image_width, size)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))

    def count(self, targets: dict[str, Tensor]) -> float:
        return len(targets["pair"])

    def note(self, pairs: int, ranks: int, accumulation: int) -> str:
        accumulated = "; accumulation adds none to them" if accumulation > 1 else ""
        return (
            f"itc: {pairs * ranks - 1} negatives per pair, of micro-batches of {pairs} on {ranks} ranks{accumulated} "
            "(official fine-tuning: 63 on Flickr30K, 127 on COCO)"
        )

    def forward(self, shared: Shared, targets: dict[str, Tensor]) -> Result:
        with torch.no_grad():
            self.temperature.clamp_(*TEMPERATURE_RANGE)
        image_rows, text_rows = shared.batch.pairs.unbind(1)
        images = self.image_head(shared.images.cls)[image_rows]
        texts = self.text_head(shared.texts.cls)[text_rows]
        ids = shared.batch.image_ids[image_rows]
        # In evaluation the negatives are those of the evaluation batch, whatever the number of ranks.
        local = images, texts, ids
        all_images, all_texts, all_ids = gather_rows(*local) if self.training else local
        same = (ids[:, None] == all_ids[None, :]).float()
        target = same / same.sum(1, keepdim=True)
        image_to_text = (images @ all_texts.T / self.temperature).float()
        text_to_image = (texts @ all_images.T / self.temperature).float()
        loss = (
            F.cross_entropy(image_to_text, target, reduction="sum")
            + F.cross_entropy(text_to_image, target, reduction="sum")
        ) / 2
        metrics = {
            "text_to_image_accuracy": same.gather(1, text_to_image.argmax(1, keepdim=True)).squeeze(1),
            "image_to_text_accuracy": same.gather(1, image_to_text.argmax(1, keepdim=True)).squeeze(1),
        }
        return Result(loss, metrics, {"image_to_text": image_to_text, "text_to_image": text_to_image})
