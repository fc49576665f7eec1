"""Masked language modelling on image-text pairs (BridgeTower paper, section 3.3; official compute_mlm)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bt.data.batch import Texts
from bt.data.draft import Draft
from bt.models.bridgetower import Need
from bt.models.checks import check_range
from bt.models.heads import MLMHead
from bt.tasks.base import Context, Objective, Result, Shared


@dataclass
class MLMTargets:
    """Masks tokens as transformers' DataCollatorForLanguageModeling does: each token that is not special is chosen
    with `probability`; of the chosen, 80 % become the mask token, 10 % a random id of the whole vocabulary, 10 % stay.

    Returns ids, mask (pairs, tokens), positions (pairs, tokens) bool and labels (chosen tokens,) in row-major order.
    """

    probability: float
    vocab_size: int
    mask_id: int
    special_ids: tuple[int, ...]

    def __call__(self, draft: Draft) -> dict[str, Tensor]:
        ids = draft.texts.ids[draft.pairs[:, 1]]
        mask = draft.texts.mask[draft.pairs[:, 1]]
        tokens = ids.shape[1]

        def draw(purpose: str) -> Tensor:
            return torch.from_numpy(draft.uniform(f"mlm.{purpose}", tokens))

        maskable = mask & ~torch.isin(ids, torch.tensor(self.special_ids))
        positions = maskable & (draw("choose") < self.probability)
        labels = ids[positions]
        kind = draw("kind")
        random_ids = (draw("id") * self.vocab_size).long()
        ids = ids.masked_fill(positions & (kind < 0.8), self.mask_id)
        ids = torch.where(positions & (kind >= 0.9), random_ids, ids)
        return {"ids": ids, "mask": mask, "positions": positions, "labels": labels}


class MLM(Objective):
    """Cross-entropy over the masked positions; only these rows go through the head.

    norm_eps: of the head's norm, 1e-12 in the official code, 1e-5 in transformers' port.
    Gradients do not reach the poolers nor the last image cross-modal layer, as in the official code.
    """

    def __init__(self, context: Context, weight: float = 1.0, probability: float = 0.15, norm_eps: float = 1e-12):
        check_range("MLM.probability", probability, above=0, at_most=1)
        check_range("MLM.norm_eps", norm_eps, above=0)
        tokenizer = context.tokenizer
        targets = MLMTargets(probability, tokenizer.vocab_size, tokenizer.mask_id, tuple(tokenizer.special_ids))
        super().__init__(weight, targets)
        self.head = MLMHead(context.width, tokenizer.vocab_size, norm_eps)

    def count(self, targets: dict[str, Tensor]) -> float:
        return targets["labels"].numel()

    def forward(self, shared: Shared, targets: dict[str, Tensor]) -> Result:
        texts = shared.tower.encode_texts(Texts(targets["ids"], targets["mask"]))
        image_rows = shared.batch.pairs[:, 0]
        pairs = torch.stack([image_rows, torch.arange(len(image_rows), device=image_rows.device)], dim=1)
        fused = shared.tower.fuse(shared.images, texts, pairs, Need(text=targets["positions"]))
        logits = self.head(fused.text).float()
        loss = F.cross_entropy(logits, targets["labels"], reduction="sum")
        return Result(loss, {"accuracy": (logits.argmax(-1) == targets["labels"]).float()}, {"logits": logits})
