"""Image-text contrast on uni-modal features (official compute_itc)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt.data.draft import Draft
from bt.engine.distributed import gather_rows, this_rank
from bt.errors import ConfigError
from bt.models.bridgetower import Encoded
from bt.models.checks import check_range
from bt.models.heads import ITCHead
from bt.tasks.base import Context, Objective, Result, Shared

TEMPERATURE_RANGE = (0.001, 0.5)


def no_targets(draft: Draft) -> dict[str, Tensor]:
    """ITC reads the matching pairs of the batch and needs no draw; the tensor only carries their number."""
    return {"pair": torch.arange(len(draft.pairs))}


def shared_target_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy, summed over the rows of logits (pairs, columns), against targets in equal shares over `same`."""
    return F.cross_entropy(logits, same.float() / same.sum(1, keepdim=True), reduction="sum")


class ITC(Objective):
    """Both directions of the contrastive loss over the pairs of all ranks, mean over pairs.

    Rows are this rank's pairs, columns the pairs of all ranks, gathered with their gradients. Features: L2-normalised
    projections of the uni-modal last-layer [CLS], which are computed once per unique image and text.

    positives: "image": an image that occurs in several pairs is a target of each of its texts, in equal shares
    (official fine-tuning). "pair": each pair is its own only target (official pre-training); the official code takes
    other texts of the same image for negatives, here they are left out of the softmax. With one text per image in a
    batch both are the same.
    outputs: the logits (pairs, columns) of both directions, `own`: (pairs,) the column of each pair.
    """

    # Official groups: the temperature trains at the base rate, with decay.
    head_parameters_at_base = ("temperature",)
    fuses = False

    def __init__(
        self,
        context: Context,
        weight: float = 1.0,
        size: int = 256,
        temperature: float = 0.07,
        positives: Literal["image", "pair"] = "image",
    ):
        check_range("ITC.size", size, at_least=1)
        check_range("ITC.temperature", temperature, above=0)
        if positives not in ("image", "pair"):
            raise ConfigError(f"ITC.positives={positives}: allowed are image, pair")
        super().__init__(weight, no_targets)
        self.positives = positives
        self.text_head = ITCHead(context.text_width, size)
        self.image_head = ITCHead(context.image_width, size)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))

    def count(self, targets: dict[str, Tensor]) -> float:
        return len(targets["pair"])

    def note(self, pairs: int, ranks: int, accumulation: int) -> str:
        whole = pairs * ranks * accumulation - 1
        accumulated = f"; {whole} without accumulation" if accumulation > 1 else ""
        return (
            f"itc: {pairs * ranks - 1} negatives per pair, of micro-batches of {pairs} on {ranks} ranks{accumulated} "
            "(official fine-tuning: 63 on Flickr30K, 127 on COCO)"
        )

    def image_features(self, images: Encoded) -> Tensor:
        """(images, size), L2-normalised; retrieval compares them by their dot product."""
        return self.image_head(images.cls)

    def text_features(self, texts: Encoded) -> Tensor:
        """(texts, size), L2-normalised."""
        return self.text_head(texts.cls)

    def forward(self, shared: Shared, targets: dict[str, Tensor]) -> Result:
        with torch.no_grad():
            self.temperature.clamp_(*TEMPERATURE_RANGE)
        image_rows, text_rows = shared.batch.pairs.unbind(1)
        images = self.image_features(shared.images)[image_rows]
        texts = self.text_features(shared.texts)[text_rows]
        ids = shared.batch.image_ids[image_rows]
        # In evaluation the negatives are those of the evaluation batch, whatever the number of ranks.
        local = images, texts, ids, torch.full_like(ids, this_rank())
        all_images, all_texts, all_ids, ranks = gather_rows(*local) if self.training else local
        own = (ranks == this_rank()).nonzero()[:, 0]
        same = ids[:, None] == all_ids[None, :]
        image_to_text = (images @ all_texts.T / self.temperature).float()
        text_to_image = (texts @ all_images.T / self.temperature).float()
        loss = sum(self.direction(logits, same, own) for logits in (image_to_text, text_to_image)) / 2
        metrics = {
            "text_to_image_accuracy": same.gather(1, text_to_image.argmax(1, keepdim=True)).squeeze(1).float(),
            "image_to_text_accuracy": same.gather(1, image_to_text.argmax(1, keepdim=True)).squeeze(1).float(),
        }
        outputs = {"image_to_text": image_to_text, "text_to_image": text_to_image, "own": own}
        return Result(loss, metrics, outputs)

    def direction(self, logits: Tensor, same: Tensor, own: Tensor) -> Tensor:
        """The loss of one direction, summed over rows. same: (pairs, columns), is it the row's image."""
        if self.positives == "image":
            return shared_target_loss(logits, same)
        others = same.scatter(1, own[:, None], False)
        return F.cross_entropy(logits.masked_fill(others, -torch.inf), own, reduction="sum")
