"""Image-text matching with random negatives (BridgeTower paper, section 3.3; official compute_itm)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bt.data.draft import Draft, Needs
from bt.errors import ConfigError
from bt.models.bridgetower import Need
from bt.models.heads import ITMHead
from bt.tasks.base import Context, Objective, Result, Shared


@dataclass
class ITMTargets:
    """Keeps half of the pairs of the step and gives the others another image.

    negatives="sampled": the false image drawn from the whole split (official draw_false_image, except that it is
    never the pair's own image). negatives="batch": another image of this micro-batch, which costs no extra image.
    Returns pairs (pairs, 2) and labels (pairs,) int64, 1 = match.
    """

    negatives: str

    def __call__(self, draft: Draft) -> dict[str, Tensor]:
        own = draft.pairs[:, 0]
        if self.negatives == "sampled":
            other = draft.false_image_rows
        else:
            rows = np.unique(own)
            position = np.searchsorted(rows, own)
            # A shift of 1 .. n-1 places round the batch's images: never the own image.
            shift = 1 + np.floor(draft.uniform("itm.image", 1)[:, 0] * max(len(rows) - 1, 0)).astype(np.int64)
            other = rows[(position + shift) % len(rows)]
        # A micro-batch of a single image has no negative to offer: such a pair stays a match.
        match = draft.match | (other < 0) | (draft.image_ids[other] == draft.image_ids[own])
        image_rows = np.where(match, own, other)
        pairs = np.stack([image_rows, draft.pairs[:, 1]], axis=1)
        return {"pairs": torch.from_numpy(pairs), "labels": torch.from_numpy(match.astype(np.int64))}


class ITM(Objective):
    """Two-class cross-entropy on the fused [CLS] pair, mean over pairs; class 1 = match.

    frozen_head: the head stays as it is and passes its gradient on to the tower (official companion of the 16-way
    retrieval objective).
    """

    def __init__(
        self,
        context: Context,
        weight: float = 1.0,
        negatives: Literal["batch", "sampled"] = "batch",
        frozen_head: bool = False,
    ):
        if negatives not in ("batch", "sampled"):
            raise ConfigError(f"ITM.negatives={negatives}: allowed are batch, sampled")
        super().__init__(weight, ITMTargets(negatives), Needs(false_images=negatives == "sampled"))
        self.head = ITMHead(context.width).requires_grad_(not frozen_head)

    def note(self, pairs: int, ranks: int, accumulation: int) -> str | None:
        whole = pairs * ranks * accumulation
        if self.targets.negatives != "batch" or whole == pairs:
            return None
        return (
            f"itm: false images are those of a micro-batch of {pairs} pairs, not of the step's {whole} "
            "(task.objectives.itm.negatives=sampled: of the whole split)"
        )

    def score(self, cls: Tensor) -> Tensor:
        """How well pairs match, for retrieval: fused [CLS] (pairs, 2 * width) -> the match logit (pairs,)."""
        return self.head(cls)[:, 1].float()

    def count(self, targets: dict[str, Tensor]) -> float:
        return len(targets["labels"])

    def forward(self, shared: Shared, targets: dict[str, Tensor]) -> Result:
        fused = shared.tower.fuse(shared.images, shared.texts, targets["pairs"], Need(cls=True))
        logits = self.head(fused.cls).float()
        loss = F.cross_entropy(logits, targets["labels"], reduction="sum")
        return Result(loss, {"accuracy": (logits.argmax(-1) == targets["labels"]).float()}, {"logits": logits})
