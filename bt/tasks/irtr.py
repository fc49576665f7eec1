"""16-way image-text retrieval: the true caption among false ones (official compute_irtr)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt.data.draft import Draft, Needs
from bt.errors import ConfigError
from bt.models.bridgetower import Need
from bt.models.checks import check_range
from bt.models.heads import init_new
from bt.tasks.base import Context, Objective, Result, Shared


def one_of_many(draft: Draft) -> dict[str, Tensor]:
    """texts: (pairs, 1 + false texts) text rows, the true one first."""
    own = torch.from_numpy(draft.pairs[:, 1:])
    return {"texts": torch.cat([own, torch.from_numpy(draft.false_text_rows)], dim=1)}


class IRTR(Objective):
    """Softmax cross-entropy of each image's true caption among `texts` drawn false ones, mean over pairs.

    Only fuse sees pairs: an image passes its encoder once, whatever the number of captions.
    false_texts: "other": never a caption of the image nor an equal string. "official": drawn from all captions of the
    split, so that a "false" one may be true (base_dataset.py, draw_false_text).
    A new rank head starts as the match row of the checkpoint's ITM head, as in the official code, where the head is
    furthermore a view of the frozen ITM weight until the model moves to a GPU; here it is a copy.
    """

    # Official groups match no name of the head.
    head_parameters_at_base = ("head.weight", "head.bias")

    def __init__(
        self,
        context: Context,
        weight: float = 1.0,
        texts: int = 15,
        false_texts: Literal["other", "official"] = "other",
    ):
        check_range("IRTR.texts", texts, at_least=1)
        if false_texts not in ("other", "official"):
            raise ConfigError(f"IRTR.false_texts={false_texts}: allowed are other, official")
        super().__init__(weight, one_of_many, Needs(false_texts=texts, any_texts=false_texts == "official"))
        self.head = nn.Linear(2 * context.width, 1)
        init_new(self.head)

    def start_from(self, heads: Mapping[str, Mapping[str, Tensor]]) -> tuple[str, dict[str, Tensor]] | None:
        match = {name: tensor[1:2] for name, tensor in heads.get("itm", {}).items() if name.startswith("head.fc.")}
        fits = match.get("head.fc.weight", torch.empty(0)).shape == self.head.weight.shape
        return ("itm", {f"head.{part}": match[f"head.fc.{part}"] for part in ("weight", "bias")}) if fits else None

    def score(self, cls: Tensor) -> Tensor:
        """How well pairs match, for retrieval: fused [CLS] (pairs, 2 * width) -> (pairs,)."""
        return self.head(cls)[:, 0].float()

    def count(self, targets: dict[str, Tensor]) -> float:
        return len(targets["texts"])

    def forward(self, shared: Shared, targets: dict[str, Tensor]) -> Result:
        texts = targets["texts"]
        images = shared.batch.pairs[:, :1].expand_as(texts)
        pairs = torch.stack([images, texts], dim=-1).flatten(0, 1)
        fused = shared.tower.fuse(shared.images, shared.texts, pairs, Need(cls=True))
        scores = self.score(fused.cls).view(texts.shape)
        target = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        loss = F.cross_entropy(scores, target, reduction="sum")
        # Strictly better: an equal score is no retrieval.
        accuracy = (scores[:, 0] > scores[:, 1:].amax(1)).float()
        return Result(loss, {"accuracy": accuracy}, {"scores": scores})
